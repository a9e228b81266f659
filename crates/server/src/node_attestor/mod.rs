//! Node attestation: how an agent proves which node it runs on.

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

/// Why a node was rejected. The text is sent to the agent.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// The evidence cannot be parsed.
    #[error("{0}")]
    Malformed(String),
    /// The evidence is invalid or not accepted.
    #[error("{0}")]
    Refused(String),
    /// The agent disconnected, or took too long to answer.
    #[error("the agent did not answer the challenge")]
    NoAnswer,
    /// A service that we depend on did not answer; the agent may try again.
    #[error("{0}")]
    Unavailable(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] DataStoreError),
}

/// A node that has attested.
#[derive(Debug, Clone)]
pub struct AttestedNode {
    /// SPIFFE ID of the node's agent.
    pub id: SpiffeId,
    /// Selectors of the node, found by the attestor.
    pub selectors: SelectorSet,
    /// Whether it may attest again with the same evidence.
    pub can_reattest: bool,
    /// SPIFFE ID that the agent gets as an alias (set in a join token).
    pub alias: Option<SpiffeId>,
    /// The evidence, for bans; `None` if it is for single use. A ban applies to the evidence under whatever agent ID.
    pub evidence: Option<EvidenceKey>,
}

/// A stable name of a node's evidence: the node may show the same evidence under another agent ID, but not under
/// another key. Stored with the agent, so that a banned node cannot return under another ID.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EvidenceKey(String);

impl EvidenceKey {
    /// The key from its stored form.
    pub(crate) fn stored(text: String) -> Self {
        Self(text)
    }

    /// The stored form, `<attestor>:<name of the evidence>`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Sends challenges to the agent during attestation.
#[async_trait]
pub trait Challenger: Send {
    /// Sends a challenge and waits for the answer. Errors: [`AttestError::NoAnswer`].
    async fn challenge(&mut self, challenge: Vec<u8>) -> Result<Vec<u8>, AttestError>;
}

/// A method of node attestation.
#[async_trait]
pub trait NodeAttestor: Send + Sync {
    /// Its name on the wire, such as `x509pop`.
    fn kind(&self) -> &'static str;
    /// Verifies the evidence and returns the node's identity and selectors.
    async fn attest(&self, payload: &[u8], challenger: &mut dyn Challenger) -> Result<AttestedNode, AttestError>;
}
