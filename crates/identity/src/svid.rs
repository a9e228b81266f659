//! An X509-SVID with its key, as a workload or an agent holds it.

use std::time::Duration;

use rustls_pki_types::CertificateDer;
use spiffe::SpiffeId;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundle::authority_key_id;
use crate::key::PrivateKey;
use crate::path::check_bounds;
use crate::rotation;
use crate::verify::{Refusal, leaf_id};

/// Why a chain and a key are no SVID.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// The chain is empty.
    #[error("the SVID's certificate chain is empty")]
    Empty,
    /// The leaf breaks a rule of X509-SVID.
    #[error("the SVID's leaf is refused: {0}")]
    Leaf(#[from] Refusal),
    /// The key is not the leaf's.
    #[error("the private key does not belong to the SVID of `{0}`")]
    KeyMismatch(SpiffeId),
    /// The key cannot be read.
    #[error(transparent)]
    Key(#[from] crate::key::KeyError),
}

/// An X509-SVID with its private key. The key belongs to the leaf, and the leaf obeys the standard: both are checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct X509Svid {
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKey,
    facts: LeafFacts,
}

/// What a leaf says about itself besides its ID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafFacts {
    /// Serial number, lower-case hex.
    pub serial: String,
    /// Start of its validity.
    pub not_before: OffsetDateTime,
    /// End of its validity.
    pub not_after: OffsetDateTime,
    /// Subject key identifier of its issuer, lower-case hex; empty if it does not say.
    pub authority_id: String,
}

impl LeafFacts {
    /// Reads them from the first certificate of concatenated DER.
    pub fn of_first(der: &[u8]) -> Option<Self> {
        X509Certificate::from_der(der).ok().map(|(_, cert)| Self::of(&cert))
    }

    /// Reads them from a certificate.
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
    /// Joins a chain (leaf first) and its key.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKey) -> Result<Self, SvidError> {
        let leaf = chain.first().ok_or(SvidError::Empty)?;
        check_bounds(&chain).map_err(|e| Refusal::ChainTooLong(e.to_string()))?;
        let (_, cert) = X509Certificate::from_der(leaf).map_err(|e| Refusal::Malformed(e.to_string()))?;
        let id = leaf_id(&cert)?;
        let public = rcgen::PublicKeyData::subject_public_key_info(&key.key_pair()?);
        if cert.public_key().raw != public {
            return Err(SvidError::KeyMismatch(id));
        }
        let facts = LeafFacts::of(&cert);
        Ok(Self { id, facts, key, chain })
    }

    /// The identity.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Leaf first, then intermediates; without the root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The private key.
    pub fn key(&self) -> &PrivateKey {
        &self.key
    }

    /// Serial, validity, issuer.
    pub fn facts(&self) -> &LeafFacts {
        &self.facts
    }

    /// Whether its time is over.
    pub fn is_expired(&self, now: OffsetDateTime) -> bool {
        self.facts.not_after <= now
    }

    /// What is left of its life; zero once it is over.
    pub fn remaining(&self, now: OffsetDateTime) -> Duration {
        (self.facts.not_after - now).try_into().unwrap_or(Duration::ZERO)
    }

    /// When to renew it. `jitter` from -1.0 to 1.0, drawn once for this SVID.
    pub fn renew_at(&self, jitter: f64) -> OffsetDateTime {
        rotation::renew_at(self.facts.not_before, self.facts.not_after, jitter)
    }
}
