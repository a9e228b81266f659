//! From a chain that somebody sent to the path that was verified: the only source of facts about who vouches for a leaf.
//!
//! Whatever is said about a peer's authorities is read from a [`TrustedPath`], never from the certificates as sent: these
//! are bytes of the peer's choice.

use std::cell::Cell;
use std::time::Duration;

use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundle::X509Authority;
use crate::ca;
use crate::verify::PeerRole;

/// Most certificates in a chain: a leaf, the six intermediates that path building goes through, and a root.
pub const MAX_CERTIFICATES: usize = 8;
/// Longest certificate that is read, in bytes.
pub const MAX_CERTIFICATE_BYTES: usize = 16 * 1024;
/// Longest chain that is read, in bytes.
pub const MAX_CHAIN_BYTES: usize = 48 * 1024;

/// Why a chain leads to no authority.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum PathError {
    /// There is no certificate.
    #[error("there is no certificate")]
    Empty,
    /// More, or longer ones, than are read.
    #[error("the chain is too long: {0}")]
    TooLong(String),
    /// No path through what was sent ends in a trusted authority.
    #[error("{0}")]
    Untrusted(String),
    /// Certificates that are in no path to the authority: they prove nothing, and nothing may be read from them.
    #[error(
        "{0} of the certificates sent are not part of the path to the authority; send the leaf and what is above it"
    )]
    Unused(usize),
}

/// A path that was verified: from a leaf to an authority that is trusted.
#[derive(Debug, Clone)]
pub struct TrustedPath<'a> {
    /// The intermediates of the path, the leaf's issuer first. Empty directly below the authority.
    pub intermediates: Vec<CertificateDer<'a>>,
    /// Where the path ends.
    pub anchor: &'a X509Authority,
}

/// Bounds a chain before anything of it is parsed.
pub fn check_bounds(chain: &[CertificateDer<'_>]) -> Result<(), PathError> {
    if chain.is_empty() {
        return Err(PathError::Empty);
    }
    if chain.len() > MAX_CERTIFICATES {
        return Err(PathError::TooLong(format!("{} certificates, at most {MAX_CERTIFICATES} are read", chain.len())));
    }
    if let Some(long) = chain.iter().find(|c| c.len() > MAX_CERTIFICATE_BYTES) {
        return Err(PathError::TooLong(format!(
            "a certificate of {} bytes, at most {MAX_CERTIFICATE_BYTES} are read",
            long.len()
        )));
    }
    let bytes: usize = chain.iter().map(|c| c.len()).sum();
    if bytes > MAX_CHAIN_BYTES {
        return Err(PathError::TooLong(format!("{bytes} bytes, at most {MAX_CHAIN_BYTES} are read")));
    }
    Ok(())
}

/// Finds the path from a chain's leaf (first) to one of the authorities that are valid at a time, and verifies it
/// (RFC 5280 6.1). Each certificate that was sent must be part of it.
pub fn trusted_path<'a>(
    chain: &'a [CertificateDer<'a>],
    authorities: impl IntoIterator<Item = &'a X509Authority>,
    at: OffsetDateTime,
    role: PeerRole,
) -> Result<TrustedPath<'a>, PathError> {
    check_bounds(chain)?;
    let (leaf, sent) = chain.split_first().ok_or(PathError::Empty)?;
    let valid: Vec<&X509Authority> =
        authorities.into_iter().filter(|a| a.not_before() <= at && at <= a.not_after()).collect();
    let anchors: Vec<TrustAnchor<'a>> = valid.iter().map(|a| a.anchor().clone()).collect();
    let usage = match role {
        PeerRole::Client => webpki::KeyUsage::client_auth(),
        PeerRole::Server => webpki::KeyUsage::server_auth(),
    };
    // Asked of each candidate: when an intermediate may not sign, another path through the same certificates is tried.
    let unfit = Cell::new(None);
    let every_issuer_may_sign = |path: &webpki::VerifiedPath<'_>| {
        let fault = path.intermediate_certificates().find_map(|ca| intermediate_fault(&ca.der()));
        fault.map_or(Ok(()), |why| {
            unfit.set(Some(why));
            Err(webpki::Error::UnknownIssuer)
        })
    };
    let untrusted = |e: webpki::Error| {
        PathError::Untrusted(
            unfit.get().map_or_else(|| e.to_string(), |why| format!("an intermediate CA is unfit: {why}")),
        )
    };
    let leaf = webpki::EndEntityCert::try_from(leaf).map_err(untrusted)?;
    let verified = leaf
        .verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            sent,
            unix_time(at),
            usage,
            None,
            Some(&every_issuer_may_sign),
        )
        .map_err(untrusted)?;
    let position = anchors.iter().position(|a| std::ptr::eq(a, verified.anchor()));
    let anchor = *position
        .and_then(|n| valid.get(n))
        .ok_or_else(|| PathError::Untrusted("the path ends in an authority that was not given".into()))?;
    let used: Vec<Vec<u8>> = verified.intermediate_certificates().map(|c| c.der().to_vec()).collect();
    let intermediates = in_path(sent, &used, anchor)?;
    Ok(TrustedPath { intermediates, anchor })
}

/// The intermediates of the path, once it is certain that nothing else was sent. The authority's own certificate may
/// stand in the chain: many tools append it, and it is in the path.
fn in_path<'a>(
    sent: &'a [CertificateDer<'a>],
    used: &[Vec<u8>],
    anchor: &X509Authority,
) -> Result<Vec<CertificateDer<'a>>, PathError> {
    let intermediates: Vec<_> =
        used.iter().filter_map(|der| sent.iter().find(|c| c.as_ref() == der.as_slice()).cloned()).collect();
    let anchor_sent = usize::from(sent.iter().any(|c| c == anchor.der()));
    // A certificate that is sent twice counts as unused: each is accounted for once.
    match sent.len().saturating_sub(intermediates.len() + anchor_sent) {
        0 => Ok(intermediates),
        unused => Err(PathError::Unused(unused)),
    }
}

fn intermediate_fault(der: &CertificateDer<'_>) -> Option<&'static str> {
    match X509Certificate::from_der(der) {
        Ok((_, cert)) => ca::fault(&cert),
        Err(_) => Some("it cannot be read"),
    }
}

fn unix_time(at: OffsetDateTime) -> UnixTime {
    // Times before 1970 are in no certificate's validity that we would accept.
    UnixTime::since_unix_epoch(Duration::from_secs(at.unix_timestamp().try_into().unwrap_or(0)))
}
