//! What can be proven about a caller, as selectors.

mod k8s;
mod unix;

use async_trait::async_trait;
use countersign_identity::selector::SelectorSet;

use crate::peer::Process;

pub use k8s::{K8s, SetupError, container_of};
pub use unix::Unix;

/// Why nothing can be said of a caller now. It may ask again.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct AttestorError(pub String);

/// What is proven of a process.
#[derive(Debug, Default)]
pub struct Proof {
    /// Everything that is known.
    pub selectors: SelectorSet,
    /// More will be known in a while; what is known already will not change.
    pub in_part: bool,
}

/// One way to learn about a process.
#[async_trait]
pub trait WorkloadAttestor: Send + Sync {
    /// What is proven of a process whose identity as a process is certain.
    async fn attest(&self, process: &Process) -> Result<Proof, AttestorError>;
}
