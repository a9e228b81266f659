//! Settings of an agent, read once at start.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use countersign_identity::{KeyType, TrustDomain};
pub use countersign_watch::node::NodeName;
use tokio::sync::watch;

use crate::node_attestor::NodeAttestor;
use crate::secret_names::SecretNames;
use crate::socket_link::LinkName;

/// Settings of an agent. Every combination of valid fields is a valid agent.
#[derive(Clone)]
pub struct Config {
    /// The trust domain of the agent, its server and its workloads.
    pub trust_domain: TrustDomain,
    /// Address of the server, `HOST:PORT`.
    pub server: String,
    /// Unix socket for workloads and sidecars, mode 0666.
    pub socket: PathBuf,
    /// A second name of the socket: a symbolic link beside it. `None` makes none.
    pub socket_link: Option<LinkName>,
    /// Folder of the agent's own identity and the last bundle.
    pub data_dir: PathBuf,
    /// PEM file with the trust domain's bundle, which authenticates the server until a bundle was received from it;
    /// `None` requires the bundle of an earlier run.
    pub trust_bundle: Option<PathBuf>,
    /// How this node attests; `None` requires an identity from an earlier run.
    pub attestor: Option<Arc<dyn NodeAttestor>>,
    /// Key type of new SVIDs of workloads; may change while the agent runs.
    pub key_type: watch::Receiver<KeyType>,
    /// Interval between two polls of a server without push.
    pub sync_interval: Duration,
    /// Whether `unix:path` and `unix:sha256` are attested.
    pub discover_path: bool,
    /// Largest executable that is hashed, in bytes.
    pub hash_limit: u64,
    /// Whether callers in other PID and user namespaces are attested by uid. Off by default, because a container
    /// chooses its uids.
    pub foreign_namespaces: bool,
    /// Where this node's pods are learnt from; `None` disables attestation by pod.
    pub pods: Option<PodSources>,
    /// Secrets for Envoys.
    pub sds: SdsConfig,
    /// Listening address of `/metrics`, `/ready` and `/live`; `None` serves none of them.
    pub metrics: Option<SocketAddr>,
}

/// How secrets are given to Envoys (SDS).
#[derive(Debug, Clone, Default)]
pub struct SdsConfig {
    /// Names that stand for no SPIFFE ID.
    pub names: SecretNames,
    /// Whether bundles are given as plain certificates, without Envoy's SPIFFE validator, to an Envoy that does not say otherwise.
    pub disable_spiffe_validation: bool,
}

/// Where an agent learns which pods its node has. Every source is a peer whose certificate is verified.
#[derive(Debug, Clone)]
pub struct PodSources {
    /// A watch on the API server, or this node's kubelet, or both.
    pub sources: Sources,
    /// Whether labels of pods' namespaces are read from the API server.
    pub namespace_labels: bool,
}

/// At least one source of pods.
#[derive(Debug, Clone)]
pub enum Sources {
    /// A watch on the API server, for the pods of this node.
    ApiServer(NodeName),
    /// This node's kubelet.
    Kubelet(Kubelet),
    /// Whichever knows a container first.
    Both(NodeName, Kubelet),
}

/// The kubelet of this node.
#[derive(Debug, Clone)]
pub struct Kubelet {
    /// Address, `HOST:PORT`. The kubelet's certificate must name the host.
    pub address: String,
    /// PEM file of the CAs that the kubelet's certificate must chain to.
    pub ca: PathBuf,
    /// Path of our service account's token, read for each query.
    pub token: PathBuf,
}
