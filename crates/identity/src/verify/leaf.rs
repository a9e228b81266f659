//! The rules of X509-SVID for a leaf on its own. None of them proves that the leaf is genuine: only the path does.

use spiffe::SpiffeId;
use x509_parser::error::X509Error;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::Refusal;
use crate::trust_domain::parse_id;

/// Parses a leaf; trailing bytes are rejected.
pub(super) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, Refusal> {
    let (rest, cert) = X509Certificate::from_der(der).map_err(|e| Refusal::Malformed(e.to_string()))?;
    if rest.is_empty() { Ok(cert) } else { Err(Refusal::Malformed("bytes behind the certificate".into())) }
}

/// The SPIFFE ID of a leaf that obeys X509-SVID's rules for leaves. The ID is only a claim until the path is verified.
pub fn leaf_id(cert: &X509Certificate<'_>) -> Result<SpiffeId, Refusal> {
    let id = claimed_id(cert)?;
    if id.path().is_empty() { Err(Refusal::NoPath(id)) } else { Ok(id) }
}

/// [`leaf_id`] without the path rule: a trust domain's own ID may be named in an error only after the path was
/// verified.
pub(super) fn claimed_id(cert: &X509Certificate<'_>) -> Result<SpiffeId, Refusal> {
    // Parsers differ on which copy of an extension counts: the ID that we read must be the one that others read.
    if cert.tbs_certificate.extensions_map().is_err() {
        return Err(Refusal::Malformed("an extension stands in it twice".into()));
    }
    let san = cert.subject_alternative_name().map_err(malformed)?;
    let uris: Vec<&str> = san
        .iter()
        .flat_map(|san| san.value.general_names.iter())
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let [uri] = uris[..] else { return Err(Refusal::UriSans(uris.len())) };
    // CA before the ID: a CA's ID has no path, and "a CA certificate" is the more precise reason.
    if cert.basic_constraints().map_err(malformed)?.is_some_and(|bc| bc.value.ca) {
        return Err(Refusal::CaAsLeaf);
    }
    // RFC 5280 4.2.1.10: name constraints belong in CA certificates only.
    if cert.name_constraints().map_err(malformed)?.is_some() {
        return Err(Refusal::Malformed("name constraints in a leaf".into()));
    }
    check_usage(cert)?;
    parse_id(uri).map_err(|e| Refusal::BadId(e.to_string()))
}

fn check_usage(cert: &X509Certificate<'_>) -> Result<(), Refusal> {
    // X509-SVID 4.3: key usage is present, critical, and allows signatures but not certificates or CRLs.
    let usage = cert.key_usage().map_err(malformed)?.ok_or(Refusal::KeyUsage("it is absent"))?;
    if !usage.critical {
        return Err(Refusal::KeyUsage("it is not critical"));
    }
    if !usage.value.digital_signature() {
        return Err(Refusal::KeyUsage("digitalSignature is not set"));
    }
    if usage.value.key_cert_sign() || usage.value.crl_sign() {
        return Err(Refusal::KeyUsage("keyCertSign or cRLSign is set on a leaf"));
    }
    // X509-SVID 4.4: extended key usage may be absent; if present, both purposes are set.
    if let Some(extended) = cert.extended_key_usage().map_err(malformed)?
        && !(extended.value.server_auth && extended.value.client_auth)
    {
        return Err(Refusal::KeyUsage("extended key usage lacks serverAuth or clientAuth"));
    }
    Ok(())
}

fn malformed(error: X509Error) -> Refusal {
    Refusal::Malformed(error.to_string())
}
