//! Storage of the authorities' private keys.

mod disk;
mod memory;

use std::path::PathBuf;

use countersign_identity::{KeyType, PrivateKey};

pub use disk::Disk;
pub use memory::Memory;

/// Why a key could not be stored or found.
#[derive(Debug, thiserror::Error)]
pub enum KeyManagerError {
    /// A file operation failed.
    #[error("cannot {what} the key file {}: {source}", path.display())]
    Io {
        /// The attempted operation, as in "read".
        what: &'static str,
        /// Path of the key file or folder.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// Other users may read a key file, so the key may be known to them.
    #[error("the key file {} may be read by others (mode {mode:o}); `chmod 600` it, and rotate the authority", path.display())]
    Exposed {
        /// Path of the key file.
        path: PathBuf,
        /// File mode, permission bits only.
        mode: u32,
    },
    /// The key cannot be generated or parsed.
    #[error(transparent)]
    Key(#[from] countersign_identity::key::KeyError),
}

/// Stores private keys under names of `[a-f0-9]`.
pub trait KeyManager: Send + Sync {
    /// Generates a key and stores it under `name`.
    fn generate(&self, name: &str, key_type: KeyType) -> Result<PrivateKey, KeyManagerError>;
    /// The key with this name; `None` if it is not stored any more.
    fn get(&self, name: &str) -> Result<Option<PrivateKey>, KeyManagerError>;
    /// The names of all stored keys.
    fn names(&self) -> Result<Vec<String>, KeyManagerError>;
    /// Deletes a key, if it exists.
    fn remove(&self, name: &str) -> Result<(), KeyManagerError>;
}
