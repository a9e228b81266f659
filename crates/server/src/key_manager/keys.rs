//! A key manager with a deadline on each call.

use std::sync::Arc;

use countersign_identity::KeyType;
use tokio::time::timeout;

use super::{DEADLINE, KeyManager, KeyManagerError, Signer};

/// Calls a key manager, each time for at most [`DEADLINE`].
pub struct Keys(Arc<dyn KeyManager>);

impl Keys {
    /// Calls this one.
    pub fn new(manager: Arc<dyn KeyManager>) -> Self {
        Self(manager)
    }

    /// As [`KeyManager::generate`].
    pub async fn generate(&self, name: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, KeyManagerError> {
        within(self.0.generate(name, key_type)).await
    }

    /// As [`KeyManager::get`].
    pub async fn get(&self, name: &str) -> Result<Option<Arc<dyn Signer>>, KeyManagerError> {
        within(self.0.get(name)).await
    }

    /// As [`KeyManager::names`].
    pub async fn names(&self) -> Result<Vec<String>, KeyManagerError> {
        within(self.0.names()).await
    }

    /// As [`KeyManager::remove`].
    pub async fn remove(&self, name: &str) -> Result<(), KeyManagerError> {
        within(self.0.remove(name)).await
    }
}

async fn within<T>(call: impl Future<Output = Result<T, KeyManagerError>>) -> Result<T, KeyManagerError> {
    timeout(DEADLINE, call).await.unwrap_or(Err(KeyManagerError::Timeout(DEADLINE)))
}
