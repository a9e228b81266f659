//! Node attestation by a service account token that the kubelet projects into the agent's pod: the server verifies it with the API
//! server. SPIRE's wire format.

use std::path::PathBuf;

use serde::Serialize;
use zeroize::Zeroizing;

use super::{Evidence, EvidenceError, NodeAttestor, unexpected_challenge};

/// Longest token that is read, in bytes.
const MAX_TOKEN_BYTES: u64 = 16 * 1024;

/// A projected token, read for each attestation.
pub struct K8sPsat {
    cluster: String,
    token: PathBuf,
}

impl K8sPsat {
    /// `cluster`: the server's name of this cluster. `token`: path of the token's file, which the kubelet replaces while the agent
    /// runs.
    pub fn new(cluster: String, token: PathBuf) -> Self {
        Self { cluster, token }
    }

    fn read(&self) -> Result<Zeroizing<String>, EvidenceError> {
        let wrong = |why: String| EvidenceError::File { path: self.token.clone(), why };
        let text =
            countersign_api::files::read_bounded(&self.token, MAX_TOKEN_BYTES).map_err(|e| wrong(e.to_string()))?;
        let text = Zeroizing::new(String::from_utf8(text).map_err(|_| wrong("it is not text".into()))?);
        match text.trim() {
            "" => Err(wrong("it is empty".into())),
            token => Ok(Zeroizing::new(token.to_owned())),
        }
    }
}

impl NodeAttestor for K8sPsat {
    fn kind(&self) -> &'static str {
        "k8s_psat"
    }

    fn evidence(&self) -> Result<Box<dyn Evidence>, EvidenceError> {
        Ok(Box::new(Token { cluster: self.cluster.clone(), token: self.read()? }))
    }
}

/// What is presented.
struct Token {
    cluster: String,
    token: Zeroizing<String>,
}

/// The same as it is sent, JSON.
#[derive(Serialize)]
struct Payload<'a> {
    cluster: &'a str,
    token: &'a str,
}

impl Evidence for Token {
    fn payload(&self) -> Result<Vec<u8>, EvidenceError> {
        let payload = Payload { cluster: &self.cluster, token: &self.token };
        serde_json::to_vec(&payload).map_err(|e| EvidenceError::Challenge(e.to_string()))
    }

    fn answer(&self, _: &[u8]) -> Result<Vec<u8>, EvidenceError> {
        Err(unexpected_challenge())
    }
}
