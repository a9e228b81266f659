//! Identity from PEM files, reloaded when they change. A change that cannot be used leaves the last valid identity in
//! place.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use countersign_api::files::read_pem;
use countersign_identity::bundle::certificates_from_pem;
use countersign_identity::{PrivateKey, TrustBundle, TrustDomain, X509Svid};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::{Current, Identity};

/// Interval between two checks for a change.
const LOOK: Duration = Duration::from_secs(1);

/// Why the files cannot be used: a path and a reason.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct FilesError {
    path: PathBuf,
    why: String,
}

/// The files of an identity.
#[derive(Debug, Clone)]
pub struct Files {
    /// Certificate chain in PEM, leaf first.
    pub chain: PathBuf,
    /// Private key in PEM, PKCS#8.
    pub key: PathBuf,
    /// Authorities in PEM, one file per trust domain.
    pub bundles: Vec<(TrustDomain, PathBuf)>,
}

impl Files {
    fn paths(&self) -> impl Iterator<Item = &Path> {
        [&self.chain, &self.key].into_iter().chain(self.bundles.iter().map(|(_, p)| p)).map(PathBuf::as_path)
    }

    fn load(&self) -> Result<Identity, FilesError> {
        let failed = |path: &Path, why: String| FilesError { path: path.to_owned(), why };
        let read = |path: &Path| read_pem(path).map_err(|e| failed(path, e.to_string()));
        let chain = certificates_from_pem(&read(&self.chain)?).map_err(|e| failed(&self.chain, e.to_string()))?;
        let pem = Zeroizing::new(read(&self.key)?);
        let key = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|e| {
            failed(&self.key, format!("no PKCS#8 private key ({e}); convert it with `openssl pkcs8 -topk8 -nocrypt`"))
        })?;
        let key =
            PrivateKey::from_pkcs8(key.secret_pkcs8_der().to_vec()).map_err(|e| failed(&self.key, e.to_string()))?;
        let svid = X509Svid::new(chain, key).map_err(|e| failed(&self.chain, e.to_string()))?;
        let bundles = self
            .bundles
            .iter()
            .map(|(td, path)| TrustBundle::from_pem(td.clone(), &read(path)?).map_err(|e| failed(path, e.to_string())));
        Identity::new(svid, bundles.collect::<Result<_, _>>()?).map_err(|e| failed(&self.key, e.to_string()))
    }

    /// Modification time and length of each file; any difference is a change.
    fn stamp(&self) -> Vec<Option<(SystemTime, u64)>> {
        let one = |path: &Path| std::fs::metadata(path).ok().and_then(|m| Some((m.modified().ok()?, m.len())));
        self.paths().map(one).collect()
    }
}

/// Loads the files, and returns a future that follows them until `shutdown`. Errors: the first load failed.
pub fn follow_files(
    files: Files,
    current: Arc<Current>,
    shutdown: CancellationToken,
) -> Result<impl Future<Output = ()>, FilesError> {
    let mut stamp = files.stamp();
    current.set(files.load()?);
    Ok(async move {
        let mut tick = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = shutdown.cancelled() => return,
            }
            let now = files.stamp();
            if now == stamp {
                continue;
            }
            match files.load() {
                Ok(identity) => {
                    current.set(identity);
                    stamp = now;
                }
                // Key and certificate may be in the middle of being replaced: the next tick tries again.
                Err(error) => tracing::warn!(%error, "the changed identity cannot be used; the last one stands"),
            }
        }
    })
}
