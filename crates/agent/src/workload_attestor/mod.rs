//! Workload attestation: facts that can be proven about a caller, as selectors.

mod executable;
mod k8s;
mod unix;

use async_trait::async_trait;
use countersign_identity::Selector;
use countersign_identity::selector::SelectorSet;
use tokio_util::sync::CancellationToken;

use crate::peer::Process;

pub use k8s::{K8s, SetupError};
pub use unix::Unix;

/// Why a caller cannot be attested now. It may try again.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct AttestorError(pub String);

/// The proven facts about a process.
#[derive(Debug, Default)]
pub struct Proof {
    /// All selectors that are known.
    pub selectors: SelectorSet,
    /// Whether more will be known later. What is known already does not change.
    pub in_part: bool,
}

/// What facts are wanted for. An attestor that knows a part of them asks whether it has to wait for the rest.
pub trait Purpose: Send + Sync {
    /// Whether these facts of the attestor's are enough, although selectors for which `may_follow` is true may be added later.
    fn is_met_by(&self, facts: &SelectorSet, may_follow: fn(&Selector) -> bool) -> bool;
}

/// Every fact is wanted.
pub struct EveryFact;

impl Purpose for EveryFact {
    fn is_met_by(&self, _: &SelectorSet, _: fn(&Selector) -> bool) -> bool {
        false
    }
}

/// A source of facts about a process.
#[async_trait]
pub trait WorkloadAttestor: Send + Sync {
    /// The proven facts about a process: all of them, or as many as meet the purpose. The caller has verified which process it
    /// is, and verifies it again afterwards.
    async fn attest(&self, process: &Process, purpose: &dyn Purpose) -> Result<Proof, AttestorError>;

    /// Its work in the background, until `shutdown`.
    async fn keep(&self, _shutdown: CancellationToken) {}

    /// Why it cannot attest callers now, for `/ready`; `None` if it can.
    fn missing(&self) -> Option<String> {
        None
    }

    /// Its facts for `status`, name and value.
    fn facts(&self) -> Vec<(String, String)> {
        vec![]
    }

    /// Sets its metrics that are looked up rather than counted.
    fn observe(&self) {}
}
