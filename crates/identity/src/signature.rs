//! What a key that signs for us is known by, wherever it is: its public half and how it signs.

use std::fmt;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey,
    VerificationAlgorithm,
};

use crate::key::KeyType;

/// How a message is signed. ECDSA signatures are written in ASN.1 (RFC 3279, 2.2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignatureAlgorithm {
    /// ECDSA over NIST P-256 with SHA-256.
    EcdsaP256Sha256,
    /// ECDSA over NIST P-384 with SHA-384.
    EcdsaP384Sha384,
    /// RSA PKCS #1 v1.5 with SHA-256.
    RsaPkcs1Sha256,
}

impl SignatureAlgorithm {
    /// Whether `signature` over `message` is by the key `public_key` (PKIX DER).
    pub fn verifies(self, public_key: &[u8], message: &[u8], signature: &[u8]) -> bool {
        let how: &'static dyn VerificationAlgorithm = match self {
            Self::EcdsaP256Sha256 => &ECDSA_P256_SHA256_ASN1,
            Self::EcdsaP384Sha384 => &ECDSA_P384_SHA384_ASN1,
            Self::RsaPkcs1Sha256 => &RSA_PKCS1_2048_8192_SHA256,
        };
        UnparsedPublicKey::new(how, public_key).verify(message, signature).is_ok()
    }

    /// As certificates name it.
    pub(crate) fn x509(self) -> &'static rcgen::SignatureAlgorithm {
        match self {
            Self::EcdsaP256Sha256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            Self::EcdsaP384Sha384 => &rcgen::PKCS_ECDSA_P384_SHA384,
            Self::RsaPkcs1Sha256 => &rcgen::PKCS_RSA_SHA256,
        }
    }
}

impl fmt::Display for SignatureAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EcdsaP256Sha256 => "ECDSA P-256 SHA-256",
            Self::EcdsaP384Sha384 => "ECDSA P-384 SHA-384",
            Self::RsaPkcs1Sha256 => "RSA PKCS #1 v1.5 SHA-256",
        })
    }
}

impl From<KeyType> for SignatureAlgorithm {
    /// How keys of this type sign certificates and tokens.
    fn from(key_type: KeyType) -> Self {
        match key_type {
            KeyType::EcP256 => Self::EcdsaP256Sha256,
            KeyType::EcP384 => Self::EcdsaP384Sha384,
            KeyType::Rsa2048 | KeyType::Rsa4096 => Self::RsaPkcs1Sha256,
        }
    }
}

/// The public side of a key that signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicSide<'a> {
    /// The public key as PKIX DER (RFC 5280, 4.1.2.7).
    pub key: &'a [u8],
    /// How it signs.
    pub algorithm: SignatureAlgorithm,
}
