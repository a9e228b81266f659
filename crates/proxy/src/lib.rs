//! The sidecar: intercepts a workload's traffic, speaks mTLS to other sidecars, enforces mode and policy, and swaps its
//! certificates without dropping a connection.
//!
//! Top down: [`run`] opens listeners and starts workers; `outbound` and `inbound` carry one connection each; `mesh`
//! does the handshake and preamble between sidecars; `tls` is the stream below it; `copy` moves the bytes.

mod affinity;
mod balance;
mod buffer;
pub mod config;
mod connections;
mod copy;
mod cut;
mod eligible;
pub mod exemption;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod identity;
mod inbound;
mod kernel;
mod local_workload;
mod mesh;
mod outbound;
pub mod plaintext;
mod preamble;
mod probes;
mod proxy_protocol;
mod readiness;
mod refusal;
mod sidecar;
mod silence;
mod sockets;
mod status;
pub mod status_page;
mod telemetry;
mod tls;
mod trim;
mod warm_up;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use countersign_api::clock::Clock;
use countersign_api::graceful::take_leave;
use countersign_api::push::status_server::StatusServer;
use countersign_api::transport::{accept_unix, bind_unix, unix_channel};
use countersign_api::{grpc, http};
use countersign_identity::policy::{Mode, Policy};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Channel;

pub use config::{Config, IdentitySource, Routing};

use crate::config::{FixedInbound, FixedOutbound};
use crate::identity::{Files, FilesError, follow_agent, follow_files};
use crate::inbound::Target;
use crate::probes::Prober;
use crate::readiness::Readiness;
use crate::sidecar::Sidecar;
use crate::status_page::SidecarStatus;
use crate::telemetry::Telemetry;

/// Why a sidecar did not start.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// A port or socket cannot be opened: in use or not permitted.
    #[error("cannot listen on {name}: {source}")]
    Listen {
        /// Address, port or path.
        name: String,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The access log cannot be opened.
    #[error("cannot open the access log: {0}")]
    AccessLog(std::io::Error),
    /// The identity's files cannot be read or used.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// A worker thread could not be started.
    #[error("cannot start a worker: {0}")]
    Worker(std::io::Error),
}

/// Purpose of a listener.
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
    // Tasks that open connections depend on run longer than `shutdown`, which only stops accepting.
    let end = CancellationToken::new();
    let doors = doors(&config)?;
    let http = http_listeners(config.http).await?;
    let telemetry = Telemetry::new(config.access_log.as_ref()).map_err(ProxyError::AccessLog)?;
    let sidecar = Arc::new(Sidecar::new(config, telemetry, clock));
    tasks.spawn(watch_identity(sidecar.clone(), end.clone()));
    match &sidecar.config.identity {
        IdentitySource::Agent { socket } => {
            let channel = || unix_channel(socket.clone());
            tasks.spawn(follow_agent(sidecar.current.clone(), channel(), end.clone()));
            tasks.spawn(follow_directory(sidecar.clone(), channel(), end.clone()));
        }
        IdentitySource::Files { chain, key, bundles } => {
            let files = Files { chain: chain.clone(), key: key.clone(), bundles: bundles.clone() };
            tasks.spawn(follow_files(files, sidecar.current.clone(), end.clone())?);
        }
    }
    if let Some(asking) = sidecar.config.exemption.clone() {
        tasks.spawn(sidecar.exemption.clone().run(asking, end.clone()));
    }
    for listener in http {
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
        // A worker that panicked has already reported it.
        let _ = tokio::task::spawn_blocking(move || worker.join()).await;
    }
    end.cancel();
    tasks.close();
    // A client of the status socket that is stopped does not read that we take leave.
    take_leave(tasks.wait(), &end, LAST_WORDS).await;
    sidecar.telemetry.finish().await;
    Ok(())
}

/// Listeners of the pages. `[::]` is every address, also IPv4 alone where the host has no IPv6.
async fn http_listeners(bind: Option<SocketAddr>) -> Result<Vec<TcpListener>, ProxyError> {
    let Some(bind) = bind else { return Ok(vec![]) };
    let failed = |source| ProxyError::Listen { name: bind.to_string(), source };
    if bind.ip() != std::net::Ipv6Addr::UNSPECIFIED || bind.port() == 0 {
        return Ok(vec![TcpListener::bind(bind).await.map_err(failed)?]);
    }
    let listeners = sockets::listen_everywhere(bind.port()).map_err(failed)?;
    listeners.into_iter().map(|listener| TcpListener::from_std(listener).map_err(failed)).collect()
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

/// Starts the workers beyond the first, each a thread with its own runtime and listeners.
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

/// Accepts on all listeners until `shutdown`, then lets open connections continue for the drain time.
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

/// Follows the agent's directory from the first identity on: a caller without one is refused, and would try again later and
/// later.
async fn follow_directory(sidecar: Arc<Sidecar>, channel: Channel, end: CancellationToken) {
    let mut changes = sidecar.current.changes();
    while sidecar.current.peek().is_none() {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = end.cancelled() => return,
        }
    }
    sidecar.directory.run(channel, end).await;
}

/// How long after the first identity the code that only the start needs is unmapped again.
const SETTLED: Duration = Duration::from_secs(1);

/// Follows changes of the identity: warms up once, updates expiry metrics, cuts connections behind a revoked authority.
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

/// Reopens the access log on each request.
async fn reopen_log(sidecar: Arc<Sidecar>, end: CancellationToken) {
    let mut reopen = sidecar.config.reopen.clone();
    loop {
        tokio::select! {
            () = reopen.asked() => sidecar.telemetry.reopen(),
            () = end.cancelled() => return,
        }
    }
}

/// Most concurrent calls per connection to the status socket.
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
    let readiness = Arc::new(Readiness::new(sidecar.clone(), shutdown));
    Arc::new(move |asked| {
        if !asked.near && is_closed(&sidecar, asked.local.port()) {
            let refused = http::Answer::text(403, STRANGERS_REFUSED);
            return Box::pin(std::future::ready(Some(refused)));
        }
        if let Some(name) = asked.path.strip_prefix(probes::PREFIX) {
            let (prober, name, app) = (prober.clone(), name.to_owned(), asked.local.ip().to_canonical());
            return Box::pin(async move { prober.ask(&name, app).await });
        }
        if asked.path == "/ready" {
            let (readiness, wait) = (readiness.clone(), readiness::wait_of(&asked));
            return Box::pin(async move { Some(readiness.answer(wait).await) });
        }
        let answer = match asked.path.as_str() {
            "/metrics" => {
                sidecar.telemetry.followed.set(i64::try_from(sidecar.directory.len()).unwrap_or(i64::MAX));
                Some(http::Answer::metrics(&sidecar.telemetry.registry))
            }
            "/live" => Some(http::Answer::ready(None)),
            "/mode" => Some(match sidecar.policy(modes) {
                Some(modes) => http::Answer::text(200, modes),
                None => http::Answer::text(503, "not known yet\n"),
            }),
            // Only from inside, which a port-forward is too: who talks to whom is nothing for strangers.
            "/plaintext" if is_inside(&asked) => Some(json(&sidecar.plaintext.shown())),
            "/status" if is_inside(&asked) => Some(json(&SidecarStatus::of(&sidecar))),
            _ => None,
        };
        Box::pin(std::future::ready(answer))
    })
}

/// The workload's mode on the first line, and on each further one a port with another mode: `8080 strict`.
fn modes(policy: &Policy) -> String {
    let ports = policy.other_ports().into_iter().map(|(port, mode)| format!("{port} {mode}\n"));
    format!("{}\n{}", policy.mode, ports.collect::<String>())
}

/// What a stranger is told under strict.
const STRANGERS_REFUSED: &str = "this workload is strict: only its own node is answered here\n";

/// Whether strangers are refused the pages, which are plaintext: as on any port under strict, unless its mode was excepted. Until
/// the mode is known it may be strict. Without a redirect there is none, and whoever set the pages' address decides.
fn is_closed(sidecar: &Sidecar, port: u16) -> bool {
    matches!(sidecar.config.routing, Routing::Redirected(_)) && may_be_strict(sidecar.mode_of(port))
}

fn may_be_strict(mode: Option<Mode>) -> bool {
    mode.is_none_or(|mode| mode == Mode::Strict)
}

/// Whether a question comes from inside the pod: the kernel takes nothing for a loopback address from a network.
fn is_inside(asked: &http::Asked) -> bool {
    asked.local.ip().to_canonical().is_loopback()
}

fn json(page: &impl serde::Serialize) -> http::Answer {
    match serde_json::to_string(page) {
        Ok(text) => http::Answer { status: 200, kind: "application/json", text },
        Err(e) => http::Answer::text(500, format!("cannot write the page: {e}\n")),
    }
}

/// How long connections may take to notice that the drain is over.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Default of [`Config::drain`].
pub const DEFAULT_DRAIN: Duration = Duration::from_secs(25);

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;

    use crate::config::{Balance, Handshakes, Limits, Ports, Timeouts};
    use crate::status_page::{Carried, Direction};

    #[tokio::test]
    async fn a_client_of_the_status_socket_that_stands_still_does_not_keep_the_sidecar_from_ending() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("admin.sock");
        let config = Config {
            exemption: None,
            identity: IdentitySource::Agent { socket: dir.path().join("agent.sock") },
            routing: Routing::Fixed { outbound: None, inbound: None },
            http: None,
            admin_socket: Some(socket.clone()),
            access_log: None,
            workers: 1,
            drain: Duration::ZERO,
            limits: config::Limits::default(),
            handshakes: config::Handshakes::default(),
            timeouts: config::Timeouts::default(),
            balance: config::Balance::default(),
            proxy_protocol: Default::default(),
            probes: Default::default(),
            reopen: Default::default(),
        };
        let (shutdown, (ready, is_ready)) = (CancellationToken::new(), tokio::sync::oneshot::channel());
        let (clock, stop) = (countersign_api::clock::system_clock(), shutdown.clone());
        let sidecar = tokio::spawn(run(config, clock, stop, || ready.send(()).unwrap()));
        is_ready.await.unwrap();
        // It opens an HTTP/2 connection, with its settings, and reads nothing, not even that the sidecar takes leave.
        let mut client = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        client.write_all(grpc::PREFACE).unwrap();
        client.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).unwrap();
        let mut readable = client.try_clone().unwrap();
        readable.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let served = tokio::task::spawn_blocking(move || std::io::Read::read_exact(&mut readable, &mut [0; 9]));
        served.await.unwrap().unwrap();
        let told = std::time::Instant::now();
        shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(20), sidecar).await.expect("in bounded time").unwrap().unwrap();
        assert!(told.elapsed() < Duration::from_secs(10), "{:?}", told.elapsed());
    }

    pub(crate) fn sidecar() -> Sidecar {
        let config = Config {
            identity: IdentitySource::Agent { socket: "/nowhere/agent.sock".into() },
            exemption: None,
            routing: Routing::Redirected(Ports::default()),
            http: None,
            admin_socket: None,
            access_log: None,
            workers: 1,
            drain: DEFAULT_DRAIN,
            limits: Limits::default(),
            handshakes: Handshakes::default(),
            timeouts: Timeouts::default(),
            balance: Balance::default(),
            proxy_protocol: [].into(),
            probes: [].into(),
            reopen: countersign_api::reopen::Reopen::default(),
        };
        let telemetry = Telemetry::new(None).unwrap();
        Sidecar::new(config, telemetry, countersign_api::clock::system_clock())
    }

    #[tokio::test]
    async fn strangers_are_answered_nothing_where_the_workload_is_or_may_be_strict() {
        let status = |sidecar: Sidecar, path: &'static str, near| async move {
            let pages = pages(Arc::new(sidecar), CancellationToken::new());
            let local = "10.0.0.1:15020".parse().unwrap();
            let answer = pages(http::Asked { path: path.into(), query: String::new(), local, near });
            answer.await.map(|answer| answer.status)
        };
        for path in ["/ready", "/live", "/mode", "/metrics", "/probe/s3cret/app/liveness", "/status", "/nothing"] {
            assert_eq!(status(sidecar(), path, false).await, Some(403), "{path}");
            assert_ne!(status(sidecar(), path, true).await, Some(403), "{path}");
        }
        let mut fixed = sidecar();
        fixed.config.routing = Routing::Fixed { outbound: None, inbound: None };
        assert_eq!(status(fixed, "/metrics", false).await, Some(200), "who set the address decides");
        let modes = [None, Some(Mode::Strict), Some(Mode::Permissive), Some(Mode::Off)];
        assert_eq!(modes.map(may_be_strict), [true, true, false, false]);
    }

    #[test]
    fn the_page_of_the_mode_names_the_ports_that_have_another_one() {
        let policy = Policy { mode: Mode::Permissive, ..Policy::default() };
        assert_eq!(modes(&policy), "permissive\n");
        let port_modes = [(8080, Mode::Strict), (9090, Mode::Permissive), (9443, Mode::Off)].into();
        assert_eq!(modes(&Policy { port_modes, ..policy }), "permissive\n8080 strict\n9443 off\n");
    }

    #[tokio::test]
    async fn the_pages_of_who_talks_to_whom_are_for_those_inside_the_pod_alone() {
        let sidecar = Arc::new(sidecar());
        let key = plaintext::Key {
            peer: "10.0.0.9".parse().unwrap(),
            port: 8080,
            direction: Direction::Inbound,
            mode: Carried::Plain,
        };
        let _open = sidecar.plaintext.admitted(key, time::OffsetDateTime::UNIX_EPOCH);
        sidecar.current.refused_by_agent("PermissionDenied", "no identity issued\n\u{1b}[31m");
        let pages = pages(sidecar.clone(), CancellationToken::new());
        let ask = |path: &str, local: &str| {
            let (path, local) = (path.into(), local.parse().unwrap());
            pages(http::Asked { path, query: String::new(), local, near: true })
        };
        for path in ["/status", "/plaintext"] {
            for outside in ["10.0.0.1:15020", "[fd00::1]:15020", "[::ffff:10.0.0.1]:15020"] {
                assert!(ask(path, outside).await.is_none(), "{path} at {outside}");
            }
            for inside in ["127.0.0.1:15020", "[::1]:15020", "[::ffff:127.0.0.1]:15020"] {
                assert_eq!(ask(path, inside).await.unwrap().status, 200, "{path} at {inside}");
            }
        }
        let page = ask("/status", "127.0.0.1:15020").await.unwrap().text;
        let read: SidecarStatus = serde_json::from_str(&page).unwrap();
        assert_eq!(read, SidecarStatus::of(&sidecar), "what is written can be read");
        assert_eq!((read.plaintext.peers[0].key, read.plaintext.peers[0].open), (key, 1));
        assert_eq!((read.identity, read.mode, read.open), (None, None, 0));
        let refusal = read.agent_refusal.unwrap();
        assert_eq!(
            (refusal.code.as_str(), refusal.message.as_str()),
            ("PermissionDenied", r"no identity issued\n\u{1b}[31m")
        );
    }
}
