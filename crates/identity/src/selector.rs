//! Selectors: facts about a workload or a node, as `type:value`, and the subset rule.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use crate::shown::shown;

/// One attested fact, such as `unix:uid:2102`. Ordered, so that sets compare and print the same everywhere.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    kind: String,
    value: String,
}

/// A set of selectors, sorted and without duplicates.
pub type SelectorSet = BTreeSet<Selector>;

/// Why a text is not a selector.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{}` is not a selector: {why} (expected `type:value`, as in `unix:uid:2102`)", shown(text))]
pub struct SelectorError {
    text: String,
    why: &'static str,
}

impl Selector {
    /// A selector from a type without a colon and a value of 1 to 4,096 bytes (SPIRE API, types.Selector).
    pub fn new(kind: impl Into<String>, value: impl Into<String>) -> Result<Self, SelectorError> {
        let (kind, value) = (kind.into(), value.into());
        let why = match () {
            () if kind.is_empty() => "the type is empty",
            () if kind.contains(':') => "the type holds a colon",
            () if value.is_empty() => "the value is empty",
            () if value.len() > 4096 => "the value is longer than 4096 bytes",
            () => return Ok(Self { kind, value }),
        };
        Err(SelectorError { text: format!("{kind}:{value}"), why })
    }

    /// Why none of our attestors can ever produce this selector, so that an entry with it would never match. `None` if
    /// one may, or if the type is not ours.
    pub fn never_attested(&self) -> Option<&'static str> {
        let (key, rest) = match (self.kind.as_str(), self.value.split_once(':')) {
            ("unix" | "k8s" | "k8s_psat" | "x509pop", None) => return Some("a key and a value stand behind the type"),
            (_, None) => return None,
            (_, Some(split)) => split,
        };
        match self.kind.as_str() {
            "unix" => unix_fault(key, rest),
            "x509pop" => x509pop_fault(key, rest),
            "k8s" | "k8s_psat" if rest.is_empty() => Some("the value is empty"),
            _ => None,
        }
    }

    /// The attestor's type, such as `unix`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Everything after the type, such as `uid:2102`.
    pub fn value(&self) -> &str {
        &self.value
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind, self.value)
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        match text.split_once(':') {
            Some((kind, value)) => Self::new(kind, value),
            None => Err(SelectorError { text: text.to_owned(), why: "it holds no colon" }),
        }
    }
}

fn unix_fault(key: &str, value: &str) -> Option<&'static str> {
    match key {
        // Attestors print IDs as decimal u32: `007` and `-1` never match.
        "uid" | "gid" | "supplementary_gid" => match value.parse::<u32>() {
            Ok(id) if id.to_string() == value => None,
            _ => Some("an ID is a number from 0 to 4294967295, without sign and leading zeros"),
        },
        "user" | "group" | "supplementary_group" => value.is_empty().then_some("the name is empty"),
        "path" => (!value.starts_with('/')).then_some("a path begins with `/`"),
        "sha256" => (!is_hex(value, 64)).then_some("a SHA-256 is 64 lower-case hexadecimal digits"),
        _ => Some("`unix` knows uid, gid, user, group, supplementary_gid, supplementary_group, path and sha256"),
    }
}

fn x509pop_fault(key: &str, value: &str) -> Option<&'static str> {
    match (key, value.split_once(':')) {
        ("subject", Some(("cn", name))) => name.is_empty().then_some("the name is empty"),
        ("ca", Some(("fingerprint", sum))) => {
            (!is_hex(sum, 40)).then_some("a fingerprint is 40 lower-case hexadecimal digits")
        }
        ("serialnumber", _) => {
            let whole = !value.is_empty() && value.len().is_multiple_of(2) && is_hex(value, value.len());
            (!whole).then_some("a serial number is an even number of lower-case hexadecimal digits")
        }
        _ => Some("`x509pop` knows subject:cn, ca:fingerprint and serialnumber"),
    }
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The selectors of `wanted` that `attested` lacks. Empty means that the entry applies.
pub fn missing<'a>(wanted: &'a SelectorSet, attested: &'a SelectorSet) -> Vec<&'a Selector> {
    wanted.difference(attested).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_keeps_its_colons() {
        let s: Selector = "k8s:pod-label:app:web".parse().unwrap();
        assert_eq!((s.kind(), s.value()), ("k8s", "pod-label:app:web"));
        assert_eq!(s.to_string(), "k8s:pod-label:app:web");
    }

    #[test]
    fn half_a_selector_is_refused() {
        for bad in ["", "unix", ":x", "unix:"] {
            assert!(bad.parse::<Selector>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn missing_names_what_the_caller_lacks() {
        let set = |s: &[&str]| s.iter().map(|s| s.parse().unwrap()).collect::<SelectorSet>();
        let attested = set(&["unix:uid:1", "unix:gid:1"]);
        assert!(missing(&set(&["unix:uid:1"]), &attested).is_empty());
        assert_eq!(missing(&set(&["unix:uid:1", "unix:user:x"]), &attested)[0].to_string(), "unix:user:x");
    }

    #[test]
    fn selectors_that_no_attestor_can_find_are_told_from_those_that_one_may() {
        let hex = "0123456789abcdef".repeat(4);
        for good in [
            "unix:uid:0",
            "unix:gid:4294967295",
            "unix:user:web",
            "unix:path:/usr/bin/curl",
            &format!("unix:sha256:{hex}"),
            "k8s:ns:default",
            "k8s:pod-label:app:",
            "x509pop:subject:cn:node 1",
            &format!("x509pop:ca:fingerprint:{}", &hex[..40]),
            "x509pop:serialnumber:0a",
            "k8s_psat:cluster:main",
            "somebody-elses:whatever",
            "spiffe_id:spiffe://td/spire/agent/join_token/x",
        ] {
            assert_eq!(good.parse::<Selector>().unwrap().never_attested(), None, "{good}");
        }
        for bad in [
            "unix:uid:",
            "unix:uid:abc",
            "unix:uid:-1",
            "unix:uid:+1",
            "unix:uid:007",
            "unix:uid:4294967296",
            "unix:uid: 1",
            "unix:uid",
            "unix:user:",
            "unix:path:bin/curl",
            "unix:sha256:ABC",
            "unix:pid:1",
            "k8s:ns:",
            "x509pop:ca:fingerprint:AA",
            "x509pop:serialnumber:abc",
            "x509pop:cn:x",
        ] {
            assert!(bad.parse::<Selector>().unwrap().never_attested().is_some(), "{bad} was accepted");
        }
    }

    proptest::proptest! {
        #[test]
        fn a_selector_survives_its_text(kind in "[a-z_0-9]{1,20}", value in "\\PC{1,200}") {
            let selector = Selector::new(kind, value).unwrap();
            assert_eq!(selector.to_string().parse::<Selector>().unwrap(), selector);
        }

        #[test]
        fn no_text_makes_the_parser_panic_or_the_error_long(text in "(?s).{0,5000}") {
            if let Err(e) = text.parse::<Selector>() {
                assert!(e.to_string().len() < 2_000);
                assert!(!e.to_string().contains(['\n', '\x1b']));
            }
        }

        #[test]
        fn missing_is_the_difference_and_an_entry_applies_exactly_to_supersets(
            wanted in proptest::collection::btree_set(0u32..12, 0..6),
            attested in proptest::collection::btree_set(0u32..12, 0..12),
        ) {
            let set = |ids: &BTreeSet<u32>| -> SelectorSet { ids.iter().map(|n| format!("unix:uid:{n}").parse().unwrap()).collect() };
            let (w, a) = (set(&wanted), set(&attested));
            assert_eq!(missing(&w, &a).is_empty(), wanted.is_subset(&attested));
            assert!(missing(&w, &a).iter().all(|s| w.contains(s) && !a.contains(s)));
        }
    }
}
