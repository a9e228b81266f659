//! Network namespaces with a name, in the place where iproute2 looks for them.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// Where named namespaces are mounted (ip-netns(8)).
const DIR: &str = "/run/netns";

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

    /// Makes it. Its loopback interface is down.
    pub fn create(name: &str) -> io::Result<Self> {
        std::fs::create_dir_all(DIR)?;
        let ns = Self::named(name);
        File::options().write(true).create_new(true).open(&ns.path)?;
        let path = ns.path.clone();
        // A thread of its own: what it unshares is gone with it, but for the mount.
        let made = on_own_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        });
        if let Err(error) = made {
            let _ = std::fs::remove_file(&ns.path);
            return Err(error);
        }
        Ok(ns)
    }

    /// Removes it; what still runs in it keeps it alive without a name. Not there is fine.
    pub fn remove(&self) -> io::Result<()> {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
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

fn on_own_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    std::thread::spawn(work).join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
}
