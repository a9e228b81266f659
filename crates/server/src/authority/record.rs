//! Authorities in the journal.

use std::fmt;
use std::str::FromStr;

use countersign_identity::{AuthorityKey, JwtAuthority, TrustBundle, X509Authority};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;

use super::{RevokedKeys, lifecycle};

/// What an authority signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// X509-SVIDs.
    X509,
    /// JWT-SVIDs.
    Jwt,
}

impl Kind {
    /// Its name in logs and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::X509 => "x509",
            Self::Jwt => "jwt",
        }
    }
}

/// State of an authority in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Published in the bundle, but not signing yet.
    Prepared,
    /// Signs everything new; at most one authority of a kind is active.
    Active,
    /// No longer signs, but is still trusted.
    Old,
    /// Still trusted, but every SVID under it is renewed at once.
    Tainted,
}

impl Status {
    /// Its name in the store, the API and `countersign authority show`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prepared => "prepared",
            Self::Active => "active",
            Self::Old => "old",
            Self::Tainted => "tainted",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Status {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Prepared, Self::Active, Self::Old, Self::Tainted]
            .into_iter()
            .find(|s| s.as_str() == text)
            .ok_or_else(|| format!("`{text}` is no status of an authority"))
    }
}

/// What the store has of the authorities, beside the bundle.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredJournal {
    /// Authorities of both kinds, the oldest first.
    pub records: Vec<Record>,
    /// Keys that were revoked, by whichever server.
    pub revoked: RevokedKeys,
}

/// An authority in the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Subject key identifier of its certificate in lower-case hex, or the key ID that its tokens name.
    pub id: String,
    /// State in its life.
    pub status: Status,
    /// Name of its key in the key manager.
    pub key_name: String,
    /// What peers know it by.
    pub public: Public,
}

/// The public part of an authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Public {
    /// Of one that signs X509-SVIDs.
    X509 {
        /// The CA certificate in DER.
        certificate: CertificateDer<'static>,
        /// Certificates appended to each leaf; empty for a root.
        chain: Vec<CertificateDer<'static>>,
    },
    /// Of one that signs JWT-SVIDs: the key with its validity, in the bundle's form.
    Jwt {
        /// The public key. Its ID is the record's, and it has an end.
        key: JwtAuthority,
        /// Start of its validity.
        not_before: OffsetDateTime,
    },
}

impl Record {
    /// What it signs.
    pub fn kind(&self) -> Kind {
        match self.public {
            Public::X509 { .. } => Kind::X509,
            Public::Jwt { .. } => Kind::Jwt,
        }
    }

    /// Start and end of its validity.
    pub fn validity(&self) -> (OffsetDateTime, OffsetDateTime) {
        match &self.public {
            Public::X509 { certificate, .. } => lifecycle::validity_of(certificate),
            // One without an end would never be followed by another.
            Public::Jwt { key, not_before } => (*not_before, key.expires_at.unwrap_or(*not_before)),
        }
    }

    /// The digest of its key; `None` if its certificate cannot be parsed, which it was before it came here.
    pub fn key(&self) -> Option<AuthorityKey> {
        match &self.public {
            Public::X509 { certificate, .. } => X509Authority::from_der(certificate.to_vec()).ok().map(|a| a.key()),
            Public::Jwt { key, .. } => Some(key.digest()),
        }
    }

    /// Whether it signs certificates and depends on this root's key.
    pub fn is_below(&self, root: &X509Authority) -> bool {
        match &self.public {
            Public::X509 { certificate, chain } if chain.is_empty() => root.is_above(std::slice::from_ref(certificate)),
            Public::X509 { chain, .. } => root.is_above(chain),
            Public::Jwt { .. } => false,
        }
    }

    /// Whether the bundle trusts it.
    pub fn is_trusted(&self, bundle: &TrustBundle) -> bool {
        match self.kind() {
            Kind::X509 => bundle.authorities.iter().any(|a| a.id() == self.id),
            Kind::Jwt => bundle.jwt_authorities.iter().any(|a| a.key_id() == self.id),
        }
    }

    /// As the bundle has it; `None` if it signs certificates.
    pub fn jwt_authority(&self) -> Option<JwtAuthority> {
        match &self.public {
            Public::X509 { .. } => None,
            Public::Jwt { key, .. } => {
                let mut key = key.clone();
                key.tainted = self.status == Status::Tainted;
                Some(key)
            }
        }
    }
}
