//! A private key in this process's memory, parsed once to sign often.

use std::fmt;

use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, KeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
};

use crate::key::{KeyError, KeyType, PrivateKey};
use crate::signature::{PublicSide, SignatureAlgorithm};

/// A private key that signs. It cannot be taken out again; `Debug` shows nothing of it.
pub struct LocalKey {
    pair: Pair,
    public: Vec<u8>,
    algorithm: SignatureAlgorithm,
}

enum Pair {
    Ecdsa(EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

impl LocalKey {
    /// Parses a key. Errors: [`KeyError::Parse`] if it is of no kind that signs here.
    pub fn new(key: &PrivateKey) -> Result<Self, KeyError> {
        use SignatureAlgorithm::{EcdsaP256Sha256, EcdsaP384Sha384, RsaPkcs1Sha256};
        let der = key.as_pkcs8();
        let parse = |why: String| KeyError::Parse(why);
        let written = |der: Result<PublicKeyX509Der<'_>, _>| match der {
            Ok(der) => Ok(der.as_ref().to_vec()),
            Err(aws_lc_rs::error::Unspecified) => Err(parse("it has no public key".into())),
        };
        for (curve, algorithm) in
            [(&ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaP256Sha256), (&ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaP384Sha384)]
        {
            if let Ok(pair) = EcdsaKeyPair::from_pkcs8(curve, der) {
                let public = written(pair.public_key().as_der())?;
                return Ok(Self { pair: Pair::Ecdsa(pair), public, algorithm });
            }
        }
        let pair = RsaKeyPair::from_pkcs8(der).map_err(|e| parse(e.to_string()))?;
        let public = written(pair.public_key().as_der())?;
        Ok(Self { pair: Pair::Rsa(pair), public, algorithm: RsaPkcs1Sha256 })
    }

    /// Its public key and how it signs.
    pub fn public_side(&self) -> PublicSide<'_> {
        PublicSide { key: &self.public, algorithm: self.algorithm }
    }

    /// Its type; `None` for RSA of a length that we make no keys of.
    pub fn key_type(&self) -> Option<KeyType> {
        Some(match (&self.pair, self.algorithm) {
            (Pair::Ecdsa(_), SignatureAlgorithm::EcdsaP384Sha384) => KeyType::EcP384,
            (Pair::Ecdsa(_), _) => KeyType::EcP256,
            (Pair::Rsa(pair), _) => match pair.public_modulus_len() {
                256 => KeyType::Rsa2048,
                512 => KeyType::Rsa4096,
                _ => return None,
            },
        })
    }

    /// Signs a message with the key's algorithm.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        let failed = |_| KeyError::Sign;
        let random = SystemRandom::new();
        match &self.pair {
            Pair::Ecdsa(pair) => Ok(pair.sign(&random, message).map_err(failed)?.as_ref().to_vec()),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).map_err(failed)?;
                Ok(signature)
            }
        }
    }
}

impl fmt::Debug for LocalKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LocalKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_each_type_signs_what_its_public_side_verifies() {
        for (_, key_type) in KeyType::ALL {
            let private = PrivateKey::generate(key_type).unwrap();
            let key = LocalKey::new(&private).unwrap();
            assert_eq!(key.key_type(), Some(key_type));
            let PublicSide { key: public, algorithm } = key.public_side();
            assert_eq!(public, private.public_der().unwrap());
            assert_eq!(algorithm, SignatureAlgorithm::from(key_type));
            let signature = key.sign(b"message").unwrap();
            assert!(algorithm.verifies(public, b"message", &signature));
            assert!(!algorithm.verifies(public, b"another", &signature));
            assert_eq!(format!("{key:?}"), "LocalKey(…)");
        }
    }
}
