//! What is kept of the cluster's objects, instead of whole objects, to save memory.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use countersign_identity::directory::{Hints, Readiness};
use countersign_identity::policy::Mode;
use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1::{EndpointConditions, EndpointHints, EndpointSlice};
use kube::ResourceExt;

use crate::crd::SpiffeID;
use crate::injector::SIDECAR;
use crate::port_modes::{self, PORT_MODES};

/// Prefix of our annotations and labels.
pub const OURS: &str = "countersign.dev/";
/// Annotation or label with the mode of a namespace or pod.
pub const MODE: &str = "countersign.dev/mode";
/// Annotation with the trust domains that a pod federates with, comma-separated.
pub const FEDERATES_WITH: &str = "spiffe.io/federatesWith";

/// Label with the zone of a node.
const ZONE: &str = "topology.kubernetes.io/zone";
/// Session affinity without a timeout of its own lasts this long, in seconds (Service, `sessionAffinityConfig`).
const DEFAULT_AFFINITY: i32 = 10_800;
/// Most nodes or zones that an endpoint may name as hints (discovery/v1).
const MAX_HINTS: usize = 8;

/// Key of an object: namespace and name.
pub type Key = (String, String);

/// What is kept of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// UID of the pod.
    pub uid: String,
    /// Name of its service account.
    pub service_account: String,
    /// Name of its node; `None` until it is scheduled.
    pub node: Option<String>,
    /// IP addresses of the pod; empty until it has its network.
    pub addresses: Vec<IpAddr>,
    /// All labels of the pod.
    pub labels: BTreeMap<String, String>,
    /// The annotations that matter here.
    pub annotations: BTreeMap<String, String>,
    /// Whether it has ended, so that its addresses may belong to another pod.
    pub over: bool,
    /// Whether it uses its node's network namespace.
    pub host_network: bool,
    /// Whether it has our sidecar.
    pub meshed: bool,
}

/// What is kept of a namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Mode of the namespace; `None` if it sets none.
    pub mode: Option<Mode>,
}

/// What is kept of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// UID of the node.
    pub uid: String,
    /// Its zone; empty if it has none.
    pub zone: String,
    /// Its IP addresses inside the cluster's network.
    pub addresses: Vec<IpAddr>,
}

/// What is kept of a service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Service {
    /// UID of the service.
    pub uid: String,
    /// Namespace of the service.
    pub namespace: String,
    /// Name of the service.
    pub name: String,
    /// Virtual IP addresses; empty for a headless service.
    pub addresses: Vec<IpAddr>,
    /// Service ports, number and name.
    pub ports: Vec<(u16, String)>,
    /// Labels of the pods behind it; empty if endpoints are made by hand.
    pub selector: BTreeMap<String, String>,
    /// How long a client stays with an endpoint; `None` without session affinity.
    pub affinity: Option<Duration>,
    /// Whether clients in the cluster use endpoints of their own node only (`internalTrafficPolicy: Local`).
    pub local: bool,
    /// Ports on every node's address, number and name of the service port.
    pub node_ports: Vec<(u16, String)>,
    /// Addresses outside the cluster that whoever made the service chose (`externalIPs`).
    pub external_ips: Vec<IpAddr>,
    /// Addresses that a load balancer was given for it and that nodes answer for (`ipMode: VIP`).
    pub balancer_ips: Vec<IpAddr>,
    /// Addresses that a load balancer was given for it and that are left to the balancer. Nobody else may claim them.
    pub reserved_ips: Vec<IpAddr>,
    /// When it was created, in seconds since 1970.
    pub created: i64,
}

/// Some of a service's endpoints, from one `EndpointSlice`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slice {
    /// Name of the service.
    pub service: String,
    /// The endpoints, one for each address.
    pub endpoints: Vec<SliceEndpoint>,
    /// Ports of all these endpoints, name and number.
    pub ports: Vec<(String, u16)>,
}

/// One address of an `EndpointSlice`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Its IP address.
    pub address: IpAddr,
    /// Whether it takes new connections.
    pub readiness: Readiness,
    /// Name of its node; empty if the slice does not tell.
    pub node: String,
    /// Whose clients should prefer it.
    pub hints: Hints,
}

/// Settings of the mesh that may change while it runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mesh {
    /// Mode of the mesh, used where namespace and pod set none.
    pub mode: Option<Mode>,
    /// How far the mesh is on its way out.
    pub transparent: Transparency,
}

/// How far a mesh that is being removed is transparent, whatever its modes are. A sidecar that sends plaintext before all accept it
/// would be refused, so each step waits until every sidecar has taken the one before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Transparency {
    /// Not at all; written `false`.
    #[default]
    No,
    /// Every sidecar accepts plaintext; written `inbound`.
    Inbound,
    /// Every sidecar also sends plaintext, as if it were not there; written `true`.
    Full,
}

impl fmt::Display for Transparency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::No => "false",
            Self::Inbound => "inbound",
            Self::Full => "true",
        })
    }
}

impl FromStr for Transparency {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "false" => Ok(Self::No),
            "inbound" => Ok(Self::Inbound),
            "true" => Ok(Self::Full),
            other => Err(format!("`{other}` is none of false, inbound and true")),
        }
    }
}

impl Mesh {
    /// Reads the mesh's ConfigMap. An invalid value is logged and left out.
    pub fn read(map: &v1::ConfigMap) -> Option<Self> {
        fn value<T: FromStr<Err: std::fmt::Display>>(map: &v1::ConfigMap, key: &str) -> Option<T> {
            let text = map.data.as_ref()?.get(key)?.trim();
            let parsed = if text.is_empty() { return None } else { text.parse() };
            parsed.inspect_err(|error| tracing::warn!(key, %error, "the mesh's ConfigMap; it is left out")).ok()
        }
        Some(Self { mode: value(map, "mode"), transparent: value(map, "transparent").unwrap_or_default() })
    }
}

/// All that is kept of the cluster.
#[derive(Debug, Default)]
pub struct Store {
    /// The mesh's ConfigMap; empty if none is followed.
    pub mesh: HashMap<Key, Mesh>,
    /// Pods by namespace and name.
    pub pods: HashMap<Key, Pod>,
    /// Nodes by name; the namespace in the key is empty.
    pub nodes: HashMap<Key, Node>,
    /// Namespaces by name; the namespace in the key is empty.
    pub namespaces: HashMap<Key, Namespace>,
    /// Services by namespace and name.
    pub services: HashMap<Key, Service>,
    /// Endpoint slices by namespace and name.
    pub slices: HashMap<Key, Slice>,
    /// `SpiffeID` objects by namespace and name.
    pub spiffe_ids: HashMap<Key, SpiffeID>,
}

impl Store {
    /// A pod's mode: the mesh's mode (or `default`), narrowed by its namespace's and its own.
    pub fn mode_of(&self, pod: &Pod, default: Mode) -> Mode {
        let followed = self.mesh.values().next().cloned().unwrap_or_default();
        let mesh = followed.mode.unwrap_or(default);
        let namespace = self.namespaces.get(&(String::new(), pod.namespace.clone())).and_then(|n| n.mode);
        let mode = mesh.narrowed_by(namespace).narrowed_by(pod.mode());
        match followed.transparent {
            Transparency::No => mode,
            Transparency::Inbound => mode.min(Mode::Permissive),
            Transparency::Full => Mode::Off,
        }
    }
}

/// Parses a mode from an annotation or label. An unknown word counts as strict: a typing error must not open anything.
fn mode_word(text: &str) -> Mode {
    text.parse().unwrap_or(Mode::Strict)
}

/// IPv4 addresses that are written as IPv6 ones (`::ffff:10.0.0.1`) are the IPv4 ones: the directory has one answer for both.
fn addresses<'a>(texts: impl IntoIterator<Item = &'a String>) -> Vec<IpAddr> {
    let parsed = texts.into_iter().filter_map(|t| IpAddr::from_str(t).ok());
    let mut all: Vec<IpAddr> = parsed.map(|address| address.to_canonical()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|p| *p != 0)
}

impl Store {
    /// Whether the mesh is being removed, so that no setting of a namespace or pod counts any more.
    pub fn is_transparent(&self) -> bool {
        self.mesh.values().next().is_some_and(|mesh| mesh.transparent != Transparency::No)
    }
}

impl Pod {
    /// Modes of its single ports.
    pub fn port_modes(&self) -> BTreeMap<u16, Mode> {
        self.annotations.get(PORT_MODES).map(|text| port_modes::read(text)).unwrap_or_default()
    }

    /// The pod's own mode: the stricter one of annotation and label.
    fn mode(&self) -> Option<Mode> {
        [self.annotations.get(MODE), self.labels.get(MODE)].into_iter().flatten().map(|text| mode_word(text)).max()
    }

    /// Reads a pod; `None` if it has no spec.
    pub fn read(pod: &v1::Pod) -> Option<Self> {
        let spec = pod.spec.as_ref()?;
        let status = pod.status.as_ref();
        let named = |containers: &[v1::Container]| containers.iter().any(|c| c.name == SIDECAR);
        let ours = |k: &String| k.starts_with(OURS) || k == FEDERATES_WITH;
        let ips = status.and_then(|s| s.pod_ips.as_ref()).into_iter().flatten().map(|ip| &ip.ip);
        Some(Self {
            namespace: pod.namespace()?,
            name: pod.name_any(),
            uid: pod.uid()?,
            service_account: spec.service_account_name.clone().unwrap_or_else(|| "default".into()),
            node: spec.node_name.clone(),
            addresses: addresses(ips),
            labels: pod.labels().clone(),
            annotations: pod
                .annotations()
                .iter()
                .filter(|(k, _)| ours(k))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect(),
            over: status.and_then(|s| s.phase.as_deref()).is_some_and(|p| p == "Succeeded" || p == "Failed"),
            host_network: spec.host_network == Some(true),
            meshed: named(spec.init_containers.as_deref().unwrap_or_default()) || named(&spec.containers),
        })
    }
}

impl Namespace {
    /// Reads a namespace.
    pub fn read(namespace: &v1::Namespace) -> Option<Self> {
        let said = [namespace.annotations().get(MODE), namespace.labels().get(MODE)].into_iter().flatten();
        // The webhook's selectors use the label, people read the annotation; the stricter one counts.
        let mode = said.map(|text| mode_word(text)).max();
        Some(Self { mode })
    }
}

impl Node {
    /// Reads a node; `None` if it has no UID.
    pub fn read(node: &v1::Node) -> Option<Self> {
        let all = node.status.as_ref().and_then(|s| s.addresses.as_ref());
        let internal = all.into_iter().flatten().filter(|a| a.type_ == "InternalIP");
        Some(Self {
            uid: node.uid()?,
            zone: node.labels().get(ZONE).cloned().unwrap_or_default(),
            addresses: addresses(internal.map(|a| &a.address)),
        })
    }
}

impl Service {
    /// Reads a service; `None` for an `ExternalName` service.
    pub fn read(service: &v1::Service) -> Option<Self> {
        let spec = service.spec.as_ref()?;
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let tcp = |p: &&v1::ServicePort| p.protocol.as_deref().is_none_or(|p| p == "TCP");
        let ports = || spec.ports.iter().flatten().filter(tcp);
        let name_of = |p: &v1::ServicePort| p.name.clone().unwrap_or_default();
        let (balancer_ips, reserved_ips) = balancer_ips(spec, service.status.as_ref());
        Some(Self {
            uid: service.uid()?,
            namespace: service.namespace()?,
            name: service.name_any(),
            addresses: addresses(spec.cluster_ips.iter().flatten()),
            ports: ports().filter_map(|p| Some((port(p.port)?, name_of(p)))).collect(),
            selector: spec.selector.clone().unwrap_or_default(),
            affinity: affinity(spec),
            local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            node_ports: ports().filter_map(|p| Some((port(p.node_port?)?, name_of(p)))).collect(),
            external_ips: addresses(spec.external_ips.iter().flatten().take(MAX_OUTER)),
            balancer_ips,
            reserved_ips,
            created: service.metadata.creation_timestamp.as_ref().map_or(0, |t| t.0.as_second()),
        })
    }

    /// Whether a pod is behind this service.
    pub fn selects(&self, pod: &Pod) -> bool {
        self.namespace == pod.namespace
            && !self.selector.is_empty()
            && self.selector.iter().all(|(k, v)| pod.labels.get(k) == Some(v))
    }
}

fn affinity(spec: &v1::ServiceSpec) -> Option<Duration> {
    let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
    let seconds = config.and_then(|c| c.timeout_seconds).unwrap_or(DEFAULT_AFFINITY);
    let seconds = u64::try_from(seconds).ok().filter(|s| *s > 0)?;
    (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| Duration::from_secs(seconds))
}

/// Most addresses from outside of one kind that a Service may have here. Each one takes a copy of the Service's ports.
const MAX_OUTER: usize = 32;

/// The addresses that the load balancer gave: those that nodes answer for, and the others. Where only some sources are admitted,
/// all are left to the nodes, which know who comes.
fn balancer_ips(spec: &v1::ServiceSpec, status: Option<&v1::ServiceStatus>) -> (Vec<IpAddr>, Vec<IpAddr>) {
    let narrowed = spec.load_balancer_source_ranges.as_ref().is_some_and(|ranges| !ranges.is_empty());
    let ingress = status.and_then(|s| s.load_balancer.as_ref()).and_then(|b| b.ingress.as_ref());
    let all = ingress.into_iter().flatten().take(MAX_OUTER);
    let (ours, theirs): (Vec<_>, Vec<_>) =
        all.partition(|i| !narrowed && i.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"));
    let ips = |of: Vec<&v1::LoadBalancerIngress>| addresses(of.into_iter().filter_map(|i| i.ip.as_ref()));
    (ips(ours), ips(theirs))
}

/// Finds the services in front of a pod by one pair of their selectors, instead of checking every service.
#[derive(Debug, Default)]
pub struct ServiceIndex(HashMap<String, ByPair>);

/// Keys of the services of a namespace whose selector begins with a pair of key and value.
type ByPair = HashMap<String, HashMap<String, Vec<Key>>>;

impl ServiceIndex {
    /// An index of all services.
    pub fn of(store: &Store) -> Self {
        let mut index: HashMap<String, ByPair> = HashMap::new();
        for (at, service) in &store.services {
            // A pod that the service selects has every pair, so also this one.
            let Some((key, value)) = service.selector.iter().next() else { continue };
            let pairs = index.entry(service.namespace.clone()).or_default();
            pairs.entry(key.clone()).or_default().entry(value.clone()).or_default().push(at.clone());
        }
        Self(index)
    }

    /// The services that select a pod.
    pub fn before<'a>(&self, pod: &Pod, store: &'a Store) -> Vec<&'a Service> {
        let Some(pairs) = self.0.get(&pod.namespace) else { return vec![] };
        let behind = pod.labels.iter().filter_map(|(key, value)| pairs.get(key)?.get(value));
        behind.flatten().filter_map(|at| store.services.get(at)).filter(|s| s.selects(pod)).collect()
    }
}

impl Slice {
    /// Reads an endpoint slice; `None` if it belongs to no service.
    pub fn read(slice: &EndpointSlice) -> Option<Self> {
        let service = slice.labels().get("kubernetes.io/service-name")?.clone();
        let each = slice.endpoints.iter().flat_map(|e| {
            let made = move |address| SliceEndpoint {
                address,
                readiness: readiness(e.conditions.as_ref()),
                node: e.node_name.clone().unwrap_or_default(),
                hints: e.hints.as_ref().map(hints).unwrap_or_default(),
            };
            addresses(&e.addresses).into_iter().map(made)
        });
        let tcp = |p: &&k8s_openapi::api::discovery::v1::EndpointPort| p.protocol.as_deref().is_none_or(|p| p == "TCP");
        let ports = slice.ports.iter().flatten().filter(tcp);
        Some(Self {
            service,
            endpoints: each.collect(),
            ports: ports.filter_map(|p| Some((p.name.clone().unwrap_or_default(), port(p.port?)?))).collect(),
        })
    }
}

/// What the conditions of an endpoint say. What is missing has the defaults of discovery/v1: ready, serving, not terminating.
fn readiness(conditions: Option<&EndpointConditions>) -> Readiness {
    let Some(conditions) = conditions else { return Readiness::Ready };
    let draining = conditions.serving != Some(false) && conditions.terminating == Some(true);
    match conditions.ready {
        None | Some(true) => Readiness::Ready,
        Some(false) if draining => Readiness::Draining,
        Some(false) => Readiness::NotReady,
    }
}

fn hints(hints: &EndpointHints) -> Hints {
    Hints {
        nodes: hints.for_nodes.iter().flatten().take(MAX_HINTS).map(|n| n.name.clone()).collect(),
        zones: hints.for_zones.iter().flatten().take(MAX_HINTS).map(|z| z.name.clone()).collect(),
    }
}

#[cfg(test)]
mod tests;
