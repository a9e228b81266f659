//! Node attestation by proof of possession: sends a certificate chain and signs the server's nonce with its key.
//! SPIRE's wire format.

use std::path::{Path, PathBuf};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{self, EcdsaKeyPair, RsaKeyPair};
use base64::Engine;
use countersign_api::files::read_pem;
use countersign_identity::bundle::certificates_from_pem;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{Evidence, EvidenceError, NodeAttestor};

/// A node's certificate and its key, read for each attestation.
pub struct X509Pop {
    certificate: PathBuf,
    key: PathBuf,
}

impl X509Pop {
    /// PEM files: the certificate chain, leaf first, and its private key (PKCS#8).
    pub fn new(certificate: PathBuf, key: PathBuf) -> Self {
        Self { certificate, key }
    }
}

impl NodeAttestor for X509Pop {
    fn kind(&self) -> &'static str {
        "x509pop"
    }

    fn evidence(&self) -> Result<Box<dyn Evidence>, EvidenceError> {
        Ok(Box::new(Possession::load(&self.certificate, &self.key)?))
    }
}

/// A node's certificate chain and private key.
struct Possession {
    chain: Vec<CertificateDer<'static>>,
    key: Zeroizing<Vec<u8>>,
}

fn base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn challenge_error(why: impl ToString) -> EvidenceError {
    EvidenceError::Challenge(why.to_string())
}

impl Possession {
    /// Reads the PEM files. Errors: unreadable, no certificate, or no PKCS#8 key.
    fn load(certificate: &Path, key: &Path) -> Result<Self, EvidenceError> {
        let wrong = |path: &Path, why: String| EvidenceError::File { path: path.to_owned(), why };
        let pem = read_pem(certificate).map_err(|e| wrong(certificate, e.to_string()))?;
        let chain = certificates_from_pem(&pem).map_err(|e| wrong(certificate, e.to_string()))?;
        let pem = Zeroizing::new(read_pem(key).map_err(|e| wrong(key, e.to_string()))?);
        let key = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|e| {
            wrong(key, format!("no PKCS#8 private key ({e}); convert it with `openssl pkcs8 -topk8 -nocrypt`"))
        })?;
        Ok(Self { chain, key: Zeroizing::new(key.secret_pkcs8_der().to_vec()) })
    }
}

impl Evidence for Possession {
    /// The chain as sent to the server, JSON.
    fn payload(&self) -> Result<Vec<u8>, EvidenceError> {
        let certificates: Vec<_> = self.chain.iter().map(|c| base64(c)).collect();
        serde_json::to_vec(&json!({ "certificates": certificates })).map_err(challenge_error)
    }

    /// A signature over the server's nonce and our own.
    fn answer(&self, challenge: &[u8]) -> Result<Vec<u8>, EvidenceError> {
        let challenge: Value = serde_json::from_slice(challenge).map_err(challenge_error)?;
        let nonce = |kind: &str| {
            challenge[kind]["nonce"].as_str().and_then(|n| base64::engine::general_purpose::STANDARD.decode(n).ok())
        };
        // Our own nonce is signed too, so that the server cannot choose the exact bytes that this key signs.
        let mut ours = [0u8; 32];
        aws_lc_rs::rand::fill(&mut ours).map_err(|_| challenge_error("no randomness"))?;
        let random = SystemRandom::new();
        let answer = if let Some(theirs) = nonce("ecdsa_signature") {
            let message = [&theirs[..], &ours].concat();
            // The protocol always hashes with SHA-256, and the crypto library signs ECDSA with it on P-256 only.
            let pair = EcdsaKeyPair::from_pkcs8(&signature::ECDSA_P256_SHA256_FIXED_SIGNING, &self.key);
            let pair = pair.map_err(|_| challenge_error("the server asks for ECDSA, and the key is not on P-256"))?;
            let signature = pair.sign(&random, &message).map_err(|_| challenge_error("cannot sign"))?;
            let (r, s) = signature.as_ref().split_at(signature.as_ref().len() / 2);
            json!({ "ecdsa_signature": { "nonce": base64(&ours), "r": base64(r), "s": base64(s) } })
        } else if let Some(theirs) = nonce("rsa_signature") {
            let message = [&theirs[..], &ours].concat();
            let pair = RsaKeyPair::from_pkcs8(&self.key)
                .map_err(|_| challenge_error("the server asks for RSA, and the key is none"))?;
            let mut signature = vec![0; pair.public_modulus_len()];
            pair.sign(&signature::RSA_PSS_SHA256, &random, &message, &mut signature)
                .map_err(|_| challenge_error("cannot sign"))?;
            json!({ "rsa_signature": { "nonce": base64(&ours), "signature": base64(&signature) } })
        } else {
            return Err(challenge_error("the server's challenge is of an unknown kind"));
        };
        serde_json::to_vec(&answer).map_err(challenge_error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evidence_that_is_a_pipe_or_too_long_is_named_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (pipe, long) = (dir.path().join("pipe"), dir.path().join("long"));
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::write(&long, vec![b'x'; 2 << 20]).unwrap();
        for (path, why) in [(&pipe, "it is a pipe; expected a file"), (&long, "it is longer than 1048576 bytes")] {
            let said = X509Pop::new(path.clone(), path.clone()).evidence().err().unwrap().to_string();
            assert!(said.contains(&path.display().to_string()) && said.contains(why), "{said}");
        }
    }
}
