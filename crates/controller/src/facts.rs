//! What we keep of the cluster's objects: small facts in place of whole objects, so that memory follows what is used.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::str::FromStr;

use countersign_identity::policy::Mode;
use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;

use crate::crd::SpiffeID;
use crate::injector::SIDECAR;

/// Prefix of our annotations and labels.
pub const OURS: &str = "countersign.dev/";
/// The mode of a namespace or pod.
pub const MODE: &str = "countersign.dev/mode";
/// Trust domains that a pod federates with.
pub const FEDERATES_WITH: &str = "spiffe.io/federatesWith";

/// Namespace and name.
pub type Key = (String, String);

/// A pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// Service account.
    pub service_account: String,
    /// The node it runs on.
    pub node: Option<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations that matter here.
    pub annotations: BTreeMap<String, String>,
    /// It has ended; its addresses may be another's.
    pub over: bool,
    /// It uses its node's network.
    pub host_network: bool,
    /// It has our sidecar.
    pub meshed: bool,
}

/// A namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its mode, where it names one.
    pub mode: Option<Mode>,
}

/// A service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Service {
    /// UID.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Its virtual addresses; none for a headless one.
    pub addresses: Vec<IpAddr>,
    /// Its ports, number and name.
    pub ports: Vec<(u16, String)>,
    /// Which pods stand behind it; none: endpoints are made by hand.
    pub selector: BTreeMap<String, String>,
}

/// Some of a service's endpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slice {
    /// The service's name.
    pub service: String,
    /// Addresses, and whether they take new connections.
    pub addresses: Vec<(IpAddr, bool)>,
    /// Ports, name and number.
    pub ports: Vec<(String, u16)>,
}

/// The mesh's own settings, which may change while it runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mesh {
    /// The mode, where namespace and pod say nothing.
    pub mode: Option<Mode>,
    /// Every sidecar forwards in the clear, whatever the modes say: the mesh is being removed.
    pub transparent: bool,
}

impl Mesh {
    /// What matters of the mesh's ConfigMap.
    pub fn read(map: &v1::ConfigMap) -> Option<Self> {
        let value = |key: &str| map.data.as_ref().and_then(|d| d.get(key));
        let mode = value("mode").and_then(|m| {
            m.parse().inspect_err(|error| tracing::warn!(%error, "mode of the mesh's ConfigMap; it is left out")).ok()
        });
        Some(Self { mode, transparent: value("transparent").is_some_and(|t| t == "true") })
    }
}

/// What is known of the cluster.
#[derive(Debug, Default)]
pub struct Facts {
    /// The mesh's ConfigMap, if one is followed.
    pub mesh: HashMap<Key, Mesh>,
    /// Pods.
    pub pods: HashMap<Key, Pod>,
    /// UID of each node by name.
    pub nodes: HashMap<Key, String>,
    /// Namespaces; the key's first half is empty.
    pub namespaces: HashMap<Key, Namespace>,
    /// Services.
    pub services: HashMap<Key, Service>,
    /// Endpoint slices.
    pub slices: HashMap<Key, Slice>,
    /// `SpiffeID` objects.
    pub spiffe_ids: HashMap<Key, SpiffeID>,
}

impl Facts {
    /// A pod's mode: the mesh's (or `default`), narrowed by its namespace's and its own.
    pub fn mode_of(&self, pod: &Pod, default: Mode) -> Mode {
        let followed = self.mesh.values().next().cloned().unwrap_or_default();
        if followed.transparent {
            return Mode::Off;
        }
        let mesh = followed.mode.unwrap_or(default);
        let namespace = self.namespaces.get(&(String::new(), pod.namespace.clone())).and_then(|n| n.mode);
        mesh.narrowed_by(namespace).narrowed_by(pod.annotations.get(MODE).map(|m| mode_word(m)))
    }
}

/// A mode as somebody wrote it. A word that means nothing is strict: a typing error must not open anything.
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

impl Pod {
    /// What matters of a pod.
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
    /// What matters of a namespace.
    pub fn read(namespace: &v1::Namespace) -> Option<Self> {
        let said = [namespace.annotations().get(MODE), namespace.labels().get(MODE)].into_iter().flatten();
        // The label says it to the webhook's selectors, the annotation to whoever reads it; the stricter one counts.
        let mode = said.map(|text| mode_word(text)).max();
        Some(Self { mode })
    }
}

impl Service {
    /// What matters of a service.
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

    /// Whether a pod stands behind it.
    pub fn selects(&self, pod: &Pod) -> bool {
        self.namespace == pod.namespace
            && !self.selector.is_empty()
            && self.selector.iter().all(|(k, v)| pod.labels.get(k) == Some(v))
    }
}

/// Which services stand before a pod, found by one pair of their selectors instead of one service after the other.
pub struct ServiceIndex<'a>(HashMap<(&'a str, &'a str, &'a str), Vec<&'a Service>>);

impl<'a> ServiceIndex<'a> {
    /// Of all services.
    pub fn of(facts: &'a Facts) -> Self {
        let mut index: HashMap<_, Vec<&Service>> = HashMap::new();
        for service in facts.services.values() {
            // A pod that is selected has every pair, this one among them.
            let Some((key, value)) = service.selector.iter().next() else { continue };
            index.entry((service.namespace.as_str(), key.as_str(), value.as_str())).or_default().push(service);
        }
        Self(index)
    }

    /// The services that a pod stands behind.
    pub fn before(&self, pod: &Pod) -> Vec<&'a Service> {
        let behind =
            pod.labels.iter().filter_map(|(k, v)| self.0.get(&(pod.namespace.as_str(), k.as_str(), v.as_str())));
        behind.flatten().copied().filter(|s| s.selects(pod)).collect()
    }
}

impl Slice {
    /// What matters of an endpoint slice.
    pub fn read(slice: &EndpointSlice) -> Option<Self> {
        let service = slice.labels().get("kubernetes.io/service-name")?.clone();
        // An endpoint that says nothing of itself is ready (discovery/v1).
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
