//! The directory: which workload or service is at an address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::policy::Policy;

/// One meshed workload, as the directory knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Identifies this run of the workload: when an address is reused, its next workload has another UID.
    pub uid: String,
    /// Name for logs and metrics; never used for a decision.
    pub name: String,
    /// IP addresses of the workload.
    pub addresses: Vec<IpAddr>,
    /// SPIFFE IDs that a peer at these addresses may prove. A sidecar accepts no other.
    pub spiffe_ids: BTreeSet<String>,
    /// TCP port on which its sidecar accepts mTLS (15008 by default).
    pub mesh_port: u16,
    /// Policy of its sidecar for incoming traffic.
    pub policy: Policy,
    /// Where it runs.
    pub place: Place,
}

/// Where a workload runs. An empty text means that it is not known; it then matches nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// Name of its node.
    pub node: String,
    /// Zone of its node (label `topology.kubernetes.io/zone`).
    pub zone: String,
}

/// A virtual address that stands for several endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Identifies this object, as [`Workload::uid`] does.
    pub uid: String,
    /// Name for logs and metrics; never used for a decision.
    pub name: String,
    /// Virtual IP addresses of the service.
    pub addresses: Vec<IpAddr>,
    /// What is behind each service port.
    pub ports: BTreeMap<u16, ServicePort>,
    /// Whether the addresses are a mere claim: whoever made the service chose them (`externalIPs`). A strict caller does
    /// not follow it.
    pub claimed: bool,
}

/// What is behind one port of a service, and how a client chooses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServicePort {
    /// The endpoints, ready or not.
    pub endpoints: Vec<Endpoint>,
    /// How long a client stays with an endpoint after its last new connection; `None` if each connection chooses anew.
    pub affinity: Option<Duration>,
    /// Whether clients use endpoints of their own node only.
    pub local: bool,
}

/// One endpoint behind a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// IP address and port that the endpoint listens on.
    pub address: SocketAddr,
    /// Whether a meshed workload is at this address.
    pub meshed: bool,
    /// Whether the endpoint takes new connections.
    pub readiness: Readiness,
    /// Name of its node; empty if it is not known or nobody needs it.
    pub node: String,
    /// Whose clients should prefer it.
    pub hints: Hints,
}

/// Whether an endpoint takes new connections, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Readiness {
    /// It takes them.
    Ready,
    /// It is terminating and still serves: it takes them where no other endpoint is ready.
    Draining,
    /// It takes none.
    NotReady,
}

/// Whose clients should prefer an endpoint. Empty lists mean that nobody said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hints {
    /// Names of nodes.
    pub nodes: Vec<String>,
    /// Names of zones.
    pub zones: Vec<String>,
}

impl Service {
    /// The endpoints behind a service port, ready or not; empty for a port that the service does not have.
    pub fn endpoints(&self, port: u16) -> &[Endpoint] {
        self.ports.get(&port).map_or(&[], |port| &port.endpoints)
    }
}

/// What the directory says about an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A workload with a sidecar of its own.
    Meshed(Arc<Workload>),
    /// A service's virtual address: pick one of its endpoints and look that up.
    Service(Arc<Service>),
    /// The directory is complete and nothing of the mesh is at this address.
    NotMeshed,
}
