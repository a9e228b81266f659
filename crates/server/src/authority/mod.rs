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

/// Where an authority is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Published in the bundle, not signing yet.
    Prepared,
    /// Signing.
    Active,
    /// Still trusted.
    Old,
    /// Still trusted, and whoever holds an SVID under it renews at once.
    Tainted,
}

impl Status {
    /// Its name.
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

/// An authority as the journal keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its subject key identifier, lower-case hex.
    pub id: String,
    /// Where it is in its life.
    pub status: Status,
    /// The key manager's name for its key.
    pub key_name: String,
    /// Its certificate.
    pub certificate: CertificateDer<'static>,
    /// What goes behind each leaf; empty for a root.
    pub chain: Vec<CertificateDer<'static>>,
}

impl Record {
    /// Start and end of its certificate's validity.
    pub fn validity(&self) -> (time::OffsetDateTime, time::OffsetDateTime) {
        lifecycle::validity_of(&self.certificate)
    }
}
