//! A CA certificate with the key manager's key that signs under it. No signature of a certificate is made elsewhere.

use std::sync::Arc;
use std::time::Duration;

use countersign_identity::TrustDomain;
use countersign_identity::profile::{
    CaCertificate, IssueError, Issued, LeafRequest, RequestedKey, Unsigned, unsigned_intermediate,
    unsigned_intermediate_request, unsigned_leaf, unsigned_root,
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;

use crate::key_manager::{SignError, Signer, sign};

/// Why a certificate or a request was not signed. Nothing was issued.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// It cannot be made.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// The key has not signed it.
    #[error(transparent)]
    Sign(#[from] SignError),
}

/// A CA certificate and its key.
pub struct SigningCa {
    ca: CaCertificate,
    key: Arc<dyn Signer>,
}

impl SigningCa {
    /// `chain` is appended to each leaf, this certificate first; empty for a root. Errors: [`IssueError::Authority`] if the key does
    /// not match.
    pub fn new(
        certificate: CertificateDer<'static>,
        chain: Vec<CertificateDer<'static>>,
        key: Arc<dyn Signer>,
    ) -> Result<Self, IssueError> {
        Ok(Self { ca: CaCertificate::new(certificate, chain, key.public_side())?, key })
    }

    /// Issues an X509-SVID.
    pub async fn issue(&self, request: &LeafRequest<'_>, now: OffsetDateTime) -> Result<Issued, SigningError> {
        let leaf = signed(&*self.key, &unsigned_leaf(request, &self.ca, now)?).await?;
        Ok(self.ca.issued(leaf)?)
    }

    /// Issues a CA certificate for a server below, with the chain that its SVIDs will have.
    pub async fn issue_intermediate(
        &self,
        trust_domain: &TrustDomain,
        key: &RequestedKey,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<Issued, SigningError> {
        let ca = signed(&*self.key, &unsigned_intermediate(trust_domain, key, ttl, now, &self.ca)?).await?;
        Ok(self.ca.issued(ca)?)
    }
}

/// Issues a root for the key, signed by itself. What the key answers is not believed: a root that does not verify would be found
/// only by peers.
pub async fn issue_root(
    td: &TrustDomain,
    key: &dyn Signer,
    ttl: Duration,
    now: OffsetDateTime,
) -> Result<CertificateDer<'static>, SigningError> {
    let public = key.public_side();
    let root = unsigned_root(td, public, ttl, now)?;
    let signature = sign(key, root.content()).await?;
    if !public.algorithm.verifies(public.key, root.content(), &signature) {
        return Err(SignError::Failed("its signature is not by its own public key".into()).into());
    }
    Ok(root.signed(&signature).into())
}

/// A PKCS#10 request in DER for an intermediate CA of `td`.
pub async fn request_intermediate(td: &TrustDomain, key: &dyn Signer) -> Result<Vec<u8>, SigningError> {
    signed(key, &unsigned_intermediate_request(td, key.public_side())?).await
}

async fn signed(key: &dyn Signer, unsigned: &Unsigned) -> Result<Vec<u8>, SigningError> {
    Ok(unsigned.signed(&sign(key, unsigned.content()).await?))
}
