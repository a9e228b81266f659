//! What a server is told when it starts.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use countersign_api::reopen::Reopen;
use countersign_identity::{KeyType, TrustDomain};
use tokio::sync::watch;

/// Shortest life of an SVID: agents sign each at most every two seconds and look once a second, so that a shorter one ends
/// before it is renewed.
pub const MIN_SVID_TTL: Duration = Duration::from_secs(10);

/// A server's settings. Every combination of valid fields is a valid server.
#[derive(Debug, Clone)]
pub struct Config {
    /// What it signs for.
    pub trust_domain: TrustDomain,
    /// Where agents reach it.
    pub bind: SocketAddr,
    /// Where operators and the registrar reach it.
    pub admin_socket: PathBuf,
    /// Keys and database.
    pub data_dir: PathBuf,
    /// How certificates are issued.
    pub issuance: watch::Receiver<Issuance>,
    /// Where the authorities' keys live.
    pub key_manager: KeyManagerKind,
    /// The PKI above us, if there is one.
    pub upstream: Option<UpstreamDisk>,
    /// CA bundle that `x509pop` agents' certificates must chain to; `None` turns the attestor off.
    pub x509pop_ca: Option<PathBuf>,
    /// The cluster whose agents attest with service account tokens; `None` turns the attestor off.
    pub k8s_psat: Option<PsatCluster>,
    /// ConfigMap that the bundle is published to.
    pub k8s_bundle: Option<BundleConfigMap>,
    /// Label `KEY=VALUE` of the webhook configurations whose caBundle is kept the same as our bundle.
    pub k8s_webhook_label: Option<String>,
    /// Where the audit record goes; `None` writes none.
    pub audit_log: Option<PathBuf>,
    /// Where `/metrics`, `/ready` and `/live` are served.
    pub metrics: Option<SocketAddr>,
    /// Asks for the audit record to be opened anew (SIGHUP).
    pub reopen: Reopen,
}

/// How certificates are issued from now on; those that are out stay as they are until they are renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Issuance {
    /// Life of an authority.
    pub ca_ttl: Duration,
    /// Life of an X509-SVID whose entry names none.
    pub svid_ttl: Duration,
    /// Life of an agent's own SVID.
    pub agent_svid_ttl: Duration,
    /// Key type of authorities.
    pub ca_key_type: KeyType,
}

/// A cluster whose nodes prove themselves by their agents' service account tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PsatCluster {
    /// Its name, part of its agents' IDs.
    pub name: String,
    /// `namespace:serviceaccount` of agents.
    pub service_accounts: BTreeSet<String>,
    /// A token must be made for one of these.
    pub audiences: BTreeSet<String>,
    /// Node labels that become selectors.
    pub node_labels: BTreeSet<String>,
    /// Labels of the agent's pod that become selectors.
    pub pod_labels: BTreeSet<String>,
}

/// A ConfigMap with the bundle as PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleConfigMap {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The key of its data.
    pub key: String,
}

/// Where the authorities' keys live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyManagerKind {
    /// Files of mode 0600.
    #[default]
    Disk,
    /// Gone with the process: a restarted server makes a new authority.
    Memory,
}

/// An upstream authority on disk.
#[derive(Debug, Clone)]
pub struct UpstreamDisk {
    /// PEM: the CA certificate, then any intermediates above it.
    pub certificate: PathBuf,
    /// PEM, PKCS#8.
    pub key: PathBuf,
    /// PEM: the roots, where `certificate` is not itself the root.
    pub bundle: Option<PathBuf>,
}
