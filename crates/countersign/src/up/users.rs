//! Users of a mesh's processes: its server, its sidecars, and the workloads that name none. An agent identifies callers
//! by their users, so these must be shared with no other mesh and no other process of the machine.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;

use super::account::{Account, known_uids};
use super::mesh_file::MAX_WORKLOADS;
use super::run_directory::{RUN_DIR, every_process, lock};

/// User IDs of the first mesh, as documented.
const FIRST_SERVER: u32 = 2_100;
const FIRST_SIDECAR: u32 = 2_102;
const FIRST_WORKLOAD: u32 = 20_000;
/// User IDs of further meshes: a range where neither login.defs(5), containers nor directory services assign users
/// (systemd's "Users, Groups, UIDs and GIDs" lists 1879048192 to 2147352575 as unused).
const FURTHER: u32 = 2_100_000_000;
/// Number of user IDs per further mesh: the server, then sidecars, then workloads.
const STEP: u32 = 1_000;
/// Most meshes on one machine at a time.
const MAX_MESHES: u32 = 64;

/// The user IDs of one mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Users {
    server: u32,
    first_sidecar: u32,
    first_workload: u32,
}

/// User IDs that are reserved for one mesh while this is held.
pub struct Held {
    /// The reserved user IDs.
    pub users: Users,
    /// The mesh's number on the machine.
    pub number: u32,
    path: PathBuf,
    _lock: Flock<File>,
}

impl Users {
    /// User IDs of the mesh with this number on the machine.
    fn of_mesh(number: u32) -> Self {
        match number {
            0 => Self { server: FIRST_SERVER, first_sidecar: FIRST_SIDECAR, first_workload: FIRST_WORKLOAD },
            n => {
                let server = FURTHER + n * STEP;
                Self { server, first_sidecar: server + 1, first_workload: server + 500 }
            }
        }
    }

    /// User ID of the server.
    pub fn server(self) -> u32 {
        self.server
    }

    /// User ID of the sidecar of the workload with this number.
    pub fn sidecar(self, number: usize) -> u32 {
        self.first_sidecar + small(number)
    }

    /// Account of the workload with this number, if it names none.
    pub fn workload(self, number: usize) -> Account {
        Account::of_uid(self.first_workload + small(number))
    }

    fn ranges(self) -> [Range<u32>; 3] {
        let many = small(MAX_WORKLOADS);
        [
            self.server..self.server + 1,
            self.first_sidecar..self.first_sidecar + many,
            self.first_workload..self.first_workload + many,
        ]
    }

    fn contain(self, uid: u32) -> bool {
        self.ranges().iter().any(|range| range.contains(&uid))
    }

    /// Every process that runs as one of them. A user that the machine's table knows by now is somebody else's too.
    pub fn processes(self) -> Vec<i32> {
        let known: BTreeSet<u32> = known_uids().into_iter().collect();
        processes_of(|uid| self.contain(uid) && !known.contains(&uid))
    }

    /// The users of the mesh with this number on the machine; `None` while another mesh has them.
    pub fn hold(number: u32) -> io::Result<Option<Held>> {
        if number >= MAX_MESHES {
            return Ok(None);
        }
        let path = Path::new(RUN_DIR).join(format!("users-{number}.lock"));
        let lock = lock(&path)?;
        Ok(lock.map(|lock| Held { users: Self::of_mesh(number), number, path, _lock: lock }))
    }

    /// Takes users that nobody on this machine has: no mesh that is up, no entry of its table, no process.
    pub fn take() -> io::Result<Held> {
        let somebodys: BTreeSet<u32> = known_uids().into_iter().chain(users_with_processes()).collect();
        for number in 0..MAX_MESHES {
            let Some(held) = Self::hold(number)? else { continue };
            if !somebodys.iter().any(|uid| held.users.contain(*uid)) {
                return Ok(held);
            }
        }
        Err(io::Error::other(format!("{MAX_MESHES} meshes' users are all taken")))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // A lock counts by being held, not by its file.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Why a workload cannot run as this user; `None` if it can. Meshes assign it to sidecars, whose traffic is never
/// redirected, or to workloads, whose identity it would get; or a sidecar that was started by hand uses it.
pub fn refused(uid: u32) -> Option<String> {
    let whose = (0..MAX_MESHES).map(Users::of_mesh).find(|users| users.contain(uid));
    if let Some(users) = whose {
        let [.., workloads] = users.ranges();
        return Some(if workloads.contains(&uid) {
            format!("uid {uid} is kept for workloads that name no user, whose identity it would get; use another user")
        } else {
            format!("uid {uid} is kept for sidecars, whose traffic is never caught; use another user")
        });
    }
    // Root can become any user and remove any rule, so excluding it gains nothing.
    if uid == 0 {
        return None;
    }
    sidecar_of(uid).map(|pid| {
        format!("uid {uid} is that of a sidecar on this machine (process {pid}), whose traffic is never caught; use another user")
    })
}

/// Process ID of a sidecar that runs as this user.
fn sidecar_of(uid: u32) -> Option<i32> {
    every_process().into_iter().find(|pid| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = command.split(|b| *b == 0);
        let program = words.next().and_then(|w| w.rsplit(|b| *b == b'/').next());
        program == Some(&b"countersign"[..]) && words.next() == Some(&b"proxy"[..]) && uids_of(*pid).contains(&uid)
    })
}

/// Every user that a process runs as.
pub fn users_with_processes() -> BTreeSet<u32> {
    every_process().into_iter().flat_map(uids_of).collect()
}

/// Every process that runs as a user of this kind.
pub fn processes_of(is_meant: impl Fn(u32) -> bool) -> Vec<i32> {
    every_process().into_iter().filter(|pid| uids_of(*pid).into_iter().any(&is_meant)).collect()
}

/// Real, effective, saved and file system user of a process (proc(5)); none when it is gone, or only waits for its parent to
/// ask how it ended.
pub fn uids_of(pid: i32) -> Vec<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let state = status.lines().find_map(|l| l.strip_prefix("State:")).unwrap_or_default().trim_start();
    if state.starts_with(['Z', 'X']) {
        return vec![];
    }
    let line = status.lines().find_map(|l| l.strip_prefix("Uid:")).unwrap_or_default();
    line.split_whitespace().filter_map(|n| n.parse().ok()).collect()
}

fn small(number: usize) -> u32 {
    // Numbers of workloads are below MAX_WORKLOADS.
    u32::try_from(number).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_meshes_and_no_two_kinds_share_a_user() {
        let mut seen = BTreeSet::new();
        for number in 0..MAX_MESHES {
            for range in Users::of_mesh(number).ranges() {
                for uid in range {
                    assert!(seen.insert(uid), "uid {uid} is there twice");
                    assert!(refused(uid).is_some(), "a workload may not name {uid}");
                }
            }
        }
        assert_eq!(Users::of_mesh(0).sidecar(0), 2102, "what the guide's commands by hand name");
        assert_eq!(refused(0), None);
        assert_eq!(refused(65_534), None);
    }
}
