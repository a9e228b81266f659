//! The other end of a connection, as request extensions carry it to gRPC services.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use countersign_identity::verify::VerifiedPeer;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::process::{Snapshot, start_time};

/// A caller over TLS.
#[derive(Debug, Clone)]
pub struct TlsPeer {
    /// Remote IP address and port.
    pub address: SocketAddr,
    /// The verified peer; `None` if the client sent no certificate.
    pub svid: Option<Arc<VerifiedPeer>>,
}

/// A caller over a Unix socket, as reported by the kernel.
#[derive(Debug, Clone)]
pub struct UnixPeer {
    /// Process ID in our PID namespace; 0 if the process is not visible there.
    pub pid: i32,
    /// Effective user ID at connect time.
    pub uid: u32,
    /// Effective group ID at connect time.
    pub gid: u32,
    /// Handle to the process itself, which stays valid when its ID is reused. `None` on kernels without `SO_PEERPIDFD`.
    pub pidfd: Option<Arc<std::os::fd::OwnedFd>>,
    /// Start time of the process in clock ticks since boot; `None` if it is uncertain whose start time `/proc` showed.
    pub started: Option<u64>,
    /// What `/proc` said about the process when the connection was accepted; `None` if the process is not visible.
    pub at_accept: Option<Arc<Snapshot>>,
}

impl UnixPeer {
    /// Whether the process that connected is still alive: until then its ID is its own, and what `/proc` shows of that ID
    /// is about it.
    pub fn is_there(&self) -> bool {
        if let Some(pidfd) = &self.pidfd {
            // A pidfd becomes readable when its process ends (pidfd_open(2)).
            let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
            return poll(&mut fds, PollTimeout::ZERO) == Ok(0);
        }
        // Kernels before 6.5: the same ID with the same start time is the same process.
        self.started.is_some() && start_time(self.pid) == self.started
    }
}
