//! The sidecar: catches a workload's traffic, speaks mTLS to the other sidecars, enforces mode and policy, and swaps its
//! certificates without dropping a connection.
//!
//! Top down: [`run`] opens listeners and starts workers; `outbound` and `inbound` carry a connection each; `mesh` is the
//! handshake and preamble between sidecars; `tls` is the stream below it; `copy` moves the bytes.

mod balance;
mod buffer;
pub mod config;
mod connections;
mod copy;
mod cut;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod identity;
mod inbound;
mod kernel;
mod memory;
mod mesh;
mod outbound;
mod own;
mod plaintext;
mod preamble;
mod probes;
mod proxy_protocol;
mod refusal;
mod sampled;
mod sidecar;
mod silence;
mod sockets;
mod status;
mod telemetry;
mod tls;
mod trim;
mod warm_up;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use countersign_api::admission::{self, Admission};
use countersign_api::clock::Clock;
use countersign_api::directory::Subscriptions;
use countersign_api::push::status_server::StatusServer;
use countersign_api::transport::{accept_unix, bind_unix, unix_channel};
use countersign_api::{grpc, http};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use config::{Config, IdentitySource, Routing};

use crate::balance::Balancer;
use crate::config::{FixedInbound, FixedOutbound};
use crate::connections::Connections;
use crate::identity::{Current, Files, FilesError, follow_agent, follow_files};
use crate::inbound::Target;
use crate::own::Own;
use crate::plaintext::Plaintext;
use crate::probes::Prober;
use crate::sidecar::Sidecar;
use crate::telemetry::Telemetry;

/// Why a sidecar did not start.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// A port or socket is taken, or not allowed.
    #[error("cannot listen on {name}: {source}")]
    Listen {
        /// Where.
        name: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The access log.
    #[error("cannot open the access log: {0}")]
    AccessLog(std::io::Error),
    /// The identity's files.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// A worker thread.
    #[error("cannot start a worker: {0}")]
    Worker(std::io::Error),
}

/// What a listener is for.
#[derive(Clone)]
enum Door {
    Outbound,
    Plaintext,
    Mesh,
    FixedOutbound(Arc<FixedOutbound>),
    FixedInbound(Arc<FixedInbound>),
}

impl Door {
    /// How silent peers are probed that come through it. `bound`: how long another machine may say nothing.
    fn probes(&self, bound: Duration) -> socket2::TcpKeepalive {
        match self {
            Self::Outbound | Self::FixedOutbound(_) => sockets::local_probes(),
            Self::Plaintext | Self::Mesh | Self::FixedInbound(_) => silence::probes_when_idle(bound),
        }
    }
}

/// Runs a sidecar until `shutdown` and then until its connections have ended or the drain is over.
pub async fn run(
    config: Config,
    clock: Clock,
    shutdown: CancellationToken,
    ready: impl FnOnce(),
) -> Result<(), ProxyError> {
    let tasks = TaskTracker::new();
    // What serves the connections to their end outlives the shutdown that ends the accepting.
    let end = CancellationToken::new();
    let doors = doors(&config)?;
    let http = match config.http {
        Some(bind) => Some(
            TcpListener::bind(bind).await.map_err(|source| ProxyError::Listen { name: bind.to_string(), source })?,
        ),
        None => None,
    };
    let telemetry = Telemetry::new(config.access_log.as_ref()).map_err(ProxyError::AccessLog)?;
    let directory = Subscriptions::default();
    let sidecar = Arc::new(Sidecar {
        current: Arc::new(Current::new(clock)),
        own: Own::new(directory.clone()),
        connections: Arc::new(Connections::new(config.limits, telemetry.active.clone())),
        handshakes: Admission::new(admission::Limits {
            name: "unfinished handshakes",
            // They are connections too: all of them together leave most of these to callers that are proven.
            total: config.handshakes.total.min(config.limits.connections.div_ceil(4)),
            per_group: config.handshakes.per_peer,
        }),
        plaintext: Plaintext::default(),
        balancer: Arc::new(Balancer::new(config.balance)),
        started_at: time::OffsetDateTime::now_utc(),
        directory,
        telemetry,
        config,
    });
    tasks.spawn(watch_identity(sidecar.clone(), end.clone()));
    match &sidecar.config.identity {
        IdentitySource::Agent { socket } => {
            let channel = || unix_channel(socket.clone());
            tasks.spawn(follow_agent(sidecar.current.clone(), channel(), end.clone()));
            let (directory, channel, end) = (sidecar.directory.clone(), channel(), end.clone());
            tasks.spawn(async move { directory.run(channel, end).await });
        }
        IdentitySource::Files { chain, key, bundles } => {
            let files = Files { chain: chain.clone(), key: key.clone(), bundles: bundles.clone() };
            tasks.spawn(follow_files(files, sidecar.current.clone(), end.clone())?);
        }
    }
    if let Some(listener) = http {
        tasks.spawn(http::serve(listener, pages(sidecar.clone(), shutdown.clone()), end.clone()));
    }
    if let Some(path) = sidecar.config.admin_socket.clone() {
        serve_status(&tasks, sidecar.clone(), path, end.clone())?;
    }
    tasks.spawn(reopen_log(sidecar.clone(), end.clone()));
    tasks.spawn(trim::when_quiet(sidecar.connections.clone(), end.clone()));
    let workers = start_workers(&sidecar, &doors, &shutdown)?;
    let first = serve(sidecar.clone(), doors, shutdown.clone());
    tracing::info!(workers = sidecar.config.workers, "sidecar ready");
    ready();
    first.await;
    for worker in workers {
        // A worker that panicked has said so itself.
        let _ = tokio::task::spawn_blocking(move || worker.join()).await;
    }
    end.cancel();
    tasks.close();
    tasks.wait().await;
    sidecar.telemetry.finish().await;
    Ok(())
}

fn doors(config: &Config) -> Result<Vec<(std::net::TcpListener, Door)>, ProxyError> {
    let mut all = vec![];
    let mut at = |address: SocketAddr, door: Door| {
        let listener =
            sockets::listen(address).map_err(|source| ProxyError::Listen { name: address.to_string(), source })?;
        all.push((listener, door));
        Ok::<_, ProxyError>(())
    };
    match &config.routing {
        Routing::Fixed { outbound, inbound } => {
            if let Some(way) = outbound {
                at(way.listen, Door::FixedOutbound(Arc::new(way.clone())))?;
            }
            if let Some(way) = inbound {
                at(way.listen, Door::FixedInbound(Arc::new(way.clone())))?;
            }
        }
        Routing::Redirected(ports) => {
            for (port, door) in
                [(ports.outbound, Door::Outbound), (ports.inbound, Door::Plaintext), (ports.mesh, Door::Mesh)]
            {
                let listeners = sockets::listen_everywhere(port);
                let listeners =
                    listeners.map_err(|source| ProxyError::Listen { name: format!("port {port}"), source })?;
                all.extend(listeners.into_iter().map(|l| (l, door.clone())));
            }
        }
    }
    Ok(all)
}

/// Workers beyond the first: a thread with a runtime and listeners of its own each.
fn start_workers(
    sidecar: &Arc<Sidecar>,
    doors: &[(std::net::TcpListener, Door)],
    shutdown: &CancellationToken,
) -> Result<Vec<std::thread::JoinHandle<()>>, ProxyError> {
    let mut workers = vec![];
    for n in 1..sidecar.config.workers {
        let mut own = vec![];
        for (listener, door) in doors {
            let address = listener.local_addr().map_err(ProxyError::Worker)?;
            own.push((sockets::listen(address).map_err(ProxyError::Worker)?, door.clone()));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ProxyError::Worker)?;
        let (sidecar, shutdown) = (sidecar.clone(), shutdown.clone());
        let work = move || runtime.block_on(serve(sidecar, own, shutdown));
        workers.push(std::thread::Builder::new().name(format!("worker-{n}")).spawn(work).map_err(ProxyError::Worker)?);
    }
    Ok(workers)
}

/// Accepts on all doors until `shutdown`, then lets what is open go on for as long as the drain allows.
async fn serve(sidecar: Arc<Sidecar>, doors: Vec<(std::net::TcpListener, Door)>, shutdown: CancellationToken) {
    let connections = TaskTracker::new();
    let mut accepting = JoinSet::new();
    for (listener, door) in doors {
        sockets::tune(&listener, &door.probes(sidecar.config.timeouts.mesh_user));
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, "cannot use a listener");
                continue;
            }
        };
        let (sidecar, connections) = (sidecar.clone(), connections.clone());
        accepting.spawn(async move {
            loop {
                let (stream, source) = sockets::accept(&listener).await;
                connections.spawn(carry(sidecar.clone(), door.clone(), stream, source));
            }
        });
    }
    shutdown.cancelled().await;
    accepting.shutdown().await;
    connections.close();
    let drain = sidecar.config.drain;
    tracing::info!(open = connections.len(), "draining for up to {drain:?}");
    if tokio::time::timeout(drain, connections.wait()).await.is_err() {
        tracing::warn!(open = connections.len(), "the drain is over; what is still open is reset");
        sidecar.connections.abort();
        let _ = tokio::time::timeout(LAST_WORDS, connections.wait()).await;
    }
}

async fn carry(sidecar: Arc<Sidecar>, door: Door, stream: TcpStream, source: SocketAddr) {
    match door {
        Door::Outbound => outbound::redirected(&sidecar, stream, source).await,
        Door::Plaintext => inbound::redirected(&sidecar, stream, source).await,
        Door::Mesh => inbound::from_mesh(&sidecar, stream, source, Target::AsAsked).await,
        Door::FixedOutbound(way) => outbound::fixed(&sidecar, stream, source, &way).await,
        Door::FixedInbound(way) => inbound::from_mesh(&sidecar, stream, source, Target::Fixed(&way)).await,
    }
}

/// A sidecar that has had its identity for this long has run what only the start needs.
const SETTLED: Duration = Duration::from_secs(1);

/// Follows each change of identity: warms up once, shows the ends, cuts what a revoked authority vouched for.
async fn watch_identity(sidecar: Arc<Sidecar>, end: CancellationToken) {
    let mut changes = sidecar.current.changes();
    let mut before: Option<Arc<identity::Identity>> = None;
    loop {
        let now = sidecar.current.peek();
        sidecar.telemetry.identity(now.as_deref());
        if let Some(identity) = &now {
            match &before {
                None => {
                    warm_up::warm_up(identity);
                    trim::give_back_code();
                    tokio::spawn(async {
                        tokio::time::sleep(SETTLED).await;
                        trim::give_back_code();
                    });
                }
                Some(before) => {
                    sidecar.connections.cut_revoked(before.bundles(), identity.bundles(), sidecar.current.now());
                }
            }
            sidecar.telemetry.rotations.inc();
        }
        before = now.or(before);
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = end.cancelled() => return,
        }
    }
}

/// Opens the access log anew whenever it is asked for.
async fn reopen_log(sidecar: Arc<Sidecar>, end: CancellationToken) {
    let mut reopen = sidecar.config.reopen.clone();
    loop {
        tokio::select! {
            () = reopen.asked() => sidecar.telemetry.reopen(),
            () = end.cancelled() => return,
        }
    }
}

/// Calls of one connection to the status socket at once.
const CALLS_AT_ONCE: u32 = 16;

fn serve_status(
    tasks: &TaskTracker,
    sidecar: Arc<Sidecar>,
    path: std::path::PathBuf,
    end: CancellationToken,
) -> Result<(), ProxyError> {
    let listener =
        bind_unix(&path, 0o600).map_err(|source| ProxyError::Listen { name: path.display().to_string(), source })?;
    let incoming = accept_unix(listener, path, 0o600);
    let service = StatusServer::new(status::StatusEndpoint(sidecar)).max_decoding_message_size(64 * 1024);
    tasks.spawn(async move {
        let served = grpc::server(CALLS_AT_ONCE)
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, end.cancelled_owned());
        if let Err(error) = served.await {
            tracing::error!(%error, "the status socket has failed");
        }
    });
    Ok(())
}

fn pages(sidecar: Arc<Sidecar>, shutdown: CancellationToken) -> Arc<http::Handler> {
    let prober = Arc::new(Prober::new(sidecar.config.probes.clone()));
    Arc::new(move |asked| {
        if let Some(name) = asked.path.strip_prefix(probes::PREFIX) {
            let (prober, name, app) = (prober.clone(), name.to_owned(), asked.local.ip().to_canonical());
            return Box::pin(async move { prober.ask(&name, app).await });
        }
        let answer = match asked.path.as_str() {
            "/metrics" => {
                sidecar.telemetry.followed.set(i64::try_from(sidecar.directory.len()).unwrap_or(i64::MAX));
                Some(http::Answer::metrics(&sidecar.telemetry.registry))
            }
            "/live" => Some(http::Answer::ready(None)),
            "/mode" => Some(match sidecar.mode() {
                Some(mode) => http::Answer::text(200, format!("{mode}\n")),
                None => http::Answer::text(503, "not known yet\n"),
            }),
            // Only from inside, which `kubectl port-forward` is too: who talks to whom is nothing for strangers.
            "/plaintext" if asked.local.ip().to_canonical().is_loopback() => {
                let text = serde_json::to_string(&sidecar.plaintext.shown()).unwrap_or_default();
                Some(http::Answer { status: 200, kind: "application/json", text })
            }
            "/ready" => {
                let draining = shutdown.is_cancelled().then(|| "shutting down".to_owned());
                Some(http::Answer::ready(draining.or_else(|| sidecar.missing())))
            }
            _ => None,
        };
        Box::pin(std::future::ready(answer))
    })
}

/// How long connections may take to notice that the drain is over.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How long a sidecar lets open connections go on after SIGTERM, by default.
pub const DEFAULT_DRAIN: Duration = Duration::from_secs(25);
