//! Keys in memory, lost when the process ends.

use std::collections::HashMap;
use std::sync::Mutex;

use countersign_identity::{KeyType, PrivateKey};

use super::{KeyManager, KeyManagerError};

/// Stores keys in memory.
#[derive(Default)]
pub struct Memory(Mutex<HashMap<String, PrivateKey>>);

impl Memory {
    fn keys(&self) -> std::sync::MutexGuard<'_, HashMap<String, PrivateKey>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl KeyManager for Memory {
    fn generate(&self, name: &str, key_type: KeyType) -> Result<PrivateKey, KeyManagerError> {
        let key = PrivateKey::generate(key_type)?;
        self.keys().insert(name.to_owned(), key.clone());
        Ok(key)
    }

    fn get(&self, name: &str) -> Result<Option<PrivateKey>, KeyManagerError> {
        Ok(self.keys().get(name).cloned())
    }

    fn names(&self) -> Result<Vec<String>, KeyManagerError> {
        Ok(self.keys().keys().cloned().collect())
    }

    fn remove(&self, name: &str) -> Result<(), KeyManagerError> {
        self.keys().remove(name);
        Ok(())
    }
}
