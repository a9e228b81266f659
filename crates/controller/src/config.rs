//! What a controller is told when it starts.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use countersign_identity::TrustDomain;
use countersign_identity::policy::Mode;

use crate::injector::Sidecar;
use crate::template::Template;

/// A controller's settings. Every combination of valid fields is a valid controller.
#[derive(Debug, Clone)]
pub struct Config {
    /// What its server signs for.
    pub trust_domain: TrustDomain,
    /// Runs the registrar.
    pub registrar: Option<RegistrarConfig>,
    /// Feeds the directory.
    pub directory: Option<DirectoryConfig>,
    /// Serves the webhook.
    pub injector: Option<InjectorConfig>,
    /// Where `/metrics`, `/ready` and `/live` are served.
    pub metrics: Option<SocketAddr>,
}

/// The registrar's settings.
#[derive(Debug, Clone)]
pub struct RegistrarConfig {
    /// The server's Unix socket.
    pub server_socket: PathBuf,
    /// What the server calls this cluster (`k8s_psat`).
    pub cluster: String,
    /// How a pod's SPIFFE ID is made.
    pub template: Template,
    /// Namespaces whose pods get no identity.
    pub excluded_namespaces: BTreeSet<String>,
    /// Several replicas agree by a lease in this namespace who works; `None`: there is only one.
    pub lease_namespace: Option<String>,
}

/// The directory feed's settings.
#[derive(Debug, Clone)]
pub struct DirectoryConfig {
    /// The server's Unix socket.
    pub server_socket: PathBuf,
    /// How a pod's SPIFFE ID is made; the registrar's own way.
    pub template: Template,
    /// The mesh's mode, where namespace and pod say nothing.
    pub mode: Mode,
    /// ConfigMap, namespace and name, whose settings stand instead of ours while the mesh runs.
    pub mesh_configmap: Option<(String, String)>,
}

/// The webhook's settings.
#[derive(Debug, Clone)]
pub struct InjectorConfig {
    /// Where the API server calls.
    pub bind: SocketAddr,
    /// The agent's Unix socket, from which its serving certificate comes.
    pub agent_socket: PathBuf,
    /// What is put into pods.
    pub sidecar: Sidecar,
}
