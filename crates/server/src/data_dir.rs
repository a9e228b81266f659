//! The data folder: created if missing, private, and locked for one server.

use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

/// The lock on a data folder, held while the server lives. The kernel releases it however the process ends.
pub struct DataDir(#[allow(dead_code, reason = "held, never asked")] Flock<File>);

impl DataDir {
    /// Creates the folder if it is missing, locks it, and removes permissions of others.
    ///
    /// The lock is on the folder itself, so no lock file remains. Two servers on one folder would overwrite each
    /// other's journal of authorities.
    pub fn take(path: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        // Before it is locked: whoever can open the folder can lock it.
        make_private(path)?;
        let dir = File::open(path)?;
        let lock = Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => io::Error::new(
                io::ErrorKind::ResourceBusy,
                "another server uses it; stop that one first, or give this one a folder of its own",
            ),
            other => other.into(),
        })?;
        for name in ["server.sqlite", "server.sqlite-wal", "server.sqlite-shm"] {
            make_file_private(&path.join(name))?;
        }
        Ok(Self(lock))
    }
}

/// Removes access of others: join tokens are in the folder, and search permission would expose files with a wrong mode.
///
/// A folder of another owner is left alone: a pod's volume belongs to root and admits us by its group.
fn make_private(path: &Path) -> io::Result<()> {
    let meta = std::fs::metadata(path)?;
    let mode = meta.mode() & 0o7777;
    if meta.uid() != nix::unistd::geteuid().as_raw() {
        if mode & 0o007 != 0 {
            tracing::warn!(path = %path.display(), uid = meta.uid(), "everybody can search the data folder (mode {mode:o}), which is not ours to close");
        }
        return Ok(());
    }
    if mode & 0o077 != 0 {
        std::fs::set_permissions(path, Permissions::from_mode(mode & !0o077))?;
        tracing::warn!(path = %path.display(), "others could search the data folder (mode {mode:o}); it is {:o} now", mode & !0o077);
    }
    Ok(())
}

fn make_file_private(path: &Path) -> io::Result<()> {
    let mode = match std::fs::metadata(path) {
        Ok(meta) => meta.mode() & 0o7777,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    if mode & 0o077 != 0 {
        std::fs::set_permissions(path, Permissions::from_mode(mode & !0o077))?;
        tracing::warn!(path = %path.display(), "others could read the database (mode {mode:o}); join tokens made before may be known");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_server_and_is_free_again_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let first = DataDir::take(&path).unwrap();
        let second = DataDir::take(&path).err().unwrap();
        assert_eq!(second.kind(), io::ErrorKind::ResourceBusy);
        assert!(second.to_string().contains("another server uses it"), "{second}");
        drop(first);
        DataDir::take(&path).unwrap();
    }

    #[test]
    fn a_folder_is_closed_before_it_is_locked() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let _stranger = Flock::lock(File::open(dir.path()).unwrap(), FlockArg::LockExclusive).unwrap();
        DataDir::take(dir.path()).err().unwrap();
        assert_eq!(std::fs::metadata(dir.path()).unwrap().mode() & 0o777, 0o700, "no further stranger can");
    }

    #[test]
    fn a_folder_and_a_database_that_others_can_read_are_closed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let wal = dir.path().join("server.sqlite-wal");
        std::fs::write(&wal, "").unwrap();
        std::fs::set_permissions(&wal, Permissions::from_mode(0o644)).unwrap();
        let _held = DataDir::take(dir.path()).unwrap();
        let mode = |p: &Path| std::fs::metadata(p).unwrap().mode() & 0o777;
        assert_eq!((mode(dir.path()), mode(&wal)), (0o700, 0o600));
    }
}
