//! What an agent is told when it starts.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use countersign_identity::{KeyType, TrustDomain};
use tokio::sync::watch;
use zeroize::Zeroizing;

/// An agent's settings. Every combination of valid fields is a valid agent.
#[derive(Clone)]
pub struct Config {
    /// Where it belongs.
    pub trust_domain: TrustDomain,
    /// The server, `host:port`.
    pub server: String,
    /// Where workloads and sidecars reach it.
    pub socket: PathBuf,
    /// Its own identity and the last bundle.
    pub data_dir: PathBuf,
    /// PEM file with the trust domain's bundle, by which the server is known before the first bundle came over an
    /// authenticated connection; `None` needs the bundle of an earlier run.
    pub trust_bundle: Option<PathBuf>,
    /// How this node proves itself; `None` needs an identity from an earlier run.
    pub evidence: Option<Evidence>,
    /// Key type of workloads' SVIDs, from now on.
    pub key_type: watch::Receiver<KeyType>,
    /// How often a server without push is asked.
    pub sync_interval: Duration,
    /// Whether `unix:path` and `unix:sha256` are attested.
    pub discover_path: bool,
    /// Largest executable that is hashed, in bytes.
    pub hash_limit: u64,
    /// Whether callers in other PID and user namespaces are attested by uid. Off: a container's uid is its own word.
    pub foreign_namespaces: bool,
    /// This node's kubelet, where callers are attested by their pods too.
    pub kubelet: Option<Kubelet>,
    /// Where `/metrics`, `/ready` and `/live` are served.
    pub metrics: Option<SocketAddr>,
}

/// How a node proves itself.
#[derive(Clone)]
pub enum Evidence {
    /// A token that works once.
    JoinToken(Zeroizing<String>),
    /// A certificate chain and its key, PEM files.
    X509Pop {
        /// Leaf first.
        certificate: PathBuf,
        /// PKCS#8.
        key: PathBuf,
    },
    /// A projected service account token, read anew for each attestation.
    K8sPsat {
        /// What the server calls this cluster.
        cluster: String,
        /// The token's file.
        token: PathBuf,
    },
}

/// The kubelet of this node.
#[derive(Debug, Clone)]
pub struct Kubelet {
    /// `host:port`; the host is what its certificate must name.
    pub address: String,
    /// PEM CAs that its certificate must chain to.
    pub ca: PathBuf,
    /// Our service account's token, read anew for each query.
    pub token: PathBuf,
    /// Whether the API server is asked for the labels of pods' namespaces.
    pub namespace_labels: bool,
}
