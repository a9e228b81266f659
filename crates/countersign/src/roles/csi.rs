//! `countersign csi`: flags of the CSI driver.

use std::path::PathBuf;

use anyhow::Result;
use countersign_csi::{Config, CsiError, DriverName, KubeletDir, NodeId};

use super::SupervisorArgs;
use crate::settings::{Mistake, need_root_because};
use crate::stop::for_role;

/// Run the CSI driver of this node, which mounts the agent's folder into pods.
///
/// A pod gets the folder of the agent's socket, read-only, by a volume `csi: {driver: csi.countersign.dev, readOnly: true}`
/// in its specification, without a `hostPath`. The driver registers itself with the kubelet. It mounts, so it needs root with
/// `CAP_SYS_ADMIN`; mounts stay while it restarts.
#[derive(Debug, clap::Args)]
pub struct CsiArgs {
    /// Name of the driver in pods' volumes. With `csi.spiffe.io` it takes the place of SPIRE's driver.
    #[arg(long, value_name = "NAME", default_value = "csi.countersign.dev")]
    driver_name: DriverName,
    /// Name of this node.
    #[arg(long, value_name = "NAME")]
    node_name: NodeId,
    /// Folder of the kubelet (its --root-dir). The driver has to see it at the same path, and with shared mounts.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet")]
    kubelet_dir: KubeletDir,
    /// Folder of the agent's socket, which pods get.
    #[arg(long, value_name = "DIR", default_value = "/run/countersign/agent")]
    agent_dir: PathBuf,
    #[command(flatten)]
    supervisor: SupervisorArgs,
}

/// Runs a driver until it is stopped.
pub fn run(args: CsiArgs) -> Result<()> {
    super::write_privately();
    args.supervisor.log.start()?;
    need_root_because("csi", "it mounts folders into pods")?;
    let config = Config {
        driver: args.driver_name,
        node: args.node_name,
        kubelet: args.kubelet_dir,
        agent_dir: args.agent_dir,
        metrics: args.supervisor.metrics,
    };
    super::runtime()?.block_on(async {
        // A driver writes no files that would have to be reopened.
        let (stop, _) = for_role()?;
        let ran = countersign_csi::run(config, stop, || args.supervisor.ready.write("ready")).await;
        ran.map_err(|error| match error {
            CsiError::Grpc(e) => e.into(),
            listen @ CsiError::Listen { .. } => Mistake(listen.to_string()).into(),
        })
    })
}
