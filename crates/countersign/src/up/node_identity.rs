//! What the agent of a mesh proves itself by: a certificate of a CA that is made for this mesh alone. Unlike a join token it
//! can be shown again, so that a mesh comes back after an outage that was longer than its SVIDs live.

use std::path::Path;

use anyhow::{Context, Result};
use countersign_api::files::{write_atomically, write_secret};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

/// The certificate's common name, and the selector that the server makes of it.
const COMMON_NAME: &str = "node";
/// The node's selector.
pub const SELECTOR: (&str, &str) = ("x509pop", "subject:cn:node");
/// Life of both certificates: longer than any mesh of `up`, which ends with its process and keeps nothing.
const LIFE: Duration = Duration::days(3_650);
/// They are valid from before now: a clock that is set back after a sleep must not lock the node out.
const BEFORE: Duration = Duration::days(2);

/// PEM texts of a node's identity.
pub struct NodeIdentity {
    ca: String,
    certificate: String,
    key: String,
}

impl NodeIdentity {
    /// Makes one. The CA's key is dropped here: nothing else can be signed by it.
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

    /// Writes the CA for the server.
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
