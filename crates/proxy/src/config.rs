//! Settings of a sidecar, read once at start.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use countersign_api::reopen::Reopen;
use countersign_identity::TrustDomain;
use countersign_identity::policy::Policy;

use crate::exemption::Asking;

/// Settings of a sidecar. Every combination of valid fields is a valid sidecar.
#[derive(Debug, Clone)]
pub struct Config {
    /// Source of the SVID and the bundles.
    pub identity: IdentitySource,
    /// Which connections are accepted, and where they are forwarded.
    pub routing: Routing,
    /// Whom to ask to let our own connections pass the redirect; `None` where they do by our user ID.
    pub exemption: Option<Asking>,
    /// Address for `/ready`, `/live`, `/metrics`, `/mode` and probes; `None` serves none of them.
    pub http: Option<SocketAddr>,
    /// Unix socket for `countersign status`, mode 0600; `None` opens none.
    pub admin_socket: Option<PathBuf>,
    /// Target of the access log, one line per connection; `None` writes none.
    pub access_log: Option<AccessLogTarget>,
    /// Number of threads that carry traffic, at least 1.
    pub workers: usize,
    /// How long open connections may continue after SIGTERM.
    pub drain: Duration,
    /// Most open connections, in total and per peer address.
    pub limits: Limits,
    /// Most callers whose handshake is unfinished.
    pub handshakes: Handshakes,
    /// Bounds on the time of each step of a connection.
    pub timeouts: Timeouts,
    /// Strategy for selecting an endpoint of a service.
    pub balance: Balance,
    /// The app's ports where each connection starts with a PROXY protocol header.
    pub proxy_protocol: BTreeSet<u16>,
    /// The app's health checks that `/probe/NAME` runs, by name (`SECRET/CONTAINER/KIND`).
    pub probes: BTreeMap<String, Probe>,
    /// Signals that the access log is to be reopened (SIGHUP, after logrotate).
    pub reopen: Reopen,
}

/// Strategy for selecting an endpoint of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Balance {
    /// Of two random endpoints, the one with fewer open connections. The default.
    #[default]
    LeastConnections,
    /// Each endpoint in turn.
    RoundRobin,
}

/// One health check of the app, at the address to which the kubelet sent its request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// TCP port of the app.
    pub port: u16,
    /// Protocol of the check, and what it asks.
    pub kind: ProbeKind,
    /// How long the app may take to answer.
    pub timeout: Duration,
}

/// Protocol of a health check, as Kubernetes defines it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeKind {
    /// An HTTP GET; status 200 to 399 is healthy.
    Http {
        /// Whether to use TLS. The certificate is not verified, as with the kubelet.
        tls: bool,
        /// Path with query string.
        path: String,
        /// Request headers in order, name and value.
        headers: Vec<(String, String)>,
    },
    /// A TCP connection; healthy once it opens.
    Tcp,
    /// `grpc.health.v1.Health/Check`; SERVING is healthy.
    Grpc {
        /// Service name in the request; may be empty.
        service: String,
    },
}

/// Target of the access log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogTarget {
    /// Lines go to standard output.
    Stdout,
    /// Lines are appended to this file.
    File(PathBuf),
}

/// Source of the SVID and the trust bundles.
#[derive(Debug, Clone)]
pub enum IdentitySource {
    /// The agent: Workload API for the identity, and its directory for destinations.
    Agent {
        /// Path of the agent's Unix socket.
        socket: PathBuf,
    },
    /// PEM files, reloaded when they change.
    Files {
        /// Certificate chain, leaf first, then intermediates.
        chain: PathBuf,
        /// Private key in PKCS#8.
        key: PathBuf,
        /// Authorities per trust domain, one file each. Peers of other trust domains are rejected.
        bundles: Vec<(TrustDomain, PathBuf)>,
    },
}

/// Which connections are accepted, and where they are forwarded.
#[derive(Debug, Clone)]
pub enum Routing {
    /// Connections come through the redirect, and the agent's directory says what is at their destination.
    Redirected(Ports),
    /// Fixed listeners with one destination each.
    Fixed {
        /// Listener for the app's plaintext, forwarded over mTLS; `None` opens none.
        outbound: Option<FixedOutbound>,
        /// Listener for mTLS, forwarded to the app in plaintext; `None` opens none.
        inbound: Option<FixedInbound>,
    },
}

/// TCP ports of a sidecar behind a redirect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Target of the redirect for outgoing connections (15001).
    pub outbound: u16,
    /// Target of the redirect for incoming plaintext (15006).
    pub inbound: u16,
    /// mTLS from other sidecars (15008); never redirected.
    pub mesh: u16,
    /// `/ready`, `/live`, `/metrics` and probes (15020).
    pub http: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self { outbound: 15001, inbound: 15006, mesh: 15008, http: 15020 }
    }
}

impl Ports {
    /// Whether a port is the sidecar's own. Nothing is ever forwarded to such a port.
    pub fn contains(&self, port: u16) -> bool {
        [self.outbound, self.inbound, self.mesh, self.http].contains(&port)
    }
}

/// Forwards plaintext from a listener to one sidecar over mTLS.
#[derive(Debug, Clone)]
pub struct FixedOutbound {
    /// Listening address for plaintext from the app.
    pub listen: SocketAddr,
    /// mTLS address of the other sidecar.
    pub target: SocketAddr,
    /// SPIFFE IDs that the other sidecar may prove.
    pub expect: BTreeSet<String>,
}

/// Forwards mTLS from a listener to one app in plaintext.
#[derive(Debug, Clone)]
pub struct FixedInbound {
    /// Listening address for mTLS.
    pub listen: SocketAddr,
    /// Address of the app.
    pub target: SocketAddr,
    /// Which callers are admitted.
    pub policy: Policy,
}

/// Bounds on connections. Neither direction can take all of them: see [`Limits::one_way`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most open connections, both directions together.
    pub connections: usize,
    /// At once from one address that calls us.
    pub connections_per_peer: usize,
}

/// Bounds on callers of the mesh port whose handshake is unfinished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handshakes {
    /// Most unfinished handshakes in total.
    pub total: usize,
    /// Most unfinished handshakes per IPv4 address or IPv6 /64 network.
    pub per_peer: usize,
}

/// Memory that one open connection may take, in bytes. Its task and TLS state take some 12 KiB. A peer that stops in the middle
/// makes it hold a part of a record (17 KiB at most), and in each direction what is kept while memory is short
/// (`buffer::SMALL`; what is kept before that is counted in all). The rest is for its queues in the kernel, which lets no
/// socket's queue grow while its group's memory is short.
const CONNECTION: u64 = 64 * 1024;
/// Memory that one unfinished handshake takes when somebody makes it as large as it may be, in bytes: a flight of 50 KiB and
/// the step by which it grew, the state of its task and of TLS, its socket.
const HANDSHAKE: u64 = 80 * 1024;

impl Limits {
    /// What fits into this much memory, in bytes. With the least of them an idle sidecar works where hardly anything fits.
    pub fn within(memory: u64) -> Self {
        let connections = fit(memory / CONNECTION, 128, 65_536);
        Self { connections, connections_per_peer: connections / 2 }
    }

    /// In one direction: a quarter of all is left to the other one, for the app must reach its database however many call it,
    /// and be reached however much it calls.
    pub fn one_way(self) -> usize {
        self.connections - self.connections / 4
    }

    /// Of callers that prove nothing, in all: what is left of their direction is for callers from the mesh.
    pub fn unproven(self) -> usize {
        (self.connections / 2).max(1)
    }

    /// Of callers that prove nothing, from one address or one IPv6 network of 64 bits, which one host may fill alone.
    pub fn unproven_per_peer(self) -> usize {
        (self.unproven() / 2).clamp(1, self.connections_per_peer.max(1))
    }
}

impl Handshakes {
    /// Bounds for a quarter of this much memory, in bytes, because anyone on the network can start a handshake.
    pub fn within(memory: u64) -> Self {
        let total = fit(memory / 4 / HANDSHAKE, 32, 16_384);
        Self { total, per_peer: total / 2 }
    }
}

fn fit(count: u64, least: usize, most: usize) -> usize {
    usize::try_from(count).unwrap_or(most).clamp(least, most)
}

/// Bounds that fit the memory limit of this process.
impl Default for Limits {
    fn default() -> Self {
        Self::within(countersign_api::memory::limit().unwrap_or(u64::MAX))
    }
}

/// Bounds that fit the memory limit of this process.
impl Default for Handshakes {
    fn default() -> Self {
        Self::within(countersign_api::memory::limit().unwrap_or(u64::MAX))
    }
}

/// Bounds on time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP connect to an app or another sidecar (5 s).
    pub connect: Duration,
    /// TLS handshake, on either side (10 s).
    pub handshake: Duration,
    /// Preamble and its answer (10 s).
    pub preamble: Duration,
    /// Waiting for the directory's answer about a destination (5 s).
    pub lookup: Duration,
    /// How long another machine may acknowledge nothing before its connection is reset (25 s).
    pub mesh_user: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            connect: seconds(5),
            handshake: seconds(10),
            preamble: seconds(10),
            lookup: seconds(5),
            mesh_user: seconds(25),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_follow_the_memory() {
        let (all, begun) = (|n: u64| Limits::within(n << 20).connections, |n: u64| Handshakes::within(n << 20).total);
        assert_eq!((all(256), begun(256), Handshakes::within(256 << 20).per_peer), (4_096, 819, 409));
        // What is held by the most of each is no more than there is, from the smallest limit that a sidecar starts with.
        for memory in [16 << 20, 64 << 20, 256 << 20, 1 << 30] {
            let (connections, handshakes) = (Limits::within(memory).connections, Handshakes::within(memory).total);
            assert!(connections as u64 * CONNECTION <= memory && handshakes as u64 * HANDSHAKE <= memory / 4);
        }
        assert_eq!((all(4), begun(4)), (128, 32));
        assert_eq!((all(1 << 20), begun(1 << 20)), (65_536, 16_384));
    }
}
