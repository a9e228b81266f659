//! What is kept of the cluster's objects, instead of whole objects, to save memory.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::str::FromStr;

use countersign_identity::policy::Mode;
use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1::EndpointSlice;
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
}

/// Some of a service's endpoints, from one `EndpointSlice`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slice {
    /// Name of the service.
    pub service: String,
    /// IP address of each endpoint, and whether it accepts new connections.
    pub addresses: Vec<(IpAddr, bool)>,
    /// Ports of all these endpoints, name and number.
    pub ports: Vec<(String, u16)>,
}

/// Settings of the mesh that may change while it runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mesh {
    /// Mode of the mesh, used where namespace and pod set none.
    pub mode: Option<Mode>,
    /// Whether every sidecar forwards plaintext whatever its mode, because the mesh is being removed.
    pub transparent: bool,
}

impl Mesh {
    /// Reads the mesh's ConfigMap. An invalid mode is logged and left out.
    pub fn read(map: &v1::ConfigMap) -> Option<Self> {
        let value = |key: &str| map.data.as_ref().and_then(|d| d.get(key));
        let mode = value("mode").and_then(|m| {
            m.parse().inspect_err(|error| tracing::warn!(%error, "mode of the mesh's ConfigMap; it is left out")).ok()
        });
        Some(Self { mode, transparent: value("transparent").is_some_and(|t| t == "true") })
    }
}

/// All that is kept of the cluster.
#[derive(Debug, Default)]
pub struct Store {
    /// The mesh's ConfigMap; empty if none is followed.
    pub mesh: HashMap<Key, Mesh>,
    /// Pods by namespace and name.
    pub pods: HashMap<Key, Pod>,
    /// UID of each node by name; the namespace in the key is empty.
    pub nodes: HashMap<Key, String>,
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
        if followed.transparent {
            return Mode::Off;
        }
        let mesh = followed.mode.unwrap_or(default);
        let namespace = self.namespaces.get(&(String::new(), pod.namespace.clone())).and_then(|n| n.mode);
        mesh.narrowed_by(namespace).narrowed_by(pod.mode())
    }
}

/// Parses a mode from an annotation or label. An unknown word counts as strict: a typing error must not open anything.
fn mode_word(text: &str) -> Mode {
    text.parse().unwrap_or(Mode::Strict)
}

fn addresses<'a>(texts: impl IntoIterator<Item = &'a String>) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = texts.into_iter().filter_map(|t| IpAddr::from_str(t).ok()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|p| *p != 0)
}

impl Store {
    /// Whether the mesh is being removed, so that every sidecar forwards as if it were not there.
    pub fn is_transparent(&self) -> bool {
        self.mesh.values().next().is_some_and(|mesh| mesh.transparent)
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

impl Service {
    /// Reads a service; `None` for an `ExternalName` service.
    pub fn read(service: &v1::Service) -> Option<Self> {
        let spec = service.spec.as_ref()?;
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let tcp = |p: &&v1::ServicePort| p.protocol.as_deref().is_none_or(|p| p == "TCP");
        let ports = spec.ports.iter().flatten().filter(tcp);
        Some(Self {
            uid: service.uid()?,
            namespace: service.namespace()?,
            name: service.name_any(),
            addresses: addresses(spec.cluster_ips.iter().flatten()),
            ports: ports.filter_map(|p| Some((port(p.port)?, p.name.clone().unwrap_or_default()))).collect(),
            selector: spec.selector.clone().unwrap_or_default(),
        })
    }

    /// Whether a pod is behind this service.
    pub fn selects(&self, pod: &Pod) -> bool {
        self.namespace == pod.namespace
            && !self.selector.is_empty()
            && self.selector.iter().all(|(k, v)| pod.labels.get(k) == Some(v))
    }
}

/// Finds the services in front of a pod by one pair of their selectors, instead of checking every service.
pub struct ServiceIndex<'a>(HashMap<(&'a str, &'a str, &'a str), Vec<&'a Service>>);

impl<'a> ServiceIndex<'a> {
    /// An index of all services.
    pub fn of(store: &'a Store) -> Self {
        let mut index: HashMap<_, Vec<&Service>> = HashMap::new();
        for service in store.services.values() {
            // A pod that the service selects has every pair, so also this one.
            let Some((key, value)) = service.selector.iter().next() else { continue };
            index.entry((service.namespace.as_str(), key.as_str(), value.as_str())).or_default().push(service);
        }
        Self(index)
    }

    /// The services that select a pod.
    pub fn before(&self, pod: &Pod) -> Vec<&'a Service> {
        let behind =
            pod.labels.iter().filter_map(|(k, v)| self.0.get(&(pod.namespace.as_str(), k.as_str(), v.as_str())));
        behind.flatten().copied().filter(|s| s.selects(pod)).collect()
    }
}

impl Slice {
    /// Reads an endpoint slice; `None` if it belongs to no service.
    pub fn read(slice: &EndpointSlice) -> Option<Self> {
        let service = slice.labels().get("kubernetes.io/service-name")?.clone();
        // An endpoint without conditions is ready (discovery/v1).
        let each = slice.endpoints.iter().flat_map(|e| {
            let ready = e.conditions.as_ref().is_none_or(|c| c.ready != Some(false));
            addresses(&e.addresses).into_iter().map(move |address| (address, ready))
        });
        let tcp = |p: &&k8s_openapi::api::discovery::v1::EndpointPort| p.protocol.as_deref().is_none_or(|p| p == "TCP");
        let ports = slice.ports.iter().flatten().filter(tcp);
        Some(Self {
            service,
            addresses: each.collect(),
            ports: ports.filter_map(|p| Some((p.name.clone().unwrap_or_default(), port(p.port?)?))).collect(),
        })
    }
}
