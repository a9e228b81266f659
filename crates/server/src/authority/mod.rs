//! The signing authorities: prepared → active → old → gone, or tainted → revoked.

mod error;
mod lifecycle;
mod manager;
mod stored;
mod upstream_call;

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;

pub use error::AuthorityError;
pub use manager::{Authorities, Settings};

/// State of an authority in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Published in the bundle, but not signing yet.
    Prepared,
    /// Signs all new certificates; at most one authority is active.
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

/// An authority in the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Subject key identifier of its certificate, lower-case hex.
    pub id: String,
    /// State in its life.
    pub status: Status,
    /// Name of its key in the key manager.
    pub key_name: String,
    /// The CA certificate in DER.
    pub certificate: CertificateDer<'static>,
    /// Certificates appended to each leaf; empty for a root.
    pub chain: Vec<CertificateDer<'static>>,
}

impl Record {
    /// Start and end of its certificate's validity.
    pub fn validity(&self) -> (time::OffsetDateTime, time::OffsetDateTime) {
        lifecycle::validity_of(&self.certificate)
    }
}
