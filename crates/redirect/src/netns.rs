//! Network namespaces with a name, in the place where iproute2 looks for them.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, statfs};

/// Where named namespaces are mounted (ip-netns(8)).
const DIR: &str = "/run/netns";
/// The file system of namespaces (`NSFS_MAGIC` of linux/magic.h).
const NSFS: FsType = FsType(0x6e73_6673);
/// Mounts that are undone at one name at most: a name may be covered several times, and a loop needs an end.
const MAX_LAYERS: usize = 64;

/// A named network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetNs {
    path: PathBuf,
}

impl NetNs {
    /// The namespace of this name, whether or not it is there.
    pub fn named(name: &str) -> Self {
        Self { path: Path::new(DIR).join(name) }
    }

    /// The namespace behind a file, such as `/proc/<pid>/ns/net`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it. Its loopback interface is down. A name that is a mere file, left by a machine that went down or by a mount
    /// that was hidden, is taken over; one that is a namespace is refused with `AlreadyExists`.
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
        // A thread of its own: what it unshares is gone with it, but for the mount.
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

    /// Whether a namespace is mounted at its name.
    fn is_namespace(&self) -> bool {
        statfs(&self.path).is_ok_and(|about| about.filesystem_type() == NSFS)
    }

    /// Removes it; what still runs in it keeps it alive without a name. Not there is fine.
    pub fn remove(&self) -> io::Result<()> {
        // Every layer: whoever copied the folder's mounts may have mounted it once more.
        for _ in 0..MAX_LAYERS {
            match umount2(&self.path, MntFlags::MNT_DETACH) {
                Ok(()) => {}
                // No mount (any more), or no file.
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(error) => return Err(error.into()),
            }
        }
        match std::fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Opens it.
    pub fn open(&self) -> io::Result<File> {
        File::open(&self.path)
    }

    /// Runs something in it, on a thread of its own.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        let file = self.open()?;
        on_own_thread(move || {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            work()
        })
    }

    /// Names of all namespaces that begin so.
    pub fn list(prefix: &str) -> Vec<String> {
        let entries = std::fs::read_dir(DIR).into_iter().flatten().flatten();
        let names = entries.filter_map(|e| e.file_name().into_string().ok());
        names.filter(|n| n.starts_with(prefix)).collect()
    }
}

/// Makes the folder of namespaces a shared mount point of its own, as ip-netns(8) does before its first namespace: a later
/// `ip netns add` or CNI plugin then finds it so. Otherwise they would mount the folder over itself, and every namespace that
/// was there before would be hidden below the copy, where nothing can unmount it.
fn prepare_folder(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    // The lock that iproute2 takes: two at once would mount the folder over itself again and again. Without it things go on,
    // as they do there.
    let _lock = Flock::lock(File::open(dir)?, FlockArg::LockExclusive).map_err(|(_, e)| e);
    let none = None::<&str>;
    let share = || mount(Some("none"), dir, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    match share() {
        // EINVAL: it is no mount point yet.
        Err(Errno::EINVAL) => {
            mount(Some(dir), dir, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
            Ok(share()?)
        }
        shared => Ok(shared?),
    }
}

fn on_own_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    std::thread::spawn(work).join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;

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
