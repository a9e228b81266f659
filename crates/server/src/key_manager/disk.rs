//! Keys as files: PKCS#8 DER, mode 0600, written atomically.

use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use countersign_api::files::{read_pem, write_secret};
use countersign_identity::{KeyType, PrivateKey};

use super::local::{Local, generate};
use super::{KeyManager, KeyManagerError, Signer};

/// Stores keys in a folder of mode 0700.
pub struct Disk(PathBuf);

impl Disk {
    /// Stores keys in `dir`, which is created if it is missing.
    pub fn new(dir: impl Into<PathBuf>) -> Result<Self, KeyManagerError> {
        let dir = dir.into();
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io("make the folder of", &dir))?;
        Ok(Self(dir))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.key"))
    }
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> KeyManagerError {
    let path = path.to_owned();
    move |source| KeyManagerError::Io { what, path, source }
}

#[async_trait]
impl KeyManager for Disk {
    async fn generate(&self, name: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, KeyManagerError> {
        let key = generate(key_type).await?;
        let path = self.path(name);
        write_secret(&path, key.as_pkcs8()).map_err(io("write", &path))?;
        Ok(Arc::new(Local::new(&key)?))
    }

    async fn get(&self, name: &str) -> Result<Option<Arc<dyn Signer>>, KeyManagerError> {
        let path = self.path(name);
        match std::fs::metadata(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io("read", &path)(e)),
            // The key may have been read already: refused here, so that the operator rotates instead of only changing
            // the mode.
            Ok(meta) if meta.mode() & 0o077 != 0 => {
                return Err(KeyManagerError::Exposed { path, mode: meta.mode() & 0o777 });
            }
            Ok(_) => {}
        }
        let key = PrivateKey::from_pkcs8(read_pem(&path).map_err(io("read", &path))?)?;
        Ok(Some(Arc::new(Local::new(&key)?)))
    }

    async fn names(&self) -> Result<Vec<String>, KeyManagerError> {
        let mut names = vec![];
        for file in std::fs::read_dir(&self.0).map_err(io("list the folder of", &self.0))? {
            let file = file.map_err(io("list the folder of", &self.0))?.path();
            let Some(name) = file.file_name().and_then(|n| n.to_str()) else { continue };
            // An interrupted write leaves a `<name>.key.<pid>.tmp` behind. It is safe to remove, because one server
            // owns this folder.
            match name.split_once(".key") {
                Some((name, "")) => names.push(name.to_owned()),
                Some((_, rest)) if rest.rsplit_once('.').is_some_and(|(_, end)| end == "tmp") => {
                    std::fs::remove_file(&file).map_err(io("remove", &file))?;
                }
                _ => {}
            }
        }
        Ok(names)
    }

    async fn remove(&self, name: &str) -> Result<(), KeyManagerError> {
        let path = self.path(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(io("remove", &path)(e)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn a_key_is_there_again_after_a_restart_and_only_its_owner_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let made = Disk::new(dir.path()).unwrap().generate("a1", KeyType::EcP256).await.unwrap();
        let again = Disk::new(dir.path()).unwrap();
        assert_eq!(again.get("a1").await.unwrap().unwrap().public_key(), made.public_key());
        assert!(again.get("b2").await.unwrap().is_none());
        let file = dir.path().join("a1.key");
        assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(again.get("a1").await, Err(KeyManagerError::Exposed { mode: 0o644, .. })));
        std::fs::write(dir.path().join("c3.key.17.tmp"), "half a key").unwrap();
        assert_eq!(again.names().await.unwrap(), ["a1"]);
        assert!(!dir.path().join("c3.key.17.tmp").exists(), "a write that was cut off is swept");
        again.remove("a1").await.unwrap();
        again.remove("a1").await.unwrap();
        assert!(again.get("a1").await.unwrap().is_none());
    }
}
