//! The connection to the server: our identity there, the bundle that authenticates the server, and calls.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use countersign_api::clock::Clock;
use countersign_api::convert::id_from_wire;
use countersign_api::spire::agent::agent_client::AgentClient;
use countersign_api::spire::agent::attest_agent_request::{Params, Step};
use countersign_api::spire::agent::attest_agent_response::Step as Answer;
use countersign_api::spire::agent::{AgentX509svidParams, AttestAgentRequest, RenewAgentRequest};
use countersign_api::spire::types;
use countersign_api::tls::{SvidVerifier, TlsError, certified_key, client_config, only};
use countersign_api::transport::tls_channel;
use countersign_identity::profile::{IssueError, request};
use countersign_identity::svid::SvidError;
use countersign_identity::trust_domain::server_id;
use countersign_identity::{BundleSet, KeyType, PrivateKey, TrustBundle, X509Svid};
use rustls::ClientConfig;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::config::Config;
use crate::keeper::Keeper;
use crate::known::{self, Given, Kept};
use crate::node_attestor::EvidenceError;
use crate::refusal::Refusal;
use crate::store::{Store, StoreError};

/// Longest call to the server.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the agent could not attest or renew its SVID.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// There is no evidence, and no identity from an earlier run.
    #[error(
        "this agent has no identity yet; start it with a join token (`countersign token generate`) or an x509pop certificate"
    )]
    NoEvidence,
    /// The evidence cannot be read, or cannot answer the challenge.
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
    /// The server refused, or did not answer.
    #[error("{}", describe(.0))]
    Server(Box<Status>),
    /// The server's answer cannot be used.
    #[error("the server's answer cannot be used: {0}")]
    Answer(String),
    /// A key could not be generated.
    #[error(transparent)]
    Key(#[from] countersign_identity::key::KeyError),
    /// A signing request could not be built.
    #[error(transparent)]
    Request(#[from] IssueError),
    /// The SVID in the answer is invalid.
    #[error(transparent)]
    Svid(#[from] SvidError),
    /// The agent's folder cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The folder is not writable, and the evidence is for single use.
    #[error("{0}; the join token was not used, for the identity that it brings could not be kept")]
    TokenSpared(StoreError),
    /// TLS cannot be set up with our SVID.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl From<Status> for LinkError {
    fn from(status: Status) -> Self {
        Self::Server(Box::new(status))
    }
}

impl LinkError {
    /// What the server rejects about this agent; `None` if the error has another cause.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Server(status) => Refusal::of(status),
            _ => None,
        }
    }
}

/// A status with the causes that tonic keeps as its source, such as a rejected certificate.
pub fn describe(status: &Status) -> String {
    let mut text = format!("server: {}", status.message());
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// One agent's connection to its server.
pub struct Link {
    config: Arc<Config>,
    keeper: Keeper,
    /// Whether the join token was sent to the server, which accepts it once.
    token_spent: AtomicBool,
    clock: Clock,
    identity: watch::Sender<Option<Arc<X509Svid>>>,
    bundles: Arc<ArcSwap<BundleSet>>,
    /// Digest of the given bundle's file as it was read last.
    seen: Mutex<Option<String>>,
    signing: Mutex<Option<(Option<Arc<X509Svid>>, Channel)>>,
}

impl Link {
    /// Loads the identity and the bundle of an earlier run. Errors: the folder or the given bundle cannot be used.
    pub fn new(config: Arc<Config>, clock: Clock) -> Result<Self, LinkError> {
        let keeper = Keeper::new(Store::open(&config.data_dir)?);
        let now = clock();
        // An identity of another trust domain, or an expired one, would only make the server refuse us.
        let own = |svid: &X509Svid| svid.id().is_member_of(&config.trust_domain) && !svid.is_expired(now);
        let identity = keeper.identity().filter(own).map(Arc::new);
        let given = config.trust_bundle.as_deref().map(|path| Given::read(path, &config.trust_domain)).transpose()?;
        let seen = given.as_ref().map(|given| given.digest.clone());
        let bundle = known::at_start(keeper.bundle(&config.trust_domain), given, now);
        let bundles = Arc::new(ArcSwap::from_pointee(bundle.into_iter().collect::<BundleSet>()));
        Ok(Self {
            keeper,
            token_spent: AtomicBool::new(false),
            clock,
            identity: watch::Sender::new(identity),
            bundles,
            seen: Mutex::new(seen),
            signing: Mutex::default(),
            config,
        })
    }

    /// Our identity at the server, with notification of each change; `None` before attestation.
    pub fn identity(&self) -> watch::Receiver<Option<Arc<X509Svid>>> {
        self.identity.subscribe()
    }

    /// The bundle that authenticates the server; `None` if there is none yet.
    pub fn bundle(&self) -> Option<Arc<TrustBundle>> {
        self.bundles.load().get(self.config.trust_domain.as_str()).cloned()
    }

    /// Uses a bundle that was received over an authenticated connection, and stores it.
    pub fn set_bundle(&self, bundle: &TrustBundle) {
        if self.bundle().is_some_and(|known| known.authorities == bundle.authorities) {
            return;
        }
        self.bundles.store(Arc::new(std::iter::once(bundle.clone()).collect()));
        let replaces = self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.keeper.keep_bundle(Arc::new(Kept { bundle: bundle.clone(), replaces }));
    }

    /// Reads the given bundle's file anew where it has changed; the server is known by it too from then on. For when the server
    /// cannot be reached: it may have become another one.
    pub fn look_at_given(&self) {
        let Some(path) = &self.config.trust_bundle else { return };
        let given = match Given::read(path, &self.config.trust_domain) {
            Ok(given) => given,
            Err(error) => return tracing::warn!(%error, "the trust bundle cannot be read anew"),
        };
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.as_ref() == Some(&given.digest) {
            return;
        }
        tracing::info!(path = %path.display(), "the trust bundle's file has changed; the server is known by it too");
        *seen = Some(given.digest);
        let known = self.bundle().map(|known| known::both(&known, &given.bundle, self.now()));
        self.bundles.store(Arc::new(std::iter::once(known.unwrap_or(given.bundle)).collect()));
    }

    /// Takes up the identity on disk where we have none: it was passed over by a clock that was ahead.
    pub fn recover(&self) -> bool {
        if self.identity.borrow().is_some() {
            return false;
        }
        let own = |svid: &X509Svid| svid.id().is_member_of(&self.config.trust_domain) && !svid.is_expired(self.now());
        let Some(svid) = self.keeper.identity().filter(own) else { return false };
        self.identity.send_replace(Some(Arc::new(svid)));
        true
    }

    /// The state of the agent's folder.
    pub fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// A new connection with our current identity, opened at the first call.
    pub fn channel(&self) -> Channel {
        self.channel_as(self.identity.borrow().clone())
    }

    /// The connection for all signing calls, replaced when our SVID changes.
    pub fn signing_channel(&self) -> Channel {
        let current = self.identity.borrow().clone();
        let mut kept = self.signing.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((svid, channel)) if *svid == current => channel.clone(),
            _ => {
                let channel = self.channel_as(current.clone());
                *kept = Some((current, channel.clone()));
                channel
            }
        }
    }

    /// A new connection with this identity, or without one, opened at the first call.
    pub fn channel_as(&self, svid: Option<Arc<X509Svid>>) -> Channel {
        // Only the server's own SPIFFE ID is accepted: any workload of the trust domain has a certificate from the same
        // CA.
        let (bundles, expected) = (self.bundles.clone(), server_id(&self.config.trust_domain));
        tls_channel(self.config.server.clone(), move || {
            let bundles = bundles.clone();
            let verifier = SvidVerifier::new(move || bundles.load_full(), only(expected.clone()));
            let own = svid.as_deref().map(certified_key).transpose();
            own.and_then(|own| client_config(own, verifier, &[b"h2"])).map_or_else(
                |error| {
                    tracing::error!(%error, "cannot use the agent's own SVID");
                    trusting_nobody()
                },
                Arc::new,
            )
        })
    }

    /// Whether [`Self::attest`] can succeed: there is evidence, and it is not used up.
    pub fn can_attest(&self) -> bool {
        let attestor = self.config.attestor.as_ref();
        attestor.is_some_and(|by| !by.is_for_single_use() || !self.token_spent.load(Ordering::Relaxed))
    }

    /// Attests this node and takes the identity that the server issues.
    pub async fn attest(&self) -> Result<Arc<X509Svid>, LinkError> {
        let attestor = self.config.attestor.as_ref().ok_or(LinkError::NoEvidence)?;
        let evidence = attestor.evidence()?;
        // Tested before the token is sent: it is used up by then, and an identity that cannot be stored would be lost
        // at a restart.
        if attestor.is_for_single_use() {
            self.keeper.probe().map_err(LinkError::TokenSpared)?;
        }
        let key = PrivateKey::generate(KeyType::EcP256)?;
        let params = Params {
            data: Some(types::AttestationData { r#type: attestor.kind().into(), payload: evidence.payload()? }),
            params: Some(AgentX509svidParams { csr: request(&key, None)? }),
        };
        let (tx, rx) = mpsc::channel(2);
        let send = |step| tx.send(AttestAgentRequest { step: Some(step) });
        let hung_up = |_| LinkError::Answer("the stream ended".into());
        send(Step::Params(params)).await.map_err(hung_up)?;
        // Without our SVID: the reason for attesting again may be that the server rejects it.
        let mut client = AgentClient::new(self.channel_as(None));
        let talk = async {
            let mut answers = client.attest_agent(ReceiverStream::new(rx)).await?.into_inner();
            loop {
                match answers.message().await?.and_then(|m| m.step) {
                    Some(Answer::Challenge(challenge)) => {
                        let answer = evidence.answer(&challenge)?;
                        send(Step::ChallengeResponse(answer)).await.map_err(hung_up)?;
                    }
                    Some(Answer::Result(result)) => return Ok(result),
                    None => return Err(LinkError::Answer("the attestation ended without a result".into())),
                }
            }
        };
        let result = tokio::time::timeout(CALL_TIMEOUT, talk).await;
        let result = result.map_err(|_| LinkError::Answer(format!("no answer within {CALL_TIMEOUT:?}")))?;
        // Any answer except an outage means that the server has seen the token, which is then used up.
        if !matches!(&result, Err(LinkError::Server(status)) if is_outage(status)) {
            self.token_spent.store(true, Ordering::Relaxed);
        }
        self.become_agent(result?.svid, key)
    }

    /// Exchanges our SVID for a new one with a new key.
    pub async fn renew(&self) -> Result<Arc<X509Svid>, LinkError> {
        let key = PrivateKey::generate(KeyType::EcP256)?;
        let params = Some(AgentX509svidParams { csr: request(&key, None)? });
        let mut client = AgentClient::new(self.channel());
        let call = client.renew_agent(RenewAgentRequest { params });
        let answer = tokio::time::timeout(CALL_TIMEOUT, call).await;
        let answer = answer.map_err(|_| LinkError::Answer(format!("no answer within {CALL_TIMEOUT:?}")))??;
        self.become_agent(answer.into_inner().svid, key)
    }

    fn become_agent(&self, svid: Option<types::X509svid>, key: PrivateKey) -> Result<Arc<X509Svid>, LinkError> {
        let svid = Arc::new(svid_from_wire(svid, key)?);
        if !svid.id().path().starts_with("/spire/agent/") || !svid.id().is_member_of(&self.config.trust_domain) {
            return Err(LinkError::Answer(format!("`{}` is no agent of `{}`", svid.id(), self.config.trust_domain)));
        }
        // In memory first: the server has issued this identity and may not accept another one any more, so a full disk
        // must not lose it.
        self.identity.send_replace(Some(svid.clone()));
        self.keeper.keep_identity(svid.clone());
        Ok(svid)
    }

    /// Drops our identity, until the next attestation.
    pub fn forget(&self) {
        self.identity.send_replace(None);
    }

    /// The current time, by the agent's clock.
    pub fn now(&self) -> time::OffsetDateTime {
        (self.clock)()
    }
}

/// Whether a call failed before the server had decided, or was postponed by it.
fn is_outage(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::DeadlineExceeded | Code::Cancelled | Code::ResourceExhausted
    )
}

/// A configuration with which every handshake fails.
fn trusting_nobody() -> Arc<ClientConfig> {
    let verifier = SvidVerifier::new(Arc::<BundleSet>::default, |_| Ok(()));
    let config = client_config(None, verifier, &[b"h2"]);
    Arc::new(config.unwrap_or_else(|_| unreachable!("a client without a certificate uses constant settings")))
}

/// Joins an SVID from the wire with the key that was generated for it. Errors: missing, malformed, or for another ID.
pub fn svid_from_wire(svid: Option<types::X509svid>, key: PrivateKey) -> Result<X509Svid, LinkError> {
    let svid = svid.ok_or_else(|| LinkError::Answer("the SVID is missing".into()))?;
    let promised = id_from_wire("svid.id", svid.id).map_err(|e| LinkError::Answer(e.to_string()))?;
    let svid = X509Svid::new(svid.cert_chain.into_iter().map(Into::into).collect(), key)?;
    if *svid.id() != promised {
        return Err(LinkError::Answer(format!("the certificate is for `{}`, not for `{promised}`", svid.id())));
    }
    Ok(svid)
}
