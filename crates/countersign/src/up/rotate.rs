//! Rotates the logs of a mesh: each has one predecessor, and both are bounded.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::children::State;
use super::mesh::Mesh;

/// Size in bytes at which a log is rotated.
const MOST: u64 = 16 * 1024 * 1024;
/// Interval between two checks of the logs.
const LOOK: Duration = Duration::from_secs(10);

/// Rotates the logs until it is dropped.
pub async fn keep_short(mesh: Rc<Mesh>) {
    loop {
        tokio::time::sleep(LOOK).await;
        for running in mesh.workloads().values() {
            // A sidecar reopens its access log on SIGHUP, as for logrotate.
            if let State::Running(pid) = running.sidecar()
                && moved(&running.access_log())
                && let Ok(pid) = i32::try_from(pid)
            {
                let _ = kill(Pid::from_raw(pid), Signal::SIGHUP);
            }
        }
        // Programs write to standard output and cannot reopen it, so their logs are copied, off this thread.
        let folder = mesh.logs().to_owned();
        let _ = tokio::task::spawn_blocking(move || cut_all(&folder)).await;
    }
}

/// Renames a log that is too long; returns whether it did.
fn moved(log: &Path) -> bool {
    // Never through a symbolic link, because the folder belongs to the sidecar's user.
    std::fs::symlink_metadata(log).is_ok_and(|m| m.is_file() && m.len() > MOST)
        && std::fs::rename(log, previous(log)).is_ok()
}

fn cut_all(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let long = entry.metadata().is_ok_and(|m| m.is_file() && m.len() > MOST);
        if long && path.extension().is_some_and(|e| e == "log") && cut(&path).is_err() {
            tracing::debug!(log = %path.display(), "cannot begin a log anew");
        }
    }
}

/// Copies a log and truncates it. It is open for appending elsewhere, so the next line is written to its start.
fn cut(log: &Path) -> std::io::Result<()> {
    let previous = previous(log);
    let _ = std::fs::remove_file(&previous);
    let mut from = File::open(log)?;
    let fresh = OpenOptions::new().write(true).create_new(true).custom_flags(OFlag::O_NOFOLLOW.bits()).open(&previous);
    let copied = fresh.and_then(|mut to| std::io::copy(&mut from, &mut to));
    // A full disk is all the more reason to truncate it.
    OpenOptions::new().write(true).open(log)?.set_len(0)?;
    copied.map(|_| ())
}

/// A log including its older part. Between the rename and the sidecar's next line, there is only an older part.
///
/// # Errors
/// Neither part can be read.
pub(super) fn read(log: &Path) -> std::io::Result<String> {
    // Opened before the older part is read, so that a rename in between neither loses nor duplicates lines.
    let current = File::open(log);
    let mut text = String::new();
    match (File::open(previous(log)), current) {
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

    #[test]
    fn a_long_log_is_begun_anew_while_its_program_writes_on() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("web.log");
        let mut program = OpenOptions::new().create(true).append(true).open(&log).unwrap();
        program.write_all(&vec![b'x'; usize::try_from(MOST).unwrap() + 1]).unwrap();
        std::fs::write(folder.path().join("short.log"), "short\n").unwrap();
        cut_all(folder.path());
        program.write_all(b"after\n").unwrap();
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "after\n");
        assert_eq!(std::fs::metadata(folder.path().join("web.log.1")).unwrap().len(), MOST + 1);
        assert!(!folder.path().join("short.log.1").exists());
        assert!(!moved(&log), "it is short again");
        assert_eq!(read(&log).unwrap().len() as u64, MOST + 1 + 6, "both parts");
        std::fs::remove_file(&log).unwrap();
        assert_eq!(read(&log).unwrap().len() as u64, MOST + 1, "moved, and not opened anew yet");
        assert!(read(&folder.path().join("none.log")).is_err());
    }
}
