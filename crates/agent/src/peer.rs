//! Who is calling: the process behind a connection, made sure of before and after anything is read about it.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use countersign_api::peer::UnixPeer;
use countersign_api::process::{Executable, Snapshot, start_time};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::workload_attestor::container_of;

/// Why a caller is not attested.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PeerError {
    /// It is in a PID namespace that we cannot see into.
    #[error("the caller's process is not visible from the agent's PID namespace")]
    Invisible,
    /// It ended, and its number may be somebody else's by now.
    #[error("the calling process {0} has ended; whoever has its number now is somebody else")]
    Gone(i32),
    /// Its uid is the word of another namespace.
    #[error(
        "the calling process {pid} lives in another {namespace} namespace than the agent; its uid proves nothing here"
    )]
    ForeignNamespace {
        /// Process.
        pid: i32,
        /// `pid` or `user`.
        namespace: &'static str,
    },
    /// It is not what it was when it connected: it ran another program since, or moved to another container.
    #[error(
        "the calling process {pid} has changed its {what} since it connected; facts of one do not count for the other. Connect anew"
    )]
    Changed {
        /// Process.
        pid: i32,
        /// `executable`, `groups` or `container`.
        what: &'static str,
    },
    /// `/proc` did not tell.
    #[error("cannot read /proc/{pid}/{file}: {why}")]
    Proc {
        /// Process.
        pid: i32,
        /// Which file.
        file: &'static str,
        /// Why.
        why: String,
    },
}

impl PeerError {
    /// Its name in metrics and `status`.
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

/// What is known of a caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Process number.
    pub pid: i32,
    /// Effective user when it connected.
    pub uid: u32,
    /// Effective group when it connected.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: BTreeSet<u32>,
    /// The program that it ran when it connected.
    pub exe: Option<Executable>,
    /// Its cgroups when it connected, as `/proc/PID/cgroup` lists them.
    pub cgroup: String,
    /// Lives in another PID or user namespace than the agent.
    pub foreign: bool,
}

/// Looks a caller up: what it was when its connection was accepted, if it is that still. A process can run another program
/// on the same connection, or leave the connection to a child and run another program itself: then neither counts.
pub fn look_up(peer: &UnixPeer, foreign_namespaces: bool) -> Result<Process, PeerError> {
    let pid = peer.pid;
    if pid <= 0 {
        return Err(PeerError::Invisible);
    }
    let mut foreign = false;
    for namespace in ["pid", "user"] {
        match shares_namespace(pid, namespace) {
            Ok(shares) => foreign |= !shares,
            // An agent without the right to look (ptrace(2), "access mode checking") takes everybody for foreign.
            Err(PeerError::Proc { .. }) if foreign_namespaces => foreign = true,
            Err(error) => return Err(error),
        }
        if foreign && !foreign_namespaces {
            return Err(PeerError::ForeignNamespace { pid, namespace });
        }
    }
    let (then, now) = unchanged(peer)?;
    // Groups that it has given up since it connected do not count; none can have come.
    let groups = then.groups.intersection(&now.groups).copied().collect();
    let (exe, cgroup) = (then.exe.clone(), then.cgroup.clone());
    Ok(Process { pid, uid: peer.uid, gid: peer.gid, groups, exe, cgroup, foreign })
}

/// Fails unless the process that connected is alive and is what it was: the same program, in the same container, with no
/// group more. Returns what it was then and is now.
pub fn unchanged(peer: &UnixPeer) -> Result<(&Snapshot, Snapshot), PeerError> {
    let pid = peer.pid;
    let now = Snapshot::read(pid);
    // Only now is it certain whose data was read: a process that is alive still has its number.
    still_there(peer)?;
    let unreadable = |why: String| PeerError::Proc { pid, file: "status", why };
    let now = now.map_err(|e| unreadable(e.to_string()))?;
    let then = peer.at_accept.as_deref().ok_or_else(|| unreadable("it was not readable when it connected".into()))?;
    let changed = |what| Err(PeerError::Changed { pid, what });
    // By the file and not by its path: a program whose file is replaced while it runs is still the same program.
    if then.exe.as_ref().map(|e| e.file) != now.exe.as_ref().map(|e| e.file) {
        return changed("executable");
    }
    if !now.groups.is_subset(&then.groups) {
        return changed("groups");
    }
    // A process that moves to another cgroup of its own container, or of none, is where it was.
    if then.cgroup != now.cgroup && container_of(&then.cgroup).ok() != container_of(&now.cgroup).ok() {
        return changed("container");
    }
    Ok((then, now))
}

/// Fails when the process that connected has ended.
pub fn still_there(peer: &UnixPeer) -> Result<(), PeerError> {
    let gone = || PeerError::Gone(peer.pid);
    if let Some(pidfd) = &peer.pidfd {
        // A pidfd becomes readable when its process ends (pidfd_open(2)).
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        let ended = poll(&mut fds, PollTimeout::ZERO).map_err(|_| gone())? != 0;
        return if ended { Err(gone()) } else { Ok(()) };
    }
    // Kernels before 6.5: the same number with the same start time is the same process.
    if peer.started.is_some() && start_time(peer.pid) == peer.started { Ok(()) } else { Err(gone()) }
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
