//! The certificate authority: attests nodes, keeps registration entries, signs, rotates, publishes the trust bundle.
//!
//! A server is a [`Config`] and [`run`]. Endpoints live in `endpoints`. Each choice of the user is a trait with one
//! file per implementation: [`datastore`], [`key_manager`], [`upstream_authority`], [`node_attestor`].

pub mod agents;
mod attempts;
pub mod audit;
pub mod authority;
pub mod bundle_publisher;
mod caller;
pub mod config;
mod core;
mod data_dir;
pub mod datastore;
pub mod directory;
mod endpoints;
pub mod entries;
pub mod federation;
mod housekeeping;
pub mod key_manager;
pub mod metrics;
pub mod node_attestor;
mod own_svid;
mod refusals;
mod signing_ca;
mod signing_jwt;
#[cfg(test)]
mod testing;
mod tokens;
pub mod upstream_authority;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use countersign_api::clock::Clock;
use countersign_api::graceful::{GRACE, take_leave};
use countersign_api::rate_limit::RateLimit;
use countersign_api::transport::{accept_tls, accept_unix, bind_unix};
use countersign_api::{grpc, http};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use config::{
    BundleConfigMap, BundleEndpoint, CertificateFiles, Config, EndpointAuthentication, Issuance, KeyManagerKind,
    MIN_SVID_TTL, PsatCluster, Upstream, UpstreamDisk, UpstreamSpire,
};

use crate::core::Core;
use crate::data_dir::DataDir;

/// Why a server did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A folder, file or address cannot be used.
    #[error("cannot {what} {name}: {source}")]
    Io {
        /// The attempted operation, as in "listen on".
        what: &'static str,
        /// Path or address of the operation.
        name: String,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The database cannot be opened or read.
    #[error("{}: {source}", path.display())]
    Store {
        /// Path of the database file.
        path: PathBuf,
        /// Error of the database.
        source: datastore::DataStoreError,
    },
    /// The authorities cannot be loaded, or none is active.
    #[error(transparent)]
    Authority(#[from] authority::AuthorityError),
    /// The upstream authority cannot sign.
    #[error("upstream authority: {0}")]
    Upstream(#[from] upstream_authority::UpstreamError),
    /// The key manager cannot read or write its keys.
    #[error(transparent)]
    Keys(#[from] key_manager::KeyManagerError),
    /// The x509pop attestor cannot be set up.
    #[error(transparent)]
    X509Pop(#[from] node_attestor::SetupError),
    /// There is no Kubernetes configuration; holds the client's error.
    #[error("cannot reach the Kubernetes API: {0}; run in a pod, or set KUBECONFIG")]
    Kubernetes(String),
    /// The files of the bundle endpoint's certificate cannot be used.
    #[error(transparent)]
    Certificate(#[from] federation::CertificateError),
    /// The server's own TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] countersign_api::tls::TlsError),
    /// The gRPC service ended unexpectedly.
    #[error("gRPC: {0}")]
    Grpc(#[from] tonic::transport::Error),
}

fn io(what: &'static str, name: impl ToString) -> impl FnOnce(std::io::Error) -> ServerError {
    move |source| ServerError::Io { what, name: name.to_string(), source }
}

/// Runs a server until `shutdown`. `ready` is called once it serves, with the address for agents.
pub async fn run(
    config: Config,
    clock: Clock,
    shutdown: CancellationToken,
    ready: impl FnOnce(SocketAddr),
) -> Result<(), ServerError> {
    // First: nothing may be read or written that another server could be changing. Held until this function ends.
    let _data_dir = DataDir::take(&config.data_dir).map_err(io("use the data folder", config.data_dir.display()))?;
    let tcp = TcpListener::bind(config.bind).await.map_err(io("listen on", config.bind))?;
    let address = tcp.local_addr().map_err(io("listen on", config.bind))?;
    let bundle_endpoint = match &config.bundle_endpoint {
        Some(endpoint) => Some(federation::endpoint::Listening::new(endpoint).await?),
        None => None,
    };
    let unix = bind_unix(&config.admin_socket, 0o600).map_err(io("listen on", config.admin_socket.display()))?;
    let metrics = match config.metrics {
        Some(bind) => Some(TcpListener::bind(bind).await.map_err(io("listen on", bind))?),
        None => None,
    };
    // A server that fails to start must not leave its socket behind.
    let socket = config.admin_socket.clone();
    let assembled = async {
        let core = Arc::new(assemble(config, clock, shutdown.clone()).await?);
        let own = Arc::new(own_svid::OwnSvid::new(core.clone()).await?);
        Ok::<_, ServerError>((core, own))
    };
    let (core, own) = assembled.await.inspect_err(|_| drop(std::fs::remove_file(socket)))?;
    let services = endpoints::by_caller(&core).await;
    if let Some(listener) = metrics {
        let core = core.clone();
        core.tasks.spawn(http::serve(listener, pages(core.clone()), shutdown.clone()));
    }
    if let Some(endpoint) = bundle_endpoint {
        if let Ok(address) = endpoint.address() {
            tracing::info!(%address, "bundle endpoint ready");
        }
        endpoint.serve(&core, &own);
    }
    housekeeping::start(&core, &own);
    for publisher in &core.publishers {
        core.tasks.spawn(bundle_publisher::keep(publisher.clone(), core.authorities.bundle(), shutdown.clone()));
    }
    let tls = accept_tls(tcp, move || own.tls());
    let unix = accept_unix(unix, core.config.admin_socket.clone(), 0o600);
    let serve_tls = grpc::server(CALLS_AT_ONCE)
        .layer(services.clone())
        .add_routes(services.routes())
        .serve_with_incoming_shutdown(tls, shutdown.clone().cancelled_owned());
    let serve_unix = grpc::server(CALLS_AT_ONCE)
        .add_routes(services.routes())
        .serve_with_incoming_shutdown(unix, shutdown.clone().cancelled_owned());
    tracing::info!(trust_domain = %core.trust_domain(), %address, socket = %core.config.admin_socket.display(), "server ready");
    ready(address);
    let serving = async {
        let served = tokio::try_join!(serve_tls, serve_unix);
        shutdown.cancel();
        core.tasks.close();
        core.tasks.wait().await;
        served.map(|_| ())
    };
    Box::pin(take_leave(serving, &shutdown, GRACE)).await.unwrap_or(Ok(())).map_err(ServerError::from)
}

/// Most concurrent calls per connection.
const CALLS_AT_ONCE: u32 = 1_024;

async fn assemble(config: Config, clock: Clock, shutdown: CancellationToken) -> Result<Core, ServerError> {
    let path = config.data_dir.join("server.sqlite");
    let store_error = |source| ServerError::Store { path: path.clone(), source };
    let store = Arc::new(datastore::Sqlite::open(&path, &config.trust_domain).await.map_err(store_error)?);
    assemble_on(store, config, clock, shutdown).await
}

/// A server on this store.
async fn assemble_on(
    store: Arc<dyn datastore::DataStore>,
    config: Config,
    clock: Clock,
    shutdown: CancellationToken,
) -> Result<Core, ServerError> {
    let path = config.data_dir.join("server.sqlite");
    let store_error = |source| ServerError::Store { path: path.clone(), source };
    let keys: Arc<dyn key_manager::KeyManager> = match config.key_manager {
        KeyManagerKind::Disk => Arc::new(key_manager::Disk::new(config.data_dir.join("keys"))?),
        KeyManagerKind::Memory => Arc::<key_manager::Memory>::default(),
    };
    let upstream: Option<Arc<dyn upstream_authority::UpstreamAuthority>> = match &config.upstream {
        Some(Upstream::Disk(files)) => {
            let disk = upstream_authority::Disk::new(files.clone(), &config.trust_domain, clock()).await?;
            Some(Arc::new(disk))
        }
        Some(Upstream::Spire(above)) => {
            let td = config.trust_domain.clone();
            Some(Arc::new(upstream_authority::Spire::new(above.clone(), td, shutdown.clone())))
        }
        None => None,
    };
    let td = config.trust_domain.clone();
    let authorities = authority::Authorities::load(authority::Settings {
        trust_domain: td.clone(),
        issuance: config.issuance.clone(),
        keys: key_manager::Keys::new(keys),
        upstream,
        store: store.clone(),
        clock: clock.clone(),
    })
    .await?;
    let mut attestors: Vec<Box<dyn node_attestor::NodeAttestor>> = vec![Box::new(node_attestor::JoinToken {
        store: store.clone(),
        trust_domain: td.clone(),
        clock: clock.clone(),
    })];
    if let Some(ca) = &config.x509pop_ca {
        attestors.push(Box::new(node_attestor::X509Pop::new(ca, td.clone(), clock.clone())?));
    }
    let mut publishers: Vec<Arc<dyn bundle_publisher::BundlePublisher>> = vec![];
    if config.k8s_psat.is_some() || config.k8s_bundle.is_some() || config.k8s_webhook_label.is_some() {
        let client =
            kube::Client::try_default().await.map_err(|e| ServerError::Kubernetes(countersign_watch::in_words(&e)))?;
        if let Some(cluster) = config.k8s_psat.clone() {
            let (client, trust_domain) = (client.clone(), td.clone());
            attestors.push(Box::new(node_attestor::K8sPsat { cluster, trust_domain, client }));
        }
        if let Some(place) = config.k8s_bundle.clone() {
            publishers.push(Arc::new(bundle_publisher::K8sConfigMap::new(place, client.clone())));
        }
        if let Some(label) = config.k8s_webhook_label.clone() {
            publishers.push(Arc::new(bundle_publisher::K8sWebhook::new(label, client)));
        }
    }
    let audit = audit::Audit::open(config.audit_log.as_deref());
    let audit = audit.map_err(io("open the audit log", config.audit_log.as_deref().unwrap_or(&path).display()))?;
    let mut epoch = [0u8; 8];
    rand::fill(&mut epoch);
    Ok(Core {
        entries: entries::Entries::load(store.clone(), &td, clock()).await.map_err(store_error)?,
        agents: agents::Agents::load(store.clone()).await.map_err(store_error)?,
        federated: federation::bundles::FederatedBundles::load(store.clone(), &td).await.map_err(store_error)?,
        relationships: federation::relationships::Relationships::load(store.clone(), &td).await.map_err(store_error)?,
        refresher: federation::refresh::Refresher::default(),
        directory: directory::Directory::default(),
        metrics: metrics::Metrics::default(),
        refusals: refusals::Refusals::default(),
        attempts: attempts::Attempts::default(),
        attest_limit: RateLimit::new(1, 10),
        sign_limit: RateLimit::new(500, 2_000),
        token_limit: RateLimit::new(500, 2_000),
        epoch: hex::encode(epoch),
        started_at: clock(),
        own_chain: Default::default(),
        tasks: TaskTracker::new(),
        audit,
        attestors,
        publishers,
        authorities,
        store,
        shutdown,
        clock,
        config,
    })
}

fn pages(core: Arc<Core>) -> Arc<http::Handler> {
    http::pages(move |path| match path {
        "/metrics" => Some(http::Answer::metrics(&core.metrics.registry)),
        "/ready" | "/live" => Some(http::Answer::ready(None)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_identity::{KeyType, PrivateKey};
    use std::path::{Path, PathBuf};
    use std::time::{Duration, Instant};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::task::JoinHandle;

    /// A server that is ready, and its operators' socket.
    async fn serving(dir: &Path, shutdown: &CancellationToken) -> (JoinHandle<Result<(), ServerError>>, PathBuf) {
        let (server, socket, _) = serving_agents(dir, shutdown).await;
        (server, socket)
    }

    /// The same with its address for agents.
    async fn serving_agents(
        dir: &Path,
        shutdown: &CancellationToken,
    ) -> (JoinHandle<Result<(), ServerError>>, PathBuf, SocketAddr) {
        let config = testing::config(dir);
        let socket = config.admin_socket.clone();
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let (clock, end) = (countersign_api::clock::system_clock(), shutdown.clone());
        let server = tokio::spawn(run(config, clock, end, |address| ready.send(address).unwrap()));
        let address = is_ready.await.unwrap();
        (server, socket, address)
    }

    /// The outcome of an attestation with this join token over a connection of its own.
    async fn attest(channel: tonic::transport::Channel, token: &str) -> Result<(), tonic::Status> {
        use countersign_api::spire::agent::attest_agent_request::{Params, Step};
        use countersign_api::spire::agent::{AgentX509svidParams, AttestAgentRequest, agent_client::AgentClient};
        let data =
            countersign_api::spire::types::AttestationData { r#type: "join_token".into(), payload: token.into() };
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let csr = countersign_identity::profile::request(&key, None).unwrap();
        let params = Params { data: Some(data), params: Some(AgentX509svidParams { csr }) };
        let asked = AttestAgentRequest { step: Some(Step::Params(params)) };
        // The call stays open on our side, as an agent's does.
        let asked = tokio_stream::StreamExt::chain(tokio_stream::once(asked), tokio_stream::pending());
        let answers = AgentClient::new(channel).attest_agent(asked).await?;
        answers.into_inner().message().await.map(|answer| assert!(answer.is_some()))
    }

    #[tokio::test]
    async fn a_stranger_at_an_agents_address_does_not_keep_it_from_attesting() {
        use countersign_api::spire::agent::{CreateJoinTokenRequest, agent_client::AgentClient};
        use countersign_api::spire::bundle::{GetBundleRequest, bundle_client::BundleClient};
        let (dir, shutdown) = (tempfile::tempdir().unwrap(), CancellationToken::new());
        let (_server, socket, address) = serving_agents(dir.path(), &shutdown).await;
        let admin = countersign_api::transport::unix_channel(socket);
        let bundle = BundleClient::new(admin.clone()).get_bundle(GetBundleRequest::default()).await.unwrap();
        let bundle = countersign_api::convert::bundle_from_wire(bundle.into_inner()).unwrap();
        let bundles = Arc::new(std::iter::once(bundle).collect::<countersign_identity::BundleSet>());
        let server_id = countersign_identity::trust_domain::server_id(&testing::td());
        let connect = move || {
            let (bundles, server_id) = (bundles.clone(), server_id.clone());
            countersign_api::transport::tls_channel(address.to_string(), move || {
                let bundles = bundles.clone();
                let only = countersign_api::tls::only(server_id.clone());
                let verifier = countersign_api::tls::SvidVerifier::new(move || bundles.clone(), only);
                Arc::new(countersign_api::tls::client_config(None, verifier, &[b"h2"]).unwrap())
            })
        };
        // Twenty connections that fail as fast as they can; the agent comes when each has failed.
        let mut strangers = tokio::task::JoinSet::new();
        let failed = Arc::new(tokio::sync::Semaphore::new(0));
        for n in 0..20 {
            let (channel, failed) = (connect(), failed.clone());
            strangers.spawn(async move {
                loop {
                    attest(channel.clone(), &format!("no-such-token-{n}")).await.unwrap_err();
                    failed.add_permits(1);
                }
            });
        }
        failed.acquire_many(40).await.unwrap().forget();
        for _ in 0..3 {
            let asked = AgentClient::new(admin.clone())
                .create_join_token(CreateJoinTokenRequest { ttl: 60, ..Default::default() })
                .await;
            attest(connect(), &asked.unwrap().into_inner().value).await.unwrap();
        }
        // And it is still being flooded.
        failed.acquire_many(40).await.unwrap().forget();
    }

    /// An HTTP/2 connection whose settings are sent.
    async fn connected(socket: &Path) -> UnixStream {
        let mut client = UnixStream::connect(socket).await.unwrap();
        client.write_all(grpc::PREFACE).await.unwrap();
        client.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        client
    }

    #[tokio::test]
    async fn a_client_that_stands_still_does_not_keep_the_server_from_ending() {
        let (dir, shutdown) = (tempfile::tempdir().unwrap(), CancellationToken::new());
        let (server, socket) = serving(dir.path(), &shutdown).await;
        // It is served, and reads nothing more, not even that the server takes leave.
        let mut client = connected(&socket).await;
        client.read_exact(&mut [0; 9]).await.unwrap();
        let told = Instant::now();
        shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(20), server).await.expect("in bounded time").unwrap().unwrap();
        assert!(told.elapsed() < Duration::from_secs(10), "{:?}", told.elapsed());
        assert!(!socket.exists());
    }

    /// RFC 9113 8.3.1 wants a slash in front, and 8.1.1 a stream error of type `PROTOCOL_ERROR` where there is none.
    #[tokio::test]
    async fn a_request_with_a_malformed_path_is_reset_and_its_connection_goes_on() {
        let (dir, shutdown) = (tempfile::tempdir().unwrap(), CancellationToken::new());
        let (_server, socket) = serving(dir.path(), &shutdown).await;
        let mut client = connected(&socket).await;
        // POST, http, and a path and an authority as literals (RFC 7541 6.2.1).
        let block = [&[0x83, 0x86, 0x44, 7][..], b"foo/Bar", &[0x41, 1], b"x"].concat();
        let headers = [&[0, 0, u8::try_from(block.len()).unwrap(), 1, 0x5, 0, 0, 0, 1][..], &block].concat();
        client.write_all(&headers).await.unwrap();
        client.write_all(&[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]).await.unwrap();
        let (mut resets, mut answered) = (vec![], false);
        // Which of the two comes first is not laid down.
        let until_both_are_there = async {
            while resets.is_empty() || !answered {
                let mut head = [0; 9];
                client.read_exact(&mut head).await.unwrap();
                let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
                client.read_exact(&mut payload).await.unwrap();
                match (head[3], head[4]) {
                    (3, _) => resets.push((head[8], payload)),
                    (6, 1) if payload == [1, 2, 3, 4, 5, 6, 7, 8] => answered = true,
                    (7, _) => panic!("the whole connection is given up: {payload:?}"),
                    _ => {}
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), until_both_are_there).await.unwrap();
        assert_eq!(resets, [(1, vec![0, 0, 0, 1])]);
    }
}
