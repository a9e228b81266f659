//! Trust bundles: the X.509 and JWT authorities of one trust domain, and sets of bundles that are never merged.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use serde_json::json;
use spiffe::TrustDomain;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, ParsedExtension, X509Certificate};

use crate::ca;
use crate::jwt_authority::JwtAuthority;
use crate::path::MAX_CERTIFICATE_BYTES;
use crate::shown::shown;

/// Why a certificate cannot be an authority.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BundleError {
    /// The bytes are not an X.509 certificate, are too long, or have trailing bytes. Holds the parser's reason.
    #[error("not an X.509 certificate: {0}")]
    Malformed(String),
    /// The certificate may not sign others (X509-SVID 3.1, RFC 5280 4.2.1.9).
    #[error("the certificate of `{}` cannot be an authority: {why}", shown(subject))]
    NotAnAuthority {
        /// The certificate's subject, unescaped; the message escapes it.
        subject: String,
        /// The rule that the certificate breaks.
        why: &'static str,
    },
    /// The PEM text holds no certificate.
    #[error("no `-----BEGIN CERTIFICATE-----` block found")]
    Empty,
}

/// The key of an authority: SHA-256 of its certificate's `subjectPublicKeyInfo`.
///
/// Authorities are identified by their key, not by what a certificate says about itself: a key identifier is text of
/// the issuer's choice, and a root that is reissued for the same key vouches for the same leaves.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AuthorityKey([u8; 32]);

impl AuthorityKey {
    fn of(cert: &X509Certificate<'_>) -> Self {
        Self::of_public_key(cert.public_key().raw)
    }

    /// The digest of a key in PKIX DER (RFC 5280, 4.1.2.7).
    pub fn of_public_key(der: &[u8]) -> Self {
        Self(sha256(der))
    }

    /// The SHA-256 digest of the `subjectPublicKeyInfo`.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for AuthorityKey {
    /// In lower-case hex.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl FromStr for AuthorityKey {
    type Err = hex::FromHexError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut key = [0; 32];
        hex::decode_to_slice(text, &mut key)?;
        Ok(Self(key))
    }
}

impl fmt::Debug for AuthorityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AuthorityKey({self})")
    }
}

/// Longest subject key identifier that is used as an authority's ID, in bytes (SHA-512 of a key). A longer one is
/// ignored.
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
    subject: Box<[u8]>,
    /// Still trusted, but no longer used for signing: agents and workloads with an SVID under it renew at once.
    pub tainted: bool,
}

impl X509Authority {
    /// Parses a DER certificate and checks that it may be a root: CA flag, key usage, name constraints, critical
    /// extensions.
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
        let subject = cert.subject().as_raw().into();
        Ok(Self { anchor, not_before, not_after, id, key, subject, tainted: false, der })
    }

    /// The CA certificate in DER.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// Its key as PKIX DER.
    pub fn public_key(&self) -> Vec<u8> {
        X509Certificate::from_der(&self.der).map_or_else(|_| vec![], |(_, cert)| cert.public_key().raw.to_vec())
    }

    /// The form that webpki takes for path validation.
    pub fn anchor(&self) -> &TrustAnchor<'static> {
        &self.anchor
    }

    /// Start of the certificate's validity (inclusive).
    pub fn not_before(&self) -> OffsetDateTime {
        self.not_before
    }

    /// End of the certificate's validity (inclusive).
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// The subject key identifier in lower-case hex: the authority's ID in every command. Derived from the key when the
    /// certificate has none or one that is too long, so every authority has an ID.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The digest of its public key, which identifies the authority everywhere inside the code.
    pub fn key(&self) -> AuthorityKey {
        self.key
    }

    /// The name of its certificate's subject in DER.
    pub fn subject(&self) -> &[u8] {
        &self.subject
    }

    /// Whether a certificate names this authority as its issuer and has its signature. A root and its successor often have one name.
    pub fn has_issued(&self, der: &CertificateDer<'_>) -> bool {
        let (Ok((_, below)), Ok((_, own))) = (X509Certificate::from_der(der), X509Certificate::from_der(&self.der))
        else {
            return false;
        };
        let key = &own.public_key().subject_public_key.data;
        let (message, signature) = (below.tbs_certificate.as_ref(), &below.signature_value.data);
        // An algorithm for another kind of key fails, whatever is signed.
        own.subject() == below.issuer()
            && webpki::ALL_VERIFICATION_ALGS.iter().any(|a| a.verify_signature(key, message, signature).is_ok())
    }

    /// Whether `chain`, a CA certificate with those above it, depends on this authority's key.
    pub fn is_above(&self, chain: &[CertificateDer<'_>]) -> bool {
        let has_key = |der| X509Certificate::from_der(der).is_ok_and(|(_, c)| AuthorityKey::of(&c) == self.key);
        chain.iter().any(|der| has_key(der) || self.has_issued(der))
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

/// An authority's ID: its subject key identifier, or the leftmost 160 bits of SHA-256 of its key (RFC 7093 2, method 1)
/// when the certificate has no usable one.
fn authority_id(cert: &X509Certificate<'_>) -> String {
    let own = subject_key_id(cert).filter(|id| (1..=MAX_KEY_ID_BYTES).contains(&id.len()));
    own.map_or_else(|| hex::encode(&sha256(&cert.public_key().subject_public_key.data)[..20]), hex::encode)
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut sum = [0; 32];
    sum.copy_from_slice(digest(&SHA256, bytes).as_ref());
    sum
}

/// The subject key identifier of a certificate, raw bytes; `None` if the extension is missing or malformed.
pub fn subject_key_id<'a>(cert: &X509Certificate<'a>) -> Option<&'a [u8]> {
    cert.extensions().iter().find_map(|e| match e.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0),
        _ => None,
    })
}

/// The authority key identifier of a certificate, raw bytes; `None` if it is missing, malformed or holds no key
/// identifier.
pub fn authority_key_id<'a>(cert: &X509Certificate<'a>) -> Option<&'a [u8]> {
    cert.extensions().iter().find_map(|e| match e.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|k| k.0),
        _ => None,
    })
}

/// Reads every certificate of a PEM text, in order. Errors: [`BundleError::Empty`] if there is none,
/// [`BundleError::Malformed`].
pub fn certificates_from_pem(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, BundleError> {
    let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let certs = certs.map_err(|e| BundleError::Malformed(e.to_string()))?;
    if certs.is_empty() { Err(BundleError::Empty) } else { Ok(certs) }
}

/// One PEM block per DER certificate, in order.
pub fn certificates_to_pem<'a>(certs: impl IntoIterator<Item = &'a [u8]>) -> String {
    certs.into_iter().map(|der| pem_block("CERTIFICATE", der)).collect()
}

/// One PEM block: Base64 in lines of 64 characters (RFC 7468).
pub fn pem_block(label: &str, der: &[u8]) -> String {
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = (0..body.len()).step_by(64).map(|at| &body[at..body.len().min(at + 64)]).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// The trust bundle of one trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustBundle {
    /// The trust domain that the authorities vouch for.
    pub trust_domain: TrustDomain,
    /// All trusted roots of X.509-SVIDs, tainted ones included.
    pub authorities: Vec<X509Authority>,
    /// All trusted keys of JWT-SVIDs, tainted ones included, each with a key ID of its own.
    pub jwt_authorities: Vec<JwtAuthority>,
    /// Version of the bundle: changes with every update.
    pub sequence: u64,
    /// How often consumers should fetch the bundle again. Zero means no hint.
    pub refresh_hint: Duration,
}

impl TrustBundle {
    /// A bundle that vouches for nobody, with sequence 0 and no refresh hint.
    pub fn empty(trust_domain: TrustDomain) -> Self {
        let (authorities, jwt_authorities) = (vec![], vec![]);
        Self { trust_domain, authorities, jwt_authorities, sequence: 0, refresh_hint: Duration::ZERO }
    }

    /// Whether it vouches for nobody.
    pub fn is_empty(&self) -> bool {
        self.authorities.is_empty() && self.jwt_authorities.is_empty()
    }

    /// All JWT authorities that have not ended as a set of JSON Web Keys (SPIFFE Workload API 6.2.3). As SPIRE's, its keys have no
    /// `use`: general libraries take no key for signatures that has the standard's.
    pub fn jwks(&self, now: OffsetDateTime) -> String {
        let keys: Vec<_> = self.jwt_authorities.iter().filter(|a| !a.is_over(now)).map(JwtAuthority::jwk).collect();
        json!({ "keys": keys }).to_string()
    }

    /// Parses a bundle from PEM certificates, with sequence 0 and no refresh hint. Fails if one of them may not be an
    /// authority.
    pub fn from_pem(trust_domain: TrustDomain, pem: &[u8]) -> Result<Self, BundleError> {
        let authorities = certificates_from_pem(pem)?
            .iter()
            .map(|c| X509Authority::from_der(c.as_ref()))
            .collect::<Result<_, _>>()?;
        Ok(Self { authorities, ..Self::empty(trust_domain) })
    }

    /// Whether one of the authorities has this key. A peer whose path ended in it is trusted for as long as this is
    /// true.
    pub fn holds(&self, key: AuthorityKey) -> bool {
        self.authorities.iter().any(|a| a.key == key)
    }

    /// All authorities as PEM blocks.
    pub fn to_pem(&self) -> String {
        certificates_to_pem(self.authorities.iter().map(|a| a.der().as_ref()))
    }

    /// All authorities' DER, concatenated (SPIFFE Workload API 5.2.1).
    pub fn concatenated_der(&self) -> Vec<u8> {
        self.authorities.iter().flat_map(|a| a.der().iter().copied()).collect()
    }
}

/// Bundles by trust domain. They are never merged, so a foreign authority cannot vouch for a local ID.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BundleSet(HashMap<String, Arc<TrustBundle>>);

impl BundleSet {
    /// Adds or replaces a trust domain's bundle.
    pub fn insert(&mut self, bundle: TrustBundle) {
        self.0.insert(bundle.trust_domain.as_str().to_owned(), Arc::new(bundle));
    }

    /// Adds or replaces a trust domain's bundle, shared with others.
    pub fn share(&mut self, bundle: Arc<TrustBundle>) {
        self.0.insert(bundle.trust_domain.as_str().to_owned(), bundle);
    }

    /// The bundle of a trust domain; `None` if this set has none.
    pub fn get(&self, trust_domain: &str) -> Option<&Arc<TrustBundle>> {
        self.0.get(trust_domain)
    }

    /// Whether the trust domain's bundle holds an authority with this key; false if there is no bundle.
    pub fn holds(&self, trust_domain: &str, key: AuthorityKey) -> bool {
        self.get(trust_domain).is_some_and(|bundle| bundle.holds(key))
    }

    /// Removes the bundle of a trust domain, if present.
    pub fn remove(&mut self, trust_domain: &str) {
        self.0.remove(trust_domain);
    }

    /// All bundles, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<TrustBundle>> {
        self.0.values()
    }
}

impl FromIterator<TrustBundle> for BundleSet {
    fn from_iter<I: IntoIterator<Item = TrustBundle>>(bundles: I) -> Self {
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
