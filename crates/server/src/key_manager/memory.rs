//! Keys in memory, lost when the process ends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use countersign_identity::KeyType;

use super::local::{Local, generate};
use super::{KeyManager, KeyManagerError, Signer};

/// Stores keys in memory.
#[derive(Default)]
pub struct Memory(Mutex<HashMap<String, Arc<dyn Signer>>>);

impl Memory {
    fn keys(&self) -> MutexGuard<'_, HashMap<String, Arc<dyn Signer>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl KeyManager for Memory {
    async fn generate(&self, name: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, KeyManagerError> {
        let key: Arc<dyn Signer> = Arc::new(Local::new(&generate(key_type).await?)?);
        self.keys().insert(name.to_owned(), key.clone());
        Ok(key)
    }

    async fn get(&self, name: &str) -> Result<Option<Arc<dyn Signer>>, KeyManagerError> {
        Ok(self.keys().get(name).cloned())
    }

    async fn names(&self) -> Result<Vec<String>, KeyManagerError> {
        Ok(self.keys().keys().cloned().collect())
    }

    async fn remove(&self, name: &str) -> Result<(), KeyManagerError> {
        self.keys().remove(name);
        Ok(())
    }
}
