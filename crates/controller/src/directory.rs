//! The intended content of the directory, kept up to date by what has changed: a pod or an endpoint slice costs as much
//! as it touches, whatever the size of the cluster. A change that many objects depend on (a Service, a node, a
//! namespace, the mesh's settings) builds it anew.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use countersign_identity::TrustDomain;
use countersign_identity::directory::{Place, Service, Workload};
use countersign_identity::policy::{Egress, Mode, Policy};

use crate::changed::Changed;
use crate::config::DirectoryConfig;
use crate::publisher::{API_SERVER, API_SERVER_NAMESPACE, api_server, policy_in};
use crate::services::{Counted, Index, View, is_outer};
use crate::store::{Key, Pod, Store};

/// TCP port of every sidecar in a cluster for mesh traffic.
const MESH_PORT: u16 = 15008;
/// TCP port of every sidecar in a cluster for its pages.
const PAGES_PORT: u16 = 15020;

/// What a pod adds to the directory.
#[derive(Debug, Default, PartialEq, Eq)]
struct PodPart {
    /// UID of its workload, if it is one.
    workload: Option<String>,
    /// The addresses of this workload.
    meshed: Vec<IpAddr>,
    /// Its own addresses.
    own: Vec<IpAddr>,
    /// Its node's addresses, if it uses them.
    of_node: Vec<IpAddr>,
}

/// What an endpoint slice adds.
#[derive(Debug, PartialEq, Eq)]
struct SlicePart {
    service: Key,
    addresses: Vec<IpAddr>,
}

/// The intended content of the directory, by UID.
#[derive(Debug, Default)]
pub struct Directory {
    /// Who is at the pods' addresses.
    pub workloads: HashMap<String, Workload>,
    /// What is behind the other addresses.
    pub services: HashMap<String, Service>,
    /// UIDs of what has been changed, added or removed since this was emptied.
    pub unpublished: HashSet<String>,
    pods: HashMap<Key, PodPart>,
    slices: HashMap<Key, SlicePart>,
    index: Index,
    /// Services that have an endpoint at an address.
    behind: HashMap<IpAddr, Counted<Key>>,
    /// Addresses whose owner decides what is at the outer ones.
    contested: HashSet<IpAddr>,
    /// UIDs of services at addresses from outside and of nodes.
    outer: HashSet<String>,
    /// The ways to the API server.
    egress: Vec<Egress>,
}

/// What a directory is made from.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The cluster.
    pub store: &'a Store,
    /// Settings of the publisher.
    pub config: &'a DirectoryConfig,
    /// The trust domain of the server.
    pub trust_domain: &'a TrustDomain,
}

/// What has to be computed again.
#[derive(Default)]
struct Touched {
    /// By namespace and name.
    services: BTreeSet<Key>,
    /// All services at addresses from outside and of nodes.
    outer: bool,
}

impl Directory {
    /// The directory of a cluster.
    pub fn of(source: Source<'_>) -> Self {
        let store = source.store;
        let mut all = Self { egress: api_server(store), ..Self::default() };
        let nodes = store.nodes.values().flat_map(|node| node.addresses.iter());
        let claimed = store.services.values().flat_map(|s| s.external_ips.iter().chain(&s.balancer_ips));
        all.contested = nodes.chain(claimed).copied().collect();
        // Whatever this touches is made below.
        let mut touched = Touched::default();
        store.slices.keys().for_each(|key| all.keep_slice(key, store, &mut touched));
        store.pods.keys().for_each(|key| all.keep_pod(key, source, &mut touched));
        for key in store.services.keys() {
            all.keep_service(key, source);
        }
        all.keep_outer(source);
        all.unpublished.clear();
        all
    }

    /// Follows what has changed.
    pub fn update(&mut self, source: Source<'_>, changed: &Changed) {
        let api_server = (API_SERVER_NAMESPACE.to_owned(), API_SERVER.to_owned());
        let of_many = changed.everything || changed.services || changed.nodes || changed.namespaces || changed.mesh;
        if of_many || changed.slices.contains(&api_server) {
            self.replace(Self::of(source));
            return;
        }
        let mut touched = Touched::default();
        changed.slices.iter().for_each(|key| self.keep_slice(key, source.store, &mut touched));
        changed.pods.iter().for_each(|key| self.keep_pod(key, source, &mut touched));
        for key in &touched.services {
            touched.outer |= self.keep_service(key, source);
        }
        if touched.outer {
            self.keep_outer(source);
        }
    }

    /// Takes another one's content; what differs is unpublished.
    pub fn replace(&mut self, fresh: Self) {
        let before = std::mem::replace(self, fresh);
        self.unpublished.extend(differing(&before.workloads, &self.workloads));
        self.unpublished.extend(differing(&before.services, &self.services));
        self.unpublished.extend(before.unpublished);
    }

    /// Whether it says the same as another one.
    pub fn says_the_same_as(&self, other: &Self) -> bool {
        self.workloads == other.workloads && self.services == other.services
    }

    fn keep_pod(&mut self, key: &Key, source: Source<'_>, touched: &mut Touched) {
        let pod = source.store.pods.get(key);
        let workload = pod.and_then(|pod| workload(pod, source, &self.egress));
        let now = pod.map(|pod| PodPart::of(pod, workload.as_ref())).unwrap_or_default();
        let before = self.pods.remove(key).unwrap_or_default();
        if let Some(gone) = before.workload.as_ref().filter(|uid| now.workload.as_ref() != Some(uid)) {
            self.workloads.remove(gone);
            self.unpublished.insert(gone.clone());
        }
        if let Some(workload) = workload {
            put(&mut self.workloads, &mut self.unpublished, workload.uid.clone(), workload);
        }
        let addresses: BTreeSet<IpAddr> = before.addresses().chain(now.addresses()).copied().collect();
        let state = |index: &Index, ip: &IpAddr| (index.in_mesh.has(ip), index.pods.has(ip), index.on_nodes.has(ip));
        let was: Vec<_> = addresses.iter().map(|ip| state(&self.index, ip)).collect();
        let index = &mut self.index;
        for (part, change) in [(&before, false), (&now, true)] {
            let lists = [
                (&part.meshed, &mut index.in_mesh),
                (&part.own, &mut index.pods),
                (&part.of_node, &mut index.on_nodes),
            ];
            for (addresses, counted) in lists {
                addresses.iter().for_each(|ip| if change { counted.add(ip) } else { counted.remove(ip) });
            }
        }
        for (ip, (meshed, own, of_node)) in addresses.iter().zip(was) {
            let (meshed_now, own_now, of_node_now) = state(&self.index, ip);
            if meshed != meshed_now {
                touched.services.extend(self.behind.get(ip).into_iter().flat_map(Counted::all).cloned());
            }
            touched.outer |= (own, of_node) != (own_now, of_node_now) && self.contested.contains(ip);
        }
        if now != PodPart::default() {
            self.pods.insert(key.clone(), now);
        }
    }

    fn keep_slice(&mut self, key: &Key, store: &Store, touched: &mut Touched) {
        if let Some(before) = self.slices.remove(key) {
            if let Some(keys) = self.index.slices.get_mut(&before.service) {
                keys.remove(key);
                if keys.is_empty() {
                    self.index.slices.remove(&before.service);
                }
            }
            for ip in &before.addresses {
                if let Some(services) = self.behind.get_mut(ip) {
                    services.remove(&before.service);
                    if services.is_empty() {
                        self.behind.remove(ip);
                    }
                }
            }
            touched.services.insert(before.service);
        }
        let Some(slice) = store.slices.get(key) else { return };
        let service = (key.0.clone(), slice.service.clone());
        let addresses: Vec<IpAddr> = slice.endpoints.iter().map(|e| e.address).collect();
        self.index.slices.entry(service.clone()).or_default().insert(key.clone());
        addresses.iter().for_each(|ip| self.behind.entry(*ip).or_default().add(&service));
        touched.services.insert(service.clone());
        self.slices.insert(key.clone(), SlicePart { service, addresses });
    }

    /// Returns whether services at outer addresses depend on this Service. One that is gone has had everything built
    /// anew.
    fn keep_service(&mut self, key: &Key, source: Source<'_>) -> bool {
        let Some(service) = source.store.services.get(key) else { return false };
        let view = View { store: source.store, index: &self.index, leave: &source.config.leave };
        if let Some(made) = view.virtual_addresses(service) {
            put(&mut self.services, &mut self.unpublished, made.uid.clone(), made);
        }
        is_outer(service)
    }

    fn keep_outer(&mut self, source: Source<'_>) {
        let view = View { store: source.store, index: &self.index, leave: &source.config.leave };
        let made: Vec<Service> = view.outer().collect();
        let now: HashSet<String> = made.iter().map(|service| service.uid.clone()).collect();
        for gone in self.outer.difference(&now) {
            self.services.remove(gone);
            self.unpublished.insert(gone.clone());
        }
        for service in made {
            put(&mut self.services, &mut self.unpublished, service.uid.clone(), service);
        }
        self.outer = now;
    }
}

/// Puts a value that may be there already; one that differs is unpublished.
fn put<V: PartialEq>(into: &mut HashMap<String, V>, unpublished: &mut HashSet<String>, uid: String, value: V) {
    if into.get(&uid) != Some(&value) {
        unpublished.insert(uid.clone());
        into.insert(uid, value);
    }
}

/// Keys whose values differ, or that only one of both has.
fn differing<V: PartialEq>(a: &HashMap<String, V>, b: &HashMap<String, V>) -> Vec<String> {
    let changed = b.iter().filter(|(key, value)| a.get(*key) != Some(*value)).map(|(key, _)| key);
    changed.chain(a.keys().filter(|key| !b.contains_key(*key))).cloned().collect()
}

impl PodPart {
    fn of(pod: &Pod, workload: Option<&Workload>) -> Self {
        let addresses = |wanted: bool| if wanted { pod.addresses.clone() } else { vec![] };
        Self {
            workload: workload.map(|w| w.uid.clone()),
            meshed: addresses(workload.is_some()),
            own: addresses(!pod.over && !pod.host_network),
            of_node: addresses(pod.host_network),
        }
    }

    fn addresses(&self) -> impl Iterator<Item = &IpAddr> {
        self.meshed.iter().chain(&self.own).chain(&self.of_node)
    }
}

/// The workload of a pod; `None` if it is none.
fn workload(pod: &Pod, source: Source<'_>, egress: &[Egress]) -> Option<Workload> {
    if !pod.meshed || pod.over || pod.host_network || pod.addresses.is_empty() {
        return None;
    }
    let id = source.config.template.id_of(pod, source.trust_domain)?.ok()?;
    Some(Workload {
        uid: pod.uid.clone(),
        name: format!("{}/{}", pod.namespace, pod.name),
        addresses: pod.addresses.clone(),
        spiffe_ids: [id.to_string()].into(),
        mesh_port: MESH_PORT,
        policy: policy(pod, source.store, source.config, egress),
        place: place(pod, source.store),
    })
}

fn place(pod: &Pod, store: &Store) -> Place {
    let node = pod.node.clone().unwrap_or_default();
    let zone = store.nodes.get(&(String::new(), node.clone())).map(|node| node.zone.clone()).unwrap_or_default();
    Place { node, zone }
}

fn policy(pod: &Pod, store: &Store, config: &DirectoryConfig, egress: &[Egress]) -> Policy {
    let mode = store.mode_of(pod, config.mode);
    if store.is_transparent() {
        return Policy { mode, egress: egress.to_vec(), ..Policy::default() };
    }
    let mut policy = policy_in(mode, pod, &config.leave, egress);
    if config.open_metrics {
        policy.port_exceptions.insert(PAGES_PORT, Mode::Permissive);
    }
    policy
}

#[cfg(test)]
mod tests {
    use countersign_identity::directory::{Hints, Readiness};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::injector::Leave;
    use crate::store::{Mesh, Namespace, Node, Service as Known, Slice, SliceEndpoint, Transparency};

    fn config() -> DirectoryConfig {
        DirectoryConfig {
            server_socket: "/x".into(),
            template: crate::template::DEFAULT.parse().unwrap(),
            mode: Mode::Permissive,
            leave: Leave::of(["bank".to_owned()]),
            open_metrics: false,
            mesh_configmap: None,
        }
    }

    struct World {
        random: StdRng,
        store: Store,
        changed: Changed,
        uids: usize,
    }

    impl World {
        fn new(seed: u64) -> Self {
            Self { random: StdRng::seed_from_u64(seed), store: Store::default(), changed: Changed::default(), uids: 0 }
        }

        fn pick<T: Clone>(&mut self, of: &[T]) -> T {
            of[self.random.random_range(0..of.len())].clone()
        }

        fn uid(&mut self) -> String {
            self.uids += 1;
            format!("uid-{}", self.uids)
        }

        /// An address of a pod, a node or from outside; few, so that they meet.
        fn address(&mut self) -> IpAddr {
            let last = self.random.random_range(1..8);
            self.pick(&[[10, 0, 0, last], [10, 0, 0, last], [10, 89, 0, last], [192, 0, 2, last]]).into()
        }

        fn key(&mut self, prefix: &str) -> Key {
            let namespace = self.pick(&["shop", "bank"]);
            (namespace.to_owned(), format!("{prefix}-{}", self.random.random_range(0..4)))
        }

        fn pod(&mut self, key: &Key) -> Pod {
            let known = self.store.pods.get(key).map(|pod| pod.uid.clone());
            let uid = known.filter(|_| self.random.random_bool(0.6));
            Pod {
                namespace: key.0.clone(),
                name: key.1.clone(),
                uid: uid.unwrap_or_else(|| self.uid()),
                service_account: "web".into(),
                node: Some(self.pick(&["node-0", "node-1"]).to_owned()),
                addresses: (0..self.random.random_range(0..3)).map(|_| self.address()).collect(),
                over: self.random.random_bool(0.1),
                host_network: self.random.random_bool(0.1),
                meshed: self.random.random_bool(0.7),
                ..Pod::default()
            }
        }

        fn slice(&mut self) -> Slice {
            let endpoint = |world: &mut Self| SliceEndpoint {
                address: world.address(),
                readiness: world.pick(&[Readiness::Ready, Readiness::NotReady]),
                node: world.pick(&["node-0", "node-1"]).to_owned(),
                hints: Hints::default(),
            };
            Slice {
                service: format!("svc-{}", self.random.random_range(0..4)),
                endpoints: (0..self.random.random_range(0..4)).map(|_| endpoint(self)).collect(),
                ports: vec![("http".into(), self.pick(&[8080, 9090]))],
            }
        }

        fn service(&mut self, key: &Key) -> Known {
            let (n, some) = (self.random.random_range(1..5), self.random.random_bool(0.5));
            Known {
                uid: self.uid(),
                namespace: key.0.clone(),
                name: key.1.clone(),
                addresses: if self.random.random_bool(0.8) { vec![[10, 91, 0, n].into()] } else { vec![] },
                ports: vec![(80, "http".into())],
                local: self.random.random_bool(0.2),
                node_ports: if some { vec![(30_000 + u16::from(n), "http".into())] } else { vec![] },
                external_ips: if self.random.random_bool(0.3) { vec![self.address()] } else { vec![] },
                balancer_ips: if self.random.random_bool(0.2) { vec![self.address()] } else { vec![] },
                created: i64::from(n),
                ..Known::default()
            }
        }

        /// Something happens, and the watch reports it.
        fn happen(&mut self) {
            let gone = self.random.random_bool(0.3);
            match self.random.random_range(0..20) {
                0..=8 => {
                    let key = self.key("pod");
                    let pod = self.pod(&key);
                    let before = self.store.pods.remove(&key);
                    if !(gone && before.is_some()) {
                        self.store.pods.insert(key.clone(), pod);
                    }
                    self.changed.pods.insert(key);
                }
                9..=15 => {
                    let key = self.key("slice");
                    let slice = self.slice();
                    let before = self.store.slices.remove(&key);
                    if !(gone && before.is_some()) {
                        self.store.slices.insert(key.clone(), slice);
                    }
                    self.changed.slices.insert(key);
                }
                16 => {
                    let key = self.key("svc");
                    let service = self.service(&key);
                    if self.store.services.remove(&key).is_none() || !gone {
                        self.store.services.insert(key, service);
                    }
                    self.changed.services = true;
                }
                17 => {
                    let name = (String::new(), format!("node-{}", self.random.random_range(0..2)));
                    let (zone, addresses) = (self.pick(&["z1", "z2"]).to_owned(), vec![self.address()]);
                    self.store.nodes.insert(name.clone(), Node { uid: name.1, zone, addresses });
                    self.changed.nodes = true;
                }
                18 => {
                    let (name, mode) = (self.pick(&["shop", "bank"]), self.pick(&[None, Some(Mode::Strict)]));
                    self.store.namespaces.insert((String::new(), name.to_owned()), Namespace { mode });
                    self.changed.namespaces = true;
                }
                _ => {
                    let transparent = self.pick(&[Transparency::No, Transparency::Inbound, Transparency::Full]);
                    let mesh = Mesh { mode: None, transparent };
                    self.store.mesh.insert(("m".into(), "m".into()), mesh);
                    self.changed.mesh = true;
                }
            }
        }
    }

    #[test]
    fn following_changes_comes_to_the_same_as_building_anew_and_what_differs_is_published() {
        let (config, trust_domain) = (config(), TrustDomain::new("td").unwrap());
        let mut outer = 0;
        for seed in 0..40 {
            let mut world = World::new(seed);
            (0..30).for_each(|_| world.happen());
            world.changed = Changed::default();
            let source = Source { store: &world.store, config: &config, trust_domain: &trust_domain };
            let mut kept = Directory::of(source);
            let (mut workloads, mut services) = (kept.workloads.clone(), kept.services.clone());
            for turn in 0..80 {
                for _ in 0..world.random.random_range(1..4) {
                    world.happen();
                }
                let changed = std::mem::take(&mut world.changed);
                let source = Source { store: &world.store, config: &config, trust_domain: &trust_domain };
                kept.update(source, &changed);
                let fresh = Directory::of(source);
                assert_eq!(kept.workloads, fresh.workloads, "seed {seed}, turn {turn}, {changed:?}");
                assert_eq!(kept.services, fresh.services, "seed {seed}, turn {turn}, {changed:?}");
                // What a server has that is sent the difference alone.
                for uid in kept.unpublished.drain() {
                    workloads.remove(&uid);
                    services.remove(&uid);
                    workloads.extend(kept.workloads.get(&uid).map(|w| (uid.clone(), w.clone())));
                    services.extend(kept.services.get(&uid).map(|s| (uid.clone(), s.clone())));
                }
                assert_eq!((&workloads, &services), (&kept.workloads, &kept.services), "seed {seed}, turn {turn}");
                outer += usize::from(services.keys().any(|uid| uid.starts_with("outer/") || uid == "node-ports"));
            }
        }
        assert!(outer > 500, "the test meets what it is for: {outer}");
    }

    #[test]
    fn a_pod_event_touches_its_workload_and_the_services_in_front_of_it_alone() {
        let (config, trust_domain) = (config(), TrustDomain::new("td").unwrap());
        let mut world = World::new(7);
        for n in 0..50 {
            let key = ("shop".to_owned(), format!("web-{n}"));
            let address: IpAddr = [10, 1, 0, n].into();
            let mut pod = world.pod(&key);
            (pod.addresses, pod.over, pod.host_network, pod.meshed) = (vec![address], false, false, true);
            world.store.pods.insert(key.clone(), pod);
            let mut service = world.service(&key);
            (service.addresses, service.node_ports, service.external_ips, service.balancer_ips) =
                (vec![[10, 91, 1, n].into()], vec![], vec![], vec![]);
            world.store.services.insert(key.clone(), service);
            let (readiness, hints) = (Readiness::Ready, Hints::default());
            let endpoints = vec![SliceEndpoint { address, readiness, node: "node-0".into(), hints }];
            let slice = Slice { service: key.1.clone(), endpoints, ports: vec![("http".into(), 8080)] };
            world.store.slices.insert(key, slice);
        }
        let source = Source { store: &world.store, config: &config, trust_domain: &trust_domain };
        let mut kept = Directory::of(source);
        let key = ("shop".to_owned(), "web-3".to_owned());
        let gone = world.store.pods.remove(&key).unwrap();
        let source = Source { store: &world.store, config: &config, trust_domain: &trust_domain };
        kept.update(source, &Changed { pods: [key.clone()].into(), ..Changed::default() });
        assert_eq!(kept.unpublished, [gone.uid, world.store.services[&key].uid.clone()].into());
    }
}
