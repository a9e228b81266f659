//! Credentials of the process behind a Unix socket, read from the kernel when the connection is accepted.
//!
//! A process ID proves nothing for long, because the process may end and its ID be reused. A pidfd refers to the
//! process itself, so where the kernel supports it (Linux 6.5), only the pidfd counts.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};
use tokio::net::UnixStream;

use crate::peer::UnixPeer;
use crate::process::{self, Snapshot};

/// Why the credentials are unknown.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The process ended before the connection was accepted. Its ID may belong to another process by now.
    #[error("process {0}, which connected, has ended")]
    Gone(i32),
    /// The kernel did not answer, for lack of descriptors or otherwise.
    #[error("cannot ask the kernel who connected: {0}")]
    Kernel(#[from] io::Error),
}

/// Reads the credentials of a connection: pid, uid and gid at connect time, a pidfd if the kernel supports it, and a
/// snapshot of the process from `/proc`.
pub fn peer_credentials(stream: &UnixStream) -> Result<UnixPeer, CredentialsError> {
    let accepted_at = process::ticks_since_boot();
    let cred = getsockopt(stream, sockopt::PeerCredentials).map_err(io::Error::from)?;
    let connected = Connected { pid: cred.pid(), uid: cred.uid(), gid: cred.gid() };
    judge(&connected, getsockopt(stream, sockopt::PeerPidfd), accepted_at)
}

/// `SO_PEERCRED`: the process and its effective user and group when it connected.
struct Connected {
    pid: i32,
    uid: u32,
    gid: u32,
}

/// Combines the kernel's answers. `pidfd` is the result of `SO_PEERPIDFD`, `accepted_at` is in clock ticks since boot.
fn judge(
    connected: &Connected,
    pidfd: nix::Result<OwnedFd>,
    accepted_at: Option<u64>,
) -> Result<UnixPeer, CredentialsError> {
    let &Connected { pid, uid, gid } = connected;
    let (pidfd, started) = match pidfd {
        Ok(pidfd) => (Some(Arc::new(pidfd)), process::start_time(pid)),
        // The one error that means "this kernel has no such option". The start time has to identify the process
        // instead.
        Err(Errno::ENOPROTOOPT) => (None, start_of(connected, accepted_at)),
        // Out of descriptors or memory, which says nothing about the peer.
        Err(error @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)) => {
            return Err(CredentialsError::Kernel(error.into()));
        }
        // EINVAL (6.5 to 6.15), ESRCH, ENODATA: the process has been reaped. Any other error proves nothing either.
        Err(_) => return Err(CredentialsError::Gone(pid)),
    };
    let at_accept = Snapshot::read(pid).ok().map(Arc::new);
    Ok(UnixPeer { pid, uid, gid, pidfd, started, at_accept })
}

/// The start time of the process that connected; `None` if the process with its ID now may be another one: it belongs
/// to another user, or it started after the connection was accepted.
fn start_of(connected: &Connected, accepted_at: Option<u64>) -> Option<u64> {
    let started = process::start_time(connected.pid)?;
    let same_user = process::effective_uid(connected.pid) == Some(connected.uid);
    (same_user && started <= accepted_at?).then_some(started)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn this_process() -> Connected {
        let pid = i32::try_from(std::process::id()).unwrap();
        Connected { pid, uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() }
    }

    #[test]
    fn a_peer_whose_pidfd_the_kernel_denies_is_gone_whoever_has_its_number_now() {
        // The ID belongs to a running process, this one: exactly what a reused ID looks like.
        for errno in [Errno::EINVAL, Errno::ESRCH, Errno::ENODATA, Errno::EPERM] {
            let judged = judge(&this_process(), Err(errno), process::ticks_since_boot());
            assert!(matches!(judged, Err(CredentialsError::Gone(_))), "{errno}: {judged:?}");
        }
    }

    #[test]
    fn a_lack_of_descriptors_is_not_the_peers_end() {
        let judged = judge(&this_process(), Err(Errno::EMFILE), process::ticks_since_boot());
        assert!(matches!(judged, Err(CredentialsError::Kernel(_))), "{judged:?}");
    }

    #[test]
    fn without_pidfds_the_start_time_counts_only_for_the_same_user_and_before_the_accept() {
        let judged = |connected: &Connected, at: Option<u64>| judge(connected, Err(Errno::ENOPROTOOPT), at).unwrap();
        let (here, now) = (this_process(), process::ticks_since_boot());
        let started = process::start_time(here.pid);
        assert!(started.is_some());
        assert_eq!(judged(&here, now).started, started);
        let other = Connected { uid: here.uid + 1, ..this_process() };
        assert_eq!(judged(&other, now).started, None, "the number belongs to another user's process");
        let before = started.unwrap().checked_sub(1);
        assert_eq!(judged(&here, before).started, None, "the process started after the accept");
        assert_eq!(judged(&here, None).started, None, "no clock, no proof");
    }
}
