//! The evidence of a mesh's agent: a certificate of a CA that is created for this mesh only. Unlike a join token it can
//! be used again, so a mesh recovers from an outage that was longer than the lifetime of its SVIDs.

use std::path::Path;

use anyhow::{Context, Result};
use countersign_api::files::{write_atomically, write_secret};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

/// Common name of the certificate, from which the server derives a selector.
const COMMON_NAME: &str = "node";
/// Selector of the node, type and value.
pub const SELECTOR: (&str, &str) = ("x509pop", "subject:cn:node");
/// Lifetime of both certificates: longer than any mesh of `up`, which ends with its process and keeps nothing.
const LIFE: Duration = Duration::days(3_650);
/// How far their validity starts in the past: a clock that is set back after a suspend must not lock the node out.
const BEFORE: Duration = Duration::days(2);

/// PEM texts of a node's evidence.
pub struct NodeIdentity {
    ca: String,
    certificate: String,
    key: String,
}

impl NodeIdentity {
    /// Creates new evidence. The CA's key is dropped, so it can sign nothing else.
    pub fn new(now: OffsetDateTime) -> Result<Self> {
        Self::signed(now).context("cannot make the node's certificate")
    }

    fn signed(now: OffsetDateTime) -> Result<Self, rcgen::Error> {
        let mut ca = params("countersign up", now);
        ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let ca_key = KeyPair::generate()?;
        let root = ca.self_signed(&ca_key)?;
        let mut leaf = params(COMMON_NAME, now);
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        leaf.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = leaf.signed_by(&key, &Issuer::new(ca, ca_key))?;
        Ok(Self { ca: root.pem(), certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// Writes the CA certificate for the server.
    pub fn write_ca(&self, path: &Path) -> Result<()> {
        write_atomically(path, self.ca.as_bytes(), 0o644).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Writes certificate and key for the agent.
    pub fn write(&self, certificate: &Path, key: &Path) -> Result<()> {
        write_secret(certificate, self.certificate.as_bytes())
            .with_context(|| format!("cannot write {}", certificate.display()))?;
        write_secret(key, self.key.as_bytes()).with_context(|| format!("cannot write {}", key.display()))
    }
}

fn params(name: &str, now: OffsetDateTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = now - BEFORE;
    params.not_after = now + LIFE;
    params
}
