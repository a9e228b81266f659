//! Turns the chain that a peer sent into a verified path: the only source of facts about who vouches for a leaf.
//!
//! Every statement about a peer's authorities is read from a [`TrustedPath`], never from the certificates as sent,
//! because those are bytes of the peer's choice.

use std::cell::Cell;
use std::time::Duration;

use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundle::X509Authority;
use crate::ca;
use crate::verify::PeerRole;

/// Most certificates in a chain: a leaf, the six intermediates that path building tries, and a root.
pub const MAX_CERTIFICATES: usize = 8;
/// Longest certificate that is parsed, in bytes.
pub const MAX_CERTIFICATE_BYTES: usize = 16 * 1024;
/// Longest chain that is parsed, in bytes.
pub const MAX_CHAIN_BYTES: usize = 48 * 1024;

/// Why no verified path was found.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum PathError {
    /// The chain holds no certificate.
    #[error("there is no certificate")]
    Empty,
    /// The chain has more certificates, or longer ones, than the bounds allow.
    #[error("the chain is too long: {0}")]
    TooLong(String),
    /// No path through the certificates ends in a trusted authority. Holds the reason.
    #[error("{0}")]
    Untrusted(String),
    /// This many certificates are in no path to the authority: they prove nothing, so nothing may be read from them.
    #[error(
        "{0} of the certificates sent are not part of the path to the authority; send the leaf and what is above it"
    )]
    Unused(usize),
}

/// A verified path from a leaf to a trusted authority.
#[derive(Debug, Clone)]
pub struct TrustedPath<'a> {
    /// The intermediates, the leaf's issuer first. Empty if the authority issued the leaf itself.
    pub intermediates: Vec<CertificateDer<'a>>,
    /// The authority in which the path ends.
    pub anchor: &'a X509Authority,
}

/// Checks the size of a chain before anything in it is parsed.
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

/// Finds a path from the chain's leaf (first) to one of the authorities that are valid at `at`, and verifies it (RFC
/// 5280 6.1). Every certificate that was sent must be part of it.
pub fn trusted_path<'a>(
    chain: &'a [CertificateDer<'a>],
    authorities: impl IntoIterator<Item = &'a X509Authority>,
    at: OffsetDateTime,
    role: PeerRole,
) -> Result<TrustedPath<'a>, PathError> {
    // The peer is not authenticated yet and chose these bytes: bound them before the first parse or signature check.
    check_bounds(chain)?;
    let (leaf, sent) = chain.split_first().ok_or(PathError::Empty)?;
    // webpki takes only the key and name of an anchor, so its validity has to be checked here.
    let valid: Vec<&X509Authority> =
        authorities.into_iter().filter(|a| a.not_before() <= at && at <= a.not_after()).collect();
    let anchors: Vec<TrustAnchor<'a>> = valid.iter().map(|a| a.anchor().clone()).collect();
    let usage = match role {
        PeerRole::Client => webpki::KeyUsage::client_auth(),
        PeerRole::Server => webpki::KeyUsage::server_auth(),
    };
    // Runs for each candidate path: when an intermediate may not sign, webpki tries another path through the same
    // certificates.
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
    // Compared by address: two authorities may share a subject and a key, and each may be tainted on its own.
    let position = anchors.iter().position(|a| std::ptr::eq(a, verified.anchor()));
    let anchor = *position
        .and_then(|n| valid.get(n))
        .ok_or_else(|| PathError::Untrusted("the path ends in an authority that was not given".into()))?;
    let used: Vec<Vec<u8>> = verified.intermediate_certificates().map(|c| c.der().to_vec()).collect();
    let intermediates = in_path(sent, &used, anchor)?;
    Ok(TrustedPath { intermediates, anchor })
}

/// The intermediates of the path, once it is certain that nothing else was sent. The authority's own certificate may be
/// in the chain, because many tools append it.
fn in_path<'a>(
    sent: &'a [CertificateDer<'a>],
    used: &[Vec<u8>],
    anchor: &X509Authority,
) -> Result<Vec<CertificateDer<'a>>, PathError> {
    let intermediates: Vec<_> =
        used.iter().filter_map(|der| sent.iter().find(|c| c.as_ref() == der.as_slice()).cloned()).collect();
    let anchor_sent = usize::from(sent.iter().any(|c| c == anchor.der()));
    // A certificate that is sent twice counts as unused, because each one is counted once.
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
    // We accept no certificate that is valid before 1970.
    UnixTime::since_unix_epoch(Duration::from_secs(at.unix_timestamp().try_into().unwrap_or(0)))
}
