//! Node attestation by proof of possession: the agent holds the key of a certificate that chains to a configured CA.
//! SPIRE's wire format.

mod challenge;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use countersign_api::clock::Clock;
use countersign_api::files::read_pem;
use countersign_identity::bundle::certificates_from_pem;
use countersign_identity::path::{TrustedPath, check_bounds, trusted_path};
use countersign_identity::selector::{Selector, SelectorSet};
use countersign_identity::trust_domain::agent_id;
use countersign_identity::verify::PeerRole;
use countersign_identity::{TrustDomain, X509Authority};
use rustls::pki_types::CertificateDer;
use serde::Deserialize;
use x509_parser::prelude::{FromDer, X509Certificate};

use self::challenge::{Bytes, prove_possession};
use super::{AttestError, AttestedNode, Challenger, EvidenceKey, NodeAttestor};

/// Its name on the wire, and the kind of its selectors.
pub const KIND: &str = "x509pop";

/// Accepts agents whose certificate chains to one of these CAs.
pub struct X509Pop {
    trust_domain: TrustDomain,
    roots: Vec<X509Authority>,
    clock: Clock,
}

/// Why the attestor could not be set up: the path of the CA bundle and a reason.
#[derive(Debug, thiserror::Error)]
#[error("x509pop CA bundle {}: {why}", path.display())]
pub struct SetupError {
    path: PathBuf,
    why: String,
}

impl X509Pop {
    /// Reads the CA bundle. Errors: it cannot be read, or holds a certificate that is not a CA.
    pub fn new(path: &Path, trust_domain: TrustDomain, clock: Clock) -> Result<Self, SetupError> {
        let wrong = |why: String| SetupError { path: path.to_owned(), why };
        let pem = read_pem(path).map_err(|e| wrong(e.to_string()))?;
        let certificates = certificates_from_pem(&pem).map_err(|e| wrong(e.to_string()))?;
        let roots = certificates.into_iter().map(|c| X509Authority::from_der(c.to_vec())).collect::<Result<_, _>>();
        Ok(Self { trust_domain, roots: roots.map_err(|e| wrong(e.to_string()))?, clock })
    }
}

#[derive(Deserialize)]
struct Evidence {
    certificates: Vec<Bytes>,
}

#[async_trait]
impl NodeAttestor for X509Pop {
    fn kind(&self) -> &'static str {
        KIND
    }

    async fn attest(&self, payload: &[u8], challenger: &mut dyn Challenger) -> Result<AttestedNode, AttestError> {
        let evidence: Evidence = serde_json::from_slice(payload).map_err(|e| malformed("x509pop payload", &e))?;
        let chain: Vec<CertificateDer<'static>> = evidence.certificates.into_iter().map(|c| c.0.into()).collect();
        check_bounds(&chain).map_err(|e| malformed("x509pop payload", &e))?;
        let path = trusted_path(&chain, &self.roots, (self.clock)(), PeerRole::Client).map_err(|e| {
            AttestError::Refused(format!("the node's certificate does not chain to a configured CA: {e}"))
        })?;
        let (_, cert) = X509Certificate::from_der(&chain[0]).map_err(|e| malformed("certificate", &e))?;
        let may_sign = cert.key_usage().ok().flatten().is_some_and(|ku| ku.value.digital_signature());
        // A certificate that is only meant for encryption must not authenticate a node.
        if !may_sign {
            return Err(AttestError::Refused("the node's certificate is not made for digital signatures".into()));
        }
        // The chain alone proves nothing: certificates are public, and only the key is secret.
        prove_possession(cert.public_key(), challenger).await?;
        let id = agent_id(&self.trust_domain, KIND, &fingerprint(&chain[0])).map_err(|e| malformed("agent ID", &e))?;
        let evidence = Some(EvidenceKey::x509pop(cert.public_key().raw));
        Ok(AttestedNode { id, selectors: selectors(&cert, &path)?, can_reattest: true, alias: None, evidence })
    }
}

/// The selectors of a node: its certificate's subject and serial number, and the CAs of the verified path, including
/// the configured one. Nothing is read from certificates that are not in the path.
fn selectors(cert: &X509Certificate<'_>, path: &TrustedPath<'_>) -> Result<SelectorSet, AttestError> {
    let mut values = vec![];
    if let Some(cn) = cert.subject().iter_common_name().next().and_then(|cn| cn.as_str().ok()) {
        values.push(format!("subject:cn:{cn}"));
    }
    values.extend(path.intermediates.iter().map(|ca| format!("ca:fingerprint:{}", fingerprint(ca))));
    values.push(format!("ca:fingerprint:{}", fingerprint(path.anchor.der())));
    // In SPIRE's form: whole bytes, so the number of digits is even.
    let serial = cert.tbs_certificate.serial.to_bytes_be();
    values.push(format!("serialnumber:{}", hex::encode(serial)));
    values.into_iter().map(|v| Selector::new(KIND, v).map_err(|e| malformed("selector", &e))).collect()
}

/// Whether two nodes showed the same certificate, in whatever way its signature was written: one serial number and one
/// subject, which the CA has signed, and a CA in common (RFC 5280 4.1.2.2: a CA gives no serial number twice). For agents
/// whose evidence was not kept.
pub fn is_same_node(one: &SelectorSet, other: &SelectorSet) -> bool {
    let of = |set: &SelectorSet, name: &str| -> BTreeSet<String> {
        let named = set.iter().filter(|s| s.kind() == KIND && s.value().starts_with(name));
        named.map(|s| s.value().to_owned()).collect()
    };
    let has_same = |name| of(one, name) == of(other, name);
    let has_common = |name| !of(one, name).is_disjoint(&of(other, name));
    has_common("serialnumber:") && has_same("subject:cn:") && has_common("ca:fingerprint:")
}

/// SPIRE names certificates by their SHA-1, which is a name here and not a proof.
fn fingerprint(certificate: &[u8]) -> String {
    hex::encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, certificate))
}

impl EvidenceKey {
    /// A key from the node's public key (its `subjectPublicKeyInfo`). The agent's ID would not do: it is the digest of
    /// a whole certificate, and an ECDSA signature can be written in a second valid form, which gives another digest.
    fn x509pop(public_key: &[u8]) -> Self {
        Self(format!("x509pop:sha256:{}", hex::encode(digest(&SHA256, public_key))))
    }
}

fn malformed(what: &str, error: &dyn std::fmt::Display) -> AttestError {
    AttestError::Malformed(format!("{what}: {error}"))
}

#[cfg(test)]
mod tests;
