//! Keeps the logs of a mesh short: each has one predecessor, and neither grows without end.

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

/// A log that is longer is begun anew, in bytes.
const MOST: u64 = 16 * 1024 * 1024;
/// How often the logs are looked at.
const LOOK: Duration = Duration::from_secs(10);

/// Looks after the logs until it is dropped.
pub async fn keep_short(mesh: Rc<Mesh>) {
    loop {
        tokio::time::sleep(LOOK).await;
        for running in mesh.workloads().values() {
            // A sidecar opens its access log again on SIGHUP, as logrotate asks for.
            if let State::Running(pid) = running.sidecar()
                && moved(&running.access_log())
                && let Ok(pid) = i32::try_from(pid)
            {
                // One that has ended opens its log anew when it is started again.
                let _ = kill(Pid::from_raw(pid), Signal::SIGHUP);
            }
        }
        // Programs have theirs as standard output and cannot be told. Copying megabytes is no work for this thread.
        let folder = mesh.logs().to_owned();
        let _ = tokio::task::spawn_blocking(move || cut_all(&folder)).await;
    }
}

/// Moves a log that is too long aside; whether it was.
fn moved(log: &Path) -> bool {
    // Never through a link: the folder belongs to the sidecar's user.
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

/// Copies a log aside and empties it. It is open for appending elsewhere, so that the next line lands at its start.
fn cut(log: &Path) -> std::io::Result<()> {
    let previous = previous(log);
    // What hinders it hinders the copy too, which says so.
    let _ = std::fs::remove_file(&previous);
    let mut from = File::open(log)?;
    let fresh = OpenOptions::new().write(true).create_new(true).custom_flags(OFlag::O_NOFOLLOW.bits()).open(&previous);
    let copied = fresh.and_then(|mut to| std::io::copy(&mut from, &mut to));
    // A full disk is the more a reason to empty it.
    OpenOptions::new().write(true).open(log)?.set_len(0)?;
    copied.map(|_| ())
}

/// A log from its older part on. Between the move and the sidecar's next line there is an older part alone.
///
/// # Errors
/// Neither part can be read.
pub(super) fn read(log: &Path) -> std::io::Result<String> {
    // Opened before the older part is read: what is moved in between is neither missed nor read twice.
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

/// Where the older part of a log lies.
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
