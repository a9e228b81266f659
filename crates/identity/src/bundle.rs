//! Trust bundles: the authorities of one trust domain, and sets of them that are never merged.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use spiffe::TrustDomain;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, ParsedExtension, X509Certificate};

use crate::ca;
use crate::path::MAX_CERTIFICATE_BYTES;
use crate::shown::shown;

/// Why a certificate cannot be an authority.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BundleError {
    /// No X.509 certificate.
    #[error("not an X.509 certificate: {0}")]
    Malformed(String),
    /// Not made for signing certificates (X509-SVID 3.1, RFC 5280 4.2.1.9).
    #[error("the certificate of `{}` cannot be an authority: {why}", shown(subject))]
    NotAnAuthority {
        /// Its subject, as the certificate has it.
        subject: String,
        /// What it lacks.
        why: &'static str,
    },
    /// The PEM text holds no certificate.
    #[error("no `-----BEGIN CERTIFICATE-----` block found")]
    Empty,
}

/// The key of an authority: SHA-256 of its certificate's `subjectPublicKeyInfo`.
///
/// An authority is told apart by its key and not by what its certificate says of itself: a key identifier is a text of the
/// issuer's choice, and a root that is issued again for the same key vouches for the same leaves.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AuthorityKey([u8; 32]);

impl AuthorityKey {
    fn of(cert: &X509Certificate<'_>) -> Self {
        Self(sha256(cert.public_key().raw))
    }

    /// The digest.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for AuthorityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AuthorityKey({})", hex::encode(self.0))
    }
}

/// Longest subject key identifier that names an authority, in bytes (SHA-512 of a key); a longer one is not used.
const MAX_KEY_ID_BYTES: usize = 64;

/// One X.509 authority: a root of trust.
#[derive(Clone)]
pub struct X509Authority {
    der: CertificateDer<'static>,
    anchor: TrustAnchor<'static>,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
    id: String,
    key: AuthorityKey,
    /// No longer to be used, still trusted: whoever holds an SVID under it renews at once.
    pub tainted: bool,
}

impl X509Authority {
    /// Parses and checks a CA certificate.
    pub fn from_der(der: impl Into<Vec<u8>>) -> Result<Self, BundleError> {
        let der = CertificateDer::from(der.into());
        if der.len() > MAX_CERTIFICATE_BYTES {
            return Err(BundleError::Malformed(format!("longer than {MAX_CERTIFICATE_BYTES} bytes")));
        }
        let (rest, cert) = X509Certificate::from_der(&der).map_err(|e| BundleError::Malformed(e.to_string()))?;
        if !rest.is_empty() {
            return Err(BundleError::Malformed("bytes behind the certificate".into()));
        }
        if let Some(why) = ca::root_fault(&cert) {
            return Err(BundleError::NotAnAuthority { subject: cert.subject().to_string(), why });
        }
        let anchor =
            webpki::anchor_from_trusted_cert(&der).map_err(|e| BundleError::Malformed(e.to_string()))?.to_owned();
        let (not_before, not_after) =
            (cert.validity().not_before.to_datetime(), cert.validity().not_after.to_datetime());
        let (id, key) = (authority_id(&cert), AuthorityKey::of(&cert));
        Ok(Self { anchor, not_before, not_after, id, key, tainted: false, der })
    }

    /// The certificate.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// The form that path validation wants.
    pub fn anchor(&self) -> &TrustAnchor<'static> {
        &self.anchor
    }

    /// Start of its validity.
    pub fn not_before(&self) -> OffsetDateTime {
        self.not_before
    }

    /// End of its validity.
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// Its subject key identifier in lower-case hex; this names an authority in every command. Derived from the key when
    /// the certificate has none, so that an authority always has a name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its key, which tells it apart from every other authority.
    pub fn key(&self) -> AuthorityKey {
        self.key
    }
}

impl PartialEq for X509Authority {
    fn eq(&self, other: &Self) -> bool {
        self.der == other.der && self.tainted == other.tainted
    }
}

impl Eq for X509Authority {}

impl fmt::Debug for X509Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "X509Authority({}, until {}, tainted {})", self.id, self.not_after, self.tainted)
    }
}

/// The name of an authority: its subject key identifier, or the leftmost 160 bits of SHA-256 of its key (RFC 7093 2,
/// method 1) where it has none that can be used.
fn authority_id(cert: &X509Certificate<'_>) -> String {
    let own = subject_key_id(cert).filter(|id| (1..=MAX_KEY_ID_BYTES).contains(&id.len()));
    own.map_or_else(|| hex::encode(&sha256(&cert.public_key().subject_public_key.data)[..20]), hex::encode)
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut sum = [0; 32];
    sum.copy_from_slice(digest(&SHA256, bytes).as_ref());
    sum
}

/// The raw subject key identifier of a certificate.
pub fn subject_key_id<'a>(cert: &X509Certificate<'a>) -> Option<&'a [u8]> {
    cert.extensions().iter().find_map(|e| match e.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0),
        _ => None,
    })
}

/// The raw authority key identifier of a certificate.
pub fn authority_key_id<'a>(cert: &X509Certificate<'a>) -> Option<&'a [u8]> {
    cert.extensions().iter().find_map(|e| match e.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|k| k.0),
        _ => None,
    })
}

/// Reads every certificate of a PEM text, in order.
pub fn certificates_from_pem(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, BundleError> {
    let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let certs = certs.map_err(|e| BundleError::Malformed(e.to_string()))?;
    if certs.is_empty() { Err(BundleError::Empty) } else { Ok(certs) }
}

/// The PEM form of certificates.
pub fn certificates_to_pem<'a>(certs: impl IntoIterator<Item = &'a [u8]>) -> String {
    certs.into_iter().map(|der| pem_block("CERTIFICATE", der)).collect()
}

/// One PEM block (RFC 7468).
pub fn pem_block(label: &str, der: &[u8]) -> String {
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = (0..body.len()).step_by(64).map(|at| &body[at..body.len().min(at + 64)]).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// The trust bundle of one trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct X509Bundle {
    /// Whose bundle it is.
    pub trust_domain: TrustDomain,
    /// Its authorities.
    pub authorities: Vec<X509Authority>,
    /// Changes with every update.
    pub sequence: u64,
    /// How often others should look for a new one.
    pub refresh_hint: Duration,
}

impl X509Bundle {
    /// A bundle of the certificates in a PEM text.
    pub fn from_pem(trust_domain: TrustDomain, pem: &[u8]) -> Result<Self, BundleError> {
        let authorities = certificates_from_pem(pem)?
            .iter()
            .map(|c| X509Authority::from_der(c.as_ref()))
            .collect::<Result<_, _>>()?;
        Ok(Self { trust_domain, authorities, sequence: 0, refresh_hint: Duration::ZERO })
    }

    /// Whether one of its authorities has this key. A peer whose path ended in it is vouched for as long as this holds.
    pub fn holds(&self, key: AuthorityKey) -> bool {
        self.authorities.iter().any(|a| a.key == key)
    }

    /// Its PEM form.
    pub fn to_pem(&self) -> String {
        certificates_to_pem(self.authorities.iter().map(|a| a.der().as_ref()))
    }

    /// All its certificates' DER, one after another (SPIFFE Workload API 5.2.1).
    pub fn concatenated_der(&self) -> Vec<u8> {
        self.authorities.iter().flat_map(|a| a.der().iter().copied()).collect()
    }
}

/// Bundles by trust domain. They are never merged, so that a foreign authority cannot vouch for a local ID.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BundleSet(HashMap<String, Arc<X509Bundle>>);

impl BundleSet {
    /// Adds or replaces a trust domain's bundle.
    pub fn insert(&mut self, bundle: X509Bundle) {
        self.0.insert(bundle.trust_domain.as_str().to_owned(), Arc::new(bundle));
    }

    /// The bundle of a trust domain.
    pub fn get(&self, trust_domain: &str) -> Option<&Arc<X509Bundle>> {
        self.0.get(trust_domain)
    }

    /// Whether a trust domain's bundle holds an authority with this key.
    pub fn holds(&self, trust_domain: &str, key: AuthorityKey) -> bool {
        self.get(trust_domain).is_some_and(|bundle| bundle.holds(key))
    }

    /// Takes a trust domain's bundle out.
    pub fn remove(&mut self, trust_domain: &str) {
        self.0.remove(trust_domain);
    }

    /// All bundles.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<X509Bundle>> {
        self.0.values()
    }
}

impl FromIterator<X509Bundle> for BundleSet {
    fn from_iter<I: IntoIterator<Item = X509Bundle>>(bundles: I) -> Self {
        let mut set = Self::default();
        bundles.into_iter().for_each(|b| set.insert(b));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_is_what_rfc_4648_and_7468_ask() {
        assert_eq!(pem_block("X", b"f"), "-----BEGIN X-----\nZg==\n-----END X-----\n");
        assert_eq!(pem_block("X", b"foobar"), "-----BEGIN X-----\nZm9vYmFy\n-----END X-----\n");
        let lines: Vec<_> = pem_block("X", &[0; 100]).lines().map(str::len).collect();
        assert_eq!(lines[1..4], [64, 64, 8]);
    }
}
