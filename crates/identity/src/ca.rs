//! Rules for every CA certificate of a path, root or intermediate.
//!
//! webpki checks signatures, validity, `basicConstraints`, extended key usages and name constraints. It ignores
//! `keyUsage` of issuers, and it evaluates name constraints only when a name below matches their type; both are checked
//! here.

use x509_parser::oid_registry::{
    OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER, OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_CERTIFICATE_POLICIES,
    OID_X509_EXT_CRL_DISTRIBUTION_POINTS, OID_X509_EXT_EXTENDED_KEY_USAGE, OID_X509_EXT_KEY_USAGE,
    OID_X509_EXT_NAME_CONSTRAINTS, OID_X509_EXT_SUBJECT_ALT_NAME, OID_X509_EXT_SUBJECT_KEY_IDENTIFIER, Oid,
};
use x509_parser::prelude::{GeneralName, X509Certificate};

/// Why a certificate may not issue others; `None` if it may (RFC 5280 4.2.1.3, 4.2.1.9, 4.2.1.10, 6.1.4).
pub(crate) fn fault(cert: &X509Certificate<'_>) -> Option<&'static str> {
    // RFC 5280 4.2: parsers may differ on which copy of an extension counts, so a duplicate must not reach them.
    if cert.tbs_certificate.extensions_map().is_err() {
        return Some("an extension stands in it twice");
    }
    match cert.basic_constraints() {
        Ok(Some(constraints)) if constraints.value.ca => {}
        Ok(_) => return Some("basicConstraints does not say CA"),
        Err(_) => return Some("basicConstraints cannot be read"),
    }
    match cert.key_usage() {
        // RFC 5280 6.1.4 (n): the key usage is judged only if it is present.
        Ok(None) => {}
        Ok(Some(usage)) if usage.value.key_cert_sign() => {}
        Ok(Some(_)) => return Some("keyUsage lacks keyCertSign"),
        Err(_) => return Some("keyUsage cannot be read"),
    }
    constraints_fault(cert)
}

/// [`fault`], plus what only a root needs: webpki takes a root's key and subject and never reads its other extensions.
pub(crate) fn root_fault(cert: &X509Certificate<'_>) -> Option<&'static str> {
    let understood: [Oid<'_>; 9] = [
        OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER,
        OID_X509_EXT_BASIC_CONSTRAINTS,
        OID_X509_EXT_CERTIFICATE_POLICIES,
        OID_X509_EXT_CRL_DISTRIBUTION_POINTS,
        OID_X509_EXT_EXTENDED_KEY_USAGE,
        OID_X509_EXT_KEY_USAGE,
        OID_X509_EXT_NAME_CONSTRAINTS,
        OID_X509_EXT_SUBJECT_ALT_NAME,
        OID_X509_EXT_SUBJECT_KEY_IDENTIFIER,
    ];
    fault(cert).or_else(|| {
        // RFC 5280 4.2: a critical extension may restrict what the root vouches for, so one that is not understood
        // rejects it.
        let foreign = cert.extensions().iter().any(|e| e.critical && !understood.contains(&e.oid));
        foreign.then_some("it has a critical extension that is not understood here")
    })
}

/// Why the name constraints cannot be relied on: unreadable, empty or malformed. `None` if absent or fine.
fn constraints_fault(cert: &X509Certificate<'_>) -> Option<&'static str> {
    let constraints = match cert.name_constraints() {
        Ok(None) => return None,
        Ok(Some(constraints)) => constraints.value,
        Err(_) => return Some("nameConstraints cannot be read"),
    };
    let both = [&constraints.permitted_subtrees, &constraints.excluded_subtrees];
    if both.iter().all(|subtrees| subtrees.as_ref().is_none_or(Vec::is_empty)) {
        return Some("nameConstraints constrains nothing");
    }
    let mut names = both.into_iter().flatten().flatten().map(|subtree| &subtree.base);
    names.any(|name| !is_well_formed(name)).then_some("nameConstraints holds a malformed name")
}

/// Whether a constraint has the form that RFC 5280 4.2.1.10 requires for its type.
fn is_well_formed(constraint: &GeneralName<'_>) -> bool {
    match constraint {
        GeneralName::Invalid(..) => false,
        GeneralName::DNSName(name) => is_host_constraint(name),
        // RFC 5280 requires a host name; a single label is one as well.
        GeneralName::URI(host) => !host.is_empty() && is_host_constraint(host),
        // An address followed by a mask of the same length.
        GeneralName::IPAddress(bytes) => matches!(bytes.len(), 8 | 32),
        _ => true,
    }
}

/// An empty constraint matches every name; one with a leading dot, every name below it.
fn is_host_constraint(name: &str) -> bool {
    let label = |l: &str| {
        !l.is_empty() && l.len() <= 63 && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    name.is_empty() || (name.len() <= 253 && name.strip_prefix('.').unwrap_or(name).split('.').all(label))
}
