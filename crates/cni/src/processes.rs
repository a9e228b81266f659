//! The processes of this node's pods, for a pod whose network namespace nobody has handed over: a pod is told by the
//! process's cgroup below the kubelet's root, as the agent tells its callers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use countersign_redirect::guard::resolvers;
use countersign_watch::cgroup::{Container, container_of};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::Mode;

/// Where the kernel shows processes.
pub const PROC: &str = "/proc";
/// Largest file of a process that is read, in bytes.
const MAX_FILE: u64 = 64 * 1024;
/// Most processes per pod.
const MAX_PROCESSES: usize = 256;

/// A process of a pod. It is held by a descriptor of its folder, which shows nothing once the process has ended,
/// whoever gets its number next.
#[derive(Debug)]
pub struct PodProcess {
    folder: OwnedFd,
    container: Container,
}

impl PodProcess {
    fn read(path: &Path) -> io::Result<Option<Self>> {
        let folder = File::open(path)?.into();
        let cgroup = text(openat(&folder, "cgroup", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)?;
        let container = container_of(&cgroup).ok().flatten();
        Ok(container.map(|container| Self { folder, container }))
    }

    /// ID of its container.
    pub fn container(&self) -> &str {
        &self.container.id
    }

    /// Its network namespace.
    pub fn netns(&self) -> io::Result<OwnedFd> {
        Ok(openat(&self.folder, "ns/net", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)
    }

    /// The resolvers of its `resolv.conf`.
    pub fn resolvers(&self) -> io::Result<BTreeSet<IpAddr>> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = openat(&self.folder, "root", flags, Mode::empty())?;
        // A link in a pod's files leads to its own files, and a pipe keeps nobody waiting.
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let file = File::from(openat2(root.as_fd(), "etc/resolv.conf", how)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("resolv.conf is no file"));
        }
        Ok(resolvers(&text(file.into())?))
    }
}

fn text(file: OwnedFd) -> io::Result<String> {
    let mut text = String::new();
    File::from(file).take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

/// The processes of these pods, by the pod's UID. Blocks.
pub fn of_pods(proc: &Path, uids: &BTreeSet<String>) -> io::Result<BTreeMap<String, Vec<PodProcess>>> {
    let mut found: BTreeMap<String, Vec<PodProcess>> = BTreeMap::new();
    for entry in std::fs::read_dir(proc)?.flatten() {
        let is_process = entry.file_name().to_str().is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()));
        if !is_process {
            continue;
        }
        // One that has ended meanwhile is nobody's.
        let Ok(Some(process)) = PodProcess::read(&entry.path()) else { continue };
        if uids.contains(&process.container.pod_uid) {
            let of_pod = found.entry(process.container.pod_uid.clone()).or_default();
            if of_pod.len() < MAX_PROCESSES {
                of_pod.push(process);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::{FakeProc, UID};

    #[test]
    fn a_pods_processes_are_found_by_their_cgroup() {
        let proc = FakeProc::new();
        proc.add(10, UID, 'a', Path::new("/proc/self/ns/net"));
        proc.add(11, UID, 'b', Path::new("/proc/self/ns/net"));
        proc.add(12, &UID.replace('7', "8"), 'c', Path::new("/proc/self/ns/net"));
        std::fs::create_dir(proc.path().join("13")).unwrap();
        let found = of_pods(proc.path(), &[UID.to_owned()].into()).unwrap();
        let mut ids: Vec<&str> = found[UID].iter().map(PodProcess::container).collect();
        ids.sort_unstable();
        assert_eq!(ids, ["a".repeat(64), "b".repeat(64)]);
        assert!(found.len() == 1 && found[UID][0].netns().is_ok());
    }

    #[test]
    fn a_link_in_a_pods_files_leads_nowhere_else() {
        let proc = FakeProc::new();
        let root = proc.add(10, UID, 'a', Path::new("/proc/self/ns/net"));
        let process = || of_pods(proc.path(), &[UID.to_owned()].into()).unwrap().remove(UID).unwrap().remove(0);
        assert!(process().resolvers().is_err(), "there is none");
        std::fs::create_dir(root.join("etc")).unwrap();
        std::fs::write(root.join("etc/real"), "nameserver 10.0.0.10\n").unwrap();
        symlink("/etc/real", root.join("etc/resolv.conf")).unwrap();
        assert_eq!(process().resolvers().unwrap(), ["10.0.0.10".parse().unwrap()].into(), "below its own root");
        let secret = proc.path().join("secret");
        std::fs::write(&secret, "nameserver 9.9.9.9\n").unwrap();
        std::fs::remove_file(root.join("etc/resolv.conf")).unwrap();
        symlink(format!("../../..{}", secret.display()), root.join("etc/resolv.conf")).unwrap();
        assert!(process().resolvers().is_err(), "not beside it");
        std::fs::remove_file(root.join("etc/resolv.conf")).unwrap();
        nix::unistd::mkfifo(&root.join("etc/resolv.conf"), Mode::S_IRWXU).unwrap();
        assert!(process().resolvers().unwrap_err().to_string().contains("is no file"));
    }
}
