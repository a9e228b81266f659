//! What an Envoy asks for, parsed.

use std::collections::BTreeSet;

use countersign_api::sds::{Node, SECRET_TYPE};
use countersign_identity::shown::shown;
use countersign_identity::trust_domain::MAX_ID_BYTES;
use prost_types::value::Kind;
use tonic::Status;

/// Name that stands for everything (xDS: a wildcard subscription).
const EVERYTHING: &str = "*";
/// Most names that one stream may ask for.
const MAX_NAMES: usize = 100;
/// Most bytes of all these names together. They stay in memory as long as the stream.
const MAX_NAMES_BYTES: usize = 16 * 1024;

/// The names that a stream asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Subscription {
    /// Whether all that the caller may have is wanted.
    pub everything: bool,
    /// What is wanted by name.
    pub names: BTreeSet<String>,
}

impl Subscription {
    /// The names of a request that tells all of them; none means everything. Errors: InvalidArgument.
    pub fn all_of(names: Vec<String>) -> Result<Self, Status> {
        let mut subscription = Self::default();
        subscription.add(names)?;
        subscription.everything |= subscription.names.is_empty();
        Ok(subscription)
    }

    /// Adds names; empty ones count as none. Errors: InvalidArgument if they are too many or too long.
    pub fn add(&mut self, names: Vec<String>) -> Result<(), Status> {
        for name in names.into_iter().filter(|name| !name.is_empty()) {
            if name == EVERYTHING {
                self.everything = true;
                continue;
            }
            if name.len() > MAX_ID_BYTES {
                let why = format!("the name `{}` is longer than {MAX_ID_BYTES} bytes", shown(&name));
                return Err(Status::invalid_argument(why));
            }
            self.names.insert(name);
        }
        let bytes: usize = self.names.iter().map(String::len).sum();
        if self.names.len() > MAX_NAMES || bytes > MAX_NAMES_BYTES {
            return Err(Status::invalid_argument(format!(
                "more than {MAX_NAMES} names, or {MAX_NAMES_BYTES} bytes of them, in one stream; open another one for the rest"
            )));
        }
        Ok(())
    }

    /// Takes a name away.
    pub fn remove(&mut self, name: &str) {
        if name == EVERYTHING {
            self.everything = false;
        } else {
            self.names.remove(name);
        }
    }
}

#[cfg(fuzzing)]
impl Subscription {
    /// # Panics
    /// If it takes more memory than a stream may.
    pub fn assert_bounded(&self) {
        assert!(self.names.len() <= MAX_NAMES && self.names.iter().map(String::len).sum::<usize>() <= MAX_NAMES_BYTES);
        assert!(!self.names.contains("") && !self.names.contains(EVERYTHING));
    }
}

/// Errors: InvalidArgument if resources of another type are asked for.
pub fn check_type(url: &str) -> Result<(), Status> {
    if url.is_empty() || url == SECRET_TYPE {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "this service has resources of the type {SECRET_TYPE} alone, not `{}`",
        shown(url)
    )))
}

/// How an Envoy validates its peers' certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Validator {
    /// By Envoy's SPIFFE validator: each trust domain by its own bundle.
    #[default]
    Spiffe,
    /// By chain alone, from one bundle.
    Chain,
}

/// Key of a node's metadata that says whether its Envoy goes without the SPIFFE validator.
const DISABLE_SPIFFE_VALIDATION: &str = "disable_spiffe_cert_validation";

impl Validator {
    /// What this Envoy uses: what its metadata says, otherwise the agent's setting, as far as its version has the SPIFFE validator.
    pub fn of(node: &Node, disable_spiffe_validation: bool) -> Self {
        let said = node.metadata.as_ref().and_then(|metadata| metadata.fields.get(DISABLE_SPIFFE_VALIDATION));
        let disabled = said.and_then(|value| truth(value.kind.as_ref()?)).unwrap_or(disable_spiffe_validation);
        if disabled || !has_spiffe_validator(node) { Self::Chain } else { Self::Spiffe }
    }
}

/// Whether this Envoy has the SPIFFE validator, which came with 1.18. One that tells no version has it.
fn has_spiffe_validator(node: &Node) -> bool {
    let version = node.user_agent_build_version.as_ref().and_then(|build| build.version);
    version.is_none_or(|version| (version.major_number, version.minor_number) >= (1, 18))
}

/// A truth value in the spellings that SPIRE takes (those of Go); `None` for anything else, which counts as not said.
fn truth(value: &Kind) -> Option<bool> {
    match value {
        Kind::BoolValue(truth) => Some(*truth),
        Kind::StringValue(text) => match text.as_str() {
            "1" | "t" | "T" | "true" | "True" | "TRUE" => Some(true),
            "0" | "f" | "F" | "false" | "False" | "FALSE" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_api::sds::{BuildVersion, SemanticVersion};

    #[test]
    fn the_nodes_word_counts_before_the_agents_and_an_old_envoy_has_no_spiffe_validator() {
        let node = |said: Option<Kind>, version: Option<(u32, u32)>| Node {
            metadata: said.map(|kind| prost_types::Struct {
                fields: [(DISABLE_SPIFFE_VALIDATION.to_owned(), prost_types::Value { kind: Some(kind) })].into(),
            }),
            user_agent_build_version: version.map(|(major_number, minor_number)| BuildVersion {
                version: Some(SemanticVersion { major_number, minor_number }),
            }),
        };
        let text = |text: &str| Some(Kind::StringValue(text.into()));
        for (said, version, disabled, validator) in [
            (None, None, false, Validator::Spiffe),
            (None, Some((1, 40)), false, Validator::Spiffe),
            (None, Some((2, 0)), false, Validator::Spiffe),
            (None, Some((1, 18)), false, Validator::Spiffe),
            (None, Some((1, 17)), false, Validator::Chain),
            (None, Some((1, 40)), true, Validator::Chain),
            (Some(Kind::BoolValue(true)), None, false, Validator::Chain),
            (Some(Kind::BoolValue(false)), None, true, Validator::Spiffe),
            (Some(Kind::BoolValue(false)), Some((1, 17)), true, Validator::Chain),
            (text("true"), None, false, Validator::Chain),
            (text("F"), None, true, Validator::Spiffe),
            (text("yes"), None, false, Validator::Spiffe),
            (Some(Kind::NumberValue(1.0)), None, false, Validator::Spiffe),
        ] {
            let node = node(said.clone(), version);
            assert_eq!(Validator::of(&node, disabled), validator, "{said:?} {version:?} {disabled}");
        }
    }

    #[test]
    fn names_are_bounded_in_number_and_length() {
        let numbered = |count: usize, length: usize| (0..count).map(|n| format!("{n:0length$}")).collect::<Vec<_>>();
        assert_eq!(Subscription::all_of(numbered(MAX_NAMES, 3)).unwrap().names.len(), MAX_NAMES);
        for names in [numbered(MAX_NAMES + 1, 3), numbered(1, MAX_ID_BYTES + 1), numbered(9, MAX_ID_BYTES)] {
            assert_eq!(Subscription::all_of(names).unwrap_err().code(), tonic::Code::InvalidArgument);
        }
        let mut subscription = Subscription::all_of(numbered(MAX_NAMES, 3)).unwrap();
        assert!(subscription.add(vec!["one more".into()]).is_err(), "whatever the number of requests");
        let everything = Subscription::all_of(vec![String::new()]).unwrap();
        assert!(everything.everything && everything.names.is_empty());
    }
}
