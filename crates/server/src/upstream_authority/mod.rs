//! Upstream authorities: the CA that signs our authorities.

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

/// Why the upstream authority cannot sign.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// A file has unexpected content.
    #[error("{}: {why}", path.display())]
    Content {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong, and how to fix it.
        why: String,
    },
    /// Issuing the CA certificate failed.
    #[error(transparent)]
    Issue(#[from] IssueError),
}

/// An intermediate CA with the certificates above it.
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
    /// Signs a CA certificate for `key`, valid for at most `ttl` from `now`.
    async fn sign_intermediate(
        &self,
        trust_domain: &TrustDomain,
        key: &PrivateKey,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<UpstreamSigned, UpstreamError>;
}
