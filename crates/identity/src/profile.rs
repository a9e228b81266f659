//! What we issue: the exact content of CA certificates, X509-SVIDs and JWT-SVIDs ([`jwt`]).
//!
//! Whatever is signed by a key of the key manager is made in two steps (`unsigned_…`, then [`Unsigned::signed`]), because such a key
//! may answer late or not at all. `issue_…` do both with a key that is at hand.

mod authority;
pub mod jwt;
mod unsigned;

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use spiffe::{SpiffeId, TrustDomain};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::key::PrivateKey;
use crate::local_key::LocalKey;
use crate::rotation::validity;
use crate::shown::shown;
use crate::signature::PublicSide;
use crate::svid::LeafFacts;

pub use authority::{CaCertificate, SigningAuthority};
pub use unsigned::Unsigned;

use authority::sign;
use unsigned::Awaited;

/// Longest certificate signing request that is parsed, in bytes.
pub const MAX_CSR_BYTES: usize = 16 * 1024;

/// Why no certificate was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The request cannot be parsed, its signature is wrong, or it is too long.
    #[error("malformed CSR: {0}")]
    Csr(String),
    /// A name cannot be encoded in a certificate.
    #[error("`{}` does not fit into a certificate: {why}", shown(name))]
    Name {
        /// The SPIFFE ID, DNS name or trust domain, unescaped; the message escapes it.
        name: String,
        /// The encoder's reason.
        why: String,
    },
    /// The signing certificate expired at this time.
    #[error("the signing authority expired at {0}; prepare and activate a new one")]
    AuthorityExpired(OffsetDateTime),
    /// The crypto library failed to sign.
    #[error("cannot sign: {0}")]
    Sign(String),
    /// The authority's own certificate or key is unreadable or they do not match.
    #[error("the authority's certificate cannot be used: {0}")]
    Authority(String),
}

/// A public key from a signing request whose signature was checked.
pub struct RequestedKey {
    key: rcgen::PublicKey,
    uri: Option<String>,
    dns_names: Vec<String>,
}

impl RequestedKey {
    /// Parses a PKCS#10 request and checks its signature, which proves that the sender holds the key.
    pub fn from_csr(der: &[u8]) -> Result<Self, IssueError> {
        if der.len() > MAX_CSR_BYTES {
            return Err(IssueError::Csr(format!("longer than {MAX_CSR_BYTES} bytes")));
        }
        let csr = CertificateSigningRequestDer::from(der);
        let csr = rcgen::CertificateSigningRequestParams::from_der(&csr).map_err(|e| IssueError::Csr(e.to_string()))?;
        let mut uri = None;
        let mut dns_names = vec![];
        for name in &csr.params.subject_alt_names {
            match name {
                // An X509-SVID holds exactly one URI name (X509-SVID 2), so it would be unclear which identity is
                // meant.
                SanType::URI(_) if uri.is_some() => return Err(IssueError::Csr("more than one URI name".into())),
                SanType::URI(u) => uri = Some(u.as_str().to_owned()),
                SanType::DnsName(n) => dns_names.push(n.as_str().to_owned()),
                _ => {}
            }
        }
        Ok(Self { key: csr.public_key, uri, dns_names })
    }

    /// The URI name that the request asks for; `None` if it names none.
    pub fn uri(&self) -> Option<&str> {
        self.uri.as_deref()
    }

    /// The DNS names that the request asks for; empty if none.
    pub fn dns_names(&self) -> &[String] {
        &self.dns_names
    }
}

/// A PKCS#10 request in DER for an SVID, signed by `key`. Without an ID the signer chooses it.
pub fn request(key: &PrivateKey, id: Option<&SpiffeId>) -> Result<Vec<u8>, IssueError> {
    let key = LocalKey::new(key).map_err(|e| IssueError::Sign(e.to_string()))?;
    sign(&key, &unsigned_request(key.public_side(), id)?)
}

/// A PKCS#10 request in DER for an intermediate CA of `td`, signed by `key`. As in SPIRE, its URI name is the trust
/// domain's ID.
pub fn request_intermediate(td: &TrustDomain, key: &PrivateKey) -> Result<Vec<u8>, IssueError> {
    request(key, Some(&id_of(td)?))
}

/// [`request_intermediate`] for a key that signs later.
pub fn unsigned_intermediate_request(td: &TrustDomain, key: PublicSide<'_>) -> Result<Unsigned, IssueError> {
    unsigned_request(key, Some(&id_of(td)?))
}

fn unsigned_request(key: PublicSide<'_>, id: Option<&SpiffeId>) -> Result<Unsigned, IssueError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = subject();
    if let Some(id) = id {
        params.subject_alt_names = vec![uri_san(id)?];
    }
    let csr = params.serialize_request(&Awaited::new(key)?).map_err(|e| IssueError::Sign(e.to_string()))?;
    Unsigned::from_der(csr.der())
}

/// A signed certificate with the facts that the audit log records.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The leaf, then the authority's intermediates, each in DER.
    pub chain: Vec<CertificateDer<'static>>,
    /// Serial number, validity and issuer of the leaf.
    pub facts: LeafFacts,
}

/// Issues a self-signed root CA for a trust domain, valid for `ttl` from `now`.
pub fn issue_root(
    td: &TrustDomain,
    key: &PrivateKey,
    ttl: Duration,
    now: OffsetDateTime,
) -> Result<CertificateDer<'static>, IssueError> {
    let key = LocalKey::new(key).map_err(|e| IssueError::Sign(e.to_string()))?;
    Ok(sign(&key, &unsigned_root(td, key.public_side(), ttl, now)?)?.into())
}

/// [`issue_root`] for a key that signs later.
pub fn unsigned_root(
    td: &TrustDomain,
    key: PublicSide<'_>,
    ttl: Duration,
    now: OffsetDateTime,
) -> Result<Unsigned, IssueError> {
    let cert = ca_params(td, ttl, now, None)?.self_signed(&Awaited::new(key)?);
    Unsigned::from_der(cert.map_err(|e| IssueError::Sign(e.to_string()))?.der())
}

/// Issues an intermediate CA for a trust domain under an upstream authority, valid no longer than that authority.
/// Errors: [`IssueError::Csr`] if `key` was requested for anything but this trust domain.
pub fn issue_intermediate(
    td: &TrustDomain,
    key: &RequestedKey,
    ttl: Duration,
    now: OffsetDateTime,
    upstream: &SigningAuthority,
) -> Result<CertificateDer<'static>, IssueError> {
    let expected = id_of(td)?.to_string();
    if key.uri() != Some(expected.as_str()) {
        let found = key.uri().map_or_else(|| "no URI name".into(), |uri| format!("`{}`", shown(uri)));
        return Err(IssueError::Csr(format!("expected a request for `{expected}`, found {found}")));
    }
    let cert = unsigned_intermediate(td, key, ttl, now, upstream.ca())?;
    Ok(upstream.sign(&cert)?.into())
}

/// A CA certificate for a trust domain under one whose key signs later, valid no longer than that one. What the request says apart from
/// its key is not looked at.
pub fn unsigned_intermediate(
    td: &TrustDomain,
    key: &RequestedKey,
    ttl: Duration,
    now: OffsetDateTime,
    upstream: &CaCertificate,
) -> Result<Unsigned, IssueError> {
    if upstream.not_after() <= now {
        return Err(IssueError::AuthorityExpired(upstream.not_after()));
    }
    let mut params = ca_params(td, ttl, now, Some(upstream.not_after()))?;
    params.use_authority_key_identifier_extension = true;
    let cert = params.signed_by(&key.key, &upstream.issuer).map_err(|e| IssueError::Sign(e.to_string()))?;
    let (_, parsed) = X509Certificate::from_der(cert.der()).map_err(|e| IssueError::Sign(e.to_string()))?;
    let (_, above) =
        X509Certificate::from_der(upstream.certificate()).map_err(|e| IssueError::Authority(e.to_string()))?;
    // rcgen encodes the issuer's name anew, and verifiers compare names byte for byte: on a mismatch no path would
    // build.
    if parsed.issuer().as_raw() != above.subject().as_raw() {
        return Err(IssueError::Authority(format!(
            "the subject `{}` cannot be repeated byte for byte as an issuer; use an upstream CA with a subject that names each attribute once",
            above.subject()
        )));
    }
    Unsigned::from_der(cert.der())
}

/// The content of a leaf.
pub struct LeafRequest<'a> {
    /// The SPIFFE ID that the leaf certifies.
    pub id: &'a SpiffeId,
    /// DNS names; the first is also the common name. May be empty.
    pub dns_names: &'a [String],
    /// The public key, from a request whose signature was checked.
    pub key: &'a RequestedKey,
    /// Lifetime from now on, shortened to the authority's own end.
    pub ttl: Duration,
}

/// Issues an X509-SVID. Errors: [`IssueError::AuthorityExpired`], [`IssueError::Name`], [`IssueError::Sign`].
pub fn issue_leaf(
    req: &LeafRequest<'_>,
    authority: &SigningAuthority,
    now: OffsetDateTime,
) -> Result<Issued, IssueError> {
    authority.ca().issued(authority.sign(&unsigned_leaf(req, authority.ca(), now)?)?)
}

/// [`issue_leaf`] under a CA certificate whose key signs later; [`CaCertificate::issued`] takes the signed leaf.
pub fn unsigned_leaf(
    req: &LeafRequest<'_>,
    authority: &CaCertificate,
    now: OffsetDateTime,
) -> Result<Unsigned, IssueError> {
    if authority.not_after() <= now {
        return Err(IssueError::AuthorityExpired(authority.not_after()));
    }
    let (not_before, not_after) = validity(now, req.ttl, Some(authority.not_after()));
    let mut names = vec![uri_san(req.id)?];
    let mut subject = subject();
    for (n, name) in req.dns_names.iter().enumerate() {
        let wrong = |e: rcgen::Error| IssueError::Name { name: name.clone(), why: e.to_string() };
        names.push(SanType::DnsName(name.as_str().try_into().map_err(wrong)?));
        if n == 0 {
            subject.push(DnType::CommonName, name.as_str());
        }
    }
    let mut params = CertificateParams::default();
    params.not_before = not_before;
    params.not_after = not_after;
    params.serial_number = Some(random_serial()?);
    params.subject_alt_names = names;
    params.distinguished_name = subject;
    // X509-SVID 4.1 and 4.3: not a CA, digitalSignature set, keyCertSign and cRLSign unset.
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages =
        vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment, KeyUsagePurpose::KeyAgreement];
    // X509-SVID 4.4: both or none, because a workload is a client and a server with the same SVID.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.key_identifier_method = rcgen::KeyIdMethod::Sha256;
    let leaf = params.signed_by(&req.key.key, &authority.issuer).map_err(|e| IssueError::Sign(e.to_string()))?;
    Unsigned::from_der(leaf.der())
}

impl CaCertificate {
    /// A leaf that was made for this CA certificate and signed by its key, with its chain. Errors: it cannot be parsed.
    pub fn issued(&self, leaf: Vec<u8>) -> Result<Issued, IssueError> {
        let facts =
            LeafFacts::of_first(&leaf).ok_or_else(|| IssueError::Sign("the certificate is malformed".into()))?;
        let chain = std::iter::once(leaf.into()).chain(self.chain().iter().cloned()).collect();
        Ok(Issued { chain, facts })
    }
}

fn ca_params(
    td: &TrustDomain,
    ttl: Duration,
    now: OffsetDateTime,
    latest: Option<OffsetDateTime>,
) -> Result<CertificateParams, IssueError> {
    let (not_before, not_after) = validity(now, ttl, latest);
    let serial = random_serial()?;
    let mut subject = subject();
    // A serial number in the subject gives two authorities of one trust domain different names.
    let decimal = u128::from_be_bytes(serial.to_bytes().try_into().unwrap_or([0; 16])).to_string();
    let printable = decimal.as_str().try_into().map_err(|e: rcgen::Error| IssueError::Sign(e.to_string()))?;
    subject.push(DnType::CustomDnType(vec![2, 5, 4, 5]), DnValue::PrintableString(printable));
    let mut params = CertificateParams::default();
    params.not_before = not_before;
    params.not_after = not_after;
    params.serial_number = Some(serial);
    params.subject_alt_names = vec![uri_san(&id_of(td)?)?];
    params.distinguished_name = subject;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// The ID of the trust domain itself, which its CA certificates carry (X509-SVID 3.1).
fn id_of(td: &TrustDomain) -> Result<SpiffeId, IssueError> {
    SpiffeId::new(format!("spiffe://{td}")).map_err(|e| IssueError::Name { name: td.to_string(), why: e.to_string() })
}

fn subject() -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CountryName, "US");
    name.push(DnType::OrganizationName, "Countersign");
    name
}

fn uri_san(id: &SpiffeId) -> Result<SanType, IssueError> {
    let uri = id.to_string();
    let name = uri
        .as_str()
        .try_into()
        .map_err(|e: rcgen::Error| IssueError::Name { name: uri.clone(), why: e.to_string() })?;
    Ok(SanType::URI(name))
}

/// A serial number of 16 bytes with 126 random bits, positive and never zero (RFC 5280 4.1.2.2).
fn random_serial() -> Result<SerialNumber, IssueError> {
    let mut bytes = [0u8; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| IssueError::Sign("no randomness".into()))?;
    // Top bit clear: positive. Next bit set: no leading zero byte, so the length never varies.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

#[cfg(test)]
mod tests;
