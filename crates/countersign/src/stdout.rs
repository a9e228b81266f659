//! The only way to standard output: a closed pipe or a full disk is an error and never a panic.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Interval between two checks whether the reader is still there.
const LOOK: Duration = Duration::from_millis(200);

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

/// Waits this long, or less if a signal comes. Whoever follows something waits with this: between two lines it learns nothing
/// of its reader's end from writing.
///
/// # Errors
/// At once when the reader of standard output is gone.
pub fn wait(time: Duration) -> Result<(), StdoutError> {
    wait_for_end_of(io::stdout().as_fd(), time)
}

/// Returns when the reader of standard output is gone; see [`wait`].
pub async fn closed() -> StdoutError {
    loop {
        if let Err(error) = wait(Duration::ZERO) {
            return error;
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn wait_for_end_of(out: BorrowedFd<'_>, time: Duration) -> Result<(), StdoutError> {
    // Nothing is asked for: these are always told (poll(2)). Of a file there is none.
    let gone = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
    let mut fds = [PollFd::new(out, PollFlags::empty())];
    let told = poll(&mut fds, PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX)).unwrap_or(0) > 0;
    if told && fds[0].revents().is_some_and(|found| found.intersects(gone)) {
        return Err(StdoutError::Closed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_is_gone_is_noticed_without_a_write() {
        let (reader, writer) = io::pipe().unwrap();
        assert!(wait_for_end_of(writer.as_fd(), Duration::ZERO).is_ok());
        drop(reader);
        let long = Duration::from_secs(3600);
        assert!(matches!(wait_for_end_of(writer.as_fd(), long), Err(StdoutError::Closed)));
        let file = tempfile::tempfile().unwrap();
        assert!(wait_for_end_of(file.as_fd(), Duration::ZERO).is_ok());
    }
}
