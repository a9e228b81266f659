//! The challenge: both sides contribute a nonce, and the node signs the two with its certificate's key. SPIRE's wire
//! format.

use aws_lc_rs::signature::{self, UnparsedPublicKey, VerificationAlgorithm};
use base64::Engine;
use serde::{Deserialize, Serialize};
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

use super::super::{AttestError, Challenger};
use super::malformed;

const NONCE_BYTES: usize = 32;

/// Has the node sign a challenge with the key of its certificate. Errors: no answer, or a wrong signature.
pub(super) async fn prove_possession(
    key: &SubjectPublicKeyInfo<'_>,
    challenger: &mut dyn Challenger,
) -> Result<(), AttestError> {
    let scheme = Scheme::of(key)?;
    let mut nonce = [0u8; NONCE_BYTES];
    aws_lc_rs::rand::fill(&mut nonce).map_err(|_| AttestError::Refused("no randomness".into()))?;
    let ours = Nonce { nonce: Bytes(nonce.to_vec()) };
    let challenge = match scheme {
        Scheme::Rsa => Challenge::RsaSignature(ours),
        Scheme::Ecdsa(_) => Challenge::EcdsaSignature(ours),
    };
    let answer = challenger.challenge(serde_json::to_vec(&challenge).map_err(|e| malformed("challenge", &e))?).await?;
    let answer: Response = serde_json::from_slice(&answer).map_err(|e| malformed("answer to the challenge", &e))?;
    let (theirs, signature, algorithm): (_, _, &dyn VerificationAlgorithm) =
        match (scheme, answer.rsa_signature, answer.ecdsa_signature) {
            (Scheme::Rsa, Some(a), _) => (a.nonce.0, a.signature.0, &signature::RSA_PSS_2048_8192_SHA256),
            (Scheme::Ecdsa(algorithm), _, Some(a)) => (a.nonce.0, der_signature(&a.r.0, &a.s.0), algorithm),
            _ => return Err(AttestError::Malformed("the answer is for another kind of key".into())),
        };
    // A fixed length, so that the signed bytes split into our nonce and the node's in one way only.
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
        })
}

/// Bytes, encoded as base64 in JSON.
#[derive(Debug)]
pub(super) struct Bytes(pub(super) Vec<u8>);

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

/// Signature scheme of a certificate's key.
enum Scheme {
    Rsa,
    Ecdsa(&'static dyn VerificationAlgorithm),
}

impl Scheme {
    fn of(key: &SubjectPublicKeyInfo<'_>) -> Result<Self, AttestError> {
        match key.parsed() {
            Ok(PublicKey::RSA(_)) => Ok(Self::Rsa),
            Ok(PublicKey::EC(point)) if point.key_size() <= 256 => Ok(Self::Ecdsa(&signature::ECDSA_P256_SHA256_ASN1)),
            Ok(PublicKey::EC(point)) if point.key_size() == 384 => Ok(Self::Ecdsa(&signature::ECDSA_P384_SHA256_ASN1)),
            _ => Err(AttestError::Refused("the node's key type is not supported: use RSA, P-256 or P-384".into())),
        }
    }
}

/// `SEQUENCE { r INTEGER, s INTEGER }` (RFC 3279 2.2.3) from two big-endian numbers.
pub(super) fn der_signature(r: &[u8], s: &[u8]) -> Vec<u8> {
    let integer = |n: &[u8]| {
        let n = &n[n.iter().take_while(|b| **b == 0).count()..];
        let pad = usize::from(n.first().is_none_or(|b| *b >= 0x80));
        let length = u8::try_from(n.len() + pad).unwrap_or(u8::MAX);
        [&[2, length], &[0][..pad], n].concat()
    };
    // At most the size of P-384: longer numbers are truncated, and the verifier rejects the signature.
    let body = [integer(&r[..r.len().min(50)]), integer(&s[..s.len().min(50)])].concat();
    [&[0x30, u8::try_from(body.len()).unwrap_or(u8::MAX)][..], &body].concat()
}
