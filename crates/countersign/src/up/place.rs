//! Where a mesh stands on this machine: its folder, its names, and tidying up after a mesh that was killed.

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use countersign_redirect::netns::NetNs;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::events::Events;
use crate::settings::Mistake;

/// Folder of all meshes.
pub const RUN_DIR: &str = "/run/countersign/up";
/// Every network namespace of ours begins so.
const NETNS_PREFIX: &str = "cs-";

/// A mesh's place; no other `up` has it while this is held.
pub struct Place {
    name: String,
    /// Its folder.
    pub dir: PathBuf,
    /// What happens in the mesh.
    pub events: Events,
    _lock: Flock<File>,
}

impl Place {
    /// Takes the place of a mesh, and removes what a killed `up` left there.
    pub fn take(name: &str) -> Result<Self> {
        let dir = Path::new(RUN_DIR).join(name);
        let lock =
            lock(&Path::new(RUN_DIR).join(format!("{name}.lock"))).with_context(|| format!("cannot lock {RUN_DIR}"))?;
        let lock = lock.ok_or_else(|| {
            Mistake(format!(
                "a mesh `{name}` is already up on this machine; stop it with Ctrl-C, or give this one another `name`"
            ))
        })?;
        let place = Self { name: name.to_owned(), dir, events: Events::default(), _lock: lock };
        place.tidy();
        std::fs::create_dir_all(&place.dir).with_context(|| format!("cannot make {}", place.dir.display()))?;
        Ok(place)
    }

    /// Name of the namespace with the switch.
    pub fn fabric_name(&self) -> String {
        format!("{NETNS_PREFIX}{}", self.name)
    }

    /// A folder in it that belongs to a user.
    pub fn folder(&self, name: &str, owner: u32) -> io::Result<PathBuf> {
        let dir = self.dir.join(name);
        std::fs::create_dir_all(&dir)?;
        chown(&dir, Some(owner), Some(owner))?;
        Ok(dir)
    }

    /// Everything of this mesh that is left, in words; empty when nothing is.
    pub fn leftovers(&self) -> Vec<String> {
        let mut left: Vec<String> = self.namespaces().iter().map(|n| format!("namespace {n}")).collect();
        if self.dir.exists() {
            left.push(format!("folder {}", self.dir.display()));
        }
        let processes = processes_of(&self.dir);
        left.extend(processes.iter().map(|p| format!("process {p}")));
        left
    }

    fn namespaces(&self) -> Vec<String> {
        let fabric = self.fabric_name();
        let of_workloads = format!("{fabric}-");
        NetNs::list(&fabric).into_iter().filter(|n| *n == fabric || n.starts_with(&of_workloads)).collect()
    }

    /// Ends what runs in this mesh's namespaces or under its folder, and removes them.
    pub fn tidy(&self) {
        for name in self.namespaces() {
            let ns = NetNs::named(&name);
            kill_inside(&ns);
            if let Err(error) = ns.remove() {
                tracing::warn!(namespace = name, %error, "cannot remove a network namespace");
            }
        }
        for pid in processes_of(&self.dir) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.dir.display(), %error, "cannot remove the mesh's folder");
            }
            _ => {}
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(Path::new(RUN_DIR).join(format!("{}.lock", self.name)));
        // These go only when they are empty.
        let up = Path::new(RUN_DIR);
        let _ = std::fs::remove_dir(up);
        let _ = up.parent().map(std::fs::remove_dir);
    }
}

/// Locks a file, made where it is missing; `None`: somebody else has it. A mesh that ends removes its file, and the folder
/// when it was the last, so a lock counts only while the file is still the one at that path.
fn lock(path: &Path) -> io::Result<Option<Flock<File>>> {
    loop {
        std::fs::create_dir_all(RUN_DIR)?;
        let file = match File::create(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        let ours = file.metadata()?.ino();
        let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(None) };
        if std::fs::metadata(path).is_ok_and(|m| m.ino() == ours) {
            return Ok(Some(lock));
        }
    }
}

/// Kills every process in a network namespace.
pub fn kill_inside(ns: &NetNs) {
    let Ok(inode) = std::fs::metadata(ns.path()).map(|m| m.ino()) else { return };
    for pid in every_process() {
        let theirs = std::fs::metadata(format!("/proc/{pid}/ns/net")).map(|m| m.ino());
        if theirs.is_ok_and(|i| i == inode) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Our own roles whose command line names a folder.
fn processes_of(dir: &Path) -> Vec<i32> {
    let needle = format!("{}/", dir.display());
    let ours = |pid: &i32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let is_role = String::from_utf8_lossy(&command).split('\0').any(|a| a.starts_with(&needle));
        is_role && *pid != i32::try_from(std::process::id()).unwrap_or(0)
    };
    every_process().into_iter().filter(ours).collect()
}

fn every_process() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}
