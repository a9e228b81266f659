//! Cgroups of containers, as the node's first process sees them, and the pods' namespaces in which a sidecar's is admitted.
//!
//! The component's own cgroup namespace may begin at its container. So each look is made by a thread that enters the first
//! process's: there a path begins at the root, and the kernel counts a cgroup's level from it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use countersign_redirect::RedirectError;
use countersign_redirect::netns::{NetNs, run_in};
use countersign_redirect::sidecar::{Cgroup, Known, admit, known, try_here};
use nix::sched::{CloneFlags, setns, unshare};

/// The node's first process.
const FIRST: &str = "/proc/1";
/// Where a process has cgroups of version 2 mounted: alone, or beside version 1.
const MOUNTS: [&str; 2] = ["root/sys/fs/cgroup", "root/sys/fs/cgroup/unified"];
/// A file that only folders of version 2 have.
const OF_VERSION_2: &str = "cgroup.stat";
/// Length of a container's ID, in hex digits.
const ID: usize = 64;

/// Why containers cannot be told by their cgroups.
#[derive(Debug, thiserror::Error)]
pub enum CgroupsError {
    /// The node has no cgroups of version 2, or they cannot be seen.
    #[error("the node's cgroups of version 2 cannot be seen: {0}")]
    Unseen(io::Error),
    /// The runtime puts containers into cgroups of version 1 alone.
    #[error("the node's runtime gives containers no cgroup of version 2")]
    Unused,
    /// The kernel cannot match cgroups.
    #[error("the kernel cannot match cgroups: {0}")]
    Unmatched(RedirectError),
}

/// The cgroups of this node's containers.
#[derive(Debug, Clone)]
pub struct Cgroups {
    /// Root of their folders, in the first process's files.
    root: PathBuf,
    /// The first process's cgroup namespace.
    namespace: PathBuf,
}

impl Cgroups {
    /// Looks whether this node's sidecars can be told by their cgroups. Blocks.
    pub fn detect() -> Result<Self, CgroupsError> {
        let cgroups = Self::seen_by(Path::new(FIRST)).map_err(CgroupsError::Unseen)?;
        // Our own container is like those of others.
        let own = cgroups.inside(|| path_of("self")).map_err(CgroupsError::Unseen)?;
        if container_in(&own, None).is_none() {
            return Err(CgroupsError::Unused);
        }
        let tried = cgroups.inside(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(try_here())
        });
        tried.map_err(CgroupsError::Unseen)?.map_err(CgroupsError::Unmatched)?;
        Ok(cgroups)
    }

    /// Those that a process sees.
    fn seen_by(process: &Path) -> io::Result<Self> {
        let namespace = process.join("ns/cgroup");
        for root in MOUNTS.map(|mount| process.join(mount)) {
            match std::fs::metadata(root.join(OF_VERSION_2)) {
                Ok(_) => return Ok(Self { root, namespace }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// The cgroup of the container with this ID, by a process of it. Blocks.
    ///
    /// # Errors
    /// The process has ended, or its container has no cgroup of version 2.
    pub fn of(&self, pid: i32, container: &str) -> io::Result<Cgroup> {
        let path = self.inside(move || path_of(&pid.to_string()))?;
        let (folder, level) = container_in(&path, Some(container))
            .ok_or_else(|| io::Error::other(format!("container {container} has no cgroup of version 2")))?;
        Ok(Cgroup { id: std::fs::metadata(self.root.join(folder))?.ino(), level })
    }

    /// Admits a cgroup as the sidecar's in a pod's network namespace, if its redirect asks for one and has another one or none yet.
    /// Returns whom the redirect took for the sidecar before. Blocks.
    pub fn admit(&self, netns: &OwnedFd, cgroup: Cgroup) -> io::Result<Result<Known, RedirectError>> {
        let admitted = move || {
            let before = known(cgroup)?;
            if before == Known::Otherwise {
                admit(cgroup)?;
            }
            Ok(before)
        };
        self.inside_of(netns, move || Ok(admitted()))
    }

    /// Runs `work` on a thread of its own in the first process's cgroup namespace.
    fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        self.inside_of(&NetNs::at("/proc/self/ns/net").open()?.into(), work)
    }

    /// As before, also in this network namespace.
    fn inside_of<T: Send + 'static>(
        &self,
        netns: &OwnedFd,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let namespace = File::open(&self.namespace)?;
        run_in(netns.as_fd(), move || {
            setns(namespace, CloneFlags::CLONE_NEWCGROUP)?;
            work()
        })
    }
}

/// The path of a process's cgroup of version 2 (cgroups(7): hierarchy 0).
fn path_of(process: &str) -> io::Result<String> {
    let text = std::fs::read_to_string(Path::new("/proc").join(process).join("cgroup"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    path.map(ToOwned::to_owned).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// The container's own folder in a path, relative to the root, and its level. `id`: its ID; without one, any container's.
fn container_in(path: &str, id: Option<&str>) -> Option<(PathBuf, u8)> {
    let parts: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
    let is_id = |word: &str| word.len() == ID && word.bytes().all(|b| b.is_ascii_hexdigit());
    // `ID` (cgroupfs), `RUNTIME-ID.scope` (systemd), `POD.slice:RUNTIME:ID` (both).
    let names = |part: &str| part.split(['-', ':', '.']).any(|word| id.map_or_else(|| is_id(word), |id| id == word));
    let at = parts.iter().position(|part| names(part))?;
    // What is above the root cannot be looked into.
    if parts.contains(&"..") {
        return None;
    }
    Some((parts[..=at].iter().collect(), u8::try_from(at + 1).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_folder_is_the_part_with_its_id() {
        let id = "a1".repeat(32);
        let found =
            |path: &str| container_in(path, Some(&id)).map(|(folder, level)| (folder.display().to_string(), level));
        let systemd = format!("/kubepods.slice/kubepods-pod1.slice/cri-containerd-{id}.scope");
        assert_eq!(found(&systemd), Some((systemd[1..].to_owned(), 3)));
        assert_eq!(
            found(&format!("{systemd}/init")),
            Some((systemd[1..].to_owned(), 3)),
            "what a container makes is below"
        );
        let plain = format!("/kubepods/burstable/pod1/{id}");
        assert_eq!(found(&plain), Some((plain[1..].to_owned(), 4)));
        let mixed = format!("/system.slice/kubepods-pod1.slice:cri-containerd:{id}");
        assert_eq!(found(&mixed), Some((mixed[1..].to_owned(), 2)));
        assert_eq!(found("/"), None);
        assert_eq!(found(&format!("/../..{plain}")), None);
        assert_eq!(found(&format!("/kubepods/pod1/{}", "b2".repeat(32))), None, "another container");
        assert!(
            container_in(&plain, None).is_some() && container_in("/system.slice/containerd.service", None).is_none()
        );
    }

    #[test]
    fn a_process_is_found_in_its_cgroup_and_admitted_where_the_redirect_asks() {
        use countersign_redirect::{Backend, Redirect, install};

        use crate::testing::Namespace;

        let Some(ns) = Namespace::new("cgroups") else { return };
        let cgroups = Cgroups::seen_by(Path::new("/proc/self")).expect("CI has cgroups of version 2");
        let root = cgroups.root.clone();
        let (id, top) = ("c3".repeat(32), format!("cs-cni-{}", std::process::id()));
        let folder = root.join(&top).join(&id);
        std::fs::create_dir_all(&folder).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        std::fs::write(folder.join("cgroup.procs"), child.id().to_string()).unwrap();
        let found = cgroups.of(i32::try_from(child.id()).unwrap(), &id);
        let other = cgroups.of(i32::try_from(child.id()).unwrap(), &"d4".repeat(32));
        let expected = Cgroup { id: std::fs::metadata(&folder).unwrap().ino(), level: 2 };
        child.kill().unwrap();
        child.wait().unwrap();
        let gone = cgroups.of(i32::try_from(child.id()).unwrap(), &id);
        std::fs::remove_dir(&folder).unwrap();
        std::fs::remove_dir(root.join(top)).unwrap();
        assert_eq!(found.unwrap(), expected);
        assert!(other.is_err() && gone.is_err());

        let admitted = || cgroups.admit(&ns.open(), expected).unwrap();
        assert_eq!(admitted().unwrap(), Known::ByUserId, "there is no redirect");
        let with = |by_cgroup| {
            let redirect = Redirect { by_cgroup, ..Redirect::for_proxy(2102) };
            let installed = move || Ok(install(&redirect, Backend::Nftables).map(drop));
            run_in(ns.open().as_fd(), installed).unwrap().unwrap();
        };
        with(false);
        assert_eq!(admitted().unwrap(), Known::ByUserId);
        with(true);
        assert_eq!((admitted().unwrap(), admitted().unwrap()), (Known::Otherwise, Known::ByCgroup));
    }
}
