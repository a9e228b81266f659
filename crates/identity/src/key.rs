//! Private keys: made, kept and dropped without ever being printed.

use std::fmt;
use std::str::FromStr;

use zeroize::Zeroizing;

/// The key types that an authority or a workload may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyType {
    /// ECDSA over P-256, the default.
    #[default]
    EcP256,
    /// ECDSA over P-384.
    EcP384,
    /// RSA with 2048 bits.
    Rsa2048,
    /// RSA with 4096 bits.
    Rsa4096,
}

impl KeyType {
    /// Each key type with its name in configuration.
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

/// Why a key could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A key type that we don't have.
    #[error("`{}` is not a key type: use ec-p256, ec-p384, rsa-2048 or rsa-4096", crate::shown::shown(_0))]
    Type(String),
    /// The engine refused to make a key.
    #[error("cannot make a key: {0}")]
    Generate(String),
    /// The bytes are no PKCS#8 key that we can use.
    #[error("not a usable PKCS#8 private key: {0}")]
    Parse(String),
}

/// A private key in PKCS#8 DER. Zeroised when dropped; `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey(Zeroizing<Vec<u8>>);

impl PrivateKey {
    /// A fresh key.
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

    /// Takes PKCS#8 DER that came from a file or a wire, after trying it.
    pub fn from_pkcs8(der: Vec<u8>) -> Result<Self, KeyError> {
        let key = Self(Zeroizing::new(der));
        key.key_pair()?;
        Ok(key)
    }

    /// The PKCS#8 DER bytes.
    pub fn as_pkcs8(&self) -> &[u8] {
        &self.0
    }

    /// The key in a form that signs.
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
