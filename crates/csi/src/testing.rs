//! Shared test helpers: mount namespaces of a test's own, and the folders of a node in them.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::mounts::Mounts;
use crate::target::Target;

/// Path of the test's volume below the pods.
pub const VOLUME: &str = "7d0e1c5a-0000-4000-8000-0123456789ab/volumes/kubernetes.io~csi/countersign-agent";

/// Folders of a node: an agent's and a kubelet's, in a temporary one that is a shared mount, as a node's is for the driver.
pub struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    /// New folders, with those that the kubelet makes before it asks for a volume.
    fn new() -> Self {
        let node = Self { dir: tempfile::tempdir().unwrap() };
        let none = None::<&str>;
        mount(Some("tmpfs"), node.dir.path(), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        mount(none, node.dir.path(), none, MsFlags::MS_SHARED, none).unwrap();
        std::fs::create_dir_all(node.volume()).unwrap();
        std::fs::create_dir_all(node.kubelet().join("plugins_registry")).unwrap();
        std::fs::create_dir(node.agent()).unwrap();
        node
    }

    pub fn agent(&self) -> PathBuf {
        self.dir.path().join("agent")
    }

    pub fn kubelet(&self) -> PathBuf {
        self.dir.path().join("kubelet")
    }

    pub fn volume(&self) -> PathBuf {
        self.kubelet().join("pods").join(VOLUME)
    }

    /// Where the volume is mounted.
    pub fn mount(&self) -> PathBuf {
        self.volume().join("mount")
    }

    pub fn target(&self) -> Target {
        Target::parse(self.mount().to_str().unwrap(), &self.kubelet().join("pods")).unwrap()
    }

    pub fn mounts(&self) -> Mounts {
        Mounts { pods: self.kubelet().join("pods"), agent: self.agent() }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Otherwise the temporary folder could not be removed.
        let _ = umount2(self.dir.path(), MntFlags::MNT_DETACH);
    }
}

/// Mount options of what is mounted at a path, of each layer, as this namespace sees it (`proc_pid_mountinfo(5)`).
pub fn mounted(path: &Path) -> Vec<String> {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let fields = table.lines().map(|l| l.split(' ').collect::<Vec<_>>());
    fields.filter(|f| Path::new(f[4]) == path).map(|f| f[5].to_owned()).collect()
}

/// Runs a test on a node's folders, on a thread with a mount namespace of its own. Without root the test says so and passes,
/// but in CI it fails.
pub fn on_a_node(test: impl FnOnce(&Node) + Send) {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "CI runs as root");
        eprintln!("skipped: mounts need root");
        return;
    }
    let none = None::<&str>;
    elsewhere(|| {
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        test(&Node::new());
    });
}

/// Runs work on a thread in a copy of this mount namespace, which gets the mounts below a node's folders that the other makes, and
/// the other way round. The copy ends with the thread.
pub fn elsewhere<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let in_copy = || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        work()
    };
    std::thread::scope(|scope| scope.spawn(in_copy).join().unwrap())
}
