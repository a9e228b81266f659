//! The authorities' private keys: named, and used where they are. Nobody outside of this folder sees one.

#[cfg(test)]
mod conformance;
mod disk;
mod keys;
mod local;
mod memory;
mod signer;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use countersign_identity::KeyType;

pub use disk::Disk;
pub use keys::Keys;
pub use memory::Memory;
pub use signer::{SIGN_DEADLINE, SignError, Signer, sign};

pub(crate) use local::ephemeral;

/// Longest call to a key manager, in which it may have to generate an RSA key.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Why a key could not be generated, stored, found or removed.
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
    /// It has not answered within this time.
    #[error("the key manager has not answered for {} seconds; trying again", .0.as_secs())]
    Timeout(Duration),
    /// The call broke off. Holds the reason.
    #[error("the key manager broke off: {0}")]
    BrokenOff(String),
}

/// Keeps private keys under names of `[a-f0-9]` and gives out what signs with them. A call may take its time, and may be dropped
/// before it has ended; [`Keys`] gives each a deadline.
#[async_trait]
pub trait KeyManager: Send + Sync {
    /// Generates a key and stores it under `name`.
    async fn generate(&self, name: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, KeyManagerError>;
    /// The key with this name; `None` if it is not stored any more.
    async fn get(&self, name: &str) -> Result<Option<Arc<dyn Signer>>, KeyManagerError>;
    /// The names of all stored keys.
    async fn names(&self) -> Result<Vec<String>, KeyManagerError>;
    /// Deletes a key, if it exists. What was given out for it may go on signing.
    async fn remove(&self, name: &str) -> Result<(), KeyManagerError>;
}
