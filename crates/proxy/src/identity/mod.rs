//! The sidecar's identity, swapped under its listeners and dialers while connections continue.
//!
//! One [`Identity`] per revision of SVID and bundles: its TLS configurations are built once and shared by all
//! connections.

mod agent;
mod files;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwapOption;
use countersign_api::clock::Clock;
use countersign_api::tls::{SvidVerifier, TlsError, certified_key, client_config, server_config};
use countersign_api::verified::VerifiedChains;
use countersign_identity::shown::sentence;
use countersign_identity::verify::Refusal;
use countersign_identity::{AuthorityKey, BundleSet, X509Svid};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::preamble::ALPN;
use crate::refusal::Refused;

pub use agent::follow_agent;
pub use files::{Files, FilesError, follow_files};

/// Most destinations whose TLS configuration is cached. Beyond that the cache is emptied.
const MAX_CLIENT_CONFIGS: usize = 4_096;

/// One revision of SVID and bundles, ready for handshakes.
pub struct Identity {
    svid: X509Svid,
    /// The SPIFFE ID as text, for logs.
    id: Arc<str>,
    chains: Arc<VerifiedChains>,
    key: Arc<CertifiedKey>,
    server: Arc<ServerConfig>,
    clients: Mutex<HashMap<BTreeSet<String>, Arc<ClientConfig>>>,
}

impl Identity {
    /// Builds the TLS configurations of a revision. Errors: rustls rejects the key or the chain.
    pub fn new(svid: X509Svid, bundles: BundleSet) -> Result<Self, TlsError> {
        let chains = Arc::new(VerifiedChains::new(Arc::new(bundles)));
        let key = certified_key(&svid)?;
        let verifier = SvidVerifier::remembering(chains.clone(), |_| Ok(()));
        let server = Arc::new(server_config(key.clone(), verifier, &[ALPN])?);
        let id = svid.id().to_string().into();
        Ok(Self { svid, id, chains, key, server, clients: Mutex::default() })
    }

    /// The SVID that we present.
    pub fn svid(&self) -> &X509Svid {
        &self.svid
    }

    /// The SVID's SPIFFE ID as text.
    pub fn id(&self) -> &Arc<str> {
        &self.id
    }

    /// The bundles that peers are verified against.
    pub fn bundles(&self) -> &BundleSet {
        self.chains.bundles()
    }

    /// The peers' chains that were verified against these bundles.
    pub fn chains(&self) -> &VerifiedChains {
        &self.chains
    }

    /// TLS configuration for incoming connections.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// TLS configuration for connections to a destination where one of the `expected` IDs may be. The expectation is
    /// part of the handshake: any other peer fails it before it learns our identity.
    pub fn client(&self, expected: &BTreeSet<String>) -> Result<Arc<ClientConfig>, TlsError> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = clients.get(expected) {
            return Ok(config.clone());
        }
        let ids = expected.clone();
        let verifier = SvidVerifier::remembering(self.chains.clone(), move |peer| {
            if ids.contains(&peer.id.to_string()) {
                return Ok(());
            }
            let expected = ids.iter().map(|id| format!("`{id}`")).collect::<Vec<_>>().join(" or ");
            Err(Refusal::WrongIdentity { expected, found: peer.id.clone() })
        });
        let config = Arc::new(client_config(Some(self.key.clone()), verifier, &[ALPN])?);
        // The app chooses its destinations, so their number must be bounded.
        if clients.len() >= MAX_CLIENT_CONFIGS {
            clients.clear();
        }
        clients.insert(expected.clone(), config.clone());
        Ok(config)
    }
}

/// Longest text of the agent's that is kept, in characters.
const MAX_AGENT_TEXT: usize = 512;

/// What the agent answered instead of an identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRefusal {
    /// When, in seconds since 1970.
    pub at: i64,
    /// The gRPC status, such as `PermissionDenied`.
    pub code: String,
    /// Its text.
    pub message: String,
}

/// The identity of the moment, and each change.
pub struct Current {
    identity: ArcSwapOption<Identity>,
    /// The agent's last answer, where it was no identity.
    refusal: Mutex<Option<AgentRefusal>>,
    changes: watch::Sender<u64>,
    clock: Clock,
}

impl Current {
    /// No identity yet.
    pub fn new(clock: Clock) -> Self {
        Self { identity: ArcSwapOption::empty(), refusal: Mutex::default(), changes: watch::Sender::new(0), clock }
    }

    /// The current time, by the sidecar's clock.
    pub fn now(&self) -> OffsetDateTime {
        (self.clock)()
    }

    /// The identity, even if it has expired; `None` before the first one and after a withdrawal.
    pub fn peek(&self) -> Option<Arc<Identity>> {
        self.identity.load_full()
    }

    /// The identity to act with. Errors: [`Refused::NoSvid`], [`Refused::SvidExpired`].
    pub fn get(&self) -> Result<Arc<Identity>, Refused> {
        let identity = self.identity.load_full().ok_or(Refused::NoSvid)?;
        if identity.svid.is_expired(self.now()) {
            return Err(Refused::SvidExpired(identity.svid.facts().not_after));
        }
        Ok(identity)
    }

    /// Whether the current bundles hold an authority. Without an identity nothing is trusted.
    pub fn trusts(&self, trust_domain: &str, key: AuthorityKey) -> bool {
        self.identity.load().as_ref().is_some_and(|identity| identity.bundles().holds(trust_domain, key))
    }

    /// Switches to a new revision. Open connections are not affected.
    pub fn set(&self, identity: Identity) {
        let facts = identity.svid.facts();
        tracing::info!(spiffe_id = %identity.svid.id(), serial = facts.serial, not_after = %facts.not_after,
            authorities = identity.bundles().iter().map(|b| b.authorities.len()).sum::<usize>(), "identity in use");
        self.identity.store(Some(Arc::new(identity)));
        *self.last_refusal() = None;
        self.changes.send_modify(|n| *n += 1);
    }

    /// Removes the identity, because the agent withdrew it.
    pub fn clear(&self) {
        if self.identity.swap(None).is_some() {
            tracing::error!("the identity was withdrawn; nothing goes to or from the mesh any more");
            self.changes.send_modify(|n| *n += 1);
        }
    }

    fn last_refusal(&self) -> MutexGuard<'_, Option<AgentRefusal>> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The agent gave no identity, or has ended its stream. An identity that stands goes on to do so.
    pub fn refused_by_agent(&self, code: &str, message: &str) {
        let message = sentence(message, MAX_AGENT_TEXT).to_string();
        *self.last_refusal() = Some(AgentRefusal { at: self.now().unix_timestamp(), code: code.to_owned(), message });
    }

    /// The agent's last answer, where it was no identity.
    pub fn agent_refusal(&self) -> Option<AgentRefusal> {
        self.last_refusal().clone()
    }

    /// Ticks with each change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}
