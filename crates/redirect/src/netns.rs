//! Named network namespaces, stored where iproute2 expects them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, statfs};

/// The folder where named namespaces are mounted (ip-netns(8)).
const DIR: &str = "/run/netns";
/// The file system type of namespaces (`NSFS_MAGIC` of linux/magic.h).
const NSFS: FsType = FsType(0x6e73_6673);
/// How long the lock of the folder is waited for; whoever makes a namespace holds it for milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most mounts that are removed at one name: a name may be mounted over several times, and the loop must end.
const MAX_LAYERS: usize = 64;

/// A network namespace by the path of its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetNs {
    path: PathBuf,
}

impl NetNs {
    /// The namespace with this name, whether or not it exists.
    pub fn named(name: &str) -> Self {
        Self { path: Path::new(DIR).join(name) }
    }

    /// The namespace behind a file, such as `/proc/<pid>/ns/net`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Path of the namespace's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Creates a named namespace, with its loopback interface down. A plain file at that name, left by a crash or a
    /// hidden mount, is replaced. Errors: `AlreadyExists` if the name is a namespace.
    pub fn create(name: &str) -> io::Result<Self> {
        prepare_folder(Path::new(DIR))?;
        let ns = Self::named(name);
        let fresh = || File::options().write(true).create_new(true).open(&ns.path);
        match fresh() {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && !ns.is_namespace() => {
                std::fs::remove_file(&ns.path)?;
                fresh()?;
            }
            made => {
                made?;
            }
        }
        let path = ns.path.clone();
        // On its own thread, whose new namespace ends with it except for the mount.
        let made = on_own_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        });
        if let Err(error) = made {
            // The first error says more; what stays is removed by whoever tidies up.
            let _ = std::fs::remove_file(&ns.path);
            return Err(error);
        }
        Ok(ns)
    }

    /// Whether a namespace is mounted at this path.
    fn is_namespace(&self) -> bool {
        statfs(&self.path).is_ok_and(|about| about.filesystem_type() == NSFS)
    }

    /// Removes the name. Processes in the namespace keep it alive without one. It need not exist.
    pub fn remove(&self) -> io::Result<()> {
        // All layers: a process that copied the folder's mounts may have mounted it once more.
        for _ in 0..MAX_LAYERS {
            match umount2(&self.path, MntFlags::MNT_DETACH) {
                Ok(()) => {}
                // Not mounted (any more), or no file.
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(error) => return Err(error.into()),
            }
        }
        match std::fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Opens the namespace's file, for setns(2).
    pub fn open(&self) -> io::Result<File> {
        File::open(&self.path)
    }

    /// Runs `work` in the namespace, on its own thread.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        run_in(self.open()?.as_fd(), work)
    }

    /// Names of all namespaces with this prefix.
    pub fn list(prefix: &str) -> Vec<String> {
        let entries = std::fs::read_dir(DIR).into_iter().flatten().flatten();
        let names = entries.filter_map(|e| e.file_name().into_string().ok());
        names.filter(|n| n.starts_with(prefix)).collect()
    }
}

/// Runs `work` in the network namespace of this descriptor, on its own thread, which ends there.
pub fn run_in<T: Send + 'static>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let namespace = namespace.try_clone_to_owned()?;
    on_own_thread(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

/// Makes the folder of namespaces a shared mount point, as ip-netns(8) does before its first namespace. Otherwise a
/// later `ip netns add` or CNI plugin would mount the folder over itself, and every earlier namespace would be hidden
/// below the copy, where nothing can unmount it.
fn prepare_folder(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let _lock = lock_within(dir, PATIENCE)?;
    let none = None::<&str>;
    let share = || mount(Some("none"), dir, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    match share() {
        // EINVAL: not a mount point yet.
        Err(Errno::EINVAL) => {
            mount(Some(dir), dir, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
            Ok(share()?)
        }
        shared => Ok(shared?),
    }
}

/// The lock that iproute2 takes: two at once would mount the folder over itself repeatedly. Every user can open the folder and
/// hold its lock for good, so without the lock this continues after `patience`, as iproute2 does.
fn lock_within(dir: &Path, patience: Duration) -> io::Result<Option<Flock<File>>> {
    let deadline = Instant::now() + patience;
    let mut folder = File::open(dir)?;
    loop {
        folder = match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((folder, Errno::EWOULDBLOCK)) if Instant::now() < deadline => folder,
            Err(_) => return Ok(None),
        };
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn on_own_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    std::thread::spawn(work).join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_who_holds_the_folders_lock_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let stranger = lock_within(dir.path(), Duration::ZERO).unwrap().unwrap();
        assert!(lock_within(dir.path(), Duration::from_millis(50)).unwrap().is_none());
        drop(stranger);
        assert!(lock_within(dir.path(), PATIENCE).unwrap().is_some());
    }

    #[test]
    fn a_name_that_is_a_mere_file_is_taken_over_and_one_that_is_a_namespace_is_refused() {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "nothing may be skipped in CI: not root");
            return;
        }
        let name = format!("cs-test-stale-{}", std::process::id());
        std::fs::create_dir_all(DIR).unwrap();
        File::create(Path::new(DIR).join(&name)).unwrap();
        let ns = NetNs::create(&name).unwrap();
        assert!(ns.is_namespace());
        assert_eq!(NetNs::create(&name).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert!(ns.is_namespace(), "the refused call left the namespace alone");
        ns.remove().unwrap();
        assert!(!ns.path().exists());
    }
}
