//! Selectors: facts about a workload or a node, as `type:value`, and the subset rule.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// One attested fact, such as `unix:uid:2102`. Ordered, so that sets of them compare and print alike everywhere.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    kind: String,
    value: String,
}

/// A set of selectors.
pub type SelectorSet = BTreeSet<Selector>;

/// Why a text is no selector.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{text}` is not a selector: {why} (expected `type:value`, as in `unix:uid:2102`)")]
pub struct SelectorError {
    text: String,
    why: &'static str,
}

impl Selector {
    /// A selector of a type without a colon and a value that is not empty (SPIRE API, types.Selector).
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

    /// The attestor's name, such as `unix`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Everything behind the type, such as `uid:2102`.
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

/// The selectors of `wanted` that `attested` lacks; empty means that the entry applies.
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
}
