//! Who is calling: the process behind a connection, made sure of before and after anything is read about it.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use countersign_api::files::read_bounded;
use countersign_api::peer::{UnixPeer, start_time};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Largest file of a process that is read, in bytes.
const MAX_PROC_BYTES: u64 = 256 * 1024;

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
    /// Its executable as the process sees it.
    pub exe: Option<PathBuf>,
    /// Its cgroups, as `/proc/PID/cgroup` lists them.
    pub cgroup: String,
    /// Lives in another PID or user namespace than the agent.
    pub foreign: bool,
}

/// Looks a caller up. What is read counts only if the process that connected is still the one with this number.
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
    let read = |file: &'static str| {
        let content = read_bounded(Path::new(&format!("/proc/{pid}/{file}")), MAX_PROC_BYTES);
        content.map(|c| String::from_utf8_lossy(&c).into_owned()).map_err(|e| PeerError::Proc {
            pid,
            file,
            why: e.to_string(),
        })
    };
    let (status, cgroup) = (read("status"), read("cgroup"));
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    // Only now is it certain whose data was read: a process that is alive still has its number.
    still_there(peer)?;
    let groups = status?.lines().find_map(|l| l.strip_prefix("Groups:").map(parse_groups)).unwrap_or_default();
    Ok(Process { pid, uid: peer.uid, gid: peer.gid, groups, exe, cgroup: cgroup?, foreign })
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

fn parse_groups(list: &str) -> BTreeSet<u32> {
    list.split_whitespace().filter_map(|g| g.parse().ok()).collect()
}

#[cfg(test)]
mod tests;
