//! SHA-256 of callers' executables. A large one takes a large part of a second: it is read beside the threads that serve,
//! once per version of the file, one at a time per user.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::Semaphore;

/// Most executables that are read at the same time.
const AT_ONCE: usize = 2;
/// Most hashes that are kept, some 200 bytes each; after that it is begun anew.
const KEPT: usize = 1_024;

/// Hashes of executables.
pub struct Hashes {
    /// Largest executable that is hashed, in bytes.
    limit: u64,
    known: Arc<Mutex<HashMap<Version, String>>>,
    /// Whose turn it is, per user.
    users: Mutex<HashMap<u32, Weak<Semaphore>>>,
    at_once: Arc<Semaphore>,
}

/// A file with its content. No user can set a file's change time, and a file that runs cannot be written to.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Version {
    file: (u64, u64),
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Version {
    fn of(found: &Metadata) -> Self {
        Self {
            file: (found.dev(), found.ino()),
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }
}

impl Hashes {
    /// Of executables of at most `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self { limit, known: Arc::default(), users: Mutex::default(), at_once: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// SHA-256 of a process's executable in hex, opened through `/proc` so that a file that replaced it is never hashed.
    /// `None` if it is not the file (device and inode) that the process ran when it connected, or too large.
    pub async fn of(&self, uid: u32, pid: i32, expected: (u64, u64)) -> Option<String> {
        let file = File::open(format!("/proc/{pid}/exe")).ok()?;
        let version = Version::of(&file.metadata().ok()?);
        // The process may have called exec since.
        if version.file != expected || version.bytes > self.limit {
            return None;
        }
        if let Some(known) = self.known(&version) {
            return Some(known);
        }
        let turn = self.turn_of(uid).acquire_owned().await.ok()?;
        // Whoever had the turn before may have asked for the same file.
        if let Some(known) = self.known(&version) {
            return Some(known);
        }
        let at_once = self.at_once.clone().acquire_owned().await.ok()?;
        let known = self.known.clone();
        // A caller that is gone does not end the read: the read keeps the turn, and its result.
        let read = tokio::task::spawn_blocking(move || {
            let _held = (turn, at_once);
            let (hash, after) = digest(file)?;
            if after == version {
                let mut known = lock(&known);
                if known.len() >= KEPT {
                    known.clear();
                }
                known.insert(version, hash.clone());
            }
            Some(hash)
        });
        read.await.ok()?
    }

    fn known(&self, version: &Version) -> Option<String> {
        lock(&self.known).get(version).cloned()
    }

    fn turn_of(&self, uid: u32) -> Arc<Semaphore> {
        let mut users = lock(&self.users);
        if let Some(turn) = users.get(&uid).and_then(Weak::upgrade) {
            return turn;
        }
        users.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::new(Semaphore::new(1));
        users.insert(uid, Arc::downgrade(&turn));
        turn
    }
}

fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn digest(mut file: File) -> Option<(String, Version)> {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match file.read(&mut buffer).ok()? {
            0 => break,
            n => context.update(&buffer[..n]),
        }
    }
    Some((hex::encode(context.finish()), Version::of(&file.metadata().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_user_whose_executables_are_read_keeps_nobody_else_waiting() {
        let hashes = Arc::new(Hashes::new(u64::MAX));
        let pid = std::process::id().try_into().unwrap();
        let here = std::fs::metadata("/proc/self/exe").unwrap();
        let file = (here.dev(), here.ino());
        // As while a large file of this user is read.
        let reading = hashes.turn_of(1).acquire_owned().await.unwrap();
        let waiting = tokio::spawn({
            let hashes = hashes.clone();
            async move { hashes.of(1, pid, file).await }
        });
        tokio::task::yield_now().await;
        let other = hashes.of(2, pid, file).await.unwrap();
        assert_eq!(other.len(), 64);
        assert!(!waiting.is_finished(), "it has no turn yet");
        drop(reading);
        assert_eq!(waiting.await.unwrap(), Some(other.clone()));
        assert_eq!(lock(&hashes.known).len(), 1, "one read is enough for both");
        assert!(lock(&hashes.known).values().all(|kept| *kept == other));
        let left = Arc::new(Hashes::new(u64::MAX));
        let asked = tokio::spawn({
            let left = left.clone();
            async move { left.of(1, pid, file).await }
        });
        let turn = left.turn_of(1);
        while turn.available_permits() > 0 && lock(&left.known).is_empty() {
            tokio::task::yield_now().await;
        }
        // The caller goes while its executable is read.
        asked.abort();
        while lock(&left.known).is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert_eq!(left.of(1, pid, file).await, Some(other), "the read went on, and kept its turn");
        assert_eq!(Hashes::new(here.len() - 1).of(1, pid, file).await, None, "too large");
        assert_eq!(hashes.of(1, pid, (0, 0)).await, None, "another program than the one that connected");
    }
}
