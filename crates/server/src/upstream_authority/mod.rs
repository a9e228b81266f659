//! The PKI above us.

mod disk;
mod pem;
mod probe;

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use countersign_identity::profile::IssueError;
use countersign_identity::{PrivateKey, TrustDomain, X509Authority};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;

pub use disk::Disk;

/// Why the upstream authority cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file holds what it should not.
    #[error("{}: {why}", path.display())]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong, and the mend.
        why: String,
    },
    /// It refused to sign.
    #[error(transparent)]
    Issue(#[from] IssueError),
}

/// An intermediate CA and what it hangs from.
#[derive(Debug, Clone)]
pub struct UpstreamSigned {
    /// Our CA certificate, then those above it, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots that peers must trust.
    pub roots: Vec<X509Authority>,
}

/// Signs our authorities.
#[async_trait]
pub trait UpstreamAuthority: Send + Sync {
    /// Signs a CA certificate for `key`.
    async fn sign_intermediate(
        &self,
        trust_domain: &TrustDomain,
        key: &PrivateKey,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<UpstreamSigned, UpstreamError>;
}
