//! Registration entries: which workload gets which identity.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use spiffe::{SpiffeId, TrustDomain};
use time::OffsetDateTime;

use crate::selector::{SelectorSet, missing};
use crate::shown::shown;
use crate::trust_domain::{is_reserved, server_id};

/// The ID of a registration entry: 1 to 255 bytes of `[A-Za-z0-9._-]`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId(String);

impl EntryId {
    /// The ID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for EntryId {
    type Err = EntryError;

    fn from_str(text: &str) -> Result<Self, EntryError> {
        let ok =
            (1..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if ok { Ok(Self(text.to_owned())) } else { Err(EntryError::Id(text.chars().take(64).collect())) }
    }
}

/// Most DNS names per entry.
pub const MAX_DNS_NAMES: usize = 256;
/// Most bytes of all DNS names of an entry together. With the rest they fit into a certificate that peers accept
/// ([`crate::path::MAX_CERTIFICATE_BYTES`]).
pub const MAX_DNS_BYTES: usize = 8 * 1024;
/// Most selectors per entry.
pub const MAX_SELECTORS: usize = 256;
/// Longest selectors of an entry together, in bytes: lists of entries must fit into messages.
pub const MAX_SELECTOR_BYTES: usize = 32 * 1024;
/// Most trust domains that an entry federates with: their bundles all go to the workload in one message.
pub const MAX_FEDERATED: usize = 64;

/// Why an entry is rejected.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EntryError {
    /// The entry ID is empty, too long or has other characters.
    #[error("`{}` is not an entry ID: use 1 to 255 of letters, digits, `.`, `_`, `-`", shown(_0))]
    Id(String),
    /// The entry has no selectors, so it would match every workload.
    #[error("entry for `{0}` has no selectors; name at least one, as in `unix:uid:1000`")]
    NoSelectors(SpiffeId),
    /// A SPIFFE ID of another trust domain.
    #[error("`{id}` is not in this server's trust domain `{trust_domain}`")]
    TrustDomain {
        /// The SPIFFE ID that was given.
        id: SpiffeId,
        /// The trust domain that the server signs for.
        trust_domain: TrustDomain,
    },
    /// An ID without a path.
    #[error("`{0}` has no path; a workload's SPIFFE ID needs one")]
    NoPath(SpiffeId),
    /// A workload's ID lies under `/spire`, which is reserved for servers and agents.
    #[error("`{0}` lies under `/spire`, which is kept for servers and agents")]
    Reserved(SpiffeId),
    /// Not a DNS name as RFC 1123 defines it.
    #[error("`{}` is not a DNS name", shown(_0))]
    DnsName(String),
    /// More DNS names than fit into a certificate that peers accept.
    #[error(
        "{names} DNS names with {bytes} bytes do not fit into a certificate that peers read: at most {MAX_DNS_NAMES} names and {MAX_DNS_BYTES} bytes"
    )]
    TooManyDnsNames {
        /// Number of names.
        names: usize,
        /// Length of all names together, in bytes.
        bytes: usize,
    },
    /// A selector that none of our attestors can ever produce.
    #[error("selector `{}` can never be attested: {why}", shown(selector))]
    Selector {
        /// The selector as `type:value`, unescaped; the message escapes it.
        selector: String,
        /// The rule that the selector breaks.
        why: &'static str,
    },
    /// More selectors than [`MAX_SELECTORS`].
    #[error("{0} selectors; at most {MAX_SELECTORS} are taken")]
    TooManySelectors(usize),
    /// Selectors longer than any workload's.
    #[error("selectors of {0} bytes; at most {MAX_SELECTOR_BYTES} are taken")]
    SelectorsTooLong(usize),
    /// More trust domains than a workload's bundles can come from.
    #[error("federates with {0} trust domains; at most {MAX_FEDERATED} are taken")]
    TooManyFederated(usize),
    /// The hint is too long (SPIFFE Workload API 5.2.1: 1,024 bytes).
    #[error("the hint is longer than 1024 bytes")]
    Hint,
    /// A TTL below zero or too large, in seconds.
    #[error("the TTL of {0} seconds is out of range (0 takes the server's default)")]
    Ttl(i64),
    /// `federates_with` names the server's own trust domain, or something that is not a trust domain.
    #[error("cannot federate with `{}`: name another trust domain", shown(_0))]
    Federation(String),
}

/// Rarely used attributes of an entry (SPIRE API, types.Entry.AdditionalAttributes).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AdditionalAttributes {
    /// Tells an agent that the workload will hardly ask for X509-SVIDs. Our agents sign them ahead all the same.
    pub disable_x509_svid_prefetch: bool,
    /// Whether each JWT-SVID has an ID of its own (`jti`), and none is given out twice.
    pub jwt_svid_include_jti: bool,
}

/// A registration entry (SPIRE API, types.Entry).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Unique ID of the entry, chosen by its creator or by the server.
    pub id: EntryId,
    /// The identity that the entry grants.
    pub spiffe_id: SpiffeId,
    /// The agent that may serve the entry, or a node alias that several agents share.
    pub parent_id: SpiffeId,
    /// Selectors that a workload must have, all of them.
    pub selectors: SelectorSet,
    /// Lifetime of the X509-SVID; `None` means the server's default.
    pub x509_svid_ttl: Option<Duration>,
    /// Lifetime of the JWT-SVID; `None` means the server's default.
    pub jwt_svid_ttl: Option<Duration>,
    /// Foreign trust domains whose bundles the workload receives.
    pub federates_with: BTreeSet<TrustDomain>,
    /// Whether the workload may call the server's admin API.
    pub admin: bool,
    /// Whether the workload may request an intermediate authority.
    pub downstream: bool,
    /// DNS names of the leaf; the first is also its common name.
    pub dns_names: Vec<String>,
    /// When the entry itself expires; `None` means never.
    pub expires_at: Option<OffsetDateTime>,
    /// Tells a workload's several identities apart (SPIFFE Workload API 5.2.1); empty if unused.
    pub hint: String,
    /// Whether the SVID is meant for an SVID store (SPIRE API). Our agents have none and skip such entries.
    pub store_svid: bool,
    /// What the field `additional_attributes` of SPIRE's API says.
    pub additional: AdditionalAttributes,
    /// Revision number, incremented by each update.
    pub revision: i64,
    /// Creation time, set by the server.
    pub created_at: OffsetDateTime,
}

impl Entry {
    /// Checks what the types cannot: trust domains, paths, the reserved part, selectors, DNS names, sizes.
    pub fn check(&self, td: &TrustDomain) -> Result<(), EntryError> {
        for id in [&self.spiffe_id, &self.parent_id] {
            if !id.is_member_of(td) {
                return Err(EntryError::TrustDomain { id: id.clone(), trust_domain: td.clone() });
            }
            if id.path().is_empty() {
                return Err(EntryError::NoPath(id.clone()));
            }
        }
        // `/spire/server` and `/spire/agent/…` are issued by attestation only. An entry for one would let a workload be
        // a server or an agent.
        if is_reserved(&self.spiffe_id) {
            return Err(EntryError::Reserved(self.spiffe_id.clone()));
        }
        // Every set contains the empty set: such an entry would give its identity to every workload on the node.
        if self.selectors.is_empty() {
            return Err(EntryError::NoSelectors(self.spiffe_id.clone()));
        }
        if self.selectors.len() > MAX_SELECTORS {
            return Err(EntryError::TooManySelectors(self.selectors.len()));
        }
        let bytes = self.selectors.iter().map(|s| s.kind().len() + 1 + s.value().len()).sum();
        if bytes > MAX_SELECTOR_BYTES {
            return Err(EntryError::SelectorsTooLong(bytes));
        }
        if let Some((selector, why)) = self.selectors.iter().find_map(|s| Some((s, s.never_attested()?))) {
            return Err(EntryError::Selector { selector: selector.to_string(), why });
        }
        let (names, bytes) = (self.dns_names.len(), self.dns_names.iter().map(String::len).sum());
        if names > MAX_DNS_NAMES || bytes > MAX_DNS_BYTES {
            return Err(EntryError::TooManyDnsNames { names, bytes });
        }
        if let Some(bad) = self.dns_names.iter().find(|n| !is_dns_name(n)) {
            return Err(EntryError::DnsName(bad.clone()));
        }
        if self.hint.len() > 1024 {
            return Err(EntryError::Hint);
        }
        if self.federates_with.len() > MAX_FEDERATED {
            return Err(EntryError::TooManyFederated(self.federates_with.len()));
        }
        if let Some(own) = self.federates_with.iter().find(|f| *f == td) {
            return Err(EntryError::Federation(own.to_string()));
        }
        Ok(())
    }

    /// Whether a workload with these selectors gets this entry: the entry's selectors are a subset of them.
    pub fn applies_to(&self, attested: &SelectorSet) -> bool {
        missing(&self.selectors, attested).is_empty()
    }

    /// Whether two entries register the same thing: equal SPIFFE ID, parent and selectors (SPIRE's rule).
    pub fn registers_the_same_as(&self, other: &Self) -> bool {
        self.spiffe_id == other.spiffe_id && self.parent_id == other.parent_id && self.selectors == other.selectors
    }

    /// Whether this entry is a node alias: an ID shared by all agents whose node selectors match.
    pub fn is_node_alias(&self, td: &TrustDomain) -> bool {
        self.parent_id == server_id(td)
    }

    /// Whether the entry has expired at `now`.
    pub fn is_expired(&self, now: OffsetDateTime) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }
}

/// A DNS name by RFC 1123, underscores allowed; the first label may be a wildcard.
fn is_dns_name(name: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    name.len() <= 253 && name.strip_prefix("*.").unwrap_or(name).split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str) -> Entry {
        Entry {
            id: "e1".parse().unwrap(),
            spiffe_id: SpiffeId::new(id).unwrap(),
            parent_id: SpiffeId::new("spiffe://td/spire/agent/join_token/x").unwrap(),
            selectors: ["unix:uid:1".parse().unwrap()].into(),
            x509_svid_ttl: None,
            jwt_svid_ttl: None,
            federates_with: BTreeSet::new(),
            admin: false,
            downstream: false,
            dns_names: vec![],
            expires_at: None,
            hint: String::new(),
            store_svid: false,
            additional: AdditionalAttributes::default(),
            revision: 0,
            created_at: OffsetDateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn an_entry_cannot_grant_a_servers_or_an_agents_identity() {
        let td = TrustDomain::new("td").unwrap();
        for id in ["spiffe://td/spire/server", "spiffe://td/spire/agent/join_token/x", "spiffe://td/spire"] {
            assert!(matches!(entry(id).check(&td), Err(EntryError::Reserved(_))), "{id}");
        }
        assert_eq!(entry("spiffe://td/ns/a/sa/b").check(&td), Ok(()));
    }

    #[test]
    fn foreign_or_rootless_ids_bad_names_and_empty_selectors_are_refused() {
        let td = TrustDomain::new("td").unwrap();
        assert!(matches!(entry("spiffe://other/x").check(&td), Err(EntryError::TrustDomain { .. })));
        assert!(matches!(entry("spiffe://td").check(&td), Err(EntryError::NoPath(_))));
        let mut e = entry("spiffe://td/x");
        e.dns_names = vec!["a..b".into()];
        assert!(matches!(e.check(&td), Err(EntryError::DnsName(_))));
        let mut e = entry("spiffe://td/x");
        e.selectors.clear();
        assert!(matches!(e.check(&td), Err(EntryError::NoSelectors(_))));
    }

    #[test]
    fn entries_that_could_never_work_are_refused_when_they_are_made() {
        let td = TrustDomain::new("td").unwrap();
        let mut e = entry("spiffe://td/x");
        e.dns_names = (0..3_000).map(|n| format!("n{n}.example.org")).collect();
        assert!(matches!(e.check(&td), Err(EntryError::TooManyDnsNames { names: 3_000, .. })));
        e.dns_names = (0..60).map(|n| format!("n{n}.{}", "x".repeat(60)) + &".y".repeat(60)).collect();
        assert!(matches!(e.check(&td), Err(EntryError::TooManyDnsNames { names: 60, .. })), "few and long");
        e.dns_names.truncate(40);
        assert_eq!(e.check(&td), Ok(()));
        for bad in ["unix:uid:abc", "unix:uid:-1", "unix:uid:"] {
            let mut e = entry("spiffe://td/x");
            e.selectors = [bad.parse().unwrap()].into();
            assert!(matches!(e.check(&td), Err(EntryError::Selector { .. })), "{bad}");
        }
        let mut e = entry("spiffe://td/x");
        e.selectors = (0..300).map(|n| format!("unix:uid:{n}").parse().unwrap()).collect();
        assert_eq!(e.check(&td), Err(EntryError::TooManySelectors(300)));
        let long = |n: usize| format!("unix:path:/{n}{}", "x".repeat(4_000)).parse().unwrap();
        e.selectors = (0..9).map(long).collect();
        assert!(matches!(e.check(&td), Err(EntryError::SelectorsTooLong(_))), "few and long");
        e.selectors = (0..8).map(long).collect();
        assert_eq!(e.check(&td), Ok(()));
        e.federates_with = (0..65).map(|n| TrustDomain::new(format!("td{n}")).unwrap()).collect();
        assert_eq!(e.check(&td), Err(EntryError::TooManyFederated(65)));
        e.federates_with.pop_last();
        assert_eq!(e.check(&td), Ok(()));
    }

    #[test]
    fn dns_names() {
        for good in ["a", "a.b", "*.a.b", "web.default.svc"] {
            assert!(is_dns_name(good), "{good}");
        }
        for bad in ["", "-a", "a-", "a.*.b", "a b", &"x".repeat(64)] {
            assert!(!is_dns_name(bad), "{bad}");
        }
    }
}
