//! Private keys: generated, stored and dropped without ever being printed.

use std::fmt;
use std::str::FromStr;

use zeroize::Zeroizing;

/// Key types for authorities and workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyType {
    /// ECDSA over NIST P-256, the default.
    #[default]
    EcP256,
    /// ECDSA over NIST P-384.
    EcP384,
    /// RSA with a 2048-bit modulus.
    Rsa2048,
    /// RSA with a 4096-bit modulus.
    Rsa4096,
}

impl KeyType {
    /// Each key type with its name in settings.
    pub const ALL: [(&'static str, Self); 4] = [
        ("ec-p256", Self::EcP256),
        ("ec-p384", Self::EcP384),
        ("rsa-2048", Self::Rsa2048),
        ("rsa-4096", Self::Rsa4096),
    ];
}

impl fmt::Display for KeyType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(_, k)| k == self).map_or("", |(name, _)| name);
        f.write_str(name)
    }
}

impl FromStr for KeyType {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::ALL.iter().find(|(name, _)| *name == text).map(|(_, k)| *k).ok_or_else(|| KeyError::Type(text.to_owned()))
    }
}

/// Why a key could not be generated or read.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Not the name of a supported key type.
    #[error("`{}` is not a key type: use ec-p256, ec-p384, rsa-2048 or rsa-4096", crate::shown::shown(_0))]
    Type(String),
    /// The crypto library failed to generate a key.
    #[error("cannot make a key: {0}")]
    Generate(String),
    /// The bytes are not a PKCS#8 key of a supported type.
    #[error("not a usable PKCS#8 private key: {0}")]
    Parse(String),
    /// The crypto library failed to sign.
    #[error("cannot sign with the key")]
    Sign,
}

/// A private key in PKCS#8 DER. Zeroised when dropped; `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey(Zeroizing<Vec<u8>>);

impl PrivateKey {
    /// Generates a new key. RSA takes up to seconds of CPU time; do not call it on an async thread.
    pub fn generate(key_type: KeyType) -> Result<Self, KeyError> {
        let pair = match key_type {
            KeyType::EcP256 => rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256),
            KeyType::EcP384 => rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384),
            KeyType::Rsa2048 => rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048),
            KeyType::Rsa4096 => rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_4096),
        };
        let pair = pair.map_err(|e| KeyError::Generate(e.to_string()))?;
        Ok(Self(Zeroizing::new(pair.serialize_der())))
    }

    /// Takes PKCS#8 DER from a file or the wire after parsing it once, so that later uses cannot fail on it.
    pub fn from_pkcs8(der: Vec<u8>) -> Result<Self, KeyError> {
        let key = Self(Zeroizing::new(der));
        key.key_pair()?;
        Ok(key)
    }

    /// The key as PKCS#8 DER: secret bytes, never to be logged.
    pub fn as_pkcs8(&self) -> &[u8] {
        &self.0
    }

    /// The public key as PKIX DER (RFC 5280, 4.1.2.7).
    pub fn public_der(&self) -> Result<Vec<u8>, KeyError> {
        Ok(rcgen::PublicKeyData::subject_public_key_info(&self.key_pair()?))
    }

    /// The key in the form that rcgen signs with. Parses it again at each call.
    pub fn key_pair(&self) -> Result<rcgen::KeyPair, KeyError> {
        let der = rustls_pki_types::PrivatePkcs8KeyDer::from(self.0.as_slice());
        rcgen::KeyPair::try_from(&der).map_err(|e| KeyError::Parse(e.to_string()))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_its_pkcs8_form_and_never_prints() {
        for (_, t) in &KeyType::ALL[..2] {
            let key = PrivateKey::generate(*t).unwrap();
            let again = PrivateKey::from_pkcs8(key.as_pkcs8().to_vec()).unwrap();
            assert!(key == again);
            assert_eq!(format!("{key:?}"), "PrivateKey(…)");
        }
        assert!(PrivateKey::from_pkcs8(vec![1, 2, 3]).is_err());
    }
}
