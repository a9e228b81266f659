//! The CSI driver, one per node: mounts the folder of the agent's socket read-only into pods whose specification has a volume of
//! this driver, so that no pod needs `hostPath`. Ephemeral inline volumes only; there is no controller.
//!
//! It listens on two Unix sockets below the kubelet's folder: [`registration`], where the kubelet finds the driver, and [`node`],
//! the driver itself. All state is the kernel's table of mounts ([`mounts`]), so that a restart loses nothing.

pub mod config;
mod kernel;
mod metrics;
mod mounts;
mod node;
mod registration;
mod request;
mod target;
#[cfg(test)]
mod testing;

use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use countersign_api::admission::Limits;
use countersign_api::calls::{CallLayer, of_local_callers};
use countersign_api::csi::identity_server::IdentityServer;
use countersign_api::csi::node_server::NodeServer;
use countersign_api::graceful::{GRACE, take_leave};
use countersign_api::plugin_registration::registration_server::RegistrationServer;
use countersign_api::transport::{accept_unix, bind_unix};
use countersign_api::{grpc, http};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

pub use config::{Config, DriverName, KubeletDir, NodeId};

use crate::metrics::Metrics;
use crate::node::Driver;
use crate::registration::Registrar;

/// Why a driver did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum CsiError {
    /// A socket or the metrics address cannot be opened.
    #[error("cannot listen on {name}: {source}")]
    Listen {
        /// Path or address.
        name: String,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The gRPC service ended unexpectedly.
    #[error("gRPC: {0}")]
    Grpc(#[from] tonic::transport::Error),
}

/// Most concurrent calls per connection.
const CALLS_AT_ONCE: u32 = 32;
/// Most open calls, and most whose request is not whole. The only caller is the kubelet, with some calls per pod.
const OPEN_CALLS: usize = 256;
const UNFINISHED_CALLS: usize = 32;
/// Longest request, in bytes. The kubelet's have a path and a few words about the pod.
const MAX_REQUEST_BYTES: usize = 64 * 1024;
/// Mode of the sockets: root's alone, who runs the kubelet.
const SOCKET_MODE: u32 = 0o600;

/// Runs a driver until `shutdown`. `ready` is called once its sockets serve.
pub async fn run(config: Config, shutdown: CancellationToken, ready: impl FnOnce()) -> Result<(), CsiError> {
    let config = Arc::new(config);
    let metrics = Arc::new(Metrics::default());
    let socket = config.kubelet.socket(&config.driver);
    let found_at = config.kubelet.registration(&config.driver);
    let driver = Driver::new(config.clone(), metrics.clone());
    let registrar = Registrar::new(config.driver.clone(), socket.clone(), metrics.clone());
    let tasks = TaskTracker::new();
    if let Some(address) = config.metrics {
        let bound = TcpListener::bind(address).await;
        let listener = bound.map_err(|source| CsiError::Listen { name: address.to_string(), source })?;
        tasks.spawn(http::serve(listener, pages(metrics, driver.clone(), registrar.clone()), shutdown.clone()));
    }
    // The driver first: once the other socket is there, the kubelet calls both.
    let listener = bind_privately(&socket)?;
    let found = bind(&found_at)?;
    let services = Routes::new(IdentityServer::new(driver.clone()).max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(NodeServer::new(driver).max_decoding_message_size(MAX_REQUEST_BYTES));
    let registration = Routes::new(RegistrationServer::new(registrar).max_decoding_message_size(MAX_REQUEST_BYTES));
    let serving = async {
        let served = tokio::try_join!(
            serve(listener, socket.clone(), services, shutdown.clone()),
            serve(found, found_at.clone(), registration, shutdown.clone()),
        );
        shutdown.cancel();
        tasks.close();
        tasks.wait().await;
        served.map(drop)
    };
    tracing::info!(driver = config.driver.as_str(), socket = %socket.display(), agent = %config.agent_dir.display(), "driver ready");
    ready();
    take_leave(Box::pin(serving), &shutdown, GRACE).await.unwrap_or(Ok(())).map_err(CsiError::from)
}

async fn serve(
    listener: UnixListener,
    path: PathBuf,
    routes: Routes,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    // All are root's, the only user who may connect.
    let limits = |name, total| Limits { name, total, per_group: total };
    let bounds = of_local_callers(limits("open calls", OPEN_CALLS), limits("unfinished requests", UNFINISHED_CALLS));
    let served = grpc::server(CALLS_AT_ONCE)
        .layer(CallLayer(bounds))
        .add_routes(routes)
        .serve_with_incoming_shutdown(accept_unix(listener, path, SOCKET_MODE), shutdown.clone().cancelled_owned())
        .await;
    // One without the other is of no use.
    shutdown.cancel();
    served
}

/// [`bind`] in a folder of mode 0700.
fn bind_privately(path: &Path) -> Result<UnixListener, CsiError> {
    let made = path.parent().map_or(Ok(()), |folder| {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        // The kubelet may have made it, for everybody to enter.
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))
    });
    made.map_err(|source| CsiError::Listen { name: path.display().to_string(), source })?;
    bind(path)
}

fn bind(path: &Path) -> Result<UnixListener, CsiError> {
    bind_unix(path, SOCKET_MODE).map_err(|source| CsiError::Listen { name: path.display().to_string(), source })
}

/// The pages of the `metrics` address. The driver is ready once the kubelet uses it.
fn pages(metrics: Arc<Metrics>, driver: Driver, registrar: Registrar) -> Arc<http::Handler> {
    http::pages(move |path| match path {
        "/metrics" => Some(http::Answer::metrics(&metrics.registry)),
        "/live" => Some(http::Answer::ready(None)),
        "/ready" => {
            let away = (!driver.agent_is_there()).then(|| "the agent's folder is not there".to_owned());
            let missing: Vec<String> = registrar.missing().into_iter().chain(away).collect();
            Some(http::Answer::ready((!missing.is_empty()).then(|| missing.join("; "))))
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests;
