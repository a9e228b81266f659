//! The agent, one per node: attests the node to the server, keeps the node's SVIDs fresh in memory, attests each local
//! caller and serves it its own identities.

mod attestation_state;
pub mod cache;
pub mod claims;
pub mod config;
mod endpoints;
#[cfg(fuzzing)]
pub mod fuzzing;
mod keeper;
mod known;
mod link;
pub mod metrics;
pub mod node_attestor;
mod own_socket;
pub mod peer;
mod refusal;
mod renewal;
mod retries;
mod secret_names;
mod signing;
mod socket_link;
pub mod store;
mod sync;
#[cfg(test)]
mod testing;
mod tokens;
pub mod workload_attestor;

use std::sync::Arc;
use std::time::Duration;

use countersign_api::calls::CallLayer;
use countersign_api::clock::Clock;
use countersign_api::directory::{Quota, Subscriptions};
use countersign_api::graceful::{GRACE, take_leave};
use countersign_api::transport::{accept_unix, bind_unix};
use countersign_api::{grpc, http};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use config::Config;
pub use link::LinkError;
pub use secret_names::{SecretNameError, SecretNames};
pub use socket_link::LinkName;

use crate::endpoints::Core;
use crate::link::Link;
use crate::metrics::Metrics;
use crate::own_socket::OwnSocket;
use crate::socket_link::SocketLink;

/// Why an agent did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The socket or the metrics address cannot be opened.
    #[error("cannot listen on {name}: {source}")]
    Listen {
        /// Path or address.
        name: String,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The second name of the socket cannot be made.
    #[error("cannot make the link beside the socket: {0}; is there another file of this name?")]
    SocketLink(std::io::Error),
    /// The connection to the server cannot be set up.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The pod attestor cannot be set up.
    #[error(transparent)]
    Pods(#[from] workload_attestor::SetupError),
    /// There is no bundle to authenticate the server with.
    #[error(
        "no trust bundle to know the server by; fetch it with `countersign bundle show > bundle.pem` on the server and name the file as --trust-bundle"
    )]
    NoBundle,
    /// The gRPC service ended unexpectedly.
    #[error("gRPC: {0}")]
    Grpc(#[from] tonic::transport::Error),
}

/// Most concurrent calls per connection.
const CALLS_AT_ONCE: u32 = 256;
/// Most addresses that all callers may follow together: half of what the server allows one agent.
const MAX_ADDRESSES: usize = 50_000;
/// Most addresses that one caller may follow.
const MAX_ADDRESSES_PER_CALLER: usize = 10_000;

/// Runs an agent until `shutdown`. `ready` is called once its socket serves.
pub async fn run(
    config: Config,
    clock: Clock,
    shutdown: CancellationToken,
    ready: impl FnOnce(),
) -> Result<(), AgentError> {
    let config = Arc::new(config);
    let link = Arc::new(Link::new(config.clone(), clock.clone())?);
    if link.bundle().is_none() {
        return Err(AgentError::NoBundle);
    }
    if link.identity().borrow().is_none() && config.attestor.is_none() {
        return Err(LinkError::NoEvidence.into());
    }
    let metrics = Arc::new(Metrics::default());
    let mut attestors: Vec<Arc<dyn workload_attestor::WorkloadAttestor>> =
        vec![Arc::new(workload_attestor::Unix::new(config.discover_path, config.hash_limit))];
    if let Some(pods) = config.pods.clone() {
        attestors.push(Arc::new(workload_attestor::K8s::new(pods, &metrics).await?));
    }
    let unix = bind_unix(&config.socket, 0o666);
    let unix = unix.map_err(|source| AgentError::Listen { name: config.socket.display().to_string(), source })?;
    let second_name = config.socket_link.as_ref().map(|name| SocketLink::make(&config.socket, name)).transpose();
    let second_name = second_name.inspect_err(|_| drop(std::fs::remove_file(&config.socket)));
    let _second_name = second_name.map_err(AgentError::SocketLink)?;
    let metrics_listener = match config.metrics {
        Some(bind) => {
            let bound = TcpListener::bind(bind).await;
            let bound = bound.inspect_err(|_| drop(std::fs::remove_file(&config.socket)));
            Some(bound.map_err(|source| AgentError::Listen { name: bind.to_string(), source })?)
        }
        None => None,
    };
    let cache: Arc<cache::Cache> = Arc::default();
    let core = Arc::new(Core {
        tokens: tokens::Tokens::new(link.clone(), cache.clone(), metrics.clone()),
        attestors,
        started_at: clock(),
        cache,
        directory: Subscriptions::with_room_for(MAX_ADDRESSES),
        own_socket: OwnSocket::at(config.socket.clone()),
        followers: Quota::new(MAX_ADDRESSES, MAX_ADDRESSES_PER_CALLER),
        metrics,
        said: Default::default(),
        tasks: TaskTracker::new(),
        shutdown: shutdown.clone(),
        link,
        clock,
        config,
    });
    start_tasks(&core);
    if let Some(listener) = metrics_listener {
        core.tasks.spawn(http::serve(listener, pages(core.clone()), shutdown.clone()));
    }
    let incoming = accept_unix(unix, core.config.socket.clone(), 0o666);
    let routes = endpoints::routes(&core).await;
    let serve = grpc::server(CALLS_AT_ONCE)
        .layer(CallLayer(endpoints::bounds()))
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, shutdown.clone().cancelled_owned());
    // Large, and needed once: it need not be moved about with this future.
    let serve = Box::pin(serve);
    tracing::info!(trust_domain = %core.config.trust_domain, server = core.config.server, socket = %core.config.socket.display(), "agent ready");
    ready();
    let serving = async {
        let served = serve.await;
        shutdown.cancel();
        core.tasks.close();
        core.tasks.wait().await;
        served
    };
    take_leave(serving, &shutdown, GRACE).await.unwrap_or(Ok(())).map_err(AgentError::from)
}

fn start_tasks(core: &Arc<Core>) {
    let (link, cache, shutdown) = (&core.link, &core.cache, &core.shutdown);
    let (refusals, heard) = mpsc::channel(4);
    core.tasks.spawn(attestation_state::keep(link.clone(), cache.clone(), heard, shutdown.clone()));
    let sync = sync::Sync {
        link: link.clone(),
        cache: cache.clone(),
        refusals: refusals.clone(),
        interval: core.config.sync_interval,
        trust_domain: core.config.trust_domain.clone(),
    };
    core.tasks.spawn(sync.run(shutdown.clone()));
    let signing = signing::Signing {
        link: link.clone(),
        cache: cache.clone(),
        refusals,
        key_type: core.config.key_type.clone(),
        metrics: core.metrics.clone(),
    };
    core.tasks.spawn(signing.run(shutdown.clone()));
    for attestor in &core.attestors {
        let (attestor, shutdown) = (attestor.clone(), shutdown.clone());
        core.tasks.spawn(async move { attestor.keep(shutdown).await });
    }
    core.tasks.spawn(follow_directory(core.clone()));
    core.tasks.spawn(observe(core.clone()));
}

/// Follows the server's directory, over a new connection whenever our SVID changes.
async fn follow_directory(core: Arc<Core>) {
    let mut identity = core.link.identity();
    while !core.shutdown.is_cancelled() {
        let known = identity.borrow_and_update().is_some();
        let stop = core.shutdown.child_token();
        let follow = async {
            if known {
                core.directory.run(core.link.channel(), stop.clone()).await;
            } else {
                stop.cancelled().await;
            }
        };
        tokio::select! {
            () = follow => {}
            changed = identity.changed() => if changed.is_err() { return },
        }
    }
}

async fn observe(core: Arc<Core>) {
    let mut tick = tokio::time::interval(Duration::from_secs(5));
    loop {
        tokio::select! {
            _ = tick.tick() => {
                let own = core.link.identity().borrow().as_ref().map(|svid| svid.facts().not_after);
                core.tell_unsaid(std::time::Instant::now());
                core.metrics.observe(&core.cache.read(), own, core.link.keeper().unsaved().is_some());
                core.metrics.socket_own.set(i64::from(core.own_socket.look().await));
            }
            () = core.shutdown.cancelled() => return,
        }
    }
}

fn pages(core: Arc<Core>) -> Arc<http::Handler> {
    http::pages(move |path| match path {
        "/metrics" => {
            // As they are now: who asks right after the start, as `check` does, is not told of a source that works as failed.
            core.attestors.iter().for_each(|a| a.observe());
            Some(http::Answer::metrics(&core.metrics.registry))
        }
        "/live" => Some(http::Answer::ready(None)),
        "/ready" => {
            let unsynced = (!core.cache.read().synced).then(|| "the server has not been heard yet".to_owned());
            let socket = core.own_socket.trouble();
            let missing: Vec<_> =
                unsynced.into_iter().chain(socket).chain(core.attestors.iter().filter_map(|a| a.missing())).collect();
            Some(http::Answer::ready((!missing.is_empty()).then(|| missing.join("; "))))
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests;
