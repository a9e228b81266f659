//! A mesh's place on this machine: its folder, its names, and cleaning up after a mesh that was killed.

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use countersign_redirect::netns::NetNs;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::events::Events;
use super::users::{Held, Users};
use crate::settings::Mistake;

/// Folder of all meshes.
pub const RUN_DIR: &str = "/run/countersign/up";
/// Prefix of all our network namespaces.
const NETNS_PREFIX: &str = "cs-";
/// Longest wait until killed processes have ended.
const GONE: Duration = Duration::from_secs(3);

/// The place of a mesh, exclusively held.
pub struct Place {
    name: String,
    /// Folder of the mesh.
    pub dir: PathBuf,
    /// Events of the mesh.
    pub events: Events,
    users: Users,
    /// Reserves the users against other meshes; `None` only while this is dropped.
    held: Option<Held>,
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
        tidy(name, &dir);
        let held = Users::take().context("cannot find users for the mesh's server, sidecars and workloads")?;
        let (users, events) = (held.users, Events::default());
        let place = Self { name: name.to_owned(), dir, events, users, held: Some(held), _lock: lock };
        passable(&place.dir).with_context(|| format!("cannot make {}", place.dir.display()))?;
        Ok(place)
    }

    /// Name of the namespace with the switch.
    pub fn fabric_name(&self) -> String {
        fabric_of(&self.name)
    }

    /// Users of the mesh's processes.
    pub fn users(&self) -> Users {
        self.users
    }

    /// Creates a folder in it that belongs to a user and that others may enter.
    pub fn folder(&self, name: &str, owner: u32) -> io::Result<PathBuf> {
        let dir = self.dir.join(name);
        passable(&dir)?;
        chown(&dir, Some(owner), Some(owner))?;
        Ok(dir)
    }

    /// What is left of this mesh, in words; empty if nothing is.
    pub fn leftovers(&self) -> Vec<String> {
        let mut left: Vec<String> = namespaces(&self.name).iter().map(|n| format!("namespace {n}")).collect();
        if self.dir.exists() {
            left.push(format!("folder {}", self.dir.display()));
        }
        let processes = processes_of(&self.dir);
        left.extend(processes.iter().map(|p| format!("process {p}")));
        left
    }

    /// Ends processes in this mesh's namespaces or with its folder on their command line, and removes namespaces and
    /// folder.
    pub fn tidy(&self) {
        tidy(&self.name, &self.dir);
    }
}

/// Name of the namespace with a mesh's switch, and prefix of its workloads' namespaces.
fn fabric_of(name: &str) -> String {
    format!("{NETNS_PREFIX}{name}")
}

fn namespaces(name: &str) -> Vec<String> {
    let fabric = fabric_of(name);
    let of_workloads = format!("{fabric}-");
    NetNs::list(&fabric).into_iter().filter(|n| *n == fabric || n.starts_with(&of_workloads)).collect()
}

fn tidy(name: &str, dir: &Path) {
    let names = namespaces(name);
    let mut killed: Vec<i32> = names.iter().flat_map(|name| kill_inside(&NetNs::named(name))).collect();
    for pid in processes_of(dir) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        killed.push(pid);
    }
    // Killed processes may still write a file or hold a namespace for a moment.
    let deadline = Instant::now() + GONE;
    while killed.iter().any(|pid| is_alive(*pid)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    for name in names {
        if let Err(error) = NetNs::named(&name).remove() {
            tracing::warn!(namespace = name, %error, "cannot remove a network namespace");
        }
    }
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %dir.display(), %error, "cannot remove the mesh's folder");
        }
        _ => {}
    }
}

/// Whether a process runs. One that has ended but was not waited for (state Z, proc(5)) does not.
fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| !"ZX".contains(state))
}

/// Creates a folder and its parents so that every user may enter them, whatever the umask: sidecars and workloads run
/// as other users.
pub fn passable(dir: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|part| !part.exists()).collect();
    for part in missing.into_iter().rev() {
        match std::fs::create_dir(part) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        std::fs::set_permissions(part, PermissionsExt::from_mode(0o755))?;
    }
    Ok(())
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(Path::new(RUN_DIR).join(format!("{}.lock", self.name)));
        drop(self.held.take());
        // Removed only if empty.
        let up = Path::new(RUN_DIR);
        let _ = std::fs::remove_dir(up);
        let _ = up.parent().map(std::fs::remove_dir);
    }
}

/// Locks a file, which is created if missing; `None` if another process holds it. A mesh that ends removes its file,
/// and the last one the folder, so a lock counts only if the file is still at that path.
pub fn lock(path: &Path) -> io::Result<Option<Flock<File>>> {
    loop {
        passable(Path::new(RUN_DIR))?;
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

/// Kills every process in a network namespace; returns their process IDs.
pub fn kill_inside(ns: &NetNs) -> Vec<i32> {
    let Ok(namespace) = std::fs::metadata(ns.path()).map(|m| (m.dev(), m.ino())) else { return vec![] };
    // A name whose namespace is gone or hidden is a plain file: no process is inside.
    let theirs =
        |pid: &i32| std::fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| (m.dev(), m.ino()) == namespace);
    let inside: Vec<i32> = every_process().into_iter().filter(theirs).collect();
    for pid in &inside {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    inside
}

/// Our own roles whose command line names a folder.
fn processes_of(dir: &Path) -> Vec<i32> {
    let needle = format!("{}/", dir.display());
    let ours = |pid: &i32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).into_owned();
        let mut words = command.split('\0');
        // An operator's `tail` of a log must not be killed.
        let is_ours = words.next().is_some_and(|program| program.rsplit('/').next() == Some("countersign"));
        is_ours && words.any(|a| a.starts_with(&needle)) && *pid != i32::try_from(std::process::id()).unwrap_or(0)
    };
    every_process().into_iter().filter(ours).collect()
}

/// All processes that this PID namespace shows.
pub fn every_process() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}
