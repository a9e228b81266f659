//! How this node proves itself to the server.

mod k8s_psat;
mod x509pop;

use std::path::PathBuf;

use crate::config::Evidence;

/// Why no evidence could be shown.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// A file.
    #[error("node attestation: {}: {why}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The server asked what this evidence cannot answer.
    #[error("node attestation: {0}")]
    Challenge(String),
}

/// What goes to the server, and the answer to its challenges.
pub enum NodeAttestor {
    /// Nothing more to say.
    JoinToken(zeroize::Zeroizing<String>),
    /// Signs the server's nonce.
    X509Pop(x509pop::X509Pop),
    /// Nothing more to say: the API server knows the token.
    K8sPsat(k8s_psat::K8sPsat),
}

impl NodeAttestor {
    /// Reads what the evidence needs.
    pub fn load(evidence: &Evidence) -> Result<Self, EvidenceError> {
        match evidence {
            Evidence::JoinToken(token) => Ok(Self::JoinToken(token.clone())),
            Evidence::X509Pop { certificate, key } => x509pop::X509Pop::load(certificate, key).map(Self::X509Pop),
            Evidence::K8sPsat { cluster, token } => k8s_psat::K8sPsat::load(cluster, token).map(Self::K8sPsat),
        }
    }

    /// Its name on the wire.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::JoinToken(_) => "join_token",
            Self::X509Pop(_) => "x509pop",
            Self::K8sPsat(_) => "k8s_psat",
        }
    }

    /// The evidence.
    pub fn payload(&self) -> Result<Vec<u8>, EvidenceError> {
        match self {
            Self::JoinToken(token) => Ok(token.as_bytes().to_vec()),
            Self::X509Pop(pop) => pop.payload(),
            Self::K8sPsat(psat) => psat.payload(),
        }
    }

    /// The answer to a challenge.
    pub fn answer(&self, challenge: &[u8]) -> Result<Vec<u8>, EvidenceError> {
        match self {
            Self::JoinToken(_) | Self::K8sPsat(_) => {
                Err(EvidenceError::Challenge("the server challenged a token, which has no answer".into()))
            }
            Self::X509Pop(pop) => pop.answer(challenge),
        }
    }
}
