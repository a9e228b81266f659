//! Node attestation by a secret for single use, until it expires.

use std::sync::Arc;

use async_trait::async_trait;
use countersign_api::clock::Clock;
use countersign_identity::TrustDomain;
use countersign_identity::selector::SelectorSet;
use countersign_identity::trust_domain::agent_id;

use super::{AttestError, AttestedNode, Challenger, NodeAttestor};
use crate::datastore::DataStore;

/// Accepts join tokens that this server generated.
pub struct JoinToken {
    /// Holds the tokens.
    pub store: Arc<dyn DataStore>,
    /// The trust domain of the agent's SPIFFE ID.
    pub trust_domain: TrustDomain,
    /// The current time.
    pub clock: Clock,
}

#[async_trait]
impl NodeAttestor for JoinToken {
    fn kind(&self) -> &'static str {
        "join_token"
    }

    async fn attest(&self, payload: &[u8], _: &mut dyn Challenger) -> Result<AttestedNode, AttestError> {
        let token =
            std::str::from_utf8(payload).map_err(|_| AttestError::Malformed("the join token is not text".into()))?;
        // SPIRE's words in front, which clients match on.
        let refused =
            |why: &str| AttestError::Malformed(format!("{why}; make another with `countersign token generate`"));
        let unknown = || refused("join token does not exist or has already been used");
        // Removed before its expiry is checked: the first attempt uses the token up, whatever the outcome, so it cannot
        // be tried again.
        let token = self.store.take_token(token).await?.ok_or_else(unknown)?;
        if token.expires_at <= (self.clock)() {
            return Err(refused("join token expired"));
        }
        let id = agent_id(&self.trust_domain, "join_token", &token.token)
            .map_err(|e| AttestError::Malformed(e.to_string()))?;
        Ok(AttestedNode {
            id,
            selectors: SelectorSet::new(),
            can_reattest: false,
            alias: token.agent_id,
            evidence: None,
        })
    }
}
