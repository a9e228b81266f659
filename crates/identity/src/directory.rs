//! The directory: which workload or service is at an address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

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
    /// The endpoints behind each service port.
    pub ports: BTreeMap<u16, Vec<Endpoint>>,
}

/// One endpoint behind a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// IP address and port that the endpoint listens on.
    pub address: SocketAddr,
    /// Whether a meshed workload is at this address.
    pub meshed: bool,
    /// Whether the endpoint accepts new connections.
    pub ready: bool,
}

impl Service {
    /// The endpoints behind a service port, ready or not; empty for a port that the service does not have.
    pub fn endpoints(&self, port: u16) -> &[Endpoint] {
        self.ports.get(&port).map_or(&[], Vec::as_slice)
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
