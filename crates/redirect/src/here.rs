//! Determines which network namespace this process is in: the machine's own, or a workload's.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A network namespace into which a redirect must not be installed by mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shared {
    /// The machine's own namespace, with its SSH server and everything else.
    Machine,
    /// The namespace of process 1, as seen from here. Holds the name of that process.
    FirstProcess(String),
    /// There is no procfs to tell.
    Unknown,
}

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine => f.write_str("the machine's own network namespace"),
            Self::FirstProcess(name) => write!(f, "the network namespace of process 1 ({name})"),
            Self::Unknown => f.write_str("a network namespace that /proc says nothing about"),
        }
    }
}

/// Reads procfs, below a root that tests can replace.
struct Proc(PathBuf);

impl Proc {
    fn namespace_of(&self, process: &str) -> io::Result<(u64, u64)> {
        std::fs::metadata(self.0.join(process).join("ns/net")).map(|m| (m.dev(), m.ino()))
    }

    fn shared(&self, is_pod: bool, first_process: bool) -> Option<Shared> {
        let core = self.0.join("sys/net/core");
        if !core.exists() {
            return Some(Shared::Unknown);
        }
        // The kernel registers this setting only in its initial network namespace and shows it nowhere else.
        if core.join("netdev_max_backlog").exists() {
            return Some(Shared::Machine);
        }
        // In a pod, process 1 is the pod's own, or this process.
        if is_pod || first_process {
            return None;
        }
        // Not readable: a process of another user, or a hidden one. The check above has decided already.
        let (ours, first) = (self.namespace_of("self").ok()?, self.namespace_of("1").ok()?);
        let name = std::fs::read_to_string(self.0.join("1/comm")).unwrap_or_default();
        (ours == first).then(|| Shared::FirstProcess(name.trim().to_owned()))
    }
}

/// The namespace that others depend on, if this is one; `None` otherwise. `is_pod`: process 1 is no reference, because
/// this is a pod's container.
///
/// The kernel's initial namespace is recognised by a setting that exists only there, so PID namespaces and a hidden
/// process 1 do not mislead. A machine that is itself a container is recognised because process 1 is in the same
/// namespace as this process.
pub fn shared(is_pod: bool) -> Option<Shared> {
    Proc("/proc".into()).shared(is_pod, std::process::id() == 1)
}

/// The kernel's identifier of this namespace, and its name if `ip netns` has one: `net:[4026532291] (web)`.
pub fn name() -> String {
    let Ok(link) = std::fs::read_link("/proc/self/ns/net") else { return "unknown".to_owned() };
    let link = link.display().to_string();
    let inode = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let ours = inode(Path::new("/proc/self/ns/net"));
    let named = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let named = named.filter(|e| ours.is_some() && inode(&e.path()) == ours).map(|e| e.file_name()).next();
    named.map_or_else(|| link.clone(), |name| format!("{link} ({})", name.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(files: &[&str], links: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "systemd\n").unwrap();
        }
        for (at, to) in links {
            let path = folder.path().join(at);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(folder.path().join(to), path).unwrap();
        }
        folder
    }

    #[test]
    fn the_kernels_first_namespace_is_known_without_process_1() {
        let machine = made(&["sys/net/core/somaxconn", "sys/net/core/netdev_max_backlog"], &[]);
        for (is_pod, first) in [(false, false), (true, false), (false, true)] {
            assert_eq!(Proc(machine.path().into()).shared(is_pod, first), Some(Shared::Machine));
        }
        assert_eq!(Proc("/nowhere".into()).shared(true, true), Some(Shared::Unknown));
    }

    #[test]
    fn a_machine_that_is_a_container_is_known_by_process_1_and_a_pod_is_let_be() {
        let container =
            made(&["sys/net/core/somaxconn", "a", "b", "1/comm"], &[("self/ns/net", "a"), ("1/ns/net", "a")]);
        let proc = Proc(container.path().into());
        assert_eq!(proc.shared(false, false), Some(Shared::FirstProcess("systemd".into())));
        assert_eq!(proc.shared(true, false), None, "a pod whose containers share their processes");
        assert_eq!(proc.shared(false, true), None, "we are process 1 of a container");
        let workload =
            made(&["sys/net/core/somaxconn", "a", "b", "1/comm"], &[("self/ns/net", "b"), ("1/ns/net", "a")]);
        assert_eq!(Proc(workload.path().into()).shared(false, false), None);
        let hidden = made(&["sys/net/core/somaxconn", "a"], &[("self/ns/net", "a")]);
        assert_eq!(Proc(hidden.path().into()).shared(false, false), None);
    }
}
