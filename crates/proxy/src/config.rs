//! What a sidecar is told when it starts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use countersign_api::reopen::Reopen;
use countersign_identity::TrustDomain;
use countersign_identity::policy::Policy;

/// A sidecar's settings. Every combination of valid fields is a valid sidecar.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where its identity comes from.
    pub identity: IdentitySource,
    /// Where its traffic comes from and goes to.
    pub routing: Routing,
    /// Where `/ready`, `/live` and `/metrics` are served.
    pub http: Option<SocketAddr>,
    /// Unix socket for `countersign status`, mode 0600.
    pub admin_socket: Option<PathBuf>,
    /// One line a connection goes here; `None` writes none.
    pub access_log: Option<AccessLogTarget>,
    /// Threads that carry traffic.
    pub workers: usize,
    /// How long open connections may go on after SIGTERM.
    pub drain: Duration,
    /// Connections at once at most, and from one address.
    pub limits: Limits,
    /// Callers whose handshake is not finished.
    pub handshakes: Handshakes,
    /// Timeouts.
    pub timeouts: Timeouts,
    /// How an endpoint of a service is chosen.
    pub balance: Balance,
    /// The app's ports at which a PROXY protocol header stands in front of each connection's bytes.
    pub proxy_protocol: BTreeSet<u16>,
    /// The app's probes, which are asked through us.
    pub probes: BTreeMap<String, Probe>,
    /// Asks for the access log to be opened anew (SIGHUP).
    pub reopen: Reopen,
}

/// How an endpoint of a service is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Balance {
    /// The one with fewer connections under way of two random ones.
    #[default]
    LeastConnections,
    /// One after the other.
    RoundRobin,
}

/// One question to the app, asked at the address that the question came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The app's port.
    pub port: u16,
    /// What is asked there.
    pub kind: ProbeKind,
    /// How long the answer may take.
    pub timeout: Duration,
}

/// What a probe asks, as Kubernetes defines it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeKind {
    /// A GET; 200 to 399 is good.
    Http {
        /// Over TLS, whose certificate is not checked.
        tls: bool,
        /// Path and query.
        path: String,
        /// Headers in order.
        headers: Vec<(String, String)>,
    },
    /// A connection that opens is good.
    Tcp,
    /// `grpc.health.v1.Health/Check`; SERVING is good.
    Grpc {
        /// Service name, may be empty.
        service: String,
    },
}

/// Where access log lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogTarget {
    /// Standard output.
    Stdout,
    /// Appended to a file.
    File(PathBuf),
}

/// Where SVID and bundles come from.
#[derive(Debug, Clone)]
pub enum IdentitySource {
    /// The agent's Workload API, whose directory is used too.
    Agent {
        /// Its Unix socket.
        socket: PathBuf,
    },
    /// PEM files, read again when they change.
    Files {
        /// Leaf first.
        chain: PathBuf,
        /// PKCS#8.
        key: PathBuf,
        /// A trust domain and its authorities, for each domain whose peers are accepted.
        bundles: Vec<(TrustDomain, PathBuf)>,
    },
}

/// Where traffic comes from and goes to.
#[derive(Debug, Clone)]
pub enum Routing {
    /// Caught by the redirect; the agent's directory says who is where.
    Redirected(Ports),
    /// One listener, one destination.
    Fixed {
        /// Plaintext in, mTLS out.
        outbound: Option<FixedOutbound>,
        /// mTLS in, plaintext out.
        inbound: Option<FixedInbound>,
    },
}

/// The ports of a sidecar behind a redirect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Where outgoing connections are redirected to.
    pub outbound: u16,
    /// Where incoming plaintext is redirected to.
    pub inbound: u16,
    /// mTLS.
    pub mesh: u16,
    /// `/ready`, `/live`, `/metrics`.
    pub http: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self { outbound: 15001, inbound: 15006, mesh: 15008, http: 15020 }
    }
}

impl Ports {
    /// Whether a port is the sidecar's own: nothing is ever forwarded to it.
    pub fn contains(&self, port: u16) -> bool {
        [self.outbound, self.inbound, self.mesh, self.http].contains(&port)
    }
}

/// A fixed way out.
#[derive(Debug, Clone)]
pub struct FixedOutbound {
    /// Where plaintext comes in.
    pub listen: SocketAddr,
    /// The other sidecar.
    pub target: SocketAddr,
    /// Who must stand there; any of these.
    pub expect: BTreeSet<String>,
}

/// A fixed way in.
#[derive(Debug, Clone)]
pub struct FixedInbound {
    /// Where mTLS comes in.
    pub listen: SocketAddr,
    /// The app.
    pub target: SocketAddr,
    /// Who may call.
    pub policy: Policy,
}

/// Bounds on connections. Neither direction can take all of them: see [`Limits::one_way`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// At once, in both directions together.
    pub connections: usize,
    /// At once from one address that calls us.
    pub connections_per_peer: usize,
}

/// Bounds on callers of the mesh port whose handshake is not finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handshakes {
    /// At once.
    pub total: usize,
    /// At once from one address, or from one IPv6 network of 64 bits.
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
    /// What fits into a quarter of this much memory, in bytes: anybody may begin one.
    pub fn within(memory: u64) -> Self {
        let total = fit(memory / 4 / HANDSHAKE, 32, 16_384);
        Self { total, per_peer: total / 2 }
    }
}

fn fit(count: u64, least: usize, most: usize) -> usize {
    usize::try_from(count).unwrap_or(most).clamp(least, most)
}

/// What fits into the memory of this process.
impl Default for Limits {
    fn default() -> Self {
        Self::within(crate::memory::limit().unwrap_or(u64::MAX))
    }
}

/// What fits into the memory of this process.
impl Default for Handshakes {
    fn default() -> Self {
        Self::within(crate::memory::limit().unwrap_or(u64::MAX))
    }
}

/// Bounds on time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// A TCP connection, to an app or to another sidecar.
    pub connect: Duration,
    /// A TLS handshake, on either side.
    pub handshake: Duration,
    /// The preamble and its answer.
    pub preamble: Duration,
    /// An answer of the directory, an SVID at the start.
    pub lookup: Duration,
    /// How long another machine may acknowledge nothing before its connection is reset.
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
