//! A log whose reader may stall without blocking the tasks that write lines.
//!
//! Lines go into a bounded buffer, and each log has its own thread that writes them. Lines without room are dropped and
//! counted.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most bytes that wait to be written.
const HELD: usize = 1024 * 1024;
/// Number of waiting bytes that are written without waiting for more.
const FULL: usize = 64 * 1024;
/// Stack size of the writing thread, in bytes.
const STACK: usize = 256 * 1024;
/// Shortest interval between two error messages about a log that cannot be written.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// Target of a log.
#[derive(Debug)]
pub enum Sink {
    /// An open stream, such as standard output.
    Stream(File),
    /// A file that is appended to and that can be reopened.
    File(PathBuf),
}

/// A log with a buffer and a writing thread.
#[derive(Debug)]
pub struct LogWriter(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    /// Number of lines that were dropped or could not be written.
    lost: AtomicU64,
    /// How long lines are held back so that more can be written together.
    hold: Duration,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<u8>,
    lines: u64,
    reopen: bool,
    finishing: bool,
    /// Whether the thread has ended.
    finished: bool,
}

impl LogWriter {
    /// Opens the log and starts its thread. Lines are held back for at most `hold`, so that several are written
    /// together.
    ///
    /// # Errors
    /// The file cannot be opened, or the thread cannot be started.
    pub fn start(sink: Sink, hold: Duration) -> io::Result<Self> {
        let (file, path) = match sink {
            Sink::Stream(file) => (file, None),
            Sink::File(path) => (open(&path)?, Some(path)),
        };
        let shared = Arc::new(Shared { state: Mutex::default(), wake: Condvar::new(), lost: AtomicU64::new(0), hold });
        let (own, out) = (shared.clone(), Out { file, path, said: None });
        std::thread::Builder::new().name("log".into()).stack_size(STACK).spawn(move || own.write(out))?;
        Ok(Self(shared))
    }

    /// Adds one line including its line feed. `put` appends it to the buffer; on an error or without room the line
    /// counts as lost.
    pub fn line<E>(&self, put: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) {
        let mut state = self.0.state();
        let before = state.held.len();
        if state.finished || before >= HELD || put(&mut state.held).is_err() || state.held.len() > HELD {
            state.held.truncate(before);
            drop(state);
            self.0.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.lines += 1;
        let wakes = before == 0 || (before < FULL && state.held.len() >= FULL);
        drop(state);
        if wakes {
            self.0.wake.notify_all();
        }
    }

    /// Number of lines since start that were dropped or could not be written.
    pub fn lost(&self) -> u64 {
        self.0.lost.load(Ordering::Relaxed)
    }

    /// Asks the thread to write the buffer to the open file and then reopen the path. No effect on a stream.
    pub fn reopen(&self) {
        self.0.state().reopen = true;
        self.0.wake.notify_all();
    }

    /// Writes the buffer and ends the thread. `false` if that took longer than `within`; the rest is lost.
    pub fn finish(&self, within: Duration) -> bool {
        let mut state = self.0.state();
        state.finishing = true;
        self.0.wake.notify_all();
        let deadline = Instant::now() + within;
        while !state.finished {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.0.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Body of the writing thread.
    fn write(&self, mut out: Out) {
        let mut spare = Vec::new();
        loop {
            let mut state = self.state();
            while state.held.is_empty() && !state.reopen && !state.finishing {
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let deadline = Instant::now() + self.hold;
            while !state.reopen && !state.finishing && state.held.len() < FULL {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state = self.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            let held = std::mem::replace(&mut state.held, std::mem::take(&mut spare));
            let lines = std::mem::take(&mut state.lines);
            let (reopen, finishing) = (std::mem::take(&mut state.reopen), state.finishing);
            drop(state);
            // Without the lock, so that adding a line never waits for the reader.
            if let Err(error) = out.file.write_all(&held) {
                self.lost.fetch_add(lines, Ordering::Relaxed);
                out.say(&error, "cannot write a log");
            }
            if reopen {
                out.reopen();
            }
            let mut state = self.state();
            if finishing && state.held.is_empty() {
                state.finished = true;
                drop(state);
                self.wake.notify_all();
                return;
            }
            drop(state);
            spare = held;
            spare.clear();
            spare.shrink_to(FULL);
        }
    }
}

/// The open target of the writing thread.
struct Out {
    file: File,
    path: Option<PathBuf>,
    said: Option<Instant>,
}

impl Out {
    /// Opens the path again. Keeps the old file if that fails: lines in the wrong place are better than none.
    fn reopen(&mut self) {
        let Some(path) = &self.path else { return };
        match open(path) {
            Ok(file) => self.file = file,
            Err(error) => self.say(&error, "cannot open a log anew; writing on to the old file"),
        }
    }

    fn say(&mut self, error: &io::Error, what: &'static str) {
        if self.said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
            self.said = Some(Instant::now());
            let path = self.path.as_ref().map(|p| p.display().to_string());
            tracing::error!(%error, path, "{what}");
        }
    }
}

fn open(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn put(log: &LogWriter, line: &str) {
        log.line(|held| {
            held.extend_from_slice(line.as_bytes());
            Ok::<_, ()>(())
        });
    }

    #[test]
    fn a_reader_that_stands_still_holds_nobody_up_and_what_is_lost_is_counted() {
        let (mut reader, writer) = io::pipe().unwrap();
        let log =
            LogWriter::start(Sink::Stream(File::from(std::os::fd::OwnedFd::from(writer))), Duration::ZERO).unwrap();
        let line = format!("{}\n", "x".repeat(1023));
        let begun = Instant::now();
        for _ in 0..3_000 {
            put(&log, &line);
        }
        assert!(begun.elapsed() < Duration::from_secs(5));
        let lost = log.lost();
        assert!((1_000..3_000).contains(&lost), "{lost}");
        let begun = Instant::now();
        assert!(!log.finish(Duration::from_millis(200)) && begun.elapsed() < Duration::from_secs(5));
        // The reader continues: the whole buffer arrives, in complete lines.
        let read = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        assert!(log.finish(Duration::from_secs(10)));
        let text = read.join().unwrap();
        assert_eq!(text.lines().count() as u64, 3_000 - log.lost());
        assert!(text.lines().all(|l| l.len() == 1023));
        put(&log, "late\n");
        assert_eq!(log.lost(), lost + 1, "after its end nothing is kept");
    }

    #[test]
    fn a_renamed_file_keeps_its_lines_and_the_next_go_to_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("log"), dir.path().join("log.1"));
        let log = LogWriter::start(Sink::File(path.clone()), Duration::from_secs(60)).unwrap();
        put(&log, "one\n");
        std::fs::rename(&path, &old).unwrap();
        log.reopen();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !path.exists() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
        put(&log, "two\n");
        assert!(log.finish(Duration::from_secs(10)));
        assert_eq!(
            (std::fs::read_to_string(old).unwrap().as_str(), std::fs::read_to_string(path).unwrap().as_str()),
            ("one\n", "two\n")
        );
        assert_eq!(log.lost(), 0);
    }

    #[test]
    fn a_file_that_cannot_be_opened_anew_leaves_the_old_one_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, moved) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::create_dir(&folder).unwrap();
        let log = LogWriter::start(Sink::File(folder.join("log")), Duration::ZERO).unwrap();
        std::fs::rename(&folder, &moved).unwrap();
        log.reopen();
        put(&log, "still here\n");
        assert!(log.finish(Duration::from_secs(10)));
        assert_eq!(std::fs::read_to_string(moved.join("log")).unwrap(), "still here\n");
    }
}
