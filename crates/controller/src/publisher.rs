//! Publishes the directory: the workload at each pod's address, and the endpoints behind each service.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_api::convert::{service_to_wire, workload_to_wire};
use countersign_identity::TrustDomain;
use countersign_identity::policy::{Egress, Mode, Policy};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::changed::Reader;
use crate::config::DirectoryConfig;
use crate::directory::{Directory, Source};
use crate::injector::Leave;
use crate::metrics::Metrics;
use crate::server_link::ServerLink;
use crate::services::endpoints;
use crate::store::{Pod, Store};
use crate::watch::Cluster;

/// Changes within this time are published together.
const TOGETHER: Duration = Duration::from_millis(20);
/// Following changes is followed by a pause of this many times its duration, so that a busy cluster does not
/// occupy a core.
const REST: u32 = 3;
/// Longest such pause.
const MAX_REST: Duration = Duration::from_millis(500);
/// Interval after which everything is built and published again, because the server may have lost it unnoticed.
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

impl DirectoryPublisher {
    /// Publishes changes until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut reader = self.cluster.reader();
        let mut directory: Option<Directory> = None;
        // Whether the server may lack more than what has changed.
        let mut whole = true;
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let mut anew = Instant::now() + PUBLISH_AGAIN;
        let work = async {
            let gone = self.server.gone();
            tokio::pin!(gone);
            loop {
                let began = Instant::now();
                if anew <= began {
                    anew = began + PUBLISH_AGAIN;
                    whole = true;
                }
                self.follow(&mut reader, &mut directory, whole);
                let rest = (began.elapsed() * REST).clamp(TOGETHER, MAX_REST);
                if let Some(directory) = &mut directory {
                    self.metrics.workloads.set(i64::try_from(directory.workloads.len()).unwrap_or(i64::MAX));
                    self.metrics.services.set(i64::try_from(directory.services.len()).unwrap_or(i64::MAX));
                    match self.publish(whole, directory).await {
                        Ok(()) => {
                            backoff.reset();
                            directory.unpublished.clear();
                            whole = false;
                        }
                        Err(status) => {
                            let delay = backoff.next_delay();
                            whole = true;
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
                    changed = reader.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        tokio::time::sleep(rest).await;
                    }
                    () = tokio::time::sleep_until(anew) => {}
                    _ = gone.as_mut(), if !whole => {
                        gone.set(self.server.gone());
                        whole = true;
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

    /// Brings the directory up to the view of the cluster: by what has changed, or `anew`.
    fn follow(&self, reader: &mut Reader, directory: &mut Option<Directory>, anew: bool) {
        let Some((store, changed)) = self.cluster.look(reader) else { return };
        let source = Source { store: &store, config: &self.config, trust_domain: &self.trust_domain };
        let Some(kept) = directory else {
            *directory = Some(Directory::of(source));
            return;
        };
        kept.update(source, &changed);
        if anew {
            let fresh = Directory::of(source);
            if !kept.says_the_same_as(&fresh) {
                tracing::error!(
                    "the directory that changes were followed in is not what the cluster says; it is built anew"
                );
            }
            kept.replace(fresh);
        }
    }

    /// Publishes what has changed, or everything.
    async fn publish(&self, whole: bool, directory: &Directory) -> Result<(), tonic::Status> {
        let Directory { workloads, services, unpublished, .. } = directory;
        if whole {
            let workloads = workloads.values().map(workload_to_wire).collect();
            let services = services.values().map(service_to_wire).collect();
            return self.server.publish(true, workloads, services, vec![]).await;
        }
        if unpublished.is_empty() {
            return Ok(());
        }
        let changed = || unpublished.iter();
        let gone = changed().filter(|uid| !workloads.contains_key(*uid) && !services.contains_key(*uid)).cloned();
        let gone = gone.collect();
        let workloads = changed().filter_map(|uid| workloads.get(uid)).map(workload_to_wire).collect();
        let services = changed().filter_map(|uid| services.get(uid)).map(service_to_wire).collect();
        self.server.publish(false, workloads, services, gone).await
    }
}

/// The policy of a pod's sidecar in a mode. The modes of its ports weaken strict only where the administrator allows it: an
/// annotation on a running pod has passed no webhook.
pub fn policy_in(mode: Mode, pod: &Pod, leave: &Leave, egress: &[Egress]) -> Policy {
    // Those too where exceptions have leave: a sidecar that does not know exceptions still narrows by them.
    let policy = Policy { mode, egress: egress.to_vec(), port_modes: pod.port_modes(), ..Policy::default() };
    if leave.is_given(&pod.namespace) { Policy { port_exceptions: pod.port_modes(), ..policy } } else { policy }
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
        all.extend(endpoints(&slice, name, |_| false).into_iter().map(|endpoint| endpoint.address));
    }
    all.sort_unstable();
    all.dedup();
    all.into_iter().map(Egress::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_identity::directory::{Hints, Readiness};
    use std::net::IpAddr;

    use countersign_identity::directory::Place;

    use crate::store::{Key, Mesh, SliceEndpoint, Transparency};

    fn key(namespace: &str, name: &str) -> Key {
        (namespace.to_owned(), name.to_owned())
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn ready(address: &str) -> SliceEndpoint {
        let (node, hints) = (String::new(), Hints::default());
        SliceEndpoint { address: ip(address), readiness: Readiness::Ready, node, hints }
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
            endpoints: addresses.iter().map(|a| ready(a)).collect(),
            ports: vec![("http".into(), port)],
        };
        let service = |uid: &str, namespace: &str, name: &str, address: &[&str]| crate::store::Service {
            uid: uid.into(),
            namespace: namespace.into(),
            name: name.into(),
            addresses: address.iter().map(|a| ip(a)).collect(),
            ports: vec![(80, "http".into())],
            ..crate::store::Service::default()
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
        Directory::of(Source { store, config: &config, trust_domain: &TrustDomain::new("td").unwrap() })
    }

    #[test]
    fn a_meshed_pod_is_a_workload_and_a_service_has_its_own_endpoints_once_each() {
        let made = made(&store(), Mode::Strict);
        assert_eq!(made.workloads.len(), 1);
        let a = &made.workloads["u-a"];
        assert_eq!(a.spiffe_ids, ["spiffe://td/ns/shop/sa/web".to_owned()].into());
        assert_eq!(a.policy.mode, Mode::Strict);
        assert_eq!(a.policy.egress, egress(&["10.89.0.1:6443", "10.91.0.1:80"]));
        let web = &made.services["s-web"].ports[&80].endpoints;
        let seen: Vec<_> = web.iter().map(|e| (e.address.to_string(), e.meshed)).collect();
        assert_eq!(seen, [("10.0.0.1:8080".to_owned(), true), ("10.0.0.2:8080".to_owned(), false)]);
        assert!(!made.services.contains_key("s-headless"), "its endpoints are reached by their own addresses");
    }

    #[test]
    fn a_workload_is_where_its_node_is() {
        let mut store = store();
        store.pods.get_mut(&key("shop", "a")).unwrap().node = Some("node1".into());
        let place = |store: &Store| made(store, Mode::Strict).workloads["u-a"].place.clone();
        assert_eq!(place(&store), Place { node: "node1".into(), zone: String::new() });
        let node = crate::store::Node { zone: "z1".into(), ..Default::default() };
        store.nodes.insert(key("", "node1"), node);
        assert_eq!(place(&store), Place { node: "node1".into(), zone: "z1".into() });
    }

    #[test]
    fn only_the_api_servers_own_service_and_slice_make_an_exception() {
        let mut store = store();
        let slice = |address: &str, port| crate::store::Slice {
            service: "kubernetes".into(),
            endpoints: vec![ready(address)],
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
    fn a_mesh_that_is_being_removed_first_accepts_plaintext_and_then_sends_it_even_where_it_was_strict() {
        let mut store = store();
        let mut modes = |transparent| {
            let mesh = |mode| Mesh { mode: Some(mode), transparent };
            [Mode::Strict, Mode::Off].map(|mode| {
                store.mesh.insert(key("m", "m"), mesh(mode));
                made(&store, Mode::Strict).workloads["u-a"].policy.mode
            })
        };
        assert_eq!(modes(Transparency::No), [Mode::Strict, Mode::Off]);
        assert_eq!(modes(Transparency::Inbound), [Mode::Permissive, Mode::Off]);
        assert_eq!(modes(Transparency::Full), [Mode::Off, Mode::Off]);
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
        let mut going = |transparent| {
            store.mesh.insert(key("m", "m"), Mesh { mode: Some(Mode::Strict), transparent });
            made(&store, Mode::Strict).workloads["u-a"].policy.mode_of(80)
        };
        assert_eq!([Transparency::Inbound, Transparency::Full].map(&mut going), [Mode::Permissive, Mode::Off]);
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
