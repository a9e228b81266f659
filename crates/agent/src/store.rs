//! The agent's files: its own identity (key and chain in one file, so that they always match) and the last bundle. Keys
//! of workloads are never written to disk.

use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use countersign_api::files::{read_pem, write_atomically, write_secret};
use countersign_identity::bundle::{certificates_from_pem, certificates_to_pem, pem_block};
use countersign_identity::{PrivateKey, TrustBundle, TrustDomain, X509Svid};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use zeroize::Zeroizing;

use crate::known::Kept;

/// Why something could not be kept or found again.
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
/// Before the certificates of a kept bundle: a line that readers of PEM pass over.
const REPLACES: &str = "# In place of the trust bundle file with SHA-256 ";

/// Takes from everybody else the right to open our own folder, with which they could lock it (flock(2)); what is below stays
/// reachable.
fn close_to_others(dir: &Path) -> std::io::Result<()> {
    let meta = std::fs::metadata(dir)?;
    let mode = meta.mode() & 0o7777;
    if meta.uid() == nix::unistd::geteuid().as_raw() && mode & 0o066 != 0 {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode & !0o066))?;
    }
    Ok(())
}

fn failed(path: &Path, why: impl ToString) -> StoreError {
    StoreError { path: path.to_owned(), why: why.to_string() }
}

impl Store {
    /// Creates the folder, mode 0700, and locks it: two agents would overwrite each other's identity.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| failed(dir, e))?;
        close_to_others(dir).map_err(|e| failed(dir, e))?;
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
        let pem = Zeroizing::new(kept(&self.identity)?);
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

    /// The bundle of an earlier run.
    pub fn bundle(&self, trust_domain: &TrustDomain) -> Option<Kept> {
        let pem = kept(&self.bundle)?;
        let read = TrustBundle::from_pem(trust_domain.clone(), &pem);
        let bundle = read
            .map_err(|error| tracing::warn!(path = %self.bundle.display(), %error, "the kept bundle cannot be used"))
            .ok()?;
        let first = String::from_utf8_lossy(pem.split(|b| *b == b'\n').next().unwrap_or_default());
        Some(Kept { bundle, replaces: first.strip_prefix(REPLACES).map(ToOwned::to_owned) })
    }

    /// Keeps the bundle. What it replaces stands in the same file, so that the two are never of different times.
    pub fn put_bundle(&self, kept: &Kept) -> Result<(), StoreError> {
        let replaces = kept.replaces.iter().map(|digest| format!("{REPLACES}{digest}\n"));
        let text: String = replaces.chain([kept.bundle.to_pem()]).collect();
        write_atomically(&self.bundle, text.as_bytes(), 0o644).map_err(|e| failed(&self.bundle, e))
    }
}

/// What an earlier run has kept in a file; one that cannot be read is reported and passed over.
fn kept(path: &Path) -> Option<Vec<u8>> {
    read_pem(path)
        .inspect_err(|error| {
            if error.kind() != std::io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), %error, "a kept file cannot be read");
            }
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_files_that_are_none_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        for file in [&store.identity, &store.bundle] {
            nix::unistd::mkfifo(file, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        assert!(store.identity().is_none() && store.bundle(&TrustDomain::new("td").unwrap()).is_none());
    }

    #[test]
    fn a_kept_bundle_says_what_it_replaces_and_one_of_an_older_version_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let bundle = crate::testing::Ca::new(time::OffsetDateTime::now_utc()).bundle();
        let kept = Kept { bundle: bundle.clone(), replaces: Some("ab".repeat(32)) };
        store.put_bundle(&kept).unwrap();
        assert_eq!(store.bundle(&bundle.trust_domain), Some(kept));
        std::fs::write(dir.path().join("bundle.pem"), bundle.to_pem()).unwrap();
        assert_eq!(store.bundle(&bundle.trust_domain), Some(Kept { bundle, replaces: None }));
    }

    #[test]
    fn a_folder_that_others_can_open_is_closed_before_it_is_locked() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let _store = Store::open(dir.path()).unwrap();
        assert_eq!(std::fs::metadata(dir.path()).unwrap().mode() & 0o777, 0o711);
    }

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
