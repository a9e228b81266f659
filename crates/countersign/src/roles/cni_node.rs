//! `countersign cni-node`: flags of the CNI plugin's component of a node.

use std::path::PathBuf;

use anyhow::Result;
use countersign_cni::config::NodeName;
use countersign_cni::{Askers, CniError, Config, DaemonSetName};
use countersign_controller::injector::{REDIRECT, SIDECAR};

use super::SupervisorArgs;
use super::redirect::order;
use crate::settings::{Mistake, need_root_because};
use crate::stop::for_role;

/// Run the CNI plugin's component of this node: it installs the plugin, and the redirect of meshed pods.
///
/// It copies itself into the node's folder of plugins and adds the plugin to the network configuration that the
/// container runtime uses, again and again if another tool rewrites either. The plugin hands it each new pod's network
/// namespace. A pod whose native sidecar has the argument `--redirect`, or whose init container `countersign-redirect`
/// the arguments `redirect --validate …`, gets the redirect that they describe, any other pod nothing. It needs root
/// with `CAP_SYS_ADMIN` and `CAP_NET_ADMIN`, and `CAP_SYS_PTRACE` for --repair.
#[derive(Debug, clap::Args)]
pub struct CniNodeArgs {
    /// Name of this node.
    #[arg(long, value_name = "NAME")]
    node_name: NodeName,
    /// Folder of the node's CNI plugins.
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// Folder of the node's network configurations.
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// Unix socket for the plugin.
    #[arg(long, value_name = "PATH", default_value = "/run/countersign/cni/cni.sock")]
    socket: PathBuf,
    /// Path of that socket on the node, if it is another one there [default: that of --socket].
    #[arg(long, value_name = "PATH")]
    node_socket: Option<PathBuf>,
    /// Unix socket for sidecars, in the folder of the agent's socket: a sidecar asks there to be admitted [default: none].
    #[arg(long, value_name = "PATH")]
    sidecar_socket: Option<PathBuf>,
    /// Tell sidecars from apps with their user ID by their cgroups, where the redirect has --by-cgroup and the node has cgroups of
    /// version 2. Needs --sidecar-socket, the node's PID namespace and `CAP_SYS_PTRACE`.
    #[arg(long, requires = "sidecar_socket")]
    sidecar_by_cgroup: bool,
    /// Also install the redirect of pods that wait for it because the plugin was not called for them. Needs the node's
    /// PID namespace.
    #[arg(long)]
    repair: bool,
    /// DaemonSet of this component. Once it is gone or has no container `cni`, the plugin's entry is removed at the end
    /// [default: it stays].
    #[arg(long, value_name = "NAMESPACE/NAME")]
    daemon_set: Option<DaemonSetName>,
    #[command(flatten)]
    supervisor: SupervisorArgs,
}

/// Runs a component until it is stopped.
pub fn run(args: CniNodeArgs) -> Result<()> {
    super::write_privately();
    args.supervisor.log.start()?;
    need_root_because("cni-node", "it enters the network namespaces of pods")?;
    let config = Config {
        node: args.node_name,
        bin_dir: args.bin_dir,
        conf_dir: args.conf_dir,
        plugin_socket: args.node_socket.unwrap_or_else(|| args.socket.clone()),
        socket: args.socket,
        sidecar_socket: args.sidecar_socket,
        sidecar_by_cgroup: args.sidecar_by_cgroup,
        repair: args.repair,
        daemon_set: args.daemon_set,
        metrics: args.supervisor.metrics,
    };
    let askers = Askers { validator: REDIRECT, sidecar: SIDECAR, read: order };
    super::runtime()?.block_on(async {
        // A component writes no files that would have to be reopened.
        let (stop, _) = for_role()?;
        let ran = countersign_cni::run(config, askers, stop, || args.supervisor.ready.write("ready")).await;
        ran.map_err(|error| match error {
            listen @ CniError::Listen { .. } => Mistake(listen.to_string()).into(),
            other => other.into(),
        })
    })
}
