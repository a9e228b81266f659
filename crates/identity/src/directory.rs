//! Who is at an address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::policy::Policy;

/// One workload of the mesh, as the directory knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Names this run of it: an address that is used again carries another one.
    pub uid: String,
    /// For people.
    pub name: String,
    /// Where it is.
    pub addresses: Vec<IpAddr>,
    /// Who may stand behind those addresses.
    pub spiffe_ids: BTreeSet<String>,
    /// Where its sidecar takes mesh traffic.
    pub mesh_port: u16,
    /// What its sidecar lets through.
    pub policy: Policy,
}

/// A virtual address that stands for several endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Names this run of it.
    pub uid: String,
    /// For people.
    pub name: String,
    /// Where it is reached.
    pub addresses: Vec<IpAddr>,
    /// What stands behind each of its ports.
    pub ports: BTreeMap<u16, Vec<Endpoint>>,
}

/// One place behind a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// Where.
    pub address: SocketAddr,
    /// A workload of the mesh is there.
    pub meshed: bool,
    /// It takes new connections.
    pub ready: bool,
}

impl Service {
    /// What stands behind a port, ready or not.
    pub fn endpoints(&self, port: u16) -> &[Endpoint] {
        self.ports.get(&port).map_or(&[], Vec::as_slice)
    }
}

/// What the directory says about an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A workload with a sidecar.
    Meshed(Arc<Workload>),
    /// A virtual address.
    Service(Arc<Service>),
    /// The directory is complete and nobody of the mesh is there.
    NotMeshed,
}
