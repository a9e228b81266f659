//! Helpers for the `spiffe` crate's [`SpiffeId`] and [`TrustDomain`]: strict parsing, and the IDs that Countersign
//! assigns.

use spiffe::{SpiffeId, TrustDomain};

use crate::shown::{MAX_SHOWN, shown};

/// Why a text is not a SPIFFE ID or trust domain.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdError {
    /// The text breaks a rule of the SPIFFE ID standard.
    #[error("`{}` is not a SPIFFE ID: {why}", shown(text))]
    Id {
        /// The text that was given; the message escapes and shortens it.
        text: String,
        /// The rule that the text breaks.
        why: String,
    },
    /// The text breaks a rule for trust domain names.
    #[error("`{}` is not a trust domain name: {why}", shown(text))]
    TrustDomain {
        /// The text that was given; the message escapes and shortens it.
        text: String,
        /// The rule that the text breaks.
        why: String,
    },
    /// A trust domain's own ID where a workload's or an agent's is required.
    #[error("`{0}` has no path; a workload's SPIFFE ID needs one")]
    NoPath(SpiffeId),
}

/// Longest SPIFFE ID we issue or accept, in bytes (SPIFFE ID 2.3).
pub const MAX_ID_BYTES: usize = 2048;

/// Parses any SPIFFE ID, with or without a path.
pub fn parse_id(text: &str) -> Result<SpiffeId, IdError> {
    if text.len() > MAX_ID_BYTES {
        return Err(IdError::Id {
            text: text.chars().take(MAX_SHOWN).collect(),
            why: format!("longer than {MAX_ID_BYTES} bytes"),
        });
    }
    // The `spiffe` crate folds case, but the standard requires lower case (SPIFFE ID 2.1). Two spellings of one ID
    // would compare as different.
    let name = text.strip_prefix("spiffe://").unwrap_or(text).split('/').next().unwrap_or_default();
    if name.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(IdError::Id { text: text.to_owned(), why: "the trust domain has upper-case letters".into() });
    }
    if has_empty_label(name) {
        return Err(IdError::Id { text: text.to_owned(), why: "the trust domain has an empty label".into() });
    }
    SpiffeId::new(text).map_err(|e| IdError::Id { text: text.to_owned(), why: e.to_string() })
}

/// Parses a SPIFFE ID that must have a path (X509-SVID 4.1: a leaf's path is not the root).
pub fn parse_workload_id(text: &str) -> Result<SpiffeId, IdError> {
    let id = parse_id(text)?;
    if id.path().is_empty() { Err(IdError::NoPath(id)) } else { Ok(id) }
}

/// Parses a trust domain name such as `example.org`, without `spiffe://`.
pub fn parse_trust_domain(text: &str) -> Result<TrustDomain, IdError> {
    let err = |why: &str| IdError::TrustDomain { text: text.to_owned(), why: why.to_owned() };
    if text.contains("://") {
        return Err(err("give the bare name, without `spiffe://`"));
    }
    if text.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(err("it has upper-case letters"));
    }
    if has_empty_label(text) {
        return Err(err("it has an empty label: two dots in a row, or a dot at an end"));
    }
    TrustDomain::new(text).map_err(|e| err(&e.to_string()))
}

/// Whether a label is empty. A trust domain should be a DNS name (SPIFFE ID 2.1): `a..b` is not, though each of its
/// characters is allowed.
fn has_empty_label(name: &str) -> bool {
    !name.is_empty() && name.split('.').any(str::is_empty)
}

/// The trust domain of an ID.
pub fn trust_domain_of(id: &SpiffeId) -> TrustDomain {
    // A parsed ID's trust domain is always valid; the unreachable arm keeps this function total.
    TrustDomain::new(id.trust_domain_name()).unwrap_or_else(|_| unreachable!("a SPIFFE ID holds a valid trust domain"))
}

/// `spiffe://<td>/spire/server`, the ID of the server's own SVID and the parent of node alias entries.
pub fn server_id(td: &TrustDomain) -> SpiffeId {
    built(td, "/spire/server")
}

/// Whether an ID lies under `/spire`, the part that is reserved for servers and agents.
pub fn is_reserved(id: &SpiffeId) -> bool {
    id.path() == "/spire" || id.path().starts_with("/spire/")
}

/// The ID of a Kubernetes service account: `spiffe://<td>/ns/<namespace>/sa/<service account>`.
pub fn service_account_id(td: &TrustDomain, namespace: &str, service_account: &str) -> Result<SpiffeId, IdError> {
    parse_workload_id(&format!("spiffe://{td}/ns/{namespace}/sa/{service_account}"))
}

/// The ID of an agent: `spiffe://<td>/spire/agent/<attestor>/<suffix>`.
pub fn agent_id(td: &TrustDomain, attestor: &str, suffix: &str) -> Result<SpiffeId, IdError> {
    parse_workload_id(&format!("spiffe://{td}/spire/agent/{attestor}/{suffix}"))
}

fn built(td: &TrustDomain, path: &str) -> SpiffeId {
    SpiffeId::new(format!("spiffe://{td}{path}"))
        .unwrap_or_else(|_| unreachable!("a constant path under a valid trust domain"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_break_the_standard_are_refused() {
        let long = format!("spiffe://a/{}", "x".repeat(2048));
        for bad in [
            "",
            "spiffe://",
            "http://a/b",
            "spiffe://A/b",
            "spiffe://a/b/",
            "spiffe://a//b",
            "spiffe://a/./b",
            "spiffe://a/../b",
            "spiffe://a/b?c",
            "spiffe://a/b#c",
            "spiffe://a:80/b",
            "spiffe://u@a/b",
            "spiffe://a/%62",
            "spiffe://a/b c",
            "spiffe://a/\0",
            "spiffe://a..b/c",
            "spiffe://a./c",
            &long,
        ] {
            assert!(parse_id(bad).is_err(), "{bad:?} was accepted");
        }
        assert_eq!(
            parse_workload_id("spiffe://a").unwrap_err().to_string(),
            "`spiffe://a` has no path; a workload's SPIFFE ID needs one"
        );
    }

    #[test]
    fn ids_of_the_standard_are_accepted() {
        for good in [
            "spiffe://example.org/ns/default/sa/web",
            "spiffe://10.0.0.1/x",
            "spiffe://a_b-c.d/A.b_c-d",
            "spiffe://a/...",
        ] {
            assert_eq!(parse_workload_id(good).unwrap().to_string(), good);
        }
    }

    #[test]
    fn a_trust_domain_is_a_bare_lowercase_name() {
        assert!(parse_trust_domain("example.org").is_ok());
        for bad in ["", "Example.org", "spiffe://example.org", "a/b", "a:1", "a..b", ".a", "a.", &"x".repeat(256)] {
            assert!(parse_trust_domain(bad).is_err(), "{bad:?} was accepted");
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_parses_as_an_id_obeys_the_standard_and_comes_back_the_same(text in "(?s)(spiffe://)?[a-zA-Z0-9._/%:@?#\\- \\n]{0,80}") {
            match parse_id(&text) {
                Ok(id) => {
                    assert_eq!(id.to_string(), text, "what is read is what was written");
                    let (td, path) = text.strip_prefix("spiffe://").unwrap().split_once('/').map_or((&text[9..], None), |(t, p)| (t, Some(p)));
                    assert!(td.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b)));
                    assert!(!td.is_empty() && td.split('.').all(|l| !l.is_empty()));
                    assert!(path.is_none_or(|p| p.split('/').all(|s| !s.is_empty() && s != "." && s != "..")));
                    assert_eq!(trust_domain_of(&id).as_str(), td);
                }
                Err(e) => assert!(!e.to_string().contains(['\n', '\x1b']) && e.to_string().len() < 1_500),
            }
        }

        #[test]
        fn ids_built_from_good_segments_parse(td in "[a-z0-9_-]{1,20}(\\.[a-z0-9_-]{1,20}){0,3}", path in proptest::collection::vec("[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", 1..6)) {
            let text = format!("spiffe://{td}/{}", path.join("/"));
            assert_eq!(parse_workload_id(&text).unwrap().to_string(), text);
            assert!(parse_trust_domain(&td).is_ok());
        }
    }
}
