//! The Kubernetes controller: injects sidecars into pods, registers pods with the server, and publishes the directory.
//!
//! Three parts that run together or apart: [`injector`] is the webhook and needs no permission in the cluster;
//! [`registrar`] and [`publisher`] run next to a server, whose Unix socket they use, and share one view of the cluster
//! ([`watch`], [`store`]).

pub mod changed;
pub mod config;
pub mod crd;
mod directory;
pub mod injector;
mod leader;
pub mod metrics;
pub mod port_modes;
pub mod publisher;
pub mod quantity;
pub mod registrar;
mod server_link;
mod services;
pub mod store;
pub mod template;
pub mod watch;

use std::net::SocketAddr;
use std::sync::Arc;

use countersign_api::graceful::{GRACE, take_leave};
use countersign_api::http;
use countersign_watch::Watches;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use config::{Config, DirectoryConfig, InjectorConfig, RegistrarConfig};

use crate::leader::Leader;
use crate::metrics::Metrics;
use crate::publisher::DirectoryPublisher;
use crate::registrar::Registrar;
use crate::server_link::ServerLink;
use crate::watch::Cluster;

/// Why a controller did not start.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// The Kubernetes API cannot be reached.
    #[error("cannot reach the Kubernetes API: {}; run in a pod, or set KUBECONFIG", countersign_watch::in_words(.0))]
    Kubernetes(#[from] kube::Error),
    /// The webhook cannot serve.
    #[error(transparent)]
    Webhook(#[from] injector::WebhookError),
    /// The metrics address cannot be opened.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The listening address.
        address: SocketAddr,
        /// Error of the operating system.
        source: std::io::Error,
    },
}

/// Runs a controller until `shutdown`. `ready` is called once its parts have started.
pub async fn run(config: Config, shutdown: CancellationToken, ready: impl FnOnce()) -> Result<(), ControllerError> {
    let tasks = TaskTracker::new();
    let metrics = Arc::new(Metrics::default());
    let serving = injector::Serving::default();
    let cluster = Arc::new(Cluster::new(mesh_configmap(&config).is_some(), Watches::of(metrics.watch_errors.clone())));
    if let Some(settings) = config.injector.clone() {
        injector::serve(settings, serving.clone(), metrics.clone(), &tasks, shutdown.clone()).await?;
    }
    let watches = config.registrar.is_some() || config.directory.is_some();
    if watches {
        let client = countersign_watch::client().await?;
        start_watchers(&config, &client, &cluster, &metrics, &tasks, &shutdown);
    }
    if let Some(address) = config.metrics {
        let listener =
            TcpListener::bind(address).await.map_err(|source| ControllerError::Listen { address, source })?;
        let injects = config.injector.is_some();
        let follows_mesh = mesh_configmap(&config).is_some();
        let pages = http::pages({
            let (metrics, cluster) = (metrics.clone(), cluster.clone());
            move |path| match path {
                "/metrics" => Some(http::Answer::metrics(&metrics.registry)),
                "/live" => Some(http::Answer::ready(None)),
                "/ready" => {
                    let missing = injects.then(|| serving.missing()).flatten().map(ToOwned::to_owned);
                    let missing = missing.or_else(|| watches.then(|| cluster.missing()).flatten());
                    Some(http::Answer::ready(missing))
                }
                "/mesh" if follows_mesh => Some(mesh_page(&cluster)),
                _ => None,
            }
        });
        tasks.spawn(http::serve(listener, pages, shutdown.clone()));
    }
    tracing::info!(
        registrar = config.registrar.is_some(),
        directory = config.directory.is_some(),
        injector = config.injector.is_some(),
        "controller ready"
    );
    ready();
    shutdown.cancelled().await;
    tasks.close();
    take_leave(tasks.wait(), &shutdown, GRACE).await;
    Ok(())
}

/// The mesh's settings as they are followed. Who sets them can see that a version knows them.
fn mesh_page(cluster: &Cluster) -> http::Answer {
    let Some(mesh) = cluster.store().map(|store| store.mesh.values().next().cloned().unwrap_or_default()) else {
        return http::Answer::text(503, "not known yet\n");
    };
    let mode = mesh.mode.map(|mode| mode.to_string());
    let page = serde_json::json!({ "mode": mode, "transparent": mesh.transparent.to_string() });
    http::Answer { status: 200, kind: "application/json", text: page.to_string() }
}

fn mesh_configmap(config: &Config) -> Option<(String, String)> {
    config.directory.as_ref().and_then(|d| d.mesh_configmap.clone())
}

fn start_watchers(
    config: &Config,
    client: &kube::Client,
    cluster: &Arc<Cluster>,
    metrics: &Arc<Metrics>,
    tasks: &TaskTracker,
    shutdown: &CancellationToken,
) {
    let (follow, stop) = (cluster.clone().follow(client.clone(), mesh_configmap(config)), shutdown.clone());
    tasks.spawn(async move {
        tokio::select! {
            () = follow => {}
            () = stop.cancelled() => {}
        }
    });
    if let Some(settings) = config.directory.clone() {
        let publisher = DirectoryPublisher {
            server: ServerLink::new(&settings.server_socket),
            config: settings,
            trust_domain: config.trust_domain.clone(),
            cluster: cluster.clone(),
            metrics: metrics.clone(),
        };
        tasks.spawn(publisher.run(shutdown.clone()));
    }
    if let Some(settings) = config.registrar.clone() {
        let (cluster, client, metrics) = (cluster.clone(), client.clone(), metrics.clone());
        let (trust_domain, shutdown) = (config.trust_domain.clone(), shutdown.clone());
        tasks.spawn(async move {
            let registrar = || Registrar {
                server: ServerLink::new(&settings.server_socket),
                config: settings.clone(),
                trust_domain: trust_domain.clone(),
                client: client.clone(),
                cluster: cluster.clone(),
                metrics: metrics.clone(),
            };
            let Some(namespace) = &settings.lease_namespace else { return registrar().run(shutdown).await };
            let me = std::env::var("POD_NAME").or_else(|_| std::env::var("HOSTNAME"));
            let me = me.unwrap_or_else(|_| format!("countersign-{}", std::process::id()));
            let leader = Leader::new(client.clone(), namespace, "countersign-registrar", me);
            while !shutdown.is_cancelled() {
                let since = tokio::select! {
                    since = leader.wait() => since,
                    () = shutdown.cancelled() => return,
                };
                let term = shutdown.child_token();
                tokio::select! {
                    () = registrar().run(term.clone()) => {}
                    () = leader.hold(since) => term.cancel(),
                }
                if shutdown.is_cancelled() {
                    leader.release().await;
                }
            }
        });
    }
}
