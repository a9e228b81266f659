//! The certificate of a bundle endpoint with profile `https_web`: read from files, and again when they change.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use countersign_api::files::read_pem;
use countersign_api::tls::public_server_config;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::config::CertificateFiles;

/// Interval between two looks at the files.
const LOOK: Duration = Duration::from_secs(5);

/// Why the files are no certificate to serve with.
#[derive(Debug, thiserror::Error)]
#[error("certificate of the bundle endpoint: {path}: {why}")]
pub struct CertificateError {
    path: String,
    why: String,
}

impl CertificateError {
    fn new(path: &Path, why: impl ToString) -> Self {
        Self { path: path.display().to_string(), why: why.to_string() }
    }
}

/// The current certificate with its key.
pub struct ServingCertificate {
    files: CertificateFiles,
    current: ArcSwap<Loaded>,
}

struct Loaded {
    chain: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    tls: Arc<ServerConfig>,
}

impl ServingCertificate {
    /// Reads the files.
    pub fn load(files: CertificateFiles) -> Result<Self, CertificateError> {
        let (chain, key) = read(&files)?;
        Ok(Self { current: ArcSwap::from_pointee(loaded(&files, chain, key)?), files })
    }

    /// The current TLS configuration.
    pub fn tls(&self) -> Arc<ServerConfig> {
        self.current.load().tls.clone()
    }

    /// Takes up what the files hold when they change, until `shutdown`. While they are not right, the last good certificate stays.
    pub async fn follow(self: Arc<Self>, shutdown: CancellationToken) {
        let mut told = String::new();
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = shutdown.cancelled() => return,
            }
            let looked = self.clone();
            let looked = tokio::task::spawn_blocking(move || looked.look_again()).await;
            let now = match looked {
                Ok(Ok(true)) => {
                    tracing::info!(path = %self.files.certificate.display(), "certificate of the bundle endpoint read anew");
                    String::new()
                }
                Ok(Ok(false)) => String::new(),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            // Once for each reason: a renewal may have been left half done.
            if now != told && !now.is_empty() {
                tracing::error!(error = now, "the bundle endpoint goes on with the certificate that it has");
            }
            told = now;
        }
    }

    /// Whether the files have changed, and were taken up.
    fn look_again(&self) -> Result<bool, CertificateError> {
        let (chain, key) = read(&self.files)?;
        let current = self.current.load();
        if current.chain == chain && *current.key == *key {
            return Ok(false);
        }
        self.current.store(Arc::new(loaded(&self.files, chain, key)?));
        Ok(true)
    }
}

fn read(files: &CertificateFiles) -> Result<(Vec<u8>, Zeroizing<Vec<u8>>), CertificateError> {
    let read = |path: &Path| read_pem(path).map_err(|e| CertificateError::new(path, e));
    Ok((read(&files.certificate)?, Zeroizing::new(read(&files.key)?)))
}

fn loaded(files: &CertificateFiles, chain: Vec<u8>, key: Zeroizing<Vec<u8>>) -> Result<Loaded, CertificateError> {
    let in_chain = |why: &dyn std::fmt::Display| CertificateError::new(&files.certificate, why);
    let in_key = |why: &dyn std::fmt::Display| CertificateError::new(&files.key, why);
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(&chain).collect::<Result<_, _>>().map_err(|e| in_chain(&e))?;
    if certificates.is_empty() {
        return Err(in_chain(&"it has no `-----BEGIN CERTIFICATE-----` block"));
    }
    let private = PrivateKeyDer::from_pem_slice(&key).map_err(|e| in_key(&format!("it holds no private key: {e}")))?;
    let private = rustls::crypto::aws_lc_rs::sign::any_supported_type(&private).map_err(|e| in_key(&e))?;
    let certified = CertifiedKey::new(certificates, private);
    certified.keys_match().map_err(|_| in_key(&"it is not the key of the certificate"))?;
    let tls = public_server_config(Arc::new(certified), &[b"http/1.1"]).map_err(|e| in_key(&e))?;
    Ok(Loaded { chain, key, tls: Arc::new(tls) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(files: &CertificateFiles, names: &[&str]) -> String {
        let key = rcgen::KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let certificate = rcgen::CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
        std::fs::write(&files.certificate, certificate.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        key.serialize_pem()
    }

    #[test]
    fn files_that_change_are_taken_up_and_wrong_ones_leave_the_last_good_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let files = CertificateFiles { certificate: dir.path().join("c.pem"), key: dir.path().join("k.pem") };
        let why = |files: &CertificateFiles| ServingCertificate::load(files.clone()).err().unwrap().to_string();
        assert!(why(&files).contains("c.pem"), "{}", why(&files));
        let first_key = write(&files, &["a.test"]);
        let serving = ServingCertificate::load(files.clone()).unwrap();
        assert!(!serving.look_again().unwrap(), "nothing has changed");
        let first = serving.tls();
        write(&files, &["b.test"]);
        assert!(serving.look_again().unwrap());
        let second = serving.tls();
        assert!(!Arc::ptr_eq(&first, &second));
        // The certificate is renewed, and its key is not yet.
        std::fs::write(&files.key, &first_key).unwrap();
        let half = serving.look_again().unwrap_err().to_string();
        assert!(half.contains("k.pem: it is not the key of the certificate"), "{half}");
        for wrong in ["", "-----BEGIN CERTIFICATE-----\n?"] {
            std::fs::write(&files.certificate, wrong).unwrap();
            assert!(serving.look_again().unwrap_err().to_string().contains("c.pem"));
        }
        assert!(Arc::ptr_eq(&second, &serving.tls()));
    }
}
