//! Publishes the directory: the workload at each pod's address, and the endpoints behind each service.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_api::convert::{service_to_wire, workload_to_wire};
use countersign_identity::TrustDomain;
use countersign_identity::directory::{Endpoint, Service, Workload};
use countersign_identity::policy::{Egress, Mode, Policy};
use tokio_util::sync::CancellationToken;

use crate::config::DirectoryConfig;
use crate::injector::Leave;
use crate::metrics::Metrics;
use crate::server_link::ServerLink;
use crate::store::{Key, Pod, Store};
use crate::watch::Cluster;

/// TCP port of every sidecar in a cluster for mesh traffic.
const MESH_PORT: u16 = 15008;
/// TCP port of every sidecar in a cluster for its pages.
const PAGES_PORT: u16 = 15020;
/// Changes within this time are published together.
const TOGETHER: Duration = Duration::from_millis(20);
/// Building the directory is followed by a pause of this many times its duration, so that a busy cluster does not
/// occupy a core.
const REST: u32 = 3;
/// Longest pause after building the directory.
const MAX_REST: Duration = Duration::from_millis(500);
/// Interval after which everything is published again, because the server may have lost it unnoticed.
const PUBLISH_AGAIN: Duration = Duration::from_secs(300);

/// Keeps the server's directory up to date.
pub struct DirectoryPublisher {
    /// Settings of the publisher.
    pub config: DirectoryConfig,
    /// The trust domain of the server.
    pub trust_domain: TrustDomain,
    /// The view of the cluster.
    pub cluster: Arc<Cluster>,
    /// Connection to the server.
    pub server: ServerLink,
    /// The controller's metrics.
    pub metrics: Arc<Metrics>,
}

/// The intended content of the directory, by UID.
#[derive(Debug, Default, PartialEq, Eq)]
struct Directory {
    workloads: HashMap<String, Workload>,
    services: HashMap<String, Service>,
}

impl DirectoryPublisher {
    /// Publishes changes until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut versions = self.cluster.versions();
        let mut published: Option<Directory> = None;
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let work = async {
            let gone = self.server.gone();
            tokio::pin!(gone);
            loop {
                versions.mark_unchanged();
                let began = tokio::time::Instant::now();
                let now = self.cluster.store().map(|store| directory(&store, &self.config, &self.trust_domain));
                let rest = (began.elapsed() * REST).clamp(TOGETHER, MAX_REST);
                if let Some(now) = now {
                    self.metrics.workloads.set(i64::try_from(now.workloads.len()).unwrap_or(i64::MAX));
                    self.metrics.services.set(i64::try_from(now.services.len()).unwrap_or(i64::MAX));
                    match self.publish(published.as_ref(), &now).await {
                        Ok(()) => {
                            backoff.reset();
                            published = Some(now);
                        }
                        Err(status) => {
                            let delay = backoff.next_delay();
                            published = None;
                            self.metrics.directory_errors.inc();
                            tracing::warn!(
                                server = self.server.name(),
                                status = status.message(),
                                "cannot publish the directory; trying again in {delay:.1?}"
                            );
                            tokio::time::sleep(delay).await;
                            continue;
                        }
                    }
                }
                tokio::select! {
                    changed = versions.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        tokio::time::sleep(rest).await;
                    }
                    () = tokio::time::sleep(PUBLISH_AGAIN) => published = None,
                    _ = gone.as_mut(), if published.is_some() => {
                        gone.set(self.server.gone());
                        published = None;
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        };
        tokio::select! {
            () = work => {}
            () = shutdown.cancelled() => {}
        }
    }

    /// Publishes the difference to `before`, or everything if there is none.
    async fn publish(&self, before: Option<&Directory>, now: &Directory) -> Result<(), tonic::Status> {
        let empty = Directory::default();
        let old = before.unwrap_or(&empty);
        let workloads: Vec<_> =
            now.workloads.iter().filter(|(uid, w)| old.workloads.get(*uid) != Some(*w)).map(|(_, w)| w).collect();
        let services: Vec<_> =
            now.services.iter().filter(|(uid, s)| old.services.get(*uid) != Some(*s)).map(|(_, s)| s).collect();
        let gone = old.workloads.keys().filter(|uid| !now.workloads.contains_key(*uid));
        let gone: Vec<String> =
            gone.chain(old.services.keys().filter(|uid| !now.services.contains_key(*uid))).cloned().collect();
        if before.is_some() && workloads.is_empty() && services.is_empty() && gone.is_empty() {
            return Ok(());
        }
        let workloads = workloads.into_iter().map(workload_to_wire).collect();
        let services = services.into_iter().map(service_to_wire).collect();
        self.server.publish(before.is_none(), workloads, services, gone).await
    }
}

fn directory(store: &Store, config: &DirectoryConfig, trust_domain: &TrustDomain) -> Directory {
    let egress = api_server(store);
    let meshed = store.pods.values().filter(|p| p.meshed && !p.over && !p.host_network && !p.addresses.is_empty());
    let workload = |pod: &Pod| {
        let id = config.template.id_of(pod, trust_domain)?.ok()?;
        Some(Workload {
            uid: pod.uid.clone(),
            name: format!("{}/{}", pod.namespace, pod.name),
            addresses: pod.addresses.clone(),
            spiffe_ids: [id.to_string()].into(),
            mesh_port: MESH_PORT,
            policy: policy(pod, store, config, &egress),
        })
    };
    let workloads: HashMap<String, Workload> = meshed.filter_map(workload).map(|w| (w.uid.clone(), w)).collect();
    let in_mesh: HashSet<IpAddr> = workloads.values().flat_map(|w| w.addresses.iter().copied()).collect();
    let mut slices: HashMap<Key, Vec<&crate::store::Slice>> = HashMap::new();
    for ((namespace, _), slice) in &store.slices {
        slices.entry((namespace.clone(), slice.service.clone())).or_default().push(slice);
    }
    let services = store.services.values().filter(|s| !s.addresses.is_empty()).map(|service| {
        let key = (service.namespace.clone(), service.name.clone());
        let behind = slices.get(&key).map_or(&[][..], Vec::as_slice);
        let ports = service.ports.iter().map(|(number, name)| (*number, endpoints(behind, name, &in_mesh)));
        let service = Service {
            uid: service.uid.clone(),
            name: format!("{}/{}", service.namespace, service.name),
            addresses: service.addresses.clone(),
            ports: ports.collect::<BTreeMap<_, _>>(),
        };
        (service.uid.clone(), service)
    });
    Directory { services: services.collect(), workloads }
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

/// The policy of a pod's sidecar in a mode. The modes of its ports weaken strict only where the administrator allows it: an
/// annotation on a running pod has passed no webhook.
pub fn policy_in(mode: Mode, pod: &Pod, leave: &Leave, egress: &[Egress]) -> Policy {
    // Those too where exceptions have leave: a sidecar that does not know exceptions still narrows by them.
    let policy = Policy { mode, egress: egress.to_vec(), port_modes: pod.port_modes(), ..Policy::default() };
    if leave.is_given(&pod.namespace) { Policy { port_exceptions: pod.port_modes(), ..policy } } else { policy }
}

/// Endpoints of a service port with this name.
fn endpoints(slices: &[&crate::store::Slice], name: &str, in_mesh: &HashSet<IpAddr>) -> Vec<Endpoint> {
    let mut all: Vec<Endpoint> = slices
        .iter()
        .flat_map(|slice| {
            let ports = slice.ports.iter().filter(move |(n, _)| n == name).map(|(_, p)| *p);
            ports.flat_map(|port| slice.addresses.iter().map(move |(ip, ready)| (SocketAddr::new(*ip, port), *ready)))
        })
        .map(|(address, ready)| Endpoint { address, meshed: in_mesh.contains(&address.ip()), ready })
        .collect();
    // An endpoint that is listed twice while it moves between slices is ready if either slice says so.
    all.sort_unstable_by_key(|e| (e.address, !e.ready));
    all.dedup_by_key(|e| e.address);
    all
}

/// Namespace of the API server's own Service.
pub const API_SERVER_NAMESPACE: &str = "default";
/// Name of the API server's own Service, and of the one `EndpointSlice` that the API server itself maintains for it.
pub const API_SERVER: &str = "kubernetes";

/// The Kubernetes API server, which strict mode never blocks: addresses and ports of its Service and of the endpoints
/// behind it.
///
/// Only the Service and the slice named `kubernetes` in namespace `default` count. The API server creates both by these
/// names and restores them when they are changed. A label makes no slice its own: anybody can set it.
pub fn api_server(store: &Store) -> Vec<Egress> {
    let key = (API_SERVER_NAMESPACE.to_owned(), API_SERVER.to_owned());
    let Some(service) = store.services.get(&key) else { return vec![] };
    let slice: Vec<_> = store.slices.get(&key).filter(|slice| slice.service == API_SERVER).into_iter().collect();
    let mut all = vec![];
    for (port, name) in &service.ports {
        all.extend(service.addresses.iter().map(|ip| SocketAddr::new(*ip, *port)));
        all.extend(endpoints(&slice, name, &HashSet::new()).into_iter().map(|endpoint| endpoint.address));
    }
    all.sort_unstable();
    all.dedup();
    all.into_iter().map(Egress::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_identity::policy::Mode;

    fn key(namespace: &str, name: &str) -> Key {
        (namespace.to_owned(), name.to_owned())
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn egress(all: &[&str]) -> Vec<Egress> {
        all.iter().map(|at| at.parse::<SocketAddr>().unwrap().into()).collect()
    }

    fn pod(name: &str, address: &str, meshed: bool) -> (Key, Pod) {
        let pod = Pod {
            namespace: "shop".into(),
            name: name.into(),
            uid: format!("u-{name}"),
            service_account: "web".into(),
            addresses: vec![ip(address)],
            meshed,
            ..Pod::default()
        };
        (key("shop", name), pod)
    }

    fn store() -> Store {
        let slice = |service: &str, addresses: &[&str], port| crate::store::Slice {
            service: service.into(),
            addresses: addresses.iter().map(|a| (ip(a), true)).collect(),
            ports: vec![("http".into(), port)],
        };
        let service = |uid: &str, namespace: &str, name: &str, address: &[&str]| crate::store::Service {
            uid: uid.into(),
            namespace: namespace.into(),
            name: name.into(),
            addresses: address.iter().map(|a| ip(a)).collect(),
            ports: vec![(80, "http".into())],
            selector: BTreeMap::new(),
        };
        Store {
            pods: [pod("a", "10.0.0.1", true), pod("b", "10.0.0.2", false)].into(),
            services: [
                (key("shop", "web"), service("s-web", "shop", "web", &["10.91.0.7"])),
                (key("shop", "headless"), service("s-headless", "shop", "headless", &[])),
                (key("default", "kubernetes"), service("s-api", "default", "kubernetes", &["10.91.0.1"])),
            ]
            .into(),
            slices: [
                (key("shop", "web-1"), slice("web", &["10.0.0.1", "10.0.0.2"], 8080)),
                (key("shop", "web-2"), slice("web", &["10.0.0.1"], 8080)),
                (key("other", "web-1"), slice("web", &["10.0.0.9"], 8080)),
                (key("default", "kubernetes"), slice("kubernetes", &["10.89.0.1"], 6443)),
            ]
            .into(),
            ..Store::default()
        }
    }

    fn made(store: &Store, mode: Mode) -> Directory {
        let config = DirectoryConfig {
            server_socket: "/x".into(),
            template: crate::template::DEFAULT.parse().unwrap(),
            mode,
            leave: Leave::of(["monitored".to_owned()]),
            open_metrics: false,
            mesh_configmap: None,
        };
        directory(store, &config, &TrustDomain::new("td").unwrap())
    }

    #[test]
    fn a_meshed_pod_is_a_workload_and_a_service_has_its_own_endpoints_once_each() {
        let made = made(&store(), Mode::Strict);
        assert_eq!(made.workloads.len(), 1);
        let a = &made.workloads["u-a"];
        assert_eq!(a.spiffe_ids, ["spiffe://td/ns/shop/sa/web".to_owned()].into());
        assert_eq!(a.policy.mode, Mode::Strict);
        assert_eq!(a.policy.egress, egress(&["10.89.0.1:6443", "10.91.0.1:80"]));
        let web = &made.services["s-web"].ports[&80];
        let seen: Vec<_> = web.iter().map(|e| (e.address.to_string(), e.meshed)).collect();
        assert_eq!(seen, [("10.0.0.1:8080".to_owned(), true), ("10.0.0.2:8080".to_owned(), false)]);
        assert!(!made.services.contains_key("s-headless"), "its endpoints are reached by their own addresses");
    }

    #[test]
    fn only_the_api_servers_own_service_and_slice_make_an_exception() {
        let mut store = store();
        let slice = |address: &str, port| crate::store::Slice {
            service: "kubernetes".into(),
            addresses: vec![(ip(address), true)],
            ports: vec![("http".into(), port)],
        };
        let mut put = |namespace: &str, name: &str, made| store.slices.insert(key(namespace, name), made);
        put("evil", "kubernetes", slice("10.0.0.66", 80));
        put("evil", "kubernetes-1", slice("10.0.0.66", 80));
        put("default", "kubernetes-1", slice("10.0.0.66", 80));
        assert_eq!(api_server(&store), egress(&["10.89.0.1:6443", "10.91.0.1:80"]));
        // A port that the Service does not have is no way to the API server.
        let own = store.slices.get_mut(&key("default", "kubernetes")).unwrap();
        own.ports.push(("kubelet".into(), 10250));
        assert_eq!(api_server(&store), egress(&["10.89.0.1:6443", "10.91.0.1:80"]));
        store.services.remove(&key("default", "kubernetes"));
        assert_eq!(api_server(&store), []);
    }

    #[test]
    fn a_mesh_that_is_being_removed_is_transparent_even_where_it_was_strict() {
        let mut store = store();
        store.mesh.insert(key("m", "m"), crate::store::Mesh { mode: Some(Mode::Strict), transparent: false });
        assert_eq!(made(&store, Mode::Permissive).workloads["u-a"].policy.mode, Mode::Strict);
        store.mesh.insert(key("m", "m"), crate::store::Mesh { mode: Some(Mode::Strict), transparent: true });
        assert_eq!(made(&store, Mode::Strict).workloads["u-a"].policy.mode, Mode::Off);
    }

    #[test]
    fn modes_of_ports_weaken_strict_where_the_administrator_allows_it_alone() {
        let mut store = store();
        let annotation = || (crate::port_modes::PORT_MODES.to_owned(), "9443=permissive, 80=stict".to_owned());
        let a = store.pods.get_mut(&key("shop", "a")).unwrap();
        a.annotations.extend([annotation()]);
        let strict = made(&store, Mode::Strict).workloads["u-a"].policy.clone();
        assert_eq!((strict.mode_of(9443), strict.mode_of(80)), (Mode::Strict, Mode::Strict), "nobody allowed it");
        let permissive = made(&store, Mode::Permissive).workloads["u-a"].policy.clone();
        assert_eq!((permissive.mode_of(80), permissive.mode_of(81)), (Mode::Strict, Mode::Permissive));
        store.pods.get_mut(&key("shop", "a")).unwrap().namespace = "monitored".into();
        let strict = made(&store, Mode::Strict).workloads["u-a"].policy.clone();
        assert_eq!((strict.mode_of(9443), strict.mode_of(80)), (Mode::Permissive, Mode::Strict));
        store.mesh.insert(key("m", "m"), crate::store::Mesh { mode: Some(Mode::Strict), transparent: true });
        assert_eq!(made(&store, Mode::Strict).workloads["u-a"].policy.mode_of(80), Mode::Off, "the mesh is going");
    }

    #[test]
    fn a_pod_that_is_over_or_uses_its_nodes_network_is_nobody() {
        let mut store = store();
        store.pods.get_mut(&key("shop", "a")).unwrap().over = true;
        assert!(made(&store, Mode::Strict).workloads.is_empty());
        let a = store.pods.get_mut(&key("shop", "a")).unwrap();
        (a.over, a.host_network) = (false, true);
        assert!(made(&store, Mode::Strict).workloads.is_empty());
    }

    #[test]
    fn the_nearest_mode_wins_and_strict_is_not_weakened() {
        let mut store = store();
        store.namespaces.insert(key("", "shop"), crate::store::Namespace { mode: Some(Mode::Strict) });
        store.pods.get_mut(&key("shop", "a")).unwrap().annotations.insert(crate::store::MODE.into(), "off".into());
        assert_eq!(made(&store, Mode::Permissive).workloads["u-a"].policy.mode, Mode::Strict);
        store.namespaces.clear();
        assert_eq!(made(&store, Mode::Permissive).workloads["u-a"].policy.mode, Mode::Off);
        assert_eq!(made(&store, Mode::Strict).workloads["u-a"].policy.mode, Mode::Strict);
        let mut labelled = |word: &str| {
            store.pods.get_mut(&key("shop", "a")).unwrap().labels.insert(crate::store::MODE.into(), word.into());
            made(&store, Mode::Permissive).workloads["u-a"].policy.mode
        };
        assert_eq!(labelled("permissive"), Mode::Permissive, "the stricter of annotation and label");
        assert_eq!(labelled("stict"), Mode::Strict, "a word that means nothing opens nothing");
    }
}
