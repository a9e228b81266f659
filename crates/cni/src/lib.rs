//! The redirect without a privilege in any pod: a chained CNI plugin, which the container runtime starts for each pod,
//! and its node's component, one per node.
//!
//! [`plugin`] is the plugin. The component ([`run`]) installs it and keeps it installed (`keeper`: `binary`, `conf`),
//! answers it over a Unix socket (`wire`, `requests`), and installs the redirect of pods that the plugin was not called
//! for (`repair`, `processes`). It admits sidecars by their cgroups (`sidecars`, `cgroups`, `runtime`). What a pod asks for is
//! what the API server says of it (`pod`): an argument of its sidecar, which keeps the pod from starting anything before the
//! component has said that the redirect is in force.

mod binary;
mod cgroups;
mod conf;
pub mod config;
#[cfg(fuzzing)]
pub mod fuzzing;
mod installer;
mod keeper;
mod kernel;
mod leave;
mod metrics;
mod namespace;
pub mod plugin;
mod pod;
mod processes;
mod repair;
mod requests;
mod resolvers;
mod runtime;
mod sidecars;
#[cfg(test)]
mod testing;
mod turns;
mod wire;

use std::future::pending;
use std::io;
use std::sync::Arc;

use countersign_api::http;
use countersign_api::transport::bind_unix;
use countersign_watch::Watches;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use config::{Config, DaemonSetName};
pub use pod::{Askers, Order};

use crate::binary::Binary;
use crate::cgroups::Cgroups;
use crate::conf::ConfDir;
use crate::installer::Installer;
use crate::keeper::Keeper;
use crate::metrics::Metrics;
use crate::repair::Repair;
use crate::requests::Service;
use crate::runtime::Records;
use crate::sidecars::Sidecars;

/// Why a component did not start.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// The socket or the metrics address cannot be opened.
    #[error("cannot listen on {name}: {source}")]
    Listen {
        /// Path or address.
        name: String,
        /// Error of the operating system.
        source: io::Error,
    },
    /// There is no way to the API server.
    #[error("cannot ask the API server: {0}")]
    ApiServer(#[from] kube::Error),
}

/// This program.
const PROGRAM: &str = "/proc/self/exe";
/// Mode of the socket: root's alone, who runs the container runtime.
const SOCKET_MODE: u32 = 0o600;
/// Name of the component's container in its DaemonSet.
pub const CONTAINER: &str = "cni";

/// Runs a node's component until `shutdown`. `ready` is called once its socket serves.
pub async fn run(
    config: Config,
    askers: Askers,
    shutdown: CancellationToken,
    ready: impl FnOnce(),
) -> Result<(), CniError> {
    let client = countersign_watch::client().await?;
    run_with(client, config, askers, shutdown, ready).await
}

async fn run_with(
    client: kube::Client,
    config: Config,
    askers: Askers,
    shutdown: CancellationToken,
    ready: impl FnOnce(),
) -> Result<(), CniError> {
    let metrics = Arc::new(Metrics::default());
    let watches = Arc::new(Watches::of(metrics.watch_errors.clone()));
    let conf = ConfDir::new(config.conf_dir.clone(), config.bin_dir.clone(), entry(&config));
    let keeper = Arc::new(Keeper::new(Binary::new(PROGRAM.into(), &config.bin_dir), conf, metrics.clone()));
    let tasks = TaskTracker::new();
    if let Some(address) = config.metrics {
        let bound = TcpListener::bind(address).await;
        let listener = bound.map_err(|source| CniError::Listen { name: address.to_string(), source })?;
        let pages = pages(metrics.clone(), keeper.clone(), watches.clone());
        tasks.spawn(http::serve(listener, pages, shutdown.clone()));
    }
    let listener = bind_unix(&config.socket, SOCKET_MODE)
        .map_err(|source| CniError::Listen { name: config.socket.display().to_string(), source })?;
    let cgroups = if config.sidecar_by_cgroup { cgroups().await } else { None };
    metrics.by_cgroup.set(i64::from(cgroups.is_some()));
    let installer = Installer::new(askers, cgroups.is_some());
    if let Some(socket) = config.sidecar_socket {
        let name = socket.display().to_string();
        let sidecars = Sidecars::new(client.clone(), askers.sidecar, cgroups, Records::of_node(), metrics.clone());
        let served = sidecars.serve(socket, shutdown.clone());
        tasks.spawn(served.map_err(|source| CniError::Listen { name, source })?);
    }
    let service = Service::new(client.clone(), config.node.clone(), installer.clone(), metrics.clone(), config.repair);
    tasks.spawn(service.serve(listener, shutdown.clone()));
    let repair = Repair::new(config.node, installer, metrics);
    let repairing = async {
        if config.repair {
            repair.run(client.clone(), &watches.health("pods")).await;
        }
        pending::<()>().await;
    };
    tracing::info!(socket = %config.socket.display(), "ready for the plugin");
    ready();
    // The plugin calls us as soon as it is installed.
    tokio::select! {
        () = keeper.run(shutdown.clone()) => {}
        () = repairing => {}
    }
    tasks.close();
    tasks.wait().await;
    if let Some(set) = &config.daemon_set
        && leave::is_for_good(client, set, CONTAINER).await
    {
        keeper.remove().await;
    }
    Ok(())
}

/// The cgroups of this node's sidecars, if they can be told by them.
async fn cgroups() -> Option<Cgroups> {
    match tokio::task::spawn_blocking(Cgroups::detect).await {
        Ok(Ok(cgroups)) => {
            tracing::info!("sidecars are told by their cgroups");
            Some(cgroups)
        }
        Ok(Err(why)) => {
            tracing::warn!(%why, "sidecars are told by their user ID alone, which an app with CAP_SETUID can take on");
            None
        }
        Err(why) => {
            tracing::error!(%why, "whether sidecars can be told by their cgroups is not known, so their user ID counts alone");
            None
        }
    }
}

/// The plugin's object in the node's network configuration.
fn entry(config: &Config) -> Value {
    json!({ "type": plugin::NAME, "capabilities": { "dns": true }, "socket": config.plugin_socket })
}

/// The pages of the `metrics` address.
fn pages(metrics: Arc<Metrics>, keeper: Arc<Keeper>, watches: Arc<Watches>) -> Arc<http::Handler> {
    http::pages(move |path| match path {
        "/metrics" => Some(http::Answer::metrics(&metrics.registry)),
        "/live" => Some(http::Answer::ready(None)),
        "/ready" => {
            let missing: Vec<String> = keeper.missing().into_iter().chain(watches.lasting()).collect();
            Some(http::Answer::ready((!missing.is_empty()).then(|| missing.join("; "))))
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests;
