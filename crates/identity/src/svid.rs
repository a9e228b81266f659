//! An X509-SVID with its private key, as a workload or an agent holds it.

use std::time::Duration;

use rustls_pki_types::CertificateDer;
use spiffe::SpiffeId;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundle::{TrustBundle, authority_key_id};
use crate::issuer::Above;
use crate::key::PrivateKey;
use crate::path::check_bounds;
use crate::rotation;
use crate::verify::{Refusal, leaf_id};

/// Why a chain and a key do not form an SVID.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// The chain is empty.
    #[error("the SVID's certificate chain is empty")]
    Empty,
    /// The leaf breaks a rule of X509-SVID, or the chain is too long.
    #[error("the SVID's leaf is refused: {0}")]
    Leaf(#[from] Refusal),
    /// The private key does not belong to the leaf.
    #[error("the private key does not belong to the SVID of `{0}`")]
    KeyMismatch(SpiffeId),
    /// The private key cannot be parsed.
    #[error(transparent)]
    Key(#[from] crate::key::KeyError),
}

/// An X509-SVID with its private key. Construction checks that the key belongs to the leaf and that the leaf obeys the
/// standard; it does not verify the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct X509Svid {
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKey,
    facts: LeafFacts,
    above: Above,
}

/// What a leaf says apart from its SPIFFE ID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafFacts {
    /// Serial number in lower-case hex.
    pub serial: String,
    /// Start of the leaf's validity (inclusive).
    pub not_before: OffsetDateTime,
    /// End of the leaf's validity (inclusive).
    pub not_after: OffsetDateTime,
    /// Subject key identifier of the issuer in lower-case hex; empty if the leaf does not name it.
    pub authority_id: String,
}

impl LeafFacts {
    /// Reads the facts of the first certificate in concatenated DER; `None` if it cannot be parsed.
    pub fn of_first(der: &[u8]) -> Option<Self> {
        X509Certificate::from_der(der).ok().map(|(_, cert)| Self::of(&cert))
    }

    /// Reads the facts of a parsed certificate.
    pub fn of(cert: &X509Certificate<'_>) -> Self {
        Self {
            serial: cert.tbs_certificate.serial.to_str_radix(16),
            not_before: cert.validity().not_before.to_datetime(),
            not_after: cert.validity().not_after.to_datetime(),
            authority_id: authority_key_id(cert).map(hex::encode).unwrap_or_default(),
        }
    }
}

impl X509Svid {
    /// Joins a chain (leaf first) and its private key. Errors: see [`SvidError`].
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKey) -> Result<Self, SvidError> {
        let leaf = chain.first().ok_or(SvidError::Empty)?;
        check_bounds(&chain).map_err(|e| Refusal::ChainTooLong(e.to_string()))?;
        let (_, cert) = X509Certificate::from_der(leaf).map_err(|e| Refusal::Malformed(e.to_string()))?;
        let id = leaf_id(&cert)?;
        let public = rcgen::PublicKeyData::subject_public_key_info(&key.key_pair()?);
        // A mismatch would otherwise show only in handshakes, at the peers.
        if cert.public_key().raw != public {
            return Err(SvidError::KeyMismatch(id));
        }
        let facts = LeafFacts::of(&cert);
        let above = Above::of(&chain).map_err(Refusal::Malformed)?;
        Ok(Self { id, facts, key, chain, above })
    }

    /// The SPIFFE ID that the leaf certifies.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The certificates in DER: leaf first, then intermediates, without the root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The private key of the leaf.
    pub fn key(&self) -> &PrivateKey {
        &self.key
    }

    /// Serial number, validity and issuer of the leaf.
    pub fn facts(&self) -> &LeafFacts {
        &self.facts
    }

    /// Whether the bundle of its trust domain has the authority that it is below, and has none that it is below as tainted. Says
    /// nothing of validity: see [`crate::verify`].
    pub fn is_below_good_authority(&self, bundle: &TrustBundle) -> bool {
        self.above.is_good(&self.chain, bundle)
    }

    /// Whether the SVID has expired at `now`.
    pub fn is_expired(&self, now: OffsetDateTime) -> bool {
        self.facts.not_after <= now
    }

    /// The lifetime that is left at `now`; zero once expired.
    pub fn remaining(&self, now: OffsetDateTime) -> Duration {
        (self.facts.not_after - now).try_into().unwrap_or(Duration::ZERO)
    }

    /// When to renew the SVID. `jitter` is between -1.0 and 1.0, drawn once per SVID: see [`rotation::renew_at`].
    pub fn renew_at(&self, jitter: f64) -> OffsetDateTime {
        rotation::renew_at(self.facts.not_before, self.facts.not_after, jitter)
    }
}
