//! The one way to standard output: a reader that has seen enough, or a disk that is full, is an error and never a panic.

use std::io::{self, Write};

/// Standard output did not take what was written.
#[derive(Debug, thiserror::Error)]
pub enum StdoutError {
    /// The reader closed the pipe, as `head` does when it has its lines. Nothing is said about it.
    #[error("standard output was closed")]
    Closed,
    /// It cannot be written.
    #[error("cannot write to standard output: {0}")]
    Failed(io::Error),
}

/// What a shell reports for a program that SIGPIPE ended, which this stands for.
pub const CLOSED_EXIT_CODE: u8 = 128 + 13;

impl From<io::Error> for StdoutError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe { Self::Closed } else { Self::Failed(error) }
    }
}

/// Writes text, all of it.
pub fn put(text: &str) -> Result<(), StdoutError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    // Standard output holds back half a line; what is left there at exit would be lost without a word.
    Ok(out.flush()?)
}

/// Writes a line.
pub fn line(text: &str) -> Result<(), StdoutError> {
    put(&format!("{text}\n"))
}
