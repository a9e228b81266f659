//! The calling process behind a connection, verified before and after anything is read about it.

use std::collections::BTreeSet;

use countersign_api::peer::UnixPeer;
use countersign_api::process::{Executable, Snapshot};
use countersign_watch::cgroup::container_of;

/// Why a caller is not attested.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PeerError {
    /// The caller is in a PID namespace that we cannot see into.
    #[error("the caller's process is not visible from the agent's PID namespace")]
    Invisible,
    /// The caller has ended, and its process ID may belong to another process.
    #[error("the calling process {0} has ended; whoever has its number now is somebody else")]
    Gone(i32),
    /// The caller's uid comes from another namespace, which may assign any uid.
    #[error(
        "the calling process {pid} lives in another {namespace} namespace than the agent; its uid proves nothing here"
    )]
    ForeignNamespace {
        /// Process ID of the caller.
        pid: i32,
        /// The namespace type, `pid` or `user`.
        namespace: &'static str,
    },
    /// The caller has changed since it connected: it runs another program, or moved to another container.
    #[error(
        "the calling process {pid} has changed its {what} since it connected; facts of one do not count for the other. Connect anew"
    )]
    Changed {
        /// Process ID of the caller.
        pid: i32,
        /// The changed property: `executable`, `groups` or `container`.
        what: &'static str,
    },
    /// A file in `/proc` cannot be read.
    #[error("cannot read /proc/{pid}/{file}: {why}")]
    Proc {
        /// Process ID of the caller.
        pid: i32,
        /// Name of the file in `/proc/PID`.
        file: &'static str,
        /// Error of the operating system.
        why: String,
    },
}

impl PeerError {
    /// Its name in metrics and `status`, stable between releases.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Invisible => "caller_invisible",
            Self::Gone(_) => "caller_gone",
            Self::ForeignNamespace { .. } => "foreign_namespace",
            Self::Changed { .. } => "caller_changed",
            Self::Proc { .. } => "proc_unreadable",
        }
    }
}

/// Verified facts about a caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Process ID in the agent's PID namespace.
    pub pid: i32,
    /// Effective user ID at connect time.
    pub uid: u32,
    /// Effective group ID at connect time.
    pub gid: u32,
    /// Supplementary group IDs.
    pub groups: BTreeSet<u32>,
    /// The program that it ran at connect time; `None` if not readable.
    pub exe: Option<Executable>,
    /// Content of `/proc/PID/cgroup` at connect time.
    pub cgroup: String,
    /// Whether it is in another PID or user namespace than the agent.
    pub foreign: bool,
}

/// Looks a caller up as it was when its connection was accepted, provided that it has not changed. A process may run
/// another program on the same connection, or leave the connection to a child and then run another program itself; both
/// are rejected.
pub fn look_up(peer: &UnixPeer, foreign_namespaces: bool) -> Result<Process, PeerError> {
    let pid = peer.pid;
    if pid <= 0 {
        return Err(PeerError::Invisible);
    }
    let mut foreign = false;
    for namespace in ["pid", "user"] {
        match shares_namespace(pid, namespace) {
            Ok(shares) => foreign |= !shares,
            // Without the right to read this (ptrace(2), "access mode checking"), an agent treats every caller as
            // foreign.
            Err(PeerError::Proc { .. }) if foreign_namespaces => foreign = true,
            Err(error) => return Err(error),
        }
        if foreign && !foreign_namespaces {
            return Err(PeerError::ForeignNamespace { pid, namespace });
        }
    }
    let (then, now) = unchanged(peer)?;
    // Groups that it has dropped since it connected do not count; it cannot have gained any.
    let groups = then.groups.intersection(&now.groups).copied().collect();
    let (exe, cgroup) = (then.exe.clone(), then.cgroup.clone());
    Ok(Process { pid, uid: peer.uid, gid: peer.gid, groups, exe, cgroup, foreign })
}

/// Checks that the connecting process is alive and unchanged: same program, same container, no additional group.
/// Returns its state at connect time and now.
pub fn unchanged(peer: &UnixPeer) -> Result<(&Snapshot, Snapshot), PeerError> {
    let pid = peer.pid;
    let now = Snapshot::read(pid);
    // Only this proves whose data was read: a process that is still alive has had its ID the whole time.
    still_there(peer)?;
    let unreadable = |why: String| PeerError::Proc { pid, file: "status", why };
    let now = now.map_err(|e| unreadable(e.to_string()))?;
    let then = peer.at_accept.as_deref().ok_or_else(|| unreadable("it was not readable when it connected".into()))?;
    let changed = |what| Err(PeerError::Changed { pid, what });
    // Compared by file, not by path: a running program whose file is replaced is still the same program.
    if then.exe.as_ref().map(|e| e.file) != now.exe.as_ref().map(|e| e.file) {
        return changed("executable");
    }
    if !now.groups.is_subset(&then.groups) {
        return changed("groups");
    }
    // A move to another cgroup within the same container, or outside of any, changes nothing.
    if then.cgroup != now.cgroup && container_of(&then.cgroup).ok() != container_of(&now.cgroup).ok() {
        return changed("container");
    }
    Ok((then, now))
}

/// Checks that the connecting process is alive. Errors: [`PeerError::Gone`].
pub fn still_there(peer: &UnixPeer) -> Result<(), PeerError> {
    if peer.is_there() { Ok(()) } else { Err(PeerError::Gone(peer.pid)) }
}

fn shares_namespace(pid: i32, namespace: &str) -> Result<bool, PeerError> {
    let theirs = std::fs::read_link(format!("/proc/{pid}/ns/{namespace}"));
    let theirs = theirs.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => PeerError::Gone(pid),
        _ => PeerError::Proc { pid, file: "ns", why: e.to_string() },
    })?;
    let ours = std::fs::read_link(format!("/proc/self/ns/{namespace}"));
    Ok(ours.is_ok_and(|ours| ours == theirs))
}

#[cfg(test)]
mod tests;
