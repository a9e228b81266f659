//! Keys in this process's memory.

use std::sync::Arc;

use async_trait::async_trait;
use countersign_identity::key::KeyError;
use countersign_identity::{KeyType, LocalKey, PrivateKey, SignatureAlgorithm};

use super::{KeyManagerError, SignError, Signer};

/// A key in memory. Signing with it never waits.
pub(super) struct Local {
    key: LocalKey,
    key_type: KeyType,
}

impl Local {
    /// Errors: it is of no type that we make keys of.
    pub(super) fn new(key: &PrivateKey) -> Result<Self, KeyError> {
        let key = LocalKey::new(key)?;
        let key_type = key.key_type().ok_or_else(|| KeyError::Parse("an RSA key of unusual length".into()))?;
        Ok(Self { key, key_type })
    }
}

/// Generates a key off the async threads: RSA takes up to seconds of CPU time.
pub(super) async fn generate(key_type: KeyType) -> Result<PrivateKey, KeyManagerError> {
    let made = tokio::task::spawn_blocking(move || PrivateKey::generate(key_type)).await;
    Ok(made.map_err(|e| KeyManagerError::BrokenOff(e.to_string()))??)
}

/// A key under no name, which ends with whoever holds it.
pub(crate) fn ephemeral(key_type: KeyType) -> Result<Arc<dyn Signer>, KeyError> {
    Ok(Arc::new(Local::new(&PrivateKey::generate(key_type)?)?))
}

#[async_trait]
impl Signer for Local {
    fn public_key(&self) -> &[u8] {
        self.key.public_side().key
    }

    fn key_type(&self) -> KeyType {
        self.key_type
    }

    async fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, SignError> {
        if algorithm != self.key.public_side().algorithm {
            return Err(SignError::Algorithm { key_type: self.key_type, algorithm });
        }
        self.key.sign(message).map_err(|e| SignError::Failed(e.to_string()))
    }
}
