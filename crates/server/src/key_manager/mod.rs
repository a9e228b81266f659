//! Where the authorities' private keys live.

mod disk;
mod memory;

use std::path::PathBuf;

use countersign_identity::{KeyType, PrivateKey};

pub use disk::Disk;
pub use memory::Memory;

/// Why a key could not be kept or found.
#[derive(Debug, thiserror::Error)]
pub enum KeyManagerError {
    /// The disk said no.
    #[error("cannot {what} the key file {}: {source}", path.display())]
    Io {
        /// Read, write, …
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A key file that others may read.
    #[error("the key file {} may be read by others (mode {mode:o}); `chmod 600` it, and rotate the authority", path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The key cannot be made or read.
    #[error(transparent)]
    Key(#[from] countersign_identity::key::KeyError),
}

/// Keeps private keys under names of `[a-f0-9]`.
pub trait KeyManager: Send + Sync {
    /// Makes a key and keeps it under `name`.
    fn generate(&self, name: &str, key_type: KeyType) -> Result<PrivateKey, KeyManagerError>;
    /// The key of that name, if it is still there.
    fn get(&self, name: &str) -> Result<Option<PrivateKey>, KeyManagerError>;
    /// The names of all keys that it keeps.
    fn names(&self) -> Result<Vec<String>, KeyManagerError>;
    /// Forgets a key.
    fn remove(&self, name: &str) -> Result<(), KeyManagerError>;
}
