//! Keeps the logs of a mesh short: each has one predecessor, and neither grows without end.
//!
//! Logs may lie in a folder of the operator's among the logs of others, or where a user may write: only a file that a
//! process of this mesh was started with is ever cut.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Deref;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use countersign_api::files::{Links, open_regular_as};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::children::State;
use super::mesh::Mesh;

/// Size in bytes at which a log is rotated.
const MOST: u64 = 16 * 1024 * 1024;
/// Interval between two checks of the logs: what a program writes meanwhile is the only part of a log beyond [`MOST`].
const LOOK: Duration = Duration::from_secs(1);

/// The log of a process: its path, and which file there the process was last started with. Clones are the same log.
#[derive(Clone)]
pub struct Log(Arc<Named>);

struct Named {
    path: PathBuf,
    /// Device and inode.
    opened: Mutex<Option<(u64, u64)>>,
}

impl Log {
    /// A log at this path, not opened yet.
    pub fn at(path: PathBuf) -> Self {
        Self(Arc::new(Named { path, opened: Mutex::default() }))
    }

    /// Opens it for appending, made where it is missing, and remembers which file it was.
    pub fn open(&self) -> io::Result<File> {
        let file = OpenOptions::new().create(true).append(true).open(&self.0.path)?;
        *self.opened() = Some(identity(&file)?);
        Ok(file)
    }

    fn opened(&self) -> std::sync::MutexGuard<'_, Option<(u64, u64)>> {
        self.0.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies its last [`MOST`] bytes aside and empties it when it is longer. It is open for appending elsewhere, so that the next line lands at
    /// its start.
    ///
    /// # Errors
    /// The file at its path is another one than was opened, or cannot be copied or emptied.
    fn cut(&self) -> io::Result<()> {
        let Some(ours) = *self.opened() else { return Ok(()) };
        let mut log = open_regular_as(&self.0.path, OpenOptions::new().read(true).write(true), Links::Reject)?;
        if identity(&log)? != ours {
            return Err(io::Error::other("it is another file than the one that was opened"));
        }
        let length = log.metadata()?.len();
        if length <= MOST {
            return Ok(());
        }
        log.seek(SeekFrom::Start(length - MOST))?;
        let previous = previous(&self.0.path);
        let _ = std::fs::remove_file(&previous);
        let fresh =
            OpenOptions::new().write(true).create_new(true).custom_flags(OFlag::O_NOFOLLOW.bits()).open(&previous);
        let copied = fresh.and_then(|mut to| io::copy(&mut log.by_ref().take(MOST), &mut to));
        // A full disk is the more a reason to empty it.
        log.set_len(0)?;
        copied.map(|_| ())
    }
}

impl Deref for Log {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0.path
    }
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    file.metadata().map(|m| (m.dev(), m.ino()))
}

/// Looks after the logs until it is dropped.
pub async fn keep_short(mesh: Rc<Mesh>) {
    loop {
        tokio::time::sleep(LOOK).await;
        for running in mesh.workloads().values() {
            // A sidecar reopens its access log on SIGHUP, as for logrotate.
            if let State::Running(pid) = running.sidecar()
                && moved(&running.access_log())
                && let Ok(pid) = i32::try_from(pid)
            {
                // One that has ended opens its log anew when it is started again.
                let _ = kill(Pid::from_raw(pid), Signal::SIGHUP);
            }
        }
        // Programs have theirs as standard output and cannot be told. Copying megabytes is no work for this thread.
        let logs = mesh.open_logs();
        let _ = tokio::task::spawn_blocking(move || cut_all(&logs)).await;
    }
}

/// Renames a log that is too long; returns whether it did.
fn moved(log: &Path) -> bool {
    // Never through a symbolic link, because the folder belongs to the sidecar's user.
    std::fs::symlink_metadata(log).is_ok_and(|m| m.is_file() && m.len() > MOST)
        && std::fs::rename(log, previous(log)).is_ok()
}

fn cut_all(logs: &[Log]) {
    for log in logs {
        if let Err(error) = log.cut() {
            tracing::debug!(log = %log.display(), %error, "cannot begin a log anew");
        }
    }
}

/// A log from its older part on; the folder may belong to a sidecar's user. Between the move and the sidecar's next line there is an older part alone.
///
/// # Errors
/// Neither part can be read.
pub(super) fn read(log: &Path) -> std::io::Result<String> {
    // Opened before the older part is read: what is moved in between is neither missed nor read twice.
    let open = |path: &Path| open_regular_as(path, OpenOptions::new().read(true), Links::Reject);
    let current = open(log);
    let mut text = String::new();
    match (open(&previous(log)), current) {
        (Ok(mut older), Ok(mut current)) => {
            if older.metadata()?.ino() != current.metadata()?.ino() {
                older.read_to_string(&mut text)?;
            }
            current.read_to_string(&mut text)?;
        }
        (Ok(mut only), Err(_)) | (Err(_), Ok(mut only)) => {
            only.read_to_string(&mut text)?;
        }
        (Err(_), Err(error)) => return Err(error),
    }
    Ok(text)
}

/// Path of the older part of a log.
pub(super) fn previous(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A log in this folder that a program has open and that is too long.
    fn long(folder: &Path, name: &str) -> (Log, File) {
        let log = Log::at(folder.join(name));
        let mut program = log.open().unwrap();
        program.write_all(&vec![b'x'; usize::try_from(MOST).unwrap() + 1]).unwrap();
        (log, program)
    }

    fn length(path: &Path) -> u64 {
        std::fs::metadata(path).unwrap().len()
    }

    #[test]
    fn a_long_log_is_begun_anew_while_its_program_writes_on() {
        let folder = tempfile::tempdir().unwrap();
        let (log, mut program) = long(folder.path(), "web.log");
        let short = Log::at(folder.path().join("short.log"));
        short.open().unwrap().write_all(b"short\n").unwrap();
        cut_all(&[log.clone(), short, Log::at(folder.path().join("never-opened.log"))]);
        program.write_all(b"after\n").unwrap();
        assert_eq!(std::fs::read_to_string(&*log).unwrap(), "after\n");
        assert_eq!(length(&folder.path().join("web.log.1")), MOST);
        assert!(!folder.path().join("short.log.1").exists());
        assert!(!moved(&log), "it is short again");
        assert_eq!(read(&log).unwrap().len() as u64, MOST + 6, "both parts");
        std::fs::remove_file(&*log).unwrap();
        assert_eq!(read(&log).unwrap().len() as u64, MOST, "moved, and not opened anew yet");
        assert!(read(&folder.path().join("none.log")).is_err());
    }

    #[test]
    fn of_a_flood_the_end_alone_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::at(folder.path().join("noisy.log"));
        let mut program = log.open().unwrap();
        program.set_len(40 * MOST).unwrap();
        program.write_all(b"last words\n").unwrap();
        cut_all(std::slice::from_ref(&log));
        assert_eq!((length(&log), length(&previous(&log))), (0, MOST));
        assert!(std::fs::read(previous(&log)).unwrap().ends_with(b"\0last words\n"));
    }

    #[test]
    fn a_log_that_is_a_pipe_or_a_link_is_neither_waited_for_nor_followed() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("access.log");
        nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(read(&log).unwrap_err().to_string(), "it is a pipe; expected a file");
        let secret = folder.path().join("secret");
        std::fs::write(&secret, "root's").unwrap();
        std::os::unix::fs::symlink(&secret, previous(&log)).unwrap();
        assert!(read(&log).is_err());
        std::fs::remove_file(&log).unwrap();
        std::fs::write(&log, "a line\n").unwrap();
        assert_eq!(read(&log).unwrap(), "a line\n");
    }

    #[test]
    fn a_file_that_no_process_of_the_mesh_was_started_with_is_never_cut() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        // The operator's own logs in the same folder.
        let kernel = at("kern.log");
        std::fs::write(&kernel, vec![b'k'; usize::try_from(MOST).unwrap() + 1]).unwrap();
        std::fs::write(at("kern.log.1"), "rotated by logrotate").unwrap();
        let (ours, _program) = long(folder.path(), "web.log");
        // One of ours is a link to the operator's now, one is another file, and one a pipe.
        let (linked, _held) = long(folder.path(), "linked.log");
        std::fs::remove_file(&*linked).unwrap();
        std::os::unix::fs::symlink(&kernel, &*linked).unwrap();
        let (moved, _held) = long(folder.path(), "moved.log");
        std::fs::rename(&*moved, at("away")).unwrap();
        std::fs::copy(&kernel, &*moved).unwrap();
        let (pipe, _held) = long(folder.path(), "pipe.log");
        std::fs::remove_file(&*pipe).unwrap();
        nix::unistd::mkfifo(&*pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        cut_all(&[linked, moved.clone(), pipe, ours.clone()]);
        assert_eq!(length(&ours), 0);
        assert_eq!((length(&kernel), length(&moved), length(&at("away"))), (MOST + 1, MOST + 1, MOST + 1));
        assert_eq!(std::fs::read_to_string(at("kern.log.1")).unwrap(), "rotated by logrotate");
        assert!(!at("moved.log.1").exists() && !at("linked.log.1").exists());
    }
}
