//! The only way to standard output: a closed pipe or a full disk is an error and never a panic.

use std::io::{self, Write};

/// Why text could not be written to standard output.
#[derive(Debug, thiserror::Error)]
pub enum StdoutError {
    /// The reader closed the pipe, as `head` does once it has its lines. Not reported.
    #[error("standard output was closed")]
    Closed,
    /// Any other error.
    #[error("cannot write to standard output: {0}")]
    Failed(io::Error),
}

/// Exit code that a shell reports for a program that SIGPIPE ended.
pub const CLOSED_EXIT_CODE: u8 = 128 + 13;

impl From<io::Error> for StdoutError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe { Self::Closed } else { Self::Failed(error) }
    }
}

/// Writes all of a text.
pub fn put(text: &str) -> Result<(), StdoutError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    // Standard output buffers incomplete lines, and would lose them silently at exit.
    Ok(out.flush()?)
}

/// Writes a line.
pub fn line(text: &str) -> Result<(), StdoutError> {
    put(&format!("{text}\n"))
}
