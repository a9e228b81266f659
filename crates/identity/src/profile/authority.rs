//! CA certificates that something is issued under, without and with the key.

use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::unsigned::Awaited;
use super::{IssueError, Unsigned};
use crate::key::PrivateKey;
use crate::local_key::LocalKey;
use crate::signature::PublicSide;

/// A CA certificate that leaves are issued under. Its key may be anywhere.
pub struct CaCertificate {
    certificate: CertificateDer<'static>,
    /// Appended to each leaf: this CA and those above it, without the root. Empty for a root.
    chain: Vec<CertificateDer<'static>>,
    pub(super) issuer: rcgen::Issuer<'static, Awaited>,
    not_after: OffsetDateTime,
}

impl CaCertificate {
    /// A CA certificate for the key with this public side. `chain` is appended to each leaf, this certificate first; empty for a
    /// root. Errors: [`IssueError::Authority`] if the key does not match.
    pub fn new(
        certificate: CertificateDer<'static>,
        chain: Vec<CertificateDer<'static>>,
        public: PublicSide<'_>,
    ) -> Result<Self, IssueError> {
        let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|e| IssueError::Authority(e.to_string()))?;
        // Every leaf that a mismatched key signs would be rejected, and only at the peers.
        if parsed.public_key().raw != public.key {
            return Err(IssueError::Authority("the private key does not belong to the certificate".into()));
        }
        let not_after = parsed.validity().not_after.to_datetime();
        let issuer = rcgen::Issuer::from_ca_cert_der(&certificate, Awaited::new(public)?)
            .map_err(|e| IssueError::Authority(e.to_string()))?;
        Ok(Self { certificate, chain, issuer, not_after })
    }

    /// The CA certificate in DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The certificates appended to each leaf: this CA and those above it, without the root. Empty for a root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// End of the CA certificate's validity: nothing that it signs is valid longer.
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }
}

/// A CA certificate with its key in this process, ready to sign.
pub struct SigningAuthority {
    ca: CaCertificate,
    key: LocalKey,
}

impl SigningAuthority {
    /// An authority from a certificate and its key. `chain` is appended to each leaf, this certificate first; empty for
    /// a root. Errors: [`IssueError::Authority`] if the key does not match.
    pub fn new(
        certificate: CertificateDer<'static>,
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKey,
    ) -> Result<Self, IssueError> {
        let key = LocalKey::new(key).map_err(|e| IssueError::Authority(e.to_string()))?;
        Ok(Self { ca: CaCertificate::new(certificate, chain, key.public_side())?, key })
    }

    /// The certificate that it signs under.
    pub fn ca(&self) -> &CaCertificate {
        &self.ca
    }

    /// The CA certificate in DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        self.ca.certificate()
    }

    /// End of the CA certificate's validity: nothing that it signs is valid longer.
    pub fn not_after(&self) -> OffsetDateTime {
        self.ca.not_after()
    }

    /// What was made for this authority with its signature, in DER.
    pub(super) fn sign(&self, unsigned: &Unsigned) -> Result<Vec<u8>, IssueError> {
        sign(&self.key, unsigned)
    }
}

/// A certificate or request with its signature by `key`, in DER.
pub(super) fn sign(key: &LocalKey, unsigned: &Unsigned) -> Result<Vec<u8>, IssueError> {
    let signature = key.sign(unsigned.content()).map_err(|e| IssueError::Sign(e.to_string()))?;
    Ok(unsigned.signed(&signature))
}
