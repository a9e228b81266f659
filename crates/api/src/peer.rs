//! Who is on the other end of a connection, as request extensions carry it to a gRPC service.

use std::net::SocketAddr;
use std::sync::Arc;

use countersign_identity::verify::VerifiedPeer;

use crate::process::Snapshot;

/// A caller over TLS.
#[derive(Debug, Clone)]
pub struct TlsPeer {
    /// Where from.
    pub address: SocketAddr,
    /// Who; `None` if it showed no certificate.
    pub svid: Option<Arc<VerifiedPeer>>,
}

/// A caller over a Unix socket, as the kernel says.
#[derive(Debug, Clone)]
pub struct UnixPeer {
    /// Process, in the reader's PID namespace; 0 if it is not visible there.
    pub pid: i32,
    /// Effective user at connect time.
    pub uid: u32,
    /// Effective group at connect time.
    pub gid: u32,
    /// Handle to the process itself, which stays right when the number is used again. `None` on kernels without it.
    pub pidfd: Option<Arc<std::os::fd::OwnedFd>>,
    /// When the process started, in clock ticks since boot; `None` where it is not certain whose start `/proc` told.
    pub started: Option<u64>,
    /// What `/proc` said of the process when the connection was accepted; `None` if it is not visible here.
    pub at_accept: Option<Arc<Snapshot>>,
}
