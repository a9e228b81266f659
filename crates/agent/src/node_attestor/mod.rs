//! Node attestation: how this node proves itself to the server.

mod k8s_psat;
mod x509pop;

use std::path::PathBuf;

use crate::config::Evidence;

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

/// The evidence, and the answers to the server's challenges.
pub enum NodeAttestor {
    /// A join token; has no challenge.
    JoinToken(zeroize::Zeroizing<String>),
    /// Signs the server's nonce.
    X509Pop(x509pop::X509Pop),
    /// A service account token, which the server verifies with the API server; has no challenge.
    K8sPsat(k8s_psat::K8sPsat),
}

impl NodeAttestor {
    /// Reads the files of the evidence.
    pub fn load(evidence: &Evidence) -> Result<Self, EvidenceError> {
        match evidence {
            Evidence::JoinToken(token) => Ok(Self::JoinToken(token.clone())),
            Evidence::X509Pop { certificate, key } => x509pop::X509Pop::load(certificate, key).map(Self::X509Pop),
            Evidence::K8sPsat { cluster, token } => k8s_psat::K8sPsat::load(cluster, token).map(Self::K8sPsat),
        }
    }

    /// Its name on the wire, such as `x509pop`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::JoinToken(_) => "join_token",
            Self::X509Pop(_) => "x509pop",
            Self::K8sPsat(_) => "k8s_psat",
        }
    }

    /// The evidence as sent to the server.
    pub fn payload(&self) -> Result<Vec<u8>, EvidenceError> {
        match self {
            Self::JoinToken(token) => Ok(token.as_bytes().to_vec()),
            Self::X509Pop(pop) => pop.payload(),
            Self::K8sPsat(psat) => psat.payload(),
        }
    }

    /// The answer to a challenge of the server.
    pub fn answer(&self, challenge: &[u8]) -> Result<Vec<u8>, EvidenceError> {
        match self {
            Self::JoinToken(_) | Self::K8sPsat(_) => {
                Err(EvidenceError::Challenge("the server challenged a token, which has no answer".into()))
            }
            Self::X509Pop(pop) => pop.answer(challenge),
        }
    }
}
