//! Node attestation: how this node proves itself to the server. A new way is one file beside these, and one line where the
//! settings choose it.

mod join_token;
mod k8s_psat;
mod x509pop;

use std::path::PathBuf;

pub use join_token::JoinToken;
pub use k8s_psat::K8sPsat;
pub use x509pop::X509Pop;

/// Why the evidence could not be presented.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// A file cannot be read or used.
    #[error("node attestation: {}: {why}", path.display())]
    File {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The server sent a challenge that this evidence cannot answer.
    #[error("node attestation: {0}")]
    Challenge(String),
}

/// A way to attest this node.
pub trait NodeAttestor: Send + Sync {
    /// Its name on the wire, such as `x509pop`.
    fn kind(&self) -> &'static str;

    /// Reads what this attestation presents: files may have been replaced since the last one.
    fn evidence(&self) -> Result<Box<dyn Evidence>, EvidenceError>;

    /// Whether the server takes the evidence once only.
    fn is_for_single_use(&self) -> bool {
        false
    }
}

/// What one attestation presents.
pub trait Evidence: Send + Sync {
    /// What is sent first.
    fn payload(&self) -> Result<Vec<u8>, EvidenceError>;

    /// The answer to a challenge of the server.
    fn answer(&self, challenge: &[u8]) -> Result<Vec<u8>, EvidenceError>;
}

/// The error of evidence that no server challenges.
fn unexpected_challenge() -> EvidenceError {
    EvidenceError::Challenge("the server challenged a token, which has no answer".into())
}
