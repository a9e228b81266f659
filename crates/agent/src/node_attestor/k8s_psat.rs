//! Node attestation by a service account token that the kubelet projects into the agent's pod. SPIRE's wire format.

use std::path::Path;

use serde::Serialize;
use zeroize::Zeroizing;

use super::EvidenceError;

/// Longest token that is read, in bytes.
const MAX_TOKEN_BYTES: u64 = 16 * 1024;

/// The current token, and the server's name of this cluster.
pub struct K8sPsat {
    cluster: String,
    token: Zeroizing<String>,
}

#[derive(Serialize)]
struct Evidence<'a> {
    cluster: &'a str,
    token: &'a str,
}

impl K8sPsat {
    /// Reads the token. The kubelet replaces the file while the agent runs.
    pub fn load(cluster: &str, token: &Path) -> Result<Self, EvidenceError> {
        let wrong = |why: String| EvidenceError::File { path: token.to_owned(), why };
        let text = countersign_api::files::read_bounded(token, MAX_TOKEN_BYTES).map_err(|e| wrong(e.to_string()))?;
        let text = Zeroizing::new(String::from_utf8(text).map_err(|_| wrong("it is not text".into()))?);
        match text.trim() {
            "" => Err(wrong("it is empty".into())),
            token => Ok(Self { cluster: cluster.to_owned(), token: Zeroizing::new(token.to_owned()) }),
        }
    }

    /// The evidence as sent to the server, JSON.
    pub fn payload(&self) -> Result<Vec<u8>, EvidenceError> {
        let evidence = Evidence { cluster: &self.cluster, token: &self.token };
        serde_json::to_vec(&evidence).map_err(|e| EvidenceError::Challenge(e.to_string()))
    }
}
