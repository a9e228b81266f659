//! The directory's services: what is behind each virtual address of the cluster, behind addresses from outside that
//! Services have, and behind the nodes' own addresses.
//!
//! A directory has one answer for an address. Cluster addresses are given by the API server and never twice. Addresses from
//! outside may be claimed by anyone who may create a Service (CVE-2020-8554), so a claim never displaces what the cluster
//! itself has at an address, and one claim never displaces an older or better founded one.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};

use countersign_identity::directory::{Endpoint, Service, ServicePort};

use crate::injector::Leave;
use crate::publisher::{API_SERVER, API_SERVER_NAMESPACE};
use crate::store::{self, Key, Slice, Store};

/// UID of the directory's service at all nodes' addresses.
const NODE_PORTS: &str = "node-ports";

/// How well a Service's address from outside is founded, the best first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Claim {
    /// A load balancer gave it. Who may write a Service may not write its status.
    Balancer,
    /// The Service names it, and the administrator trusts its namespace with exceptions.
    Trusted,
    /// The Service names it.
    Bare,
}

/// How often each thing is there.
#[derive(Debug)]
pub struct Counted<T>(HashMap<T, usize>);

impl<T> Default for Counted<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Eq + Hash + Clone> Counted<T> {
    /// Whether it is there at all.
    pub fn has(&self, thing: &T) -> bool {
        self.0.contains_key(thing)
    }

    /// Once more.
    pub fn add(&mut self, thing: &T) {
        *self.0.entry(thing.clone()).or_default() += 1;
    }

    /// Once less.
    pub fn remove(&mut self, thing: &T) {
        if let Some(count) = self.0.get_mut(thing) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(thing);
            }
        }
    }

    /// What is there.
    pub fn all(&self) -> impl Iterator<Item = &T> {
        self.0.keys()
    }

    /// Whether nothing is there.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What is known of pods and endpoint slices by address and by Service.
#[derive(Debug, Default)]
pub struct Index {
    /// Keys of the slices of each Service.
    pub slices: HashMap<Key, BTreeSet<Key>>,
    /// Addresses of meshed workloads.
    pub in_mesh: Counted<IpAddr>,
    /// Addresses of pods that have their own.
    pub pods: Counted<IpAddr>,
    /// Addresses of pods that use their node's.
    pub on_nodes: Counted<IpAddr>,
}

/// A view of the cluster's services.
pub struct View<'a> {
    /// The cluster.
    pub store: &'a Store,
    /// What is indexed of it.
    pub index: &'a Index,
    /// Namespaces that the administrator trusts with exceptions.
    pub leave: &'a Leave,
}

impl<'a> View<'a> {
    /// Services that have virtual addresses. The others are reached by their endpoints' own.
    fn known(&self) -> impl Iterator<Item = &'a store::Service> {
        self.store.services.values().filter(|s| !s.addresses.is_empty())
    }

    /// What is at a Service's virtual addresses; `None` if it has none.
    pub fn virtual_addresses(&self, service: &store::Service) -> Option<Service> {
        let ports = service.ports.iter();
        (!service.addresses.is_empty()).then(|| Service {
            uid: service.uid.clone(),
            name: name_of(service),
            addresses: service.addresses.clone(),
            ports: ports.map(|(number, name)| (*number, self.port(service, name, service.local))).collect(),
            claimed: false,
        })
    }

    /// What is at addresses from outside and at the nodes' own, by Services that have ports there ([`is_outer`]).
    pub fn outer(&self) -> impl Iterator<Item = Service> {
        let inside: HashSet<IpAddr> = self.store.services.values().flat_map(|s| s.addresses.iter().copied()).collect();
        let nodes: HashSet<IpAddr> =
            self.store.nodes.values().flat_map(|node| node.addresses.iter().copied()).collect();
        let outer = self.outer_addresses(&inside, &nodes);
        outer.into_iter().chain(self.node_ports(&inside, &nodes))
    }

    /// One service for each address from outside, which several Services may share by different ports. Traffic policies do not
    /// apply: kube-proxy takes a pod's connection to such an address to any endpoint.
    fn outer_addresses(&self, inside: &HashSet<IpAddr>, nodes: &HashSet<IpAddr>) -> Vec<Service> {
        let api_server = self.store.slices.get(&(API_SERVER_NAMESPACE.to_owned(), API_SERVER.to_owned()));
        let api_server: HashSet<IpAddr> =
            api_server.into_iter().flat_map(|slice| slice.endpoints.iter().map(|e| e.address)).collect();
        // Addresses that no Service may claim: those inside, and those of nodes and the API server.
        let taken = |ip: &IpAddr| {
            let of_pod = self.index.pods.has(ip) || self.index.on_nodes.has(ip);
            of_pod || inside.contains(ip) || nodes.contains(ip) || api_server.contains(ip)
        };
        let reserved: HashSet<IpAddr> = self.known().flat_map(|s| s.reserved_ips.iter().copied()).collect();
        let mut claims: BTreeMap<IpAddr, Vec<(Claim, &store::Service)>> = BTreeMap::new();
        for service in self.known() {
            let named = if self.leave.is_given(&service.namespace) { Claim::Trusted } else { Claim::Bare };
            let given = service.balancer_ips.iter().map(|ip| (ip, Claim::Balancer));
            let all = given.chain(service.external_ips.iter().map(|ip| (ip, named)));
            let free = |ip: &IpAddr, claim| !taken(ip) && (claim == Claim::Balancer || !reserved.contains(ip));
            for (ip, claim) in all.filter(|(ip, claim)| free(ip, *claim)) {
                claims.entry(*ip).or_default().push((claim, service));
            }
        }
        let outer = claims.into_iter().filter_map(|(ip, mut all)| {
            all.sort_unstable_by_key(|(claim, service)| (*claim, service.created, &service.uid));
            let best = all.first()?.0;
            let mut ports = BTreeMap::new();
            for (_, service) in all.into_iter().take_while(|(claim, _)| *claim == best) {
                for (number, name) in &service.ports {
                    // Of two Services with the same port the older one has it.
                    ports.entry(*number).or_insert_with(|| self.port(service, name, false));
                }
            }
            let (uid, name) = (format!("outer/{ip}"), format!("services at {ip}"));
            of_meshed(Service { uid, name, addresses: vec![ip], ports, claimed: best == Claim::Bare })
        });
        outer.collect()
    }

    /// The ports that Services have on every node.
    fn node_ports(&self, inside: &HashSet<IpAddr>, nodes: &HashSet<IpAddr>) -> Option<Service> {
        let free = |address: &&IpAddr| !inside.contains(*address) && !self.index.pods.has(address);
        let mut addresses: Vec<IpAddr> = nodes.iter().filter(free).copied().collect();
        addresses.sort_unstable();
        let ports = self.known().flat_map(|service| {
            service.node_ports.iter().map(move |(number, name)| (*number, self.port(service, name, false)))
        });
        let (uid, name, ports) = (NODE_PORTS.to_owned(), "node ports".to_owned(), ports.collect());
        of_meshed(Service { uid, name, addresses, ports, claimed: false })
    }

    fn port(&self, service: &store::Service, name: &str, local: bool) -> ServicePort {
        let keys = self.index.slices.get(&(service.namespace.clone(), service.name.clone())).into_iter().flatten();
        let behind: Vec<&Slice> = keys.filter_map(|key| self.store.slices.get(key)).collect();
        let mut endpoints = endpoints(&behind, name, |address| self.index.in_mesh.has(address));
        if !local {
            // Nobody needs it, and it is the largest part of an endpoint.
            endpoints.iter_mut().for_each(|endpoint| endpoint.node.clear());
        }
        ServicePort { endpoints, affinity: service.affinity, local }
    }
}

/// Whether a Service has ports at addresses from outside or at those of nodes.
pub fn is_outer(service: &store::Service) -> bool {
    !(service.node_ports.is_empty() && service.external_ips.is_empty() && service.balancer_ips.is_empty())
}

/// The service with its ports that lead into the mesh, if there are any. The others are left to the network, and under strict
/// refused.
fn of_meshed(mut service: Service) -> Option<Service> {
    service.ports.retain(|_, port| port.endpoints.iter().any(|e| e.meshed));
    (!service.ports.is_empty()).then_some(service)
}

fn name_of(service: &store::Service) -> String {
    format!("{}/{}", service.namespace, service.name)
}

/// Endpoints of a service port with this name.
pub fn endpoints(slices: &[&Slice], name: &str, in_mesh: impl Fn(&IpAddr) -> bool) -> Vec<Endpoint> {
    let mut all: Vec<Endpoint> = vec![];
    for slice in slices {
        for (_, port) in slice.ports.iter().filter(|(n, _)| n == name) {
            all.extend(slice.endpoints.iter().map(|e| Endpoint {
                address: SocketAddr::new(e.address, *port),
                meshed: in_mesh(&e.address),
                readiness: e.readiness,
                node: e.node.clone(),
                hints: e.hints.clone(),
            }));
        }
    }
    // An endpoint that is listed twice while it moves between slices is as ready as the better one says.
    all.sort_by_key(|e| (e.address, e.readiness));
    all.dedup_by_key(|e| e.address);
    all
}

#[cfg(test)]
mod tests;
