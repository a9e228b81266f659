//! An upstream CA from files: certificate, key, and the roots if the certificate is not one itself.

use std::time::Duration;

use async_trait::async_trait;
use countersign_identity::profile::{IssueError, RequestedKey, SigningAuthority, issue_intermediate};
use countersign_identity::{JwtAuthority, KeyType, TrustDomain, X509Authority};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::probe::probe;
use super::{UpstreamAuthority, UpstreamBundle, UpstreamError, UpstreamSigned, pem};
use crate::authority::validity_of;
use crate::config::UpstreamDisk;
use crate::key_manager::ephemeral;
use crate::signing_ca::request_intermediate;

/// Lifetime of the CA certificate that is signed once at start to test the files. It never leaves this process.
const PROBE_CA_TTL: Duration = Duration::from_secs(600);

/// Reads its files for each signature, so that a renewed upstream takes effect without a restart.
pub struct Disk(UpstreamDisk);

struct Loaded {
    signer: SigningAuthority,
    above: Vec<CertificateDer<'static>>,
    roots: Vec<X509Authority>,
    /// When the first certificate of the path ends, that of the root included.
    ends_at: OffsetDateTime,
}

impl Disk {
    /// Loads the files once, signs and verifies below them, so that mistakes show now and not in the first handshake.
    pub async fn new(
        files: UpstreamDisk,
        trust_domain: &TrustDomain,
        now: OffsetDateTime,
    ) -> Result<Self, UpstreamError> {
        let disk = Self(files);
        let failed = |why: &dyn std::fmt::Display| UpstreamError::in_file(&disk.0.certificate, why.to_string());
        let key = ephemeral(KeyType::EcP256).map_err(|e| failed(&e))?;
        let csr = request_intermediate(trust_domain, &*key).await.map_err(|e| failed(&e))?;
        let signed = disk.sign(trust_domain, &csr, PROBE_CA_TTL, now)?;
        probe(trust_domain, &signed, &key, now).await.map_err(|e| failed(&e))?;
        Ok(disk)
    }

    /// Signs the CA certificate that `csr` asks for, once its signature has proved that the sender holds the key.
    fn sign(
        &self,
        trust_domain: &TrustDomain,
        csr: &[u8],
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<UpstreamSigned, UpstreamError> {
        let loaded = self.load(now)?;
        let refused = |why: IssueError| UpstreamError::Refused { upstream: self.name(), why: why.to_string() };
        let key = RequestedKey::from_csr(csr).map_err(refused)?;
        // Nothing below is accepted longer than all above it.
        let left = Duration::try_from(loaded.ends_at - now).unwrap_or_default();
        let own = issue_intermediate(trust_domain, &key, ttl.min(left), now, &loaded.signer).map_err(refused)?;
        Ok(UpstreamSigned { chain: std::iter::once(own).chain(loaded.above).collect(), roots: loaded.roots })
    }

    fn load(&self, now: OffsetDateTime) -> Result<Loaded, UpstreamError> {
        let path = &self.0.certificate;
        let wrong = |why: String| UpstreamError::in_file(path, why);
        let mut chain = pem::certificates(path)?;
        check_chain(&chain, now).map_err(wrong)?;
        let key = pem::key(&self.0.key)?;
        let signer = SigningAuthority::new(chain[0].clone(), vec![], &key)
            .map_err(|e| wrong(format!("{e} (key: {})", self.0.key.display())))?;
        let roots = self.roots_of(chain.last())?;
        if self.0.bundle.is_none() {
            chain.pop();
        }
        // A peer's path ends at the first certificate that it trusts. That one and those above it are not sent, because
        // certificates outside of the path are rejected.
        let end = chain.iter().position(|c| roots.iter().any(|r| r.der() == c)).unwrap_or(chain.len());
        let root = chain.get(end).map(|c| validity_of(c).1).or_else(|| end_of_root(&roots, chain.last()));
        chain.truncate(end);
        let path = chain.iter().map(|c| validity_of(c).1).chain(root);
        let ends_at = path.min().unwrap_or_else(|| signer.not_after());
        Ok(Loaded { signer, above: chain, roots, ends_at })
    }

    /// The roots of the bundle, or the last certificate of the chain if there is none.
    fn roots_of(&self, last: Option<&CertificateDer<'static>>) -> Result<Vec<X509Authority>, UpstreamError> {
        let (path, roots) = match (&self.0.bundle, last) {
            (Some(bundle), _) => (bundle, pem::certificates(bundle)?),
            (None, Some(last)) if is_self_signed(last) => (&self.0.certificate, vec![last.clone()]),
            (None, _) => {
                let why = "the last certificate is not self-signed, so the root is unknown; name the file with the roots as `bundle`";
                return Err(UpstreamError::in_file(&self.0.certificate, why.into()));
            }
        };
        let parsed = roots.iter().map(|der| X509Authority::from_der(der.to_vec()));
        parsed.map(|root| root.map_err(|e| UpstreamError::in_file(path, e.to_string()))).collect()
    }
}

/// When the root ends that has signed this certificate, or that the upstream itself is.
fn end_of_root(roots: &[X509Authority], below: Option<&CertificateDer<'_>>) -> Option<OffsetDateTime> {
    let is_above = |root: &&X509Authority| below.is_none_or(|der| root.has_issued(der));
    roots.iter().filter(is_above).map(X509Authority::not_after).max()
}

fn is_self_signed(cert: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(cert).is_ok_and(|(_, c)| c.issuer() == c.subject())
}

/// Finds errors that would only show in the first handshake: CA flag, key usage, path length, time.
fn check_chain(chain: &[CertificateDer<'_>], now: OffsetDateTime) -> Result<(), String> {
    pem::check_order(chain)?;
    for (above, der) in chain.iter().enumerate() {
        let (_, cert) = X509Certificate::from_der(der).map_err(|e| e.to_string())?;
        let subject = cert.subject();
        X509Authority::from_der(der.to_vec()).map_err(|e| e.to_string())?;
        let validity = cert.validity();
        if validity.not_after.to_datetime() <= now {
            return Err(format!("the CA certificate `{subject}` expired at {}", validity.not_after.to_datetime()));
        }
        if validity.not_before.to_datetime() > now {
            return Err(format!(
                "the CA certificate `{subject}` is not valid before {}",
                validity.not_before.to_datetime()
            ));
        }
        // Our own CA is below the first certificate, so the first one needs room for one CA, the next for two, and so
        // on.
        let limit = cert.basic_constraints().ok().flatten().and_then(|bc| bc.value.path_len_constraint);
        let needed = u32::try_from(above + 1).unwrap_or(u32::MAX);
        if limit.is_some_and(|limit| limit < needed) {
            return Err(format!(
                "path length: `{subject}` allows {} CA certificates below it, and Countersign's own CA needs {needed}; \
                 issue it again with pathlen:{needed} or without the constraint",
                limit.unwrap_or_default()
            ));
        }
    }
    Ok(())
}

#[async_trait]
impl UpstreamAuthority for Disk {
    fn name(&self) -> String {
        self.0.certificate.display().to_string()
    }

    async fn sign_intermediate(
        &self,
        trust_domain: &TrustDomain,
        csr: &[u8],
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<UpstreamSigned, UpstreamError> {
        self.sign(trust_domain, csr, ttl, now)
    }

    /// Of a bundle alone: it is the list of roots that its writer has to vouch for. That a chain ends with a root is judged with each
    /// signature, together with its order and its key.
    async fn bundle(&self) -> Result<UpstreamBundle, UpstreamError> {
        let roots = if self.0.bundle.is_some() { self.roots_of(None)? } else { vec![] };
        Ok(UpstreamBundle { roots, ..UpstreamBundle::default() })
    }

    async fn publish_jwt_key(&self, _: &JwtAuthority) -> Result<Option<Vec<JwtAuthority>>, UpstreamError> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
