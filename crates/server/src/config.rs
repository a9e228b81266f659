//! Settings of a server, read once at start.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use countersign_api::log_levels::LogLevels;
use countersign_api::reopen::Reopen;
use countersign_identity::{KeyType, TrustDomain};
use tokio::sync::watch;

/// Shortest lifetime of an SVID: agents sign each one at most every two seconds and check once per second, so a shorter
/// one could expire before its renewal.
pub const MIN_SVID_TTL: Duration = Duration::from_secs(10);

/// Lifetime of a JWT-SVID whose entry sets none (SPIRE: 5 minutes).
pub const JWT_SVID_TTL: Duration = Duration::from_secs(300);

/// Settings of a server. Every combination of valid fields is a valid server.
#[derive(Debug, Clone)]
pub struct Config {
    /// The trust domain that the server signs for.
    pub trust_domain: TrustDomain,
    /// Listening address for agents (TLS).
    pub bind: SocketAddr,
    /// Unix socket for operators and the registrar, mode 0600.
    pub admin_socket: PathBuf,
    /// Folder of the keys and the database.
    pub data_dir: PathBuf,
    /// Lifetimes and key types of new certificates; may change while the server runs.
    pub issuance: watch::Receiver<Issuance>,
    /// Who JWT-SVIDs say issued them (`iss`); `None` names nobody.
    pub jwt_issuer: Option<String>,
    /// Where the private keys of authorities are stored.
    pub key_manager: KeyManagerKind,
    /// The authority above; `None` makes the server its own root.
    pub upstream: Option<Upstream>,
    /// CA bundle that the certificates of `x509pop` agents must chain to; `None` disables the attestor.
    pub x509pop_ca: Option<PathBuf>,
    /// The cluster whose agents attest with service account tokens; `None` disables the attestor.
    pub k8s_psat: Option<PsatCluster>,
    /// ConfigMap that the bundle is published to; `None` publishes to none.
    pub k8s_bundle: Option<BundleConfigMap>,
    /// Label `KEY=VALUE` of the webhook configurations whose caBundle follows our bundle; `None` updates none.
    pub k8s_webhook_label: Option<String>,
    /// Where others fetch our trust bundle; `None` serves it nowhere.
    pub bundle_endpoint: Option<BundleEndpoint>,
    /// Path of the audit log; `None` writes none.
    pub audit_log: Option<PathBuf>,
    /// Listening address of `/metrics`, `/ready` and `/live`; `None` serves none of them.
    pub metrics: Option<SocketAddr>,
    /// How much the server logs.
    pub log_levels: LogLevels,
    /// Signals that the audit log is to be reopened (SIGHUP).
    pub reopen: Reopen,
}

/// Lifetimes and key types of new certificates. Existing certificates keep theirs until they are renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Issuance {
    /// Lifetime of an authority.
    pub ca_ttl: Duration,
    /// Lifetime of an X509-SVID whose entry sets none.
    pub svid_ttl: Duration,
    /// Lifetime of an agent's own SVID.
    pub agent_svid_ttl: Duration,
    /// Key type of new authorities.
    pub ca_key_type: KeyType,
}

/// A cluster whose nodes attest with their agents' service account tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PsatCluster {
    /// Name of the cluster; part of its agents' SPIFFE IDs.
    pub name: String,
    /// Service accounts of agents, `NAMESPACE:NAME`.
    pub service_accounts: BTreeSet<String>,
    /// Accepted audiences of a token; it must have been issued for one of them.
    pub audiences: BTreeSet<String>,
    /// Keys of node labels that become selectors.
    pub node_labels: BTreeSet<String>,
    /// Keys of labels of the agent's pod that become selectors.
    pub pod_labels: BTreeSet<String>,
}

/// A ConfigMap that holds the bundle as PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleConfigMap {
    /// Namespace of the ConfigMap.
    pub namespace: String,
    /// Name of the ConfigMap.
    pub name: String,
    /// Key in the ConfigMap's data.
    pub key: String,
}

/// A bundle endpoint (SPIFFE Federation 5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleEndpoint {
    /// Listening address (TLS).
    pub bind: SocketAddr,
    /// How it proves who it is.
    pub authentication: EndpointAuthentication,
}

/// How a bundle endpoint proves who it is: its profile in the standard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndpointAuthentication {
    /// By the server's own SVID.
    HttpsSpiffe,
    /// By a certificate for its host name.
    HttpsWeb(CertificateFiles),
}

/// A certificate from files, which are read again when they change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFiles {
    /// PEM: the certificate, then any intermediates.
    pub certificate: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
}

/// Where the private keys of authorities are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyManagerKind {
    /// In files of mode 0600 in the data folder. The default.
    #[default]
    Disk,
    /// In memory only: a restarted server creates a new authority.
    Memory,
}

/// The authority above a server.
#[derive(Debug, Clone)]
pub enum Upstream {
    /// A CA from files.
    Disk(UpstreamDisk),
    /// A SPIRE-compatible server of the same trust domain.
    Spire(UpstreamSpire),
}

/// A server above ours.
#[derive(Debug, Clone)]
pub struct UpstreamSpire {
    /// Its address for agents, `HOST:PORT`.
    pub address: String,
    /// Socket of the Workload API that this server has its identity from: of an agent of the server above.
    pub workload_api: PathBuf,
}

/// Files of an upstream authority.
#[derive(Debug, Clone)]
pub struct UpstreamDisk {
    /// PEM: the CA certificate, then any intermediates above it.
    pub certificate: PathBuf,
    /// PEM: the private key of the CA certificate.
    pub key: PathBuf,
    /// PEM: the roots, if the last certificate of `certificate` is not one itself.
    pub bundle: Option<PathBuf>,
}
