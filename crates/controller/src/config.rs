//! Settings of a controller, read once at start.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use countersign_identity::TrustDomain;
use countersign_identity::policy::Mode;

use crate::injector::{Leave, Sidecar};
use crate::template::Template;

/// Largest `mode` file that is read, in bytes.
const MAX_MODE_BYTES: u64 = 64;

/// Settings of a controller. Every combination of valid fields is a valid controller.
#[derive(Debug, Clone)]
pub struct Config {
    /// The trust domain of its server and its workloads.
    pub trust_domain: TrustDomain,
    /// Settings of the registrar; `None` does not run it.
    pub registrar: Option<RegistrarConfig>,
    /// Settings of the directory publisher; `None` does not run it.
    pub directory: Option<DirectoryConfig>,
    /// Settings of the webhook; `None` does not serve it.
    pub injector: Option<InjectorConfig>,
    /// Listening address of `/metrics`, `/ready` and `/live`; `None` serves none of them.
    pub metrics: Option<SocketAddr>,
}

/// Settings of the registrar.
#[derive(Debug, Clone)]
pub struct RegistrarConfig {
    /// Path of the server's Unix socket.
    pub server_socket: PathBuf,
    /// Name of this cluster in the server's settings (`k8s_psat`).
    pub cluster: String,
    /// Template of a pod's SPIFFE ID.
    pub template: Template,
    /// Namespaces whose pods get no identity.
    pub excluded_namespaces: BTreeSet<String>,
    /// Namespace of the lease by which several replicas elect a leader; `None` if there is one replica only.
    pub lease_namespace: Option<String>,
    /// Namespace of our own installation. `SpiffeID` objects made by hand may not use its names.
    pub control_namespace: Option<String>,
}

/// Settings of the directory publisher.
#[derive(Debug, Clone)]
pub struct DirectoryConfig {
    /// Path of the server's Unix socket.
    pub server_socket: PathBuf,
    /// Template of a pod's SPIFFE ID, the same as the registrar's.
    pub template: Template,
    /// Mode of the mesh, used where namespace and pod set none.
    pub mode: Mode,
    /// Namespaces whose pods may weaken strict mode for single ports.
    pub leave: Leave,
    /// Whether strict sidecars answer strangers on port 15020: `/metrics`, `/ready`, `/live`, `/mode`.
    pub open_metrics: bool,
    /// ConfigMap (namespace and name) whose settings override these while the mesh runs; `None` follows none.
    pub mesh_configmap: Option<(String, String)>,
}

/// Settings of the webhook.
#[derive(Debug, Clone)]
pub struct InjectorConfig {
    /// Listening address for the API server.
    pub bind: SocketAddr,
    /// Path of the agent's Unix socket, which provides the serving certificate.
    pub agent_socket: PathBuf,
    /// Settings of the injected sidecar.
    pub sidecar: Sidecar,
    /// Folder where the mesh's ConfigMap is mounted; `None` uses `mode`.
    pub live_settings: Option<PathBuf>,
    /// Mode of the mesh if no folder is followed.
    pub mode: Mode,
}

impl InjectorConfig {
    /// The mesh's mode now. An unreadable mode counts as strict: rules are chosen once for a pod's life, and a pod that
    /// is too strict is noticed at once, one that is too open never.
    pub fn mesh_mode(&self) -> Mode {
        let Some(folder) = &self.live_settings else { return self.mode };
        let read = countersign_api::files::read_bounded(&folder.join("mode"), MAX_MODE_BYTES);
        let read = read.ok().and_then(|text| String::from_utf8(text).ok());
        read.and_then(|text| text.trim().parse().ok()).unwrap_or(Mode::Strict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_that_cannot_be_read_is_strict() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = InjectorConfig {
            bind: "127.0.0.1:0".parse().unwrap(),
            agent_socket: "/x".into(),
            sidecar: Sidecar::new("i".into()),
            live_settings: Some(folder.path().to_owned()),
            mode: Mode::Off,
        };
        assert_eq!(config.mesh_mode(), Mode::Strict);
        for (text, mode) in [("permissive\n", Mode::Permissive), ("stict", Mode::Strict), ("off", Mode::Off)] {
            std::fs::write(folder.path().join("mode"), text).unwrap();
            assert_eq!(config.mesh_mode(), mode, "{text}");
        }
        config.live_settings = None;
        config.mode = Mode::Permissive;
        assert_eq!(config.mesh_mode(), Mode::Permissive);
    }
}
