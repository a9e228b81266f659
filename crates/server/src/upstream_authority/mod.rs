//! Upstream authorities: the CA that signs our authorities.

mod disk;
mod pem;
mod probe;
mod spire;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use countersign_identity::{JwtAuthority, TrustDomain, X509Authority};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;

use crate::key_manager::Signer;

pub use disk::Disk;
pub use spire::Spire;

/// Why the upstream authority has not signed. `upstream` names the file or address that was asked.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// Nothing can be learned from it now: a file is missing, an address does not answer. Trying again may help.
    #[error("cannot read {upstream}: {why}")]
    Unreachable {
        /// What was asked.
        upstream: String,
        /// The reason of the system below.
        why: String,
    },
    /// It does not let this server in.
    #[error("cannot read {upstream}: {why}; give the server's user access to it")]
    Denied {
        /// What was asked.
        upstream: String,
        /// The reason of the system below.
        why: String,
    },
    /// It understood the request and does not sign it.
    #[error("{upstream} does not sign: {why}")]
    Refused {
        /// What was asked.
        upstream: String,
        /// Its reason, and how to fix it.
        why: String,
    },
    /// What it has or answered cannot be used.
    #[error("{upstream}: {why}")]
    Malformed {
        /// What was asked.
        upstream: String,
        /// What is wrong, and how to fix it.
        why: String,
    },
    /// It has not answered within this time.
    #[error("the upstream authority has not answered for {} seconds; trying again", .0.as_secs())]
    Timeout(Duration),
}

impl UpstreamError {
    /// A file with unexpected content. `why` says what is wrong and how to fix it.
    fn in_file(path: &Path, why: String) -> Self {
        Self::Malformed { upstream: path.display().to_string(), why }
    }

    /// A file that cannot be read.
    fn of_reading(path: &Path, source: &io::Error) -> Self {
        let (upstream, why) = (path.display().to_string(), source.to_string());
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::Denied { upstream, why },
            _ => Self::Unreachable { upstream, why },
        }
    }
}

/// An intermediate CA with the certificates above it.
#[derive(Debug, Clone)]
pub struct UpstreamSigned {
    /// Our CA certificate, then those above it, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots that peers must trust.
    pub roots: Vec<X509Authority>,
}

impl UpstreamSigned {
    /// Takes an answer only if its first certificate is for `key` and peers accept what is issued below it, whichever
    /// upstream gave it; `upstream` is its name. Errors: [`UpstreamError::Malformed`].
    pub async fn checked(
        self,
        upstream: &str,
        trust_domain: &TrustDomain,
        key: &Arc<dyn Signer>,
        now: OffsetDateTime,
    ) -> Result<Self, UpstreamError> {
        match probe::probe(trust_domain, &self, key, now).await {
            Ok(()) => Ok(self),
            Err(why) => Err(UpstreamError::Malformed { upstream: upstream.to_owned(), why: why.to_string() }),
        }
    }
}

/// What an upstream names.
#[derive(Debug, Clone, Default)]
pub struct UpstreamBundle {
    /// Roots, with those tainted that it has tainted.
    pub roots: Vec<X509Authority>,
    /// Keys of JWT-SVIDs, likewise.
    pub keys: Vec<JwtAuthority>,
    /// Whether it is the bundle of the trust domain: what it has no more is trusted no more, but for our own authorities.
    pub is_whole: bool,
}

/// Signs our authorities.
#[async_trait]
pub trait UpstreamAuthority: Send + Sync {
    /// The file or address that is asked, for messages.
    fn name(&self) -> String;

    /// Signs the CA certificate that `csr` asks for (PKCS#10 in DER, with the URI name `spiffe://TRUST_DOMAIN`), valid
    /// for at most `ttl` from `now`. The private key stays with the caller, who checks the answer
    /// ([`UpstreamSigned::checked`]) and gives up after a deadline.
    async fn sign_intermediate(
        &self,
        trust_domain: &TrustDomain,
        csr: &[u8],
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<UpstreamSigned, UpstreamError>;

    /// What peers must trust, as it is known now; nothing, if it names roots with each signature alone. Asked every few seconds:
    /// whoever replaces a root names the next one before anything is signed below it, by us or by another server.
    async fn bundle(&self) -> Result<UpstreamBundle, UpstreamError>;

    /// Whether [`Self::bundle`] is that of the trust domain.
    fn has_whole_bundle(&self) -> bool {
        false
    }

    /// Publishes a key that this server will sign tokens with to all servers below the upstream. Answers all keys that it has then;
    /// `None` if it publishes none.
    async fn publish_jwt_key(&self, key: &JwtAuthority) -> Result<Option<Vec<JwtAuthority>>, UpstreamError>;
}
