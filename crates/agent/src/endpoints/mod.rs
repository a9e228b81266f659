//! The services on the agent's Unix socket: the SPIFFE Workload API, Envoy's secret discovery service, the directory, status and
//! health.

pub mod directory;
pub mod identities;
pub mod secrets;
mod status;
mod streams;
mod tokens;
mod workload;

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use countersign_api::admission::{Limits, LocalSource};
use countersign_api::calls::{self, Calls, Judged};
use countersign_api::clock::Clock;
use countersign_api::directory::{Quota, Subscriptions};
use countersign_api::peer::UnixPeer;
use countersign_api::push::directory_server::DirectoryServer;
use countersign_api::push::status_server::StatusServer;
use countersign_api::sampled::{Sampled, Unsaid};
use countersign_api::sds::secret_discovery_service_server::SecretDiscoveryServiceServer;
use countersign_api::workload::spiffe_workload_api_server::SpiffeWorkloadApiServer;
use countersign_identity::selector::SelectorSet;
use futures::Stream;
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::service::Routes;
use tonic::{Code, Request, Status};

pub use self::directory::Follower;
use self::identities::Identities;
use crate::cache::{Cache, Cached, NoIdentity};
use crate::config::Config;
use crate::link::Link;
use crate::metrics::Metrics;
use crate::own_socket::OwnSocket;
use crate::peer::{PeerError, look_up, unchanged};
use crate::tokens::Tokens;
use crate::workload_attestor::{EveryFact, WorkloadAttestor};

/// A stream of responses.
type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The state that all endpoints share.
pub struct Core {
    pub config: Arc<Config>,
    pub clock: Clock,
    pub link: Arc<Link>,
    pub cache: Arc<Cache>,
    pub tokens: Tokens,
    pub attestors: Vec<Arc<dyn WorkloadAttestor>>,
    pub directory: Subscriptions,
    /// Bounds the number of addresses that each caller follows.
    pub followers: Quota<directory::Follower>,
    pub metrics: Arc<Metrics>,
    pub own_socket: OwnSocket,
    /// Rate limit for log lines about callers.
    pub said: Sampled<Follower>,
    pub started_at: OffsetDateTime,
    pub tasks: TaskTracker,
    pub shutdown: CancellationToken,
}

/// Implements all services on the agent's state.
#[derive(Clone)]
struct Endpoint(Arc<Core>);

/// Longest request of a method that is not the directory's, in bytes. None of them says much.
const MAX_REQUEST_BYTES: usize = 16 * 1024;
/// Longest request of the directory, in bytes: every address that one caller may follow.
const MAX_RESOLVE_BYTES: usize = 256 * 1024;
/// Longest request for secrets, in bytes. An Envoy lists all its extensions in each first request of a stream.
const MAX_SECRETS_BYTES: usize = 256 * 1024;
/// Methods with a stream of requests.
const STREAMS: [&str; 3] = [
    "/countersign.v1.Directory/Resolve",
    "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets",
    "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets",
];
/// The method with one request that may be as long as theirs.
const FETCH_SECRETS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets";

/// Bounds on callers' calls, by their users: whoever may enter the socket's folder may call. Calls that are open
/// take half of the agent's memory at most, one that is not whole as much as its request may have.
pub fn bounds() -> impl Fn(&http::Request<Body>) -> Judged<LocalSource> + Clone + Send + 'static {
    let limits = |name, total, per_group| Limits { name, total, per_group };
    let total = calls::that_fit(24_576);
    let open = limits("open calls", total, total / 3 * 2);
    let long = Calls::new(open, limits("unfinished long requests", 256, 64));
    let other = Calls::new(open, limits("unfinished requests", 2_048, 256));
    move |request| {
        let path = request.uri().path();
        let streams = STREAMS.contains(&path);
        let calls = if streams || path == FETCH_SECRETS { &long } else { &other }.clone();
        Judged { calls, source: LocalSource::of(request), streams }
    }
}

/// All services of the agent, with gRPC health checks.
pub async fn routes(core: &Arc<Core>) -> Routes {
    let endpoint = Endpoint(core.clone());
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    Routes::new(health)
        .add_service(SpiffeWorkloadApiServer::new(endpoint.clone()).max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(DirectoryServer::new(endpoint.clone()).max_decoding_message_size(MAX_RESOLVE_BYTES))
        .add_service(SecretDiscoveryServiceServer::new(endpoint.clone()).max_decoding_message_size(MAX_SECRETS_BYTES))
        .add_service(StatusServer::new(endpoint).max_decoding_message_size(MAX_REQUEST_BYTES))
}

/// How long a caller is given to read why its stream ends.
const LAST_WORD: Duration = Duration::from_secs(5);

/// Says why a stream ends. A caller that reads nothing keeps nobody waiting.
async fn last_word<T>(tx: &mpsc::Sender<Result<T, Status>>, status: Status) {
    let _ = tx.send_timeout(Err(status), LAST_WORD).await;
}

/// Time between two attempts to complete what was attested in part.
const IN_PART: Duration = Duration::from_secs(10);
/// Interval between two checks whether a stream's caller has changed. The timer is not restarted by changes of the
/// cache: on a busy agent the check would never run.
const CALLER_CHECK: Duration = Duration::from_secs(5);

/// A caller whose process was verified.
#[derive(Clone)]
struct Attested {
    peer: UnixPeer,
    selectors: SelectorSet,
    /// Whether more selectors will be known later.
    in_part: bool,
}

/// Which facts about a caller are wanted.
#[derive(Debug, Clone, Copy)]
enum Wanted {
    /// Those that its identities depend on.
    Identities,
    /// All of them.
    EveryFact,
}

impl Core {
    fn now(&self) -> OffsetDateTime {
        (self.clock)()
    }

    /// Logs how many lines about each pod's or user's processes were left out, once it causes no more of them.
    pub fn tell_unsaid(&self, now: Instant) {
        for Unsaid { source, kind, count } in self.said.over(now) {
            let callers = source.map_or_else(|| "others".to_owned(), |callers| callers.to_string());
            tracing::warn!(callers, kind, count, "log lines left out");
        }
    }

    /// Attests the caller of a request, as far as its identities depend on it. Errors: PermissionDenied if it cannot be
    /// verified, Unavailable if an attestor failed.
    async fn attest<T>(&self, request: &Request<T>) -> Result<Attested, Status> {
        let peer = request.extensions().get::<UnixPeer>().cloned();
        let peer = peer.ok_or_else(|| Status::internal("the connection has no peer"))?;
        self.prove(peer, Wanted::Identities).await
    }

    /// [`Self::attest`] of a caller that may have been attested in part before.
    async fn prove(&self, peer: UnixPeer, wanted: Wanted) -> Result<Attested, Status> {
        let refused = |error: PeerError| {
            self.metrics.refused(error.code());
            if let Some(unsaid) = self.said.next(Follower::User(peer.uid), "caller refused", Instant::now()) {
                tracing::warn!(pid = peer.pid, uid = peer.uid, %error, unsaid, "caller refused");
            }
            Status::permission_denied(format!("no identity issued: {error}"))
        };
        let process = look_up(&peer, self.config.foreign_namespaces).map_err(refused)?;
        let (mut selectors, mut in_part) = (SelectorSet::new(), false);
        for attestor in &self.attestors {
            let identities = Identities { cache: &self.cache, now: self.now(), known: &selectors };
            let proof = match wanted {
                Wanted::Identities => attestor.attest(&process, &identities).await,
                Wanted::EveryFact => attestor.attest(&process, &EveryFact).await,
            };
            match proof {
                Ok(proof) => {
                    selectors.extend(proof.selectors);
                    in_part |= proof.in_part;
                }
                // All or nothing: an identity must not depend on which attestor happened to answer.
                Err(error) => {
                    self.metrics.refused("attestor_failed");
                    if let Some(unsaid) =
                        self.said.next(Follower::User(peer.uid), "caller not attested", Instant::now())
                    {
                        tracing::warn!(pid = peer.pid, uid = peer.uid, %error, unsaid, "caller not attested");
                    }
                    return Err(Status::unavailable(format!("no identity issued: {error}")));
                }
            }
        }
        // Attestors may take seconds. Their results count only if the caller has not changed meanwhile.
        unchanged(&peer).map_err(refused)?;
        let attested = Attested { peer, selectors, in_part };
        if let Some(unsaid) = self.said.next(Follower::of(&attested), "caller attested", Instant::now()) {
            let listed = attested.selectors.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
            tracing::info!(pid = process.pid, selectors = listed, in_part, unsaid, "caller attested");
        }
        self.metrics.attestations.inc();
        Ok(attested)
    }

    /// Resolves with a status for the caller's stream once the caller has ended or changed: a stream may be passed to
    /// another process, and its process may run another program.
    async fn caller_changed(&self, attested: &Attested) -> Status {
        loop {
            tokio::time::sleep(CALLER_CHECK).await;
            if let Err(status) = self.still(attested) {
                return status;
            }
        }
    }

    /// Whether the caller is who it was when it was attested. Errors: PermissionDenied if it has ended or changed.
    fn still(&self, attested: &Attested) -> Result<(), Status> {
        unchanged(&attested.peer).map(drop).map_err(|error| {
            self.metrics.refused(error.code());
            Status::permission_denied(format!("no identity issued: {error}"))
        })
    }

    /// Resolves once a caller that was attested in part is attested whole; never for one that was already. Errors:
    /// PermissionDenied if it cannot be verified any more.
    async fn completed(&self, attested: &Attested) -> Result<Attested, Status> {
        if !attested.in_part {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(IN_PART).await;
            match self.prove(attested.peer.clone(), Wanted::EveryFact).await {
                Ok(whole) if !whole.in_part => return Ok(whole),
                Err(refused) if refused.code() == Code::PermissionDenied => return Err(refused),
                // What was proven stands.
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// The entries that the caller matches. Errors: Unavailable while it may still match one, otherwise
    /// PermissionDenied.
    fn identities(&self, attested: &Attested) -> Result<Vec<Cached>, Status> {
        match self.cache.matching(&attested.selectors, self.now()) {
            Ok(found) => Ok(found),
            Err(NoIdentity::NotSynced) => Err(Status::unavailable("the agent has not heard from the server yet")),
            // A selector that is not known yet may be the one that an entry requires.
            Err(NoIdentity::NoEntry(why)) if attested.in_part => {
                Err(Status::unavailable(format!("no identity issued yet, for the container is not known yet: {why}")))
            }
            Err(NoIdentity::NoEntry(why)) => {
                self.metrics.refused("no_identity");
                if let Some(unsaid) = self.said.next(Follower::of(attested), "no identity issued", Instant::now()) {
                    tracing::warn!(pid = attested.peer.pid, why, unsaid, "no identity issued");
                }
                Err(Status::permission_denied(format!("no identity issued: {why}")))
            }
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::testing::{Ca, config, join_token};
    use countersign_api::clock::system_clock;
    use countersign_api::transport::peer_credentials;
    use std::io::Write;
    use std::sync::Mutex;

    /// A log in memory.
    #[derive(Clone, Default)]
    pub struct Log(Arc<Mutex<Vec<u8>>>);

    impl Log {
        pub fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    /// What this thread logs from now on, until the rest is dropped.
    pub fn log() -> (Log, (tracing::Dispatch, tracing::subscriber::DefaultGuard)) {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        // While there is one subscriber alone, a thread without it, such as another test's, that comes to a log statement first
        // switches the statement off for all threads.
        let second = tracing::Dispatch::new(tracing::subscriber::NoSubscriber::default());
        (log, (second, tracing::subscriber::set_default(subscriber)))
    }

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    pub fn core(dir: &std::path::Path) -> Core {
        let bundle = Ca::new(OffsetDateTime::now_utc()).bundle();
        let config = Arc::new(config(dir, "127.0.0.1:1".into(), &bundle, join_token()));
        let link = Arc::new(Link::new(config.clone(), system_clock()).unwrap());
        let (cache, metrics) = (Arc::<Cache>::default(), Arc::<Metrics>::default());
        Core {
            tokens: Tokens::new(link.clone(), cache.clone(), metrics.clone()),
            link,
            own_socket: OwnSocket::at(config.socket.clone()),
            config,
            clock: system_clock(),
            cache,
            attestors: vec![],
            directory: Subscriptions::default(),
            followers: Quota::new(1, 1),
            metrics,
            said: Sampled::default(),
            started_at: OffsetDateTime::now_utc(),
            tasks: TaskTracker::new(),
            shutdown: CancellationToken::new(),
        }
    }

    #[tokio::test]
    async fn a_user_without_an_identity_that_calls_a_thousand_times_leaves_a_few_log_lines_and_a_count() {
        let dir = tempfile::tempdir().unwrap();
        let core = core(dir.path());
        core.cache.change(|state| state.synced = true);
        let (caller, _other_end) = tokio::net::UnixStream::pair().unwrap();
        let mut request = Request::new(());
        request.extensions_mut().insert(peer_credentials(&caller).unwrap());
        let (log, _logging) = log();
        let began = Instant::now();
        for _ in 0..1_000 {
            tracing::callsite::rebuild_interest_cache();
            let attested = core.attest(&request).await.unwrap();
            assert_eq!(core.identities(&attested).err().unwrap().code(), tonic::Code::PermissionDenied);
        }
        core.tell_unsaid(Instant::now() + Duration::from_secs(3_600));
        let text = log.text();
        // Twenty lines in each window of ten seconds, and one that tells of the rest.
        let windows = usize::try_from(began.elapsed().as_secs() / 10).unwrap() + 1;
        for kind in ["caller attested", "no identity issued"] {
            let lines = text.lines().filter(|l| l.contains(kind) && !l.contains("left out")).count();
            assert!((1..=20 * windows).contains(&lines), "{lines} lines in {windows} windows: {kind}");
        }
        assert_eq!(text.lines().filter(|l| l.contains("log lines left out")).count(), 2, "{text}");
        assert_eq!(
            (core.metrics.attestations.get(), core.metrics.refused_counts()),
            (1_000, [("no_identity", 1_000)].into())
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_reads_nothing_does_not_keep_its_streams_task() {
        let (tx, mut rx) = mpsc::channel(1);
        tx.try_send(Ok(1)).unwrap();
        let ended = last_word(&tx, Status::permission_denied("changed"));
        tokio::time::timeout(Duration::from_secs(60), ended).await.unwrap();
        assert_eq!(rx.recv().await.unwrap().unwrap(), 1);
        last_word(&tx, Status::permission_denied("changed")).await;
        assert_eq!(rx.recv().await.unwrap().unwrap_err().message(), "changed", "one that reads hears it");
    }
}
