//! Node attestation by a join token, which the server has generated and takes once.

use zeroize::Zeroizing;

use super::{Evidence, EvidenceError, NodeAttestor, unexpected_challenge};

/// A join token.
#[derive(Clone)]
pub struct JoinToken(Zeroizing<String>);

impl JoinToken {
    /// Attests by this token.
    pub fn new(token: Zeroizing<String>) -> Self {
        Self(token)
    }
}

impl NodeAttestor for JoinToken {
    fn kind(&self) -> &'static str {
        "join_token"
    }

    fn evidence(&self) -> Result<Box<dyn Evidence>, EvidenceError> {
        Ok(Box::new(self.clone()))
    }

    fn is_for_single_use(&self) -> bool {
        true
    }
}

impl Evidence for JoinToken {
    fn payload(&self) -> Result<Vec<u8>, EvidenceError> {
        Ok(self.0.as_bytes().to_vec())
    }

    fn answer(&self, _: &[u8]) -> Result<Vec<u8>, EvidenceError> {
        Err(unexpected_challenge())
    }
}
