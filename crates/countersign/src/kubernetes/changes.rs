//! What an installation would change of an earlier one's settings, and which of it nobody changes by accident.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::former::{Revision, defaults_of};
use super::given::{Given, leaves};
use super::values::defaults;
use crate::operator::output::Table;
use crate::settings::Mistake;

/// Settings that hold what must not change by accident, and what a change of each means. Their defaults never change
/// between versions, because an earlier installation that did not name them has them.
const FIXED: [(&str, &str); 7] = [
    ("trustDomain", "every identity changes"),
    ("clusterName", "the agents' IDs change, and so do the parents of all registration entries"),
    ("server.upstreamSecret", "the root that all workloads trust becomes another one"),
    ("registrar.idTemplate", "the identities of all pods change"),
    ("server.persistence.enabled", "the keys and the database are elsewhere"),
    ("server.persistence.storageClass", "Kubernetes does not change a volume claim"),
    ("server.persistence.size", "Kubernetes does not change a volume claim"),
];

/// Why a change needs consent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Identities or the authority's storage depend on it; what the change means.
    Fixed(&'static str),
    /// The setting was named before and is not named now.
    Dropped,
    /// Nobody named it before or names it now: its default is another one than it was.
    Default,
    /// It needs none.
    Free,
}

/// One setting that changes; `None` where it is unset.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// The setting, spelled as for `--set`.
    pub setting: String,
    /// Its value in the earlier installation.
    pub before: Option<Value>,
    /// Its value in the new one.
    pub after: Option<Value>,
    /// Whether that needs consent.
    pub kind: Kind,
}

/// What the user agreed to by flags.
#[derive(Debug, Clone, Copy, Default)]
pub struct Consent {
    /// Anything (`--force`).
    pub force: bool,
    /// That settings which are not named again are dropped (`--reset-values`).
    pub reset: bool,
}

/// The changes from earlier settings, which had the defaults of a revision, to new ones, by setting; dropped ones also if their
/// value stays the same, because the next version's default may be another. Error: the new settings are invalid.
pub fn changes(before: &Given, revision: Revision, after: &Given) -> Result<Vec<Change>, Mistake> {
    let was = leaves(&before.unjudged(defaults_of(revision, defaults()?)));
    let will = leaves(&after.whole("the settings")?);
    let (was_named, named) = (before.leaves(), after.leaves());
    let is_named_in = |of: &BTreeMap<String, Value>, setting: &str| {
        of.keys().any(|name| is_within(setting, name) || is_within(name, setting))
    };
    let dropped: BTreeSet<String> = was_named.keys().filter(|setting| !is_named_in(&named, setting)).cloned().collect();
    let by_default = |setting: &str| !is_named_in(&was_named, setting) && !is_named_in(&named, setting);
    let all: BTreeSet<&String> = was.keys().chain(will.keys()).chain(&dropped).collect();
    let value = |of: &BTreeMap<String, Value>, setting: &str| of.get(setting).filter(|value| !value.is_null()).cloned();
    let changes = all.into_iter().filter_map(|setting| {
        let (before, after) = (value(&was, setting), value(&will, setting));
        let differs = before != after;
        let fixed = FIXED.iter().find(|(name, _)| name == setting).filter(|_| differs);
        let kind = match fixed {
            Some((_, meaning)) => Kind::Fixed(meaning),
            None if dropped.contains(setting) => Kind::Dropped,
            None if by_default(setting) => Kind::Default,
            None => Kind::Free,
        };
        (differs || kind == Kind::Dropped).then(|| Change { setting: setting.clone(), before, after, kind })
    });
    Ok(changes.collect())
}

/// Whether a setting is this one or a part of it.
fn is_within(setting: &str, whole: &str) -> bool {
    setting.strip_prefix(whole).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

impl Change {
    /// Whether it may be made.
    pub fn is_allowed(&self, consent: Consent) -> bool {
        match self.kind {
            Kind::Fixed(_) => consent.force,
            Kind::Dropped => consent.force || consent.reset,
            Kind::Default | Kind::Free => true,
        }
    }

    /// What the kind of change is, in words.
    fn note(&self) -> &'static str {
        match self.kind {
            Kind::Fixed(meaning) => meaning,
            Kind::Dropped => "set before, not set now",
            Kind::Default => "its default has changed",
            Kind::Free => "",
        }
    }
}

/// A table of changes for people.
pub fn table(changes: &[Change]) -> Table {
    let shown = |value: &Option<Value>| match value {
        None => "unset".to_owned(),
        Some(Value::String(text)) if !text.is_empty() => text.clone(),
        Some(value) => value.to_string(),
    };
    let mut table = Table::new(&["setting", "old", "", "new", "note"]);
    for change in changes {
        let (before, after) = (shown(&change.before), shown(&change.after));
        table.row(vec![change.setting.clone(), before, "->".into(), after, change.note().into()]);
    }
    table
}

/// Changes for programs.
pub fn as_json(changes: &[Change], consent: Consent) -> Value {
    let one = |change: &Change| {
        json!({
            "setting": change.setting, "before": change.before, "after": change.after, "note": change.note(),
            "allowed": change.is_allowed(consent),
        })
    };
    changes.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn between(before: Value, after: Value) -> Vec<Change> {
        changes(&Given::of(before).unwrap(), Revision::NOW, &Given::of(after).unwrap()).unwrap()
    }

    fn needs(before: Value, after: Value) -> (bool, bool) {
        let all = between(before, after);
        let refused = |consent| all.iter().any(|c| !c.is_allowed(consent));
        assert!(!refused(Consent { force: true, reset: false }), "--force allows everything");
        (refused(Consent::default()), refused(Consent { force: false, reset: true }))
    }

    #[test]
    fn trust_domain_cluster_name_and_storage_need_force_and_dropped_settings_force_or_reset() {
        assert_eq!(needs(json!({}), json!({})), (false, false));
        assert_eq!(
            needs(json!({ "mesh": { "mode": "off" } }), json!({ "mesh": { "mode": "strict" } })),
            (false, false)
        );
        assert_eq!(needs(json!({}), json!({ "mesh": { "mode": "strict" } })), (false, false));
        assert_eq!(needs(json!({ "mesh": { "mode": "strict" } }), json!({})), (true, false));
        for fixed in [
            json!({ "trustDomain": "other" }),
            json!({ "clusterName": "other" }),
            json!({ "server": { "persistence": { "enabled": false } } }),
            json!({ "server": { "persistence": { "storageClass": "fast" } } }),
            json!({ "server": { "persistence": { "size": "2Gi" } } }),
        ] {
            assert_eq!(needs(json!({}), fixed.clone()), (true, true), "{fixed}: named now");
            assert_eq!(needs(fixed.clone(), json!({})), (true, true), "{fixed}: dropped, whatever may be dropped");
            assert_eq!(needs(fixed.clone(), fixed.clone()), (false, false), "{fixed}: as before");
        }
        assert_eq!(needs(json!({}), json!({ "trustDomain": "cluster.local" })), (false, false), "the default, named");
    }

    #[test]
    fn old_and_new_are_said_exactly() {
        let before = json!({ "trustDomain": "a", "agent": { "nodeSelector": { "x.y/z": "1" } }, "gone": { "by": "now" },
                             "logLevel": "info" });
        let after = json!({ "trustDomain": "b", "agent": { "tolerations": [] } });
        let said = |change: &Change| {
            let value = |v: &Option<Value>| v.as_ref().map_or("unset".to_owned(), ToString::to_string);
            format!("{}: {} → {}", change.setting, value(&change.before), value(&change.after))
        };
        let all: Vec<String> = between(before, after).iter().map(said).collect();
        assert_eq!(
            all,
            [
                // The selector itself is empty again.
                "agent.nodeSelector: unset → {}",
                r#"agent.nodeSelector.x\.y/z: "1" → unset"#,
                r#"agent.tolerations: [{"operator":"Exists"}] → []"#,
                r#"gone.by: "now" → unset"#,
                r#"logLevel: "info" → "info""#,
                r#"trustDomain: "a" → "b""#,
            ]
        );
    }

    #[test]
    fn a_part_of_what_was_named_before_is_not_dropped_by_naming_the_whole() {
        let part = json!({ "agent": { "nodeSelector": { "disk": "ssd" } } });
        assert_eq!(needs(part.clone(), json!({ "agent": { "nodeSelector": { "disk": "hdd" } } })), (false, false));
        assert_eq!(needs(json!({ "agent": { "nodeSelector": {} } }), part), (false, false));
        assert!(is_within("a.b", "a") && is_within("a", "a") && !is_within("ab", "a"));
    }

    #[test]
    fn a_default_that_has_changed_since_is_told_of_unless_it_was_named() {
        let since = |before: Value, after: Value| {
            let [before, after] = [before, after].map(|tree| Given::of(tree).unwrap());
            let all = changes(&before, Revision::FIRST, &after).unwrap();
            all.into_iter().map(|change| (change.setting, change.kind, change.after)).collect::<Vec<_>>()
        };
        let csi = |on: bool| json!({ "agent": { "csi": { "enabled": on } } });
        let driver = |kind| vec![("agent.csi.enabled".to_owned(), kind, Some(json!(true)))];
        assert_eq!(since(json!({}), json!({})), driver(Kind::Default));
        assert_eq!(since(json!({}), csi(true)), driver(Kind::Free));
        assert_eq!(since(csi(false), json!({})), driver(Kind::Dropped));
        assert_eq!(since(csi(false), csi(false)), []);
        assert_eq!(since(csi(true), csi(true)), []);
        assert_eq!(between(json!({}), json!({})), [], "of an installation that had today's");
    }

    #[test]
    fn defaults_that_installations_depend_on_stay_as_they_are() {
        let defaults = leaves(&defaults().unwrap());
        let values: Vec<String> = FIXED.iter().map(|(setting, _)| defaults[*setting].to_string()).collect();
        let template = r#""ns/{{.Pod.Namespace}}/sa/{{.Pod.ServiceAccount}}""#;
        assert_eq!(values, [r#""cluster.local""#, r#""kubernetes""#, r#""""#, template, "true", r#""""#, r#""1Gi""#]);
    }

    #[test]
    fn a_table_escapes_what_somebody_wrote_into_the_cluster() {
        let text = table(&between(json!({ "x": "\u{1b}[2Jy" }), json!({}))).render();
        assert!(!text.contains('\u{1b}') && text.contains("[2Jy"), "{text}");
    }
}
