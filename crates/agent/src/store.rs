//! What an agent keeps on disk: its own identity (key and chain in one file, so that they always belong together) and
//! the last bundle. Workloads' keys are never here.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use countersign_api::files::{write_atomically, write_secret};
use countersign_identity::bundle::{certificates_from_pem, certificates_to_pem, pem_block};
use countersign_identity::{PrivateKey, TrustDomain, X509Bundle, X509Svid};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use zeroize::Zeroizing;

/// Why something could not be kept or found again.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct StoreError {
    path: PathBuf,
    why: String,
}

/// The agent's folder.
pub struct Store {
    identity: PathBuf,
    bundle: PathBuf,
}

fn failed(path: &Path, why: impl ToString) -> StoreError {
    StoreError { path: path.to_owned(), why: why.to_string() }
}

impl Store {
    /// Makes the folder, mode 0700.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| failed(dir, e))?;
        Ok(Self { identity: dir.join("agent-svid.pem"), bundle: dir.join("bundle.pem") })
    }

    /// The identity of an earlier run. A file that cannot be used is reported and passed over.
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

    /// Keeps the identity.
    pub fn put_identity(&self, svid: &X509Svid) -> Result<(), StoreError> {
        let mut pem = Zeroizing::new(pem_block("PRIVATE KEY", svid.key().as_pkcs8()));
        pem.push_str(&certificates_to_pem(svid.chain().iter().map(AsRef::as_ref)));
        write_secret(&self.identity, pem.as_bytes()).map_err(|e| failed(&self.identity, e))
    }

    /// The bundle of an earlier run.
    pub fn bundle(&self, trust_domain: &TrustDomain) -> Option<X509Bundle> {
        let pem = std::fs::read(&self.bundle).ok()?;
        X509Bundle::from_pem(trust_domain.clone(), &pem).ok()
    }

    /// Keeps the bundle.
    pub fn put_bundle(&self, bundle: &X509Bundle) -> Result<(), StoreError> {
        write_atomically(&self.bundle, bundle.to_pem().as_bytes(), 0o644).map_err(|e| failed(&self.bundle, e))
    }
}
