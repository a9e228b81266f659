//! What a controller is told when it starts.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use countersign_identity::TrustDomain;
use countersign_identity::policy::Mode;

use crate::injector::Sidecar;
use crate::template::Template;

/// Largest `mode` that is read, in bytes.
const MAX_MODE_BYTES: u64 = 64;

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
    /// Namespace of our own installation, whose names nobody is given by hand.
    pub control_namespace: Option<String>,
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
    /// Folder with the mesh's settings, as its ConfigMap is mounted; `None`: the mesh is as `mode` says.
    pub live_settings: Option<PathBuf>,
    /// The mesh's mode where no folder is followed.
    pub mode: Mode,
}

impl InjectorConfig {
    /// The mesh's mode now. Whatever cannot be read is strict: rules are chosen once for a pod's life, and a pod that is too
    /// strict is seen at once, one that is too open never.
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
