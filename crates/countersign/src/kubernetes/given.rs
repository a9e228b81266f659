//! The settings that somebody named, without the defaults of the others: a tree in the form of the chart's values.yaml.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::schema::{self, Schema};
use super::values::{defaults, merge};
use crate::settings::Mistake;

/// Settings that were named, by a file, by flags or at an earlier installation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Given(Map<String, Value>);

impl Given {
    /// Reads a tree. Error: it is no object.
    pub fn of(tree: Value) -> Result<Self, String> {
        match tree {
            Value::Object(tree) => Ok(Self(tree)),
            other => Err(format!("`{other}` is no object")),
        }
    }

    /// The tree.
    pub fn tree(&self) -> Value {
        Value::Object(self.0.clone())
    }

    /// Adds what is named here to earlier settings: objects key by key, everything else as a whole. Null stays, because
    /// it takes a default away.
    pub fn over(self, earlier: Self) -> Self {
        let mut all = Value::Object(earlier.0);
        overlay(&mut all, Value::Object(self.0));
        Self::of(all).unwrap_or_default()
    }

    /// All settings: the defaults and what is named. Error: something named is no setting, or does not fit. `whose`
    /// says who named it.
    pub fn whole(&self, whose: &str) -> Result<Value, Mistake> {
        let (mut values, schema) = (defaults()?, schema::read()?);
        merge(&mut values, self.tree(), Schema::new(&schema), "", whose)?;
        schema::judge(&schema, &values)?;
        Ok(values)
    }

    /// What it says over these defaults, whether or not this version knows all of it.
    pub fn unjudged(&self, mut defaults: Value) -> Value {
        overlay(&mut defaults, self.tree());
        defaults
    }

    /// Each single setting that is named, spelled as for `--set`.
    pub fn leaves(&self) -> BTreeMap<String, Value> {
        leaves(&self.tree())
    }
}

fn overlay(into: &mut Value, given: Value) {
    match (into, given) {
        (Value::Object(known), Value::Object(given)) => {
            for (key, value) in given {
                match known.get_mut(&key) {
                    Some(known) => overlay(known, value),
                    None => drop(known.insert(key, value)),
                }
            }
        }
        (into, given) => *into = given,
    }
}

/// The leaves of a tree by path, spelled as for `--set`: a dot that is part of a name is written `\.`. Lists and empty
/// objects are leaves.
pub fn leaves(tree: &Value) -> BTreeMap<String, Value> {
    fn walk(value: &Value, at: &str, out: &mut BTreeMap<String, Value>) {
        match value {
            Value::Object(keys) if !keys.is_empty() => {
                for (key, value) in keys {
                    walk(value, &schema::joined(at, &key.replace('.', "\\.")), out);
                }
            }
            _ if at.is_empty() => {}
            leaf => drop(out.insert(at.to_owned(), leaf.clone())),
        }
    }
    let mut out = BTreeMap::new();
    walk(tree, "", &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn given(tree: Value) -> Given {
        Given::of(tree).unwrap()
    }

    #[test]
    fn what_is_named_now_goes_over_what_was_named_before_key_by_key() {
        let earlier = given(json!({ "mesh": { "mode": "strict" }, "agent": { "nodeSelector": { "disk": "ssd" } } }));
        let now = given(json!({ "agent": { "nodeSelector": { "disk": null, "a.b/c": "d" } }, "trustDomain": "td" }));
        let both = now.over(earlier);
        let expected = json!({
            "mesh": { "mode": "strict" }, "trustDomain": "td",
            "agent": { "nodeSelector": { "disk": null, "a.b/c": "d" } },
        });
        assert_eq!(both.tree(), expected);
        let whole = both.whole("test").unwrap();
        assert_eq!(whole["agent"]["nodeSelector"], json!({ "a.b/c": "d" }), "null takes a key away");
        assert_eq!(whole["clusterName"], "kubernetes", "a default");
        let names: Vec<String> = both.leaves().into_keys().collect();
        assert_eq!(names, [r"agent.nodeSelector.a\.b/c", "agent.nodeSelector.disk", "mesh.mode", "trustDomain"]);
    }

    #[test]
    fn what_this_version_does_not_know_is_rejected_by_whole_and_kept_by_unjudged() {
        let old = given(json!({ "mesh": { "colour": "red" } }));
        let why = old.whole("the remembered settings").unwrap_err().to_string();
        assert!(why.starts_with("the remembered settings: `mesh.colour` is no setting"), "{why}");
        assert_eq!(
            old.unjudged(json!({ "mesh": { "mode": "off" } })),
            json!({ "mesh": { "mode": "off", "colour": "red" } })
        );
    }
}
