//! Proof that the agent holds the key of a certificate that chains to a configured CA. SPIRE's own wire form.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use aws_lc_rs::signature::{self, UnparsedPublicKey, VerificationAlgorithm};
use base64::Engine;
use countersign_api::clock::Clock;
use countersign_identity::bundle::certificates_from_pem;
use countersign_identity::selector::{Selector, SelectorSet};
use countersign_identity::trust_domain::agent_id;
use countersign_identity::{TrustDomain, X509Authority};
use rustls::pki_types::{CertificateDer, UnixTime};
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::public_key::PublicKey;

use super::{AttestError, AttestedNode, Challenger, NodeAttestor};

const NONCE_BYTES: usize = 32;
const MAX_CHAIN: usize = 8;

/// Accepts agents whose certificate chains to one of these CAs.
pub struct X509Pop {
    trust_domain: TrustDomain,
    roots: Vec<X509Authority>,
    clock: Clock,
}

/// Why the attestor could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("x509pop CA bundle {}: {why}", path.display())]
pub struct SetupError {
    path: PathBuf,
    why: String,
}

impl X509Pop {
    /// Reads the CA bundle.
    pub fn new(path: &Path, trust_domain: TrustDomain, clock: Clock) -> Result<Self, SetupError> {
        let wrong = |why: String| SetupError { path: path.to_owned(), why };
        let pem = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
        let certificates = certificates_from_pem(&pem).map_err(|e| wrong(e.to_string()))?;
        let roots = certificates.into_iter().map(|c| X509Authority::from_der(c.to_vec())).collect::<Result<_, _>>();
        Ok(Self { trust_domain, roots: roots.map_err(|e| wrong(e.to_string()))?, clock })
    }

    fn verify_chain(&self, chain: &[CertificateDer<'_>]) -> Result<(), AttestError> {
        let refused = |e: webpki::Error| {
            AttestError::Refused(format!("the node's certificate does not chain to a configured CA: {e}"))
        };
        let (leaf, rest) = chain.split_first().ok_or_else(|| AttestError::Malformed("no certificate".into()))?;
        let anchors: Vec<_> = self.roots.iter().map(|r| r.anchor().clone()).collect();
        let seconds = (self.clock)().unix_timestamp().try_into().unwrap_or(0);
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        let usage = webpki::KeyUsage::client_auth();
        let leaf = webpki::EndEntityCert::try_from(leaf).map_err(refused)?;
        leaf.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &anchors, rest, now, usage, None, None)
            .map_err(refused)?;
        Ok(())
    }
}

/// Bytes as base64 in JSON.
#[derive(Debug)]
struct Bytes(Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&base64::engine::general_purpose::STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        base64::engine::general_purpose::STANDARD.decode(text).map(Self).map_err(serde::de::Error::custom)
    }
}

#[derive(Deserialize)]
struct Evidence {
    certificates: Vec<Bytes>,
}

#[derive(Serialize)]
struct Nonce {
    nonce: Bytes,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Challenge {
    RsaSignature(Nonce),
    EcdsaSignature(Nonce),
}

#[derive(Deserialize)]
struct Rsa {
    nonce: Bytes,
    signature: Bytes,
}

#[derive(Deserialize)]
struct Ecdsa {
    nonce: Bytes,
    r: Bytes,
    s: Bytes,
}

#[derive(Deserialize)]
struct Response {
    rsa_signature: Option<Rsa>,
    ecdsa_signature: Option<Ecdsa>,
}

/// How a certificate's key signs.
enum Scheme {
    Rsa,
    Ecdsa(&'static dyn VerificationAlgorithm),
}

#[async_trait]
impl NodeAttestor for X509Pop {
    fn kind(&self) -> &'static str {
        "x509pop"
    }

    async fn attest(&self, payload: &[u8], challenger: &mut dyn Challenger) -> Result<AttestedNode, AttestError> {
        let malformed = |what: &str, e: &dyn std::fmt::Display| AttestError::Malformed(format!("{what}: {e}"));
        let evidence: Evidence = serde_json::from_slice(payload).map_err(|e| malformed("x509pop payload", &e))?;
        if evidence.certificates.len() > MAX_CHAIN {
            return Err(AttestError::Malformed(format!("more than {MAX_CHAIN} certificates")));
        }
        let chain: Vec<CertificateDer<'static>> = evidence.certificates.into_iter().map(|c| c.0.into()).collect();
        self.verify_chain(&chain)?;
        let (_, cert) = X509Certificate::from_der(&chain[0]).map_err(|e| malformed("certificate", &e))?;
        let may_sign = cert.key_usage().ok().flatten().is_some_and(|ku| ku.value.digital_signature());
        if !may_sign {
            return Err(AttestError::Refused("the node's certificate is not made for digital signatures".into()));
        }
        let key = cert.public_key();
        let scheme = match key.parsed() {
            Ok(PublicKey::RSA(_)) => Scheme::Rsa,
            Ok(PublicKey::EC(point)) if point.key_size() <= 256 => Scheme::Ecdsa(&signature::ECDSA_P256_SHA256_ASN1),
            Ok(PublicKey::EC(point)) if point.key_size() == 384 => Scheme::Ecdsa(&signature::ECDSA_P384_SHA256_ASN1),
            _ => {
                return Err(AttestError::Refused(
                    "the node's key type is not supported: use RSA, P-256 or P-384".into(),
                ));
            }
        };
        let mut nonce = [0u8; NONCE_BYTES];
        aws_lc_rs::rand::fill(&mut nonce).map_err(|_| AttestError::Refused("no randomness".into()))?;
        let ours = Nonce { nonce: Bytes(nonce.to_vec()) };
        let challenge = match scheme {
            Scheme::Rsa => Challenge::RsaSignature(ours),
            Scheme::Ecdsa(_) => Challenge::EcdsaSignature(ours),
        };
        let answer =
            challenger.challenge(serde_json::to_vec(&challenge).map_err(|e| malformed("challenge", &e))?).await?;
        let answer: Response = serde_json::from_slice(&answer).map_err(|e| malformed("answer to the challenge", &e))?;
        let (theirs, signature, algorithm): (_, _, &dyn VerificationAlgorithm) =
            match (scheme, answer.rsa_signature, answer.ecdsa_signature) {
                (Scheme::Rsa, Some(a), _) => (a.nonce.0, a.signature.0, &signature::RSA_PSS_2048_8192_SHA256),
                (Scheme::Ecdsa(algorithm), _, Some(a)) => (a.nonce.0, der_signature(&a.r.0, &a.s.0), algorithm),
                _ => return Err(AttestError::Malformed("the answer is for another kind of key".into())),
            };
        if theirs.len() != NONCE_BYTES {
            return Err(AttestError::Malformed(format!(
                "the answer's nonce has {} bytes, not {NONCE_BYTES}",
                theirs.len()
            )));
        }
        UnparsedPublicKey::new(algorithm, &key.subject_public_key.data)
            .verify(&[&nonce[..], &theirs].concat(), &signature)
            .map_err(|_| {
                AttestError::Refused("the node's signature is wrong: it does not hold the certificate's key".into())
            })?;
        // SPIRE names an x509pop agent by the SHA-1 of its certificate: a name, not a proof.
        let digest =
            |der: &[u8]| hex::encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, der));
        let mut selectors = SelectorSet::new();
        let mut add = |value: String| {
            Selector::new("x509pop", value).map(|s| {
                selectors.insert(s);
            })
        };
        if let Some(cn) = cert.subject().iter_common_name().next().and_then(|cn| cn.as_str().ok()) {
            add(format!("subject:cn:{cn}")).map_err(|e| malformed("subject", &e))?;
        }
        for ca in &chain[1..] {
            add(format!("ca:fingerprint:{}", digest(ca))).map_err(|e| malformed("CA", &e))?;
        }
        add(format!("serialnumber:{:x}", cert.tbs_certificate.serial)).map_err(|e| malformed("serial", &e))?;
        let id = agent_id(&self.trust_domain, "x509pop", &digest(&chain[0])).map_err(|e| malformed("agent ID", &e))?;
        Ok(AttestedNode { id, selectors, can_reattest: true, alias: None })
    }
}

/// `SEQUENCE { r INTEGER, s INTEGER }` (RFC 3279 2.2.3) of two big-endian numbers.
fn der_signature(r: &[u8], s: &[u8]) -> Vec<u8> {
    let integer = |n: &[u8]| {
        let n = &n[n.iter().take_while(|b| **b == 0).count()..];
        let pad = usize::from(n.first().is_none_or(|b| *b >= 0x80));
        let length = u8::try_from(n.len() + pad).unwrap_or(u8::MAX);
        [&[2, length], &[0][..pad], n].concat()
    };
    // Numbers of P-384 at most: what is longer is no signature, and the verifier says so.
    let body = [integer(&r[..r.len().min(50)]), integer(&s[..s.len().min(50)])].concat();
    [&[0x30, u8::try_from(body.len()).unwrap_or(u8::MAX)][..], &body].concat()
}

#[cfg(test)]
mod tests;
