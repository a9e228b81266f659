//! A mesh's run directory on this machine: its folder, its names, and cleaning up after a mesh that was killed.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use countersign_redirect::netns::NetNs;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::events::Events;
use super::namespaces::Namespaces;
use super::users::{self, Held, Users};
use crate::settings::Mistake;

/// Folder of all meshes.
pub const RUN_DIR: &str = "/run/countersign/up";
/// File of a mesh's folder with the number of its users.
const USERS: &str = "users";
/// How long a killed process may take to be gone.
pub const GONE: Duration = Duration::from_secs(3);

/// A mesh's run directory; no other `up` has it while this is held. It is tidied when it is dropped.
pub struct RunDirectory {
    name: String,
    namespaces: Namespaces,
    /// Its folder.
    pub dir: PathBuf,
    /// Events of the mesh.
    pub events: Events,
    users: Users,
    /// Reserves the users against other meshes; `None` only while this is dropped.
    held: Option<Held>,
    _lock: Flock<File>,
}

impl RunDirectory {
    /// Takes the run directory of a mesh, and removes what a killed `up` left there.
    pub fn take(name: &str) -> Result<Self> {
        let dir = Path::new(RUN_DIR).join(name);
        let lock =
            lock(&Path::new(RUN_DIR).join(format!("{name}.lock"))).with_context(|| format!("cannot lock {RUN_DIR}"))?;
        let lock = lock.ok_or_else(|| {
            Mistake(format!(
                "a mesh `{name}` is already up on this machine; stop it with Ctrl-C, or give this one another `name`"
            ))
        })?;
        let namespaces = Namespaces::of(name);
        // Those of a mesh that was killed, unless another mesh has found them without a process and taken them since.
        let before = std::fs::read_to_string(dir.join(USERS)).ok().and_then(|number| number.parse().ok());
        let before = before.and_then(|number| Users::hold(number).ok().flatten());
        tidy(&namespaces, &dir, before.as_ref().map(|held| held.users));
        drop(before);
        let held = Users::take().context("cannot find users for the mesh's server, sidecars and workloads")?;
        let (users, number, events) = (held.users, held.number, Events::default());
        let run_dir = Self { name: name.to_owned(), namespaces, dir, events, users, held: Some(held), _lock: lock };
        passable(&run_dir.dir)
            .and_then(|()| std::fs::write(run_dir.dir.join(USERS), number.to_string()))
            .with_context(|| format!("cannot make {}", run_dir.dir.display()))?;
        Ok(run_dir)
    }

    /// Its network namespaces.
    pub fn namespaces(&self) -> &Namespaces {
        &self.namespaces
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
        let names = self.namespaces.listed().into_iter().filter(|n| NetNs::named(n).path().exists());
        let mut left: Vec<String> = names.map(|n| format!("namespace {n}")).collect();
        if self.dir.exists() {
            left.push(format!("folder {}", self.dir.display()));
        }
        let processes: BTreeSet<i32> = processes_of(&self.dir).into_iter().chain(self.users.processes()).collect();
        left.extend(processes.iter().map(|p| format!("process {p}")));
        left
    }

    /// Ends what runs in this mesh's namespaces, under its folder or as one of its users, and removes namespaces and folder.
    pub fn tidy(&self) {
        tidy(&self.namespaces, &self.dir, Some(self.users));
    }
}

fn tidy(namespaces: &Namespaces, dir: &Path, users: Option<Users>) {
    let names = namespaces.listed();
    // What is killed may still write a file, hold a namespace or have made another process for a moment.
    let deadline = Instant::now() + GONE;
    loop {
        let mut left: Vec<i32> = names.iter().flat_map(|name| kill_inside(&NetNs::named(name))).collect();
        left.extend(kill_each(processes_of(dir)));
        left.extend(kill_each(users.map(Users::processes).unwrap_or_default()));
        if !left.into_iter().any(is_alive) || Instant::now() > deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    for name in names {
        if let Err(error) = NetNs::named(&name).remove() {
            tracing::warn!(namespace = name, %error, "cannot remove a network namespace");
        }
    }
    namespaces.release_gone();
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

/// Makes a folder of a user's anew. One that was there had another owner, who may have put links into it: what lies there
/// is removed and never given away.
pub fn fresh(dir: &Path, owner: u32, mode: u32) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    passable(dir)?;
    std::fs::set_permissions(dir, PermissionsExt::from_mode(mode))?;
    chown(dir, Some(owner), Some(owner))
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        // On whatever way `up` ends: an error on the way, or a panic.
        self.tidy();
        // A lock counts by being held, not by its file.
        let _ = std::fs::remove_file(Path::new(RUN_DIR).join(format!("{}.lock", self.name)));
        drop(self.held.take());
        // Removed only if empty.
        let up = Path::new(RUN_DIR);
        let _ = std::fs::remove_dir(up);
        let _ = up.parent().map(std::fs::remove_dir);
    }
}

/// Locks a file of mode 0600, for whoever may open it may lock it (flock(2)). It is created if missing; `None` if another
/// process holds it. A mesh that ends removes its file, and the last one the folder, so a lock counts only if the file is still
/// at that path.
pub fn lock(path: &Path) -> io::Result<Option<Flock<File>>> {
    lock_as(path, FlockArg::LockExclusiveNonblock)
}

/// As [`lock`], but waits for its turn if another process holds it.
pub fn wait_for_lock(path: &Path) -> io::Result<Flock<File>> {
    lock_as(path, FlockArg::LockExclusive)?.ok_or_else(|| io::ErrorKind::Interrupted.into())
}

fn lock_as(path: &Path, how: FlockArg) -> io::Result<Option<Flock<File>>> {
    loop {
        passable(path.parent().unwrap_or(path))?;
        let file = match File::options().write(true).create(true).truncate(false).mode(0o600).open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        // An earlier version created it for everybody to read.
        file.set_permissions(PermissionsExt::from_mode(0o600))?;
        let ours = file.metadata()?.ino();
        let Ok(lock) = Flock::lock(file, how) else { return Ok(None) };
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
    kill_each(every_process().into_iter().filter(theirs).collect())
}

/// Kills every process of these users, wherever it has gone, and waits until none is left, within bounds.
pub async fn end_all_of(users: &[u32]) {
    let deadline = Instant::now() + GONE;
    // A process that forks as fast as it is killed is looked for again.
    while !kill_each(users::processes_of(|uid| users.contains(&uid))).is_empty() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn kill_each(pids: Vec<i32>) -> Vec<i32> {
    for pid in &pids {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    pids
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_for_its_owner_alone_also_one_of_an_earlier_version() {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "nothing may be skipped in CI: not root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let old = folder.path().join("old.lock");
        std::fs::write(&old, "").unwrap();
        std::fs::set_permissions(&old, PermissionsExt::from_mode(0o644)).unwrap();
        for path in [old, folder.path().join("new.lock")] {
            let held = lock(&path).unwrap().unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
            assert!(lock(&path).unwrap().is_none(), "held");
            drop(held);
        }
    }

    #[test]
    fn a_folder_is_made_anew_and_no_file_in_it_is_given_away() {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "nothing may be skipped in CI: not root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let (dir, secret) = (folder.path().join("me"), folder.path().join("secret"));
        fresh(&dir, 2_102, 0o755).unwrap();
        std::fs::write(&secret, "root's").unwrap();
        std::fs::hard_link(&secret, dir.join("access.log")).unwrap();
        fresh(&dir, 2_103, 0o700).unwrap();
        let made = std::fs::metadata(&dir).unwrap();
        assert_eq!((made.uid(), made.gid(), made.mode() & 0o777), (2_103, 2_103, 0o700));
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
        assert_eq!(std::fs::metadata(&secret).unwrap().uid(), 0);
    }
}
