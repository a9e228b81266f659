//! How an agent proves which node it is.

mod join_token;
mod k8s_psat;
mod x509pop;

use async_trait::async_trait;
use countersign_identity::SpiffeId;
use countersign_identity::selector::SelectorSet;

use crate::datastore::DataStoreError;

pub use join_token::JoinToken;
pub use k8s_psat::K8sPsat;
pub use x509pop::{KIND as X509POP, SetupError, X509Pop, is_same_node};

/// Longest evidence or answer to a challenge, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 64 * 1024;

/// Why a node was not believed. The text goes back to the agent.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// The evidence is malformed.
    #[error("{0}")]
    Malformed(String),
    /// The evidence is not good.
    #[error("{0}")]
    Refused(String),
    /// The agent went away, or took too long to answer.
    #[error("the agent did not answer the challenge")]
    NoAnswer,
    /// Whom we ask did not answer; the agent may try again.
    #[error("{0}")]
    Unavailable(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] DataStoreError),
}

/// A node that proved itself.
#[derive(Debug, Clone)]
pub struct AttestedNode {
    /// Its agent's identity.
    pub id: SpiffeId,
    /// What is known of it.
    pub selectors: SelectorSet,
    /// May prove itself again with the same evidence.
    pub can_reattest: bool,
    /// An ID that the agent gets as an alias (a join token made for it).
    pub alias: Option<SpiffeId>,
    /// What it proved itself with; `None` for evidence that works once. A ban holds for the evidence, under whatever ID.
    pub evidence: Option<EvidenceKey>,
}

/// Names a node's evidence for good: the node cannot show the same evidence under another key, as it can under another
/// agent ID. Kept with an agent, so that a banned one does not come back as somebody else.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EvidenceKey(String);

impl EvidenceKey {
    /// As it was stored.
    pub(crate) fn stored(text: String) -> Self {
        Self(text)
    }

    /// `<attestor>:<what it says>`, as it is stored.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Asks the agent something during attestation.
#[async_trait]
pub trait Challenger: Send {
    /// Sends a challenge and waits, bounded, for the answer.
    async fn challenge(&mut self, challenge: Vec<u8>) -> Result<Vec<u8>, AttestError>;
}

/// One way to prove a node.
#[async_trait]
pub trait NodeAttestor: Send + Sync {
    /// Its name on the wire.
    fn kind(&self) -> &'static str;
    /// Judges the evidence.
    async fn attest(&self, payload: &[u8], challenger: &mut dyn Challenger) -> Result<AttestedNode, AttestError>;
}
