//! The stored record of an attested agent.

use countersign_identity::SpiffeId;
use countersign_identity::selector::SelectorSet;
use countersign_identity::trust_domain::parse_workload_id;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::node_attestor::{EvidenceKey, X509POP};

/// An attested agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct AttestedAgent {
    /// SPIFFE ID of the agent.
    pub id: SpiffeId,
    /// Name of the attestor that accepted it.
    pub attestation_type: String,
    /// Selectors of the node, found by the attestor.
    pub selectors: SelectorSet,
    /// Serial of its current SVID, lower-case hex.
    pub serial: String,
    /// Serial of its previous SVID, which may still be in use while the new one is in transit.
    pub previous_serial: String,
    /// When its current SVID expires.
    pub expires_at: OffsetDateTime,
    /// Whether it is rejected until it is evicted.
    pub banned: bool,
    /// Whether it may attest again with the same evidence.
    pub can_reattest: bool,
    /// The evidence that it attested with, if that is reusable: a ban applies to it under every agent ID.
    pub evidence: Option<EvidenceKey>,
}

impl AttestedAgent {
    /// It showed evidence that outlives its ID before that was kept. It shows it again when it attests again.
    pub fn lacks_evidence(&self) -> bool {
        self.evidence.is_none() && self.attestation_type == X509POP
    }
}

#[derive(Serialize, Deserialize)]
struct Stored {
    id: String,
    attestation_type: String,
    selectors: Vec<String>,
    serial: String,
    previous_serial: String,
    expires_at: i64,
    banned: bool,
    can_reattest: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    evidence: Option<String>,
}

impl TryFrom<Stored> for AttestedAgent {
    type Error = String;

    fn try_from(s: Stored) -> Result<Self, String> {
        Ok(Self {
            id: parse_workload_id(&s.id).map_err(|e| e.to_string())?,
            attestation_type: s.attestation_type,
            selectors: s.selectors.iter().map(|s| s.parse()).collect::<Result<_, _>>().map_err(|e| format!("{e}"))?,
            serial: s.serial,
            previous_serial: s.previous_serial,
            expires_at: OffsetDateTime::from_unix_timestamp(s.expires_at).map_err(|e| e.to_string())?,
            banned: s.banned,
            can_reattest: s.can_reattest,
            evidence: s.evidence.map(EvidenceKey::stored),
        })
    }
}

impl From<AttestedAgent> for Stored {
    fn from(a: AttestedAgent) -> Self {
        Self {
            id: a.id.to_string(),
            attestation_type: a.attestation_type,
            selectors: a.selectors.iter().map(ToString::to_string).collect(),
            serial: a.serial,
            previous_serial: a.previous_serial,
            expires_at: a.expires_at.unix_timestamp(),
            banned: a.banned,
            can_reattest: a.can_reattest,
            evidence: a.evidence.map(|e| e.as_str().to_owned()),
        }
    }
}
