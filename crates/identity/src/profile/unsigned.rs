//! Certificates and requests whose signature is missing: the key that signs may be in another process or machine, and take its
//! time.

use x509_parser::der_parser::asn1_rs::{Any, FromDer};
use x509_parser::x509::SubjectPublicKeyInfo;

use super::IssueError;
use crate::der::{bit_string, sequence};
use crate::signature::PublicSide;

/// A certificate or a request without its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsigned {
    content: Vec<u8>,
    /// The algorithm's identifier in DER, which stands between content and signature.
    algorithm: Vec<u8>,
}

impl Unsigned {
    /// Takes apart what was encoded with [`Awaited`] in place of a key.
    pub(super) fn from_der(der: &[u8]) -> Result<Self, IssueError> {
        let failed = |e: &dyn std::fmt::Display| IssueError::Sign(e.to_string());
        let (_, whole) = Any::from_der(der).map_err(|e| failed(&e))?;
        let (rest, _) = Any::from_der(whole.data).map_err(|e| failed(&e))?;
        let (signature, _) = Any::from_der(rest).map_err(|e| failed(&e))?;
        let (content, _) = whole.data.split_at(whole.data.len() - rest.len());
        let (algorithm, _) = rest.split_at(rest.len() - signature.len());
        Ok(Self { content: content.to_vec(), algorithm: algorithm.to_vec() })
    }

    /// What is to be signed.
    pub fn content(&self) -> &[u8] {
        &self.content
    }

    /// The whole in DER, with the signature over [`Unsigned::content`] by the key and algorithm that it was made for.
    pub fn signed(&self, signature: &[u8]) -> Vec<u8> {
        sequence(&[&self.content[..], &self.algorithm, &bit_string(signature)].concat())
    }
}

/// Stands for a key that signs later. What is encoded with it has an empty signature.
pub(super) struct Awaited {
    point: Vec<u8>,
    algorithm: &'static rcgen::SignatureAlgorithm,
}

impl Awaited {
    /// Stands for the key with this public side. Errors: [`IssueError::Authority`] if it is no public key.
    pub(super) fn new(public: PublicSide<'_>) -> Result<Self, IssueError> {
        let (_, info) = SubjectPublicKeyInfo::from_der(public.key).map_err(|e| IssueError::Authority(e.to_string()))?;
        Ok(Self { point: info.subject_public_key.data.to_vec(), algorithm: public.algorithm.x509() })
    }
}

impl rcgen::PublicKeyData for Awaited {
    fn der_bytes(&self) -> &[u8] {
        &self.point
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.algorithm
    }
}

impl rcgen::SigningKey for Awaited {
    fn sign(&self, _: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        Ok(vec![])
    }
}
