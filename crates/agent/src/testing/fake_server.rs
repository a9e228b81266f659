//! A server on loopback: real TLS and gRPC, an authority that can be replaced, and a few switches.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use countersign_api::convert::{bundle_to_wire, entry_to_wire, id_to_wire};
use countersign_api::denied::{Reason, denied};
use countersign_api::push::push_server::{Push, PushServer};
use countersign_api::push::{WatchRequest, WatchResponse};
use countersign_api::spire::agent::agent_server::{Agent, AgentServer};
use countersign_api::spire::agent::attest_agent_request::Step as Asked;
use countersign_api::spire::agent::attest_agent_response::{Result as Attested, Step as Answered};
use countersign_api::spire::agent::{
    AttestAgentRequest, AttestAgentResponse, BanAgentRequest, CountAgentsRequest, CountAgentsResponse,
    CreateJoinTokenRequest, DeleteAgentRequest, GetAgentRequest, ListAgentsRequest, ListAgentsResponse,
    PostStatusRequest, PostStatusResponse, RenewAgentRequest, RenewAgentResponse,
};
use countersign_api::spire::svid::svid_server::{Svid, SvidServer};
use countersign_api::spire::svid::{
    BatchNewX509svidRequest, BatchNewX509svidResponse, MintJwtsvidRequest, MintJwtsvidResponse, MintX509svidRequest,
    MintX509svidResponse, NewDownstreamX509caRequest, NewDownstreamX509caResponse, NewJwtsvidRequest,
    NewJwtsvidResponse, batch_new_x509svid_response,
};
use countersign_api::spire::types;
use countersign_api::tls::{ServerTls, SvidVerifier, certified_key};
use countersign_api::transport::accept_tls;
use countersign_identity::profile::Issued;
use countersign_identity::{BundleSet, Entry, SpiffeId, TrustBundle};
use futures::Stream;
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{Request, Response, Status, Streaming};

use super::{Ca, id};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A server that a test controls.
#[derive(Clone)]
pub struct FakeServer {
    /// Its listening address, `HOST:PORT`.
    pub address: String,
    inner: Arc<Mutex<Inner>>,
    pushed: watch::Sender<Pushed>,
}

/// What it tells its agents.
#[derive(Clone)]
struct Pushed {
    revision: u64,
    entries: Vec<Entry>,
    bundle: TrustBundle,
    foreign: Vec<TrustBundle>,
    /// Why it does not speak with them.
    denied: Option<Reason>,
}

struct Inner {
    ca: Ca,
    /// The bundles that clients are verified against.
    trusted: Arc<BundleSet>,
    agent_ttl: Duration,
    svid_ttl: Duration,
    refused: BTreeSet<String>,
    agent: SpiffeId,
    /// Epoch and revision that each stream of pushes began with.
    watched_from: Vec<(String, u64)>,
    attestations: usize,
    renewals: usize,
    signing_calls: Vec<Vec<String>>,
    /// How it answers who wants a token.
    tokens: Tokens,
    token_calls: usize,
}

type Tokens = Box<dyn Fn(&NewJwtsvidRequest) -> Result<String, Status> + Send>;

impl FakeServer {
    /// Starts a server with a new authority.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ca = Ca::new(OffsetDateTime::now_utc());
        let hour = Duration::from_secs(3_600);
        let (entries, foreign) = (vec![], vec![]);
        let pushed = watch::Sender::new(Pushed { revision: 1, entries, bundle: ca.bundle(), foreign, denied: None });
        let inner = Inner {
            trusted: Arc::new(std::iter::once(ca.bundle()).collect()),
            ca,
            agent_ttl: hour,
            svid_ttl: hour,
            refused: BTreeSet::new(),
            agent: id("/spire/agent/test/1"),
            watched_from: vec![],
            attestations: 0,
            renewals: 0,
            signing_calls: vec![],
            tokens: Box::new(|_| Err(Status::unimplemented("not in tests"))),
            token_calls: 0,
        };
        let address = listener.local_addr().unwrap().to_string();
        let server = Self { address, inner: Arc::new(Mutex::new(inner)), pushed };
        let tls = server.clone();
        let incoming = accept_tls(listener, move || {
            let inner = tls.lock();
            let own = inner.ca.svid("/spire/server", Duration::from_secs(600), OffsetDateTime::now_utc());
            let trusted = inner.trusted.clone();
            let verifier = SvidVerifier::new(move || trusted.clone(), |_| Ok(())).client_may_be_anonymous();
            Arc::new(ServerTls::new(certified_key(&own).unwrap(), verifier, &[b"h2"]).unwrap())
        });
        let serve = tonic::transport::Server::builder()
            .add_service(AgentServer::new(server.clone()))
            .add_service(SvidServer::new(server.clone()))
            .add_service(PushServer::new(server.clone()))
            .serve_with_incoming(incoming);
        tokio::spawn(serve);
        server
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// The bundle of its authority.
    pub fn bundle(&self) -> TrustBundle {
        self.lock().ca.bundle()
    }

    /// Sets the lifetime of agents' SVIDs.
    pub fn agent_ttl(&self, ttl: Duration) {
        self.lock().agent_ttl = ttl;
    }

    /// Switches to another authority. Clients under the old one are still accepted. Returns a bundle of both.
    pub fn next_authority(&self, ca: Ca) -> TrustBundle {
        let mut inner = self.lock();
        let old = inner.ca.bundle();
        let mut both = ca.bundle();
        both.authorities.extend(old.authorities);
        inner.trusted = Arc::new(std::iter::once(both.clone()).collect());
        inner.ca = ca;
        both
    }

    /// Accepts only clients under its current authority.
    pub fn revoke_others(&self) {
        let mut inner = self.lock();
        inner.trusted = Arc::new(std::iter::once(inner.ca.bundle()).collect());
    }

    /// Pushes entries and a bundle to all agents.
    pub fn push(&self, entries: Vec<Entry>, bundle: TrustBundle) {
        self.pushed.send_modify(|pushed| {
            *pushed = Pushed { revision: pushed.revision + 1, entries, bundle, foreign: vec![], denied: pushed.denied };
        });
    }

    /// Refuses its agents from now on, or not any more.
    pub fn deny(&self, why: Option<Reason>) {
        self.pushed.send_modify(|pushed| pushed.denied = why);
    }

    fn judge(&self) -> Result<(), Status> {
        self.pushed.borrow().denied.map_or(Ok(()), |why| Err(denied(why, "denied by the test".into())))
    }

    /// Names the agent that attests next.
    pub fn name_agents(&self, path: &str) {
        self.lock().agent = id(path);
    }

    /// Epoch and revision that each stream of pushes began with.
    pub fn watched_from(&self) -> Vec<(String, u64)> {
        self.lock().watched_from.clone()
    }

    /// Pushes these foreign bundles, which are all there are.
    pub fn push_foreign(&self, foreign: Vec<TrustBundle>) {
        self.pushed.send_modify(|pushed| {
            pushed.revision += 1;
            pushed.foreign = foreign;
        });
    }

    /// Refuses to sign for these entries.
    pub fn refuse(&self, entries: impl IntoIterator<Item = String>) {
        self.lock().refused = entries.into_iter().collect();
    }

    /// Number of attestations and of renewals by agents.
    pub fn agent_signatures(&self) -> (usize, usize) {
        let inner = self.lock();
        (inner.attestations, inner.renewals)
    }

    /// The entry IDs of each signing call.
    pub fn signing_calls(&self) -> Vec<Vec<String>> {
        self.lock().signing_calls.clone()
    }

    /// Answers like this who wants a token.
    pub fn answer_tokens(&self, answer: impl Fn(&NewJwtsvidRequest) -> Result<String, Status> + Send + 'static) {
        self.lock().tokens = Box::new(answer);
    }

    /// Number of calls for a token.
    pub fn token_calls(&self) -> usize {
        self.lock().token_calls
    }

    fn sign_agent(&self, csr: &[u8]) -> types::X509svid {
        let inner = self.lock();
        let agent = inner.agent.clone();
        svid(&agent, inner.ca.sign(&agent, csr, inner.agent_ttl, OffsetDateTime::now_utc()))
    }
}

fn svid(id: &SpiffeId, issued: Issued) -> types::X509svid {
    types::X509svid {
        id: Some(id_to_wire(id)),
        cert_chain: issued.chain.iter().map(|c| c.to_vec()).collect(),
        expires_at: issued.facts.not_after.unix_timestamp(),
        ..Default::default()
    }
}

type Answer<T> = Result<Response<T>, Status>;

fn no<T>() -> Answer<T> {
    Err(Status::unimplemented("not in tests"))
}

#[async_trait]
impl Agent for FakeServer {
    type AttestAgentStream = Answers<AttestAgentResponse>;

    async fn attest_agent(&self, request: Request<Streaming<AttestAgentRequest>>) -> Answer<Self::AttestAgentStream> {
        let mut requests = request.into_inner();
        let Some(AttestAgentRequest { step: Some(Asked::Params(params)) }) = requests.message().await? else {
            return Err(Status::invalid_argument("params"));
        };
        self.judge()?;
        self.lock().attestations += 1;
        let svid = self.sign_agent(&params.params.unwrap().csr);
        let (tx, rx) = mpsc::channel(1);
        let step = Some(Answered::Result(Attested { svid: Some(svid), reattestable: true }));
        tx.send(Ok(AttestAgentResponse { step })).await.unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn renew_agent(&self, request: Request<RenewAgentRequest>) -> Answer<RenewAgentResponse> {
        self.judge()?;
        self.lock().renewals += 1;
        let csr = request.into_inner().params.unwrap().csr;
        Ok(Response::new(RenewAgentResponse { svid: Some(self.sign_agent(&csr)) }))
    }

    async fn count_agents(&self, _: Request<CountAgentsRequest>) -> Answer<CountAgentsResponse> {
        no()
    }
    async fn list_agents(&self, _: Request<ListAgentsRequest>) -> Answer<ListAgentsResponse> {
        no()
    }
    async fn get_agent(&self, _: Request<GetAgentRequest>) -> Answer<types::Agent> {
        no()
    }
    async fn delete_agent(&self, _: Request<DeleteAgentRequest>) -> Answer<()> {
        no()
    }
    async fn ban_agent(&self, _: Request<BanAgentRequest>) -> Answer<()> {
        no()
    }
    async fn create_join_token(&self, _: Request<CreateJoinTokenRequest>) -> Answer<types::JoinToken> {
        no()
    }
    async fn post_status(&self, _: Request<PostStatusRequest>) -> Answer<PostStatusResponse> {
        no()
    }
}

#[async_trait]
impl Svid for FakeServer {
    async fn batch_new_x509svid(&self, request: Request<BatchNewX509svidRequest>) -> Answer<BatchNewX509svidResponse> {
        let params = request.into_inner().params;
        let mut inner = self.lock();
        inner.signing_calls.push(params.iter().map(|p| p.entry_id.clone()).collect());
        let results = params.into_iter().map(|p| {
            if inner.refused.contains(&p.entry_id) {
                let status = types::Status { code: 3, message: "refused by the test".into() };
                return batch_new_x509svid_response::Result { status: Some(status), svid: None };
            }
            let id = id(&format!("/{}", p.entry_id));
            let issued = inner.ca.sign(&id, &p.csr, inner.svid_ttl, OffsetDateTime::now_utc());
            batch_new_x509svid_response::Result { status: None, svid: Some(svid(&id, issued)) }
        });
        Ok(Response::new(BatchNewX509svidResponse { results: results.collect() }))
    }

    async fn mint_x509svid(&self, _: Request<MintX509svidRequest>) -> Answer<MintX509svidResponse> {
        no()
    }
    async fn mint_jwtsvid(&self, _: Request<MintJwtsvidRequest>) -> Answer<MintJwtsvidResponse> {
        no()
    }
    async fn new_jwtsvid(&self, request: Request<NewJwtsvidRequest>) -> Answer<NewJwtsvidResponse> {
        let mut inner = self.lock();
        inner.token_calls += 1;
        let token = (inner.tokens)(request.get_ref())?;
        Ok(Response::new(NewJwtsvidResponse { svid: Some(types::Jwtsvid { token, ..Default::default() }) }))
    }
    async fn new_downstream_x509ca(
        &self,
        _: Request<NewDownstreamX509caRequest>,
    ) -> Answer<NewDownstreamX509caResponse> {
        no()
    }
}

#[async_trait]
impl Push for FakeServer {
    type WatchStream = Answers<WatchResponse>;

    async fn watch(&self, request: Request<WatchRequest>) -> Answer<Self::WatchStream> {
        let WatchRequest { epoch, revision: known } = request.into_inner();
        self.lock().watched_from.push((epoch.clone(), known));
        let pushes = WatchStream::new(self.pushed.subscribe()).map(move |pushed| {
            if let Some(why) = pushed.denied {
                return Err(denied(why, "denied by the test".into()));
            }
            // As the server does: who has it all already is told nothing of it.
            let snapshot = epoch != "test" || known != pushed.revision;
            Ok(WatchResponse {
                epoch: "test".into(),
                revision: pushed.revision,
                snapshot,
                upserted: pushed.entries.iter().filter(|_| snapshot).map(entry_to_wire).collect(),
                removed_ids: vec![],
                bundle: Some(bundle_to_wire(&pushed.bundle)),
                federated_bundles: pushed.foreign.iter().map(bundle_to_wire).collect(),
                more: false,
                federated_whole: true,
            })
        });
        Ok(Response::new(Box::pin(pushes)))
    }
}
