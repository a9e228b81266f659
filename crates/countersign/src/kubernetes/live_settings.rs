//! ConfigMap `countersign-mesh`: the settings that a running mesh follows. Who changes one there changes the mesh at once, and
//! nothing remembers it: the next installation writes its own values again.

use countersign_identity::policy::Mode;
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::Value;

use super::cluster::words;

/// Name of the ConfigMap.
pub const NAME: &str = "countersign-mesh";
/// Key of how far the mesh is on its way out, which `uninstall` writes.
pub const TRANSPARENT: &str = "transparent";
/// Each other key, and the setting that an installation makes it of.
pub const KEYS: [(&str, &str); 5] = [
    (MODE, "mesh.mode"),
    ("caTTL", "server.caTTL"),
    ("svidTTL", "server.svidTTL"),
    ("caKeyType", "server.caKeyType"),
    ("workloadKeyType", "agent.workloadKeyType"),
];
const MODE: &str = "mode";

/// The mode of the mesh; strict where the ConfigMap is missing or says none, as for the control plane.
pub fn mode(map: Option<&ConfigMap>) -> Mode {
    let word = map.and_then(|map| map.data.as_ref()?.get(MODE));
    word.and_then(|word| word.trim().parse().ok()).unwrap_or(Mode::Strict)
}

/// The command that takes back what an uninstallation has begun.
pub fn way_back(namespace: &str) -> String {
    format!(
        r#"kubectl -n {namespace} patch configmap {NAME} --type=json -p '[{{"op":"remove","path":"/data/{TRANSPARENT}"}}]'"#
    )
}

/// A value that is another one than an installation's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ByHand {
    /// Its key.
    pub key: &'static str,
    /// The setting, spelled as for `--set`.
    pub setting: &'static str,
    /// What the mesh follows.
    pub live: String,
    /// What the installation's settings say.
    pub installed: String,
}

/// The values that an installation with these settings would change. Not among them: a mode that was made stricter, which no
/// installation takes back unasked.
pub fn by_hand(map: &ConfigMap, values: &Value) -> Vec<ByHand> {
    let live = |key: &str| map.data.as_ref()?.get(key).map(|text| text.trim());
    let differs = |(key, setting): (&'static str, &'static str)| {
        let (live, installed) = (live(key)?, values.pointer(&pointer(setting))?.as_str()?);
        let mode = |text: &str| text.parse::<Mode>().ok();
        let is_stricter = key == MODE && mode(live) > mode(installed);
        let one = ByHand { key, setting, live: words(live), installed: installed.to_owned() };
        (live != installed && !is_stricter).then_some(one)
    };
    KEYS.into_iter().filter_map(differs).collect()
}

/// The place of a setting in a tree.
pub fn pointer(setting: &str) -> String {
    format!("/{}", setting.replace('.', "/"))
}

impl ByHand {
    /// In words.
    pub fn told(&self) -> String {
        format!("{} is {}, installed with {}", self.key, self.live, self.installed)
    }

    /// The flag that keeps it.
    pub fn flag(&self) -> String {
        format!("--set {}={}", self.setting, self.live)
    }
}

/// Some of them, and the command that keeps them.
pub fn kept_by(all: &[ByHand], namespace: &str) -> String {
    let told: Vec<String> = all.iter().map(ByHand::told).collect();
    let flags: Vec<String> = all.iter().map(ByHand::flag).collect();
    format!(
        "changed by hand: {}; the next installation takes that back, `countersign install -n {namespace} --reuse-values {}` keeps it",
        told.join(", "),
        flags.join(" ")
    )
}

/// What is said of values that were changed by hand since an installation with the settings `before`, and that one with `next` changes
/// again. Which ones somebody means to change by it is in its table of changes.
pub fn taken_back(map: &ConfigMap, before: &Value, next: &Value) -> Option<String> {
    let since = by_hand(map, before);
    let going = by_hand(map, next);
    let lost: Vec<ByHand> = going.into_iter().filter(|one| since.iter().any(|other| other.key == one.key)).collect();
    let told: Vec<String> =
        lost.iter().map(|one| format!("{} is {} and becomes {}", one.key, one.live, one.installed)).collect();
    let keeps: Vec<String> = lost.iter().map(ByHand::flag).collect();
    let (told, keeps) = (told.join(", "), keeps.join(" "));
    (!lost.is_empty()).then(|| format!("ConfigMap {NAME} was changed by hand since: {told}; {keeps} keeps it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::values::defaults;
    use serde_json::json;

    #[test]
    fn every_key_is_in_the_chart_with_the_value_of_its_setting() {
        let values = defaults().unwrap();
        let all: Vec<Value> =
            serde_saphyr::from_multiple(&crate::kubernetes::install::rendered("mesh", &values).unwrap()).unwrap();
        let map = all.into_iter().find(|o| o["kind"] == "ConfigMap" && o["metadata"]["name"] == NAME).unwrap();
        assert_eq!(map["data"].as_object().unwrap().len(), KEYS.len());
        for (key, setting) in KEYS {
            assert_eq!(Some(&map["data"][key]), values.pointer(&pointer(setting)), "{key}");
        }
        assert_eq!(by_hand(&serde_json::from_value(map).unwrap(), &values), []);
    }

    #[test]
    fn what_was_changed_by_hand_is_told_with_what_keeps_it_and_a_stricter_mode_is_kept_anyway() {
        let told = |key: &str, value: &str| {
            let map = serde_json::from_value(json!({ "metadata": {}, "data": { key: value } })).unwrap();
            by_hand(&map, &defaults().unwrap())
        };
        let said = kept_by(&told("svidTTL", "30m\n"), "mesh");
        assert!(said.starts_with("changed by hand: svidTTL is 30m, installed with 1h; "), "{said}");
        assert!(said.contains("install -n mesh --reuse-values --set server.svidTTL=30m`"), "{said}");
        assert_eq!(told("mode", "off").len(), 1, "installed as permissive");
        assert_eq!((told("mode", "strict").len(), told("svidTTL", "1h").len(), told("else", "1").len()), (0, 0, 0));
    }

    #[test]
    fn what_was_changed_by_hand_and_goes_back_is_said_with_what_keeps_it() {
        let map = serde_json::from_value(json!({ "metadata": {}, "data": { "svidTTL": "5m" } })).unwrap();
        let with = |ttl: &str| json!({ "server": { "svidTTL": ttl } });
        let said = taken_back(&map, &with("30m"), &with("30m")).unwrap();
        assert!(said.contains("svidTTL is 5m and becomes 30m; --set server.svidTTL=5m keeps it"), "{said}");
        assert_eq!(taken_back(&map, &with("30m"), &with("5m")), None, "it is kept");
        assert_eq!(taken_back(&map, &with("5m"), &with("30m")), None, "the table of changes has it");
    }
}
