//! Who is at an address.

use std::collections::BTreeSet;
use std::net::IpAddr;
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

/// What the directory says about an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A workload with a sidecar.
    Meshed(Arc<Workload>),
    /// The directory is complete and nobody of the mesh is there.
    NotMeshed,
}
