//! The agent's files: its own identity (key and chain in one file, so that they always match) and the last bundle. Keys
//! of workloads are never written to disk.

use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use countersign_api::files::{write_atomically, write_secret};
use countersign_identity::bundle::{certificates_from_pem, certificates_to_pem, pem_block};
use countersign_identity::{PrivateKey, TrustDomain, X509Bundle, X509Svid};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use zeroize::Zeroizing;

/// Why a file could not be written or read: a path and a reason.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct StoreError {
    path: PathBuf,
    why: String,
}

/// The agent's folder, locked against other agents.
pub struct Store {
    identity: PathBuf,
    bundle: PathBuf,
    probe: PathBuf,
    _lock: Flock<File>,
}

/// Size of the write test in bytes: larger than any identity, a key and a chain of a few certificates.
const PROBE_BYTES: usize = 16 * 1024;

fn failed(path: &Path, why: impl ToString) -> StoreError {
    StoreError { path: path.to_owned(), why: why.to_string() }
}

impl Store {
    /// Creates the folder, mode 0700, and locks it: two agents would overwrite each other's identity.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| failed(dir, e))?;
        // The lock is on the folder itself: it leaves no file, needs no space and works on a read-only disk.
        let folder = File::open(dir).map_err(|e| failed(dir, e))?;
        let lock = Flock::lock(folder, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => failed(dir, "another agent uses this folder; give each agent its own --data-dir"),
            other => failed(dir, format!("cannot lock the folder: {other}")),
        })?;
        let file = |name| dir.join(name);
        Ok(Self { identity: file("agent-svid.pem"), bundle: file("bundle.pem"), probe: file(".probe"), _lock: lock })
    }

    /// Checks whether an identity could be written now; called before single-use evidence is spent on one.
    pub fn probe(&self) -> Result<(), StoreError> {
        write_secret(&self.probe, &[0; PROBE_BYTES]).map_err(|e| failed(&self.probe, e))?;
        std::fs::remove_file(&self.probe).map_err(|e| failed(&self.probe, e))
    }

    /// The identity of an earlier run; `None` if there is none. A file that cannot be used is logged and ignored.
    pub fn identity(&self) -> Option<X509Svid> {
        let pem = Zeroizing::new(std::fs::read(&self.identity).ok()?);
        let read = || {
            let key = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|e| e.to_string())?;
            let key = PrivateKey::from_pkcs8(key.secret_pkcs8_der().to_vec()).map_err(|e| e.to_string())?;
            let chain = certificates_from_pem(&pem).map_err(|e| e.to_string())?;
            X509Svid::new(chain, key).map_err(|e| e.to_string())
        };
        read()
            .map_err(|why| tracing::warn!(path = %self.identity.display(), why, "the kept identity cannot be used"))
            .ok()
    }

    /// Writes the identity, key and chain in one file of mode 0600.
    pub fn put_identity(&self, svid: &X509Svid) -> Result<(), StoreError> {
        let mut pem = Zeroizing::new(pem_block("PRIVATE KEY", svid.key().as_pkcs8()));
        pem.push_str(&certificates_to_pem(svid.chain().iter().map(AsRef::as_ref)));
        write_secret(&self.identity, pem.as_bytes()).map_err(|e| failed(&self.identity, e))
    }

    /// The bundle of an earlier run; `None` if there is none or it cannot be parsed.
    pub fn bundle(&self, trust_domain: &TrustDomain) -> Option<X509Bundle> {
        let pem = std::fs::read(&self.bundle).ok()?;
        X509Bundle::from_pem(trust_domain.clone(), &pem).ok()
    }

    /// Writes the bundle.
    pub fn put_bundle(&self, bundle: &X509Bundle) -> Result<(), StoreError> {
        write_atomically(&self.bundle, bundle.to_pem().as_bytes(), 0o644).map_err(|e| failed(&self.bundle, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_on_the_same_folder_is_refused_until_the_first_ends() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("agent");
        let first = Store::open(&folder).unwrap();
        let second = Store::open(&folder).err().map(|e| e.to_string());
        let expected =
            format!("{}: another agent uses this folder; give each agent its own --data-dir", folder.display());
        assert_eq!(second, Some(expected));
        first.probe().unwrap();
        drop(first);
        Store::open(&folder).unwrap().probe().unwrap();
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "neither lock nor probe leaves a file");
    }
}
