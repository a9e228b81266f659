//! `countersign controller`: flags of the controller.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use countersign_controller::injector::{Leave, Sidecar};
use countersign_controller::template::{DEFAULT, Template};
use countersign_controller::{Config, DirectoryConfig, InjectorConfig, RegistrarConfig};
use countersign_csi::DriverName;
use countersign_identity::policy::Mode;
use countersign_identity::trust_domain::parse_trust_domain;

use super::SupervisorArgs;
use super::resources::ResourceArgs;
use crate::clients::{AGENT_SOCKET, SERVER_SOCKET};
use crate::settings::Mistake;
use crate::stop::for_role;

/// Run the Kubernetes controller: injector, registrar, directory publisher.
///
/// The parts run together or apart: the injector adds sidecars to pods, the registrar registers pods with the server,
/// the directory publisher tells which workload is at each address. Registrar and publisher use the server's Unix
/// socket.
#[derive(Debug, clap::Args)]
pub struct ControllerArgs {
    /// Parts to run, comma separated: injector, registrar, directory.
    #[arg(long, value_name = "PARTS", value_delimiter = ',', default_value = "injector,registrar,directory")]
    only: Vec<String>,
    /// Trust domain of the server.
    #[arg(long, value_name = "NAME")]
    trust_domain: String,
    /// Unix socket of the server.
    #[arg(long, default_value = SERVER_SOCKET, value_name = "PATH")]
    server_socket: PathBuf,
    /// Registrar: name of the cluster, equal to the server's --k8s-psat-cluster.
    #[arg(long, value_name = "NAME", default_value = "kubernetes")]
    cluster: String,
    /// Registrar: template of a pod's SPIFFE ID.
    #[arg(long, value_name = "TEMPLATE", default_value = DEFAULT)]
    id_template: String,
    /// Registrar: namespaces whose pods get no identity, comma separated.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "kube-system,kube-public")]
    exclude_namespaces: Vec<String>,
    /// Registrar: namespace of the lease by which several replicas elect a leader [default: no election, for one
    /// replica].
    #[arg(long, value_name = "NAMESPACE")]
    lease_namespace: Option<String>,
    /// Mode of the mesh, used where namespace and pod set none: off, permissive or strict.
    #[arg(long, value_name = "MODE", default_value = "permissive")]
    mode: String,
    /// Directory: ConfigMap, NAMESPACE/NAME, whose `mode` overrides --mode; changes take effect while the mesh runs.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    mesh_configmap: Option<String>,
    /// Directory: strict sidecars answer strangers on port 15020 (/metrics, /ready, /live, /mode), for a Prometheus that has no
    /// sidecar. Otherwise only their own node is answered.
    #[arg(long, value_name = "BOOL", default_value_t = false, action = clap::ArgAction::Set)]
    open_metrics: bool,
    /// Injector: listening address for the API server.
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:9443")]
    bind: SocketAddr,
    /// Injector: Unix socket of the agent, which provides the serving certificate.
    #[arg(long, default_value = AGENT_SOCKET, value_name = "PATH")]
    agent_socket: PathBuf,
    /// Injector: folder where the ConfigMap countersign-mesh is mounted. Its `mode` overrides --mode and counts as
    /// strict if it cannot be read.
    #[arg(long, value_name = "DIR")]
    live_settings: Option<PathBuf>,
    /// Injector: CSI driver that mounts the agent's folder into pods (`countersign csi`) [default: none, the pods mount it by
    /// `hostPath`].
    #[arg(long, value_name = "NAME")]
    csi_driver: Option<DriverName>,
    #[command(flatten)]
    sidecar: SidecarArgs,
    #[command(flatten)]
    supervisor: SupervisorArgs,
}

/// Arguments for the injected sidecar.
#[derive(Debug, Clone, clap::Args)]
pub struct SidecarArgs {
    /// Image of redirect and sidecar.
    #[arg(long, value_name = "IMAGE", default_value = concat!("docker.io/countersign/countersign:", env!("CARGO_PKG_VERSION")))]
    image: String,
    /// When nodes pull the image.
    #[arg(long, value_name = "POLICY", default_value = "IfNotPresent", value_parser = ["Always", "IfNotPresent", "Never"])]
    image_pull_policy: String,
    /// Folder on each node that holds its agent's socket.
    #[arg(long, value_name = "DIR", default_value = "/run/countersign/agent")]
    agent_dir: String,
    /// The CNI plugin (`countersign cni`) installs the redirect: no container of a pod needs a privilege for it, and native sidecars wait for it.
    #[arg(long)]
    cni: bool,
    /// Inject native sidecars (Kubernetes 1.29 and newer). `false` injects plain containers; a pod's init containers
    /// have no network before them.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    native_sidecars: bool,
    /// Log level of sidecars whose pod sets none.
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = ["error", "warn", "info", "debug", "trace"])]
    sidecar_log: String,
    /// Namespaces whose pods may weaken strict mode by annotations (`ignore-*`, `allow-*`, `port-modes`), comma separated;
    /// `*` stands for all. Injector and directory.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    allow_exceptions: Vec<String>,
    #[command(flatten)]
    resources: ResourceArgs,
}

impl SidecarArgs {
    /// Converts the arguments to the injector's settings. `csi_driver`: mounts the agent's folder into pods; `None` for `hostPath`.
    pub fn sidecar(self, csi_driver: Option<DriverName>) -> Sidecar {
        Sidecar {
            image: self.image,
            pull_policy: self.image_pull_policy,
            agent_dir: self.agent_dir,
            csi_driver: csi_driver.map(|name| name.as_str().to_owned()),
            cni: self.cni,
            log_level: self.sidecar_log,
            native: self.native_sidecars,
            leave: Leave::of(self.allow_exceptions),
            resources: self.resources.resources(),
        }
    }
}

impl SidecarArgs {
    /// What an injector adds, changed by the arguments that were named, each by the name of its field.
    pub fn over(self, named: &BTreeSet<String>, injected: Sidecar) -> Sidecar {
        fn pick<T>(is_named: bool, own: T, other: T) -> T {
            if is_named { own } else { other }
        }
        let has = |name: &str| named.contains(name);
        Sidecar {
            image: pick(has("image"), self.image, injected.image),
            pull_policy: pick(has("image_pull_policy"), self.image_pull_policy, injected.pull_policy),
            agent_dir: pick(has("agent_dir"), self.agent_dir, injected.agent_dir),
            csi_driver: injected.csi_driver,
            cni: pick(has("cni"), self.cni, injected.cni),
            log_level: pick(has("sidecar_log"), self.sidecar_log, injected.log_level),
            native: pick(has("native_sidecars"), self.native_sidecars, injected.native),
            leave: pick(has("allow_exceptions"), Leave::of(self.allow_exceptions), injected.leave),
            resources: self.resources.over(named, injected.resources),
        }
    }
}

impl ControllerArgs {
    /// What an injector with these arguments adds to pods.
    pub fn injects(self) -> Sidecar {
        self.sidecar.sidecar(self.csi_driver)
    }

    fn config(self) -> Result<Config, Mistake> {
        let only: BTreeSet<&str> = self.only.iter().map(|p| p.trim()).filter(|p| !p.is_empty()).collect();
        if let Some(other) = only.iter().find(|p| !["injector", "registrar", "directory"].contains(*p)) {
            let why = format!("`{other}` is no part: use injector, registrar, directory");
            return Err(Mistake::flag("--only", &why));
        }
        if only.is_empty() {
            return Err(Mistake::flag("--only", "names no part: use injector, registrar, directory"));
        }
        let template: Template =
            self.id_template.parse().map_err(|e| Mistake::flag("--id-template", &format!("{e}")))?;
        let mode: Mode = self.mode.parse().map_err(|e| Mistake::flag("--mode", &format!("{e}")))?;
        let mesh_configmap = self.mesh_configmap.map(|text| match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                Ok((namespace.to_owned(), name.to_owned()))
            }
            _ => Err(Mistake::flag("--mesh-configmap", &format!("`{text}` is no namespace/name"))),
        });
        let mesh_configmap = mesh_configmap.transpose()?;
        // The namespace of our own installation: `SpiffeID` objects made by hand may not use its names.
        let control_namespace =
            self.lease_namespace.clone().or_else(|| mesh_configmap.as_ref().map(|(namespace, _)| namespace.clone()));
        let sidecar = self.sidecar.sidecar(self.csi_driver);
        Ok(Config {
            trust_domain: parse_trust_domain(&self.trust_domain)
                .map_err(|e| Mistake::flag("--trust-domain", &e.to_string()))?,
            registrar: only.contains("registrar").then(|| RegistrarConfig {
                server_socket: self.server_socket.clone(),
                cluster: self.cluster,
                template: template.clone(),
                excluded_namespaces: self.exclude_namespaces.into_iter().collect(),
                lease_namespace: self.lease_namespace,
                control_namespace,
            }),
            directory: only.contains("directory").then_some(DirectoryConfig {
                server_socket: self.server_socket,
                template,
                mode,
                leave: sidecar.leave.clone(),
                open_metrics: self.open_metrics,
                mesh_configmap,
            }),
            injector: only.contains("injector").then_some(InjectorConfig {
                bind: self.bind,
                agent_socket: self.agent_socket,
                sidecar,
                live_settings: self.live_settings,
                mode,
            }),
            metrics: self.supervisor.metrics,
        })
    }
}

/// Runs a controller until it is stopped.
pub fn run(args: ControllerArgs) -> Result<()> {
    super::write_privately();
    args.supervisor.log.start()?;
    let ready = args.supervisor.ready.clone();
    let config = args.config()?;
    super::runtime()?.block_on(async {
        // A controller writes no files that would have to be reopened.
        let (stop, _) = for_role()?;
        let ran = countersign_controller::run(config, stop, || ready.write("ready")).await;
        ran.map_err(|error| Mistake(error.to_string()).into())
    })
}
