//! Settings of an installation: the chart's defaults, overridden by a file and by `--set`, validated by the chart's
//! schema.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::chart;
use super::given::{Given, leaves};
use super::schema::{self, Schema};
use crate::settings::words::{nearest, shown};
use crate::settings::{Mistake, load};

/// Settings from a file and from the command line.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ValuesArgs {
    /// One setting, KEY=VALUE, such as `mesh.mode=strict`; may be repeated. Lists and objects are JSON:
    /// `agent.tolerations=[{"operator":"Exists"}]`. `--show-values` lists all settings.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// YAML file with settings, in the form of the chart's values.yaml.
    #[arg(long, value_name = "FILE")]
    values: Option<PathBuf>,
}

impl ValuesArgs {
    /// Whether any setting was named.
    pub fn is_given(&self) -> bool {
        !self.set.is_empty() || self.values.is_some()
    }

    /// All settings, merged and validated.
    pub fn read(&self) -> Result<Value, Mistake> {
        self.given()?.whole("the settings")
    }

    /// The settings that are named, without the defaults of the others. Errors: one is no setting, or does not fit.
    pub fn given(&self) -> Result<Given, Mistake> {
        // A setting's type decides how its text on the command line is read, so the defaults go along.
        let (mut values, root) = (defaults()?, schema::read()?);
        let schema = Schema::new(&root);
        let mut given = Given::default();
        if let Some(path) = &self.values {
            let (tree, _): (Value, String) = load(path)?;
            merge(&mut values, tree.clone(), schema, "", &path.display().to_string())?;
            given = Given::of(tree).map_err(|why| Mistake(format!("{}: {why}", path.display())))?;
        }
        for set in &self.set {
            let (key, text) =
                set.split_once('=').ok_or_else(|| Mistake::flag("--set", &format!("`{set}` is no KEY=VALUE")))?;
            let named = named(&values, schema, key, text);
            merge(&mut values, named.clone(), schema, "", "--set")?;
            given = Given::of(named).map_err(|why| Mistake::flag("--set", &why))?.over(given);
        }
        schema::judge(&root, &values)?;
        Ok(given)
    }
}

/// The chart's default settings.
pub fn defaults() -> Result<Value, Mistake> {
    serde_saphyr::from_str(chart::VALUES).map_err(|e| Mistake(format!("the chart's values.yaml: {e}")))
}

/// What an installation whose sidecars mount the agent's folder by `hostPath` gives away, and by which setting; `None` if they have
/// it by the CSI driver.
pub fn host_path(values: &Value) -> Option<String> {
    let setting = match (&values["agent"]["csi"]["enabled"], &values["injector"]["csiVolumes"]) {
        (Value::Bool(false), _) => "agent.csi.enabled",
        (_, Value::Bool(false)) => "injector.csiVolumes",
        _ => return None,
    };
    Some(format!(
        "{setting}=false: meshed pods mount the agent's folder by hostPath, so their namespaces must allow hostPath, by which whoever \
         creates pods there can become root on a node (docs/kubernetes.md, without the CSI driver)"
    ))
}

/// Merges as Helm does: objects key by key, everything else as a whole. A free-form object, such as a nodeSelector, takes
/// any key, and null removes one from it. `whose` is the file or flag that gives the settings.
pub fn merge(into: &mut Value, given: Value, schema: Schema<'_>, at: &str, whose: &str) -> Result<(), Mistake> {
    let unknown = |at: &str| {
        let meant = meant_by(at).map(|setting| format!("; did you mean `{setting}`?")).unwrap_or_default();
        Err(Mistake(format!(
            "{whose}: `{}` is no setting{meant}; `countersign install --show-values` lists them",
            shown(at)
        )))
    };
    let (known, given) = match (into, given) {
        (Value::Object(known), Value::Object(given)) => (known, given),
        (Value::Object(_), _) if !schema.is_free() => return unknown(at),
        (into, given) => {
            *into = given;
            return Ok(());
        }
    };
    for (key, value) in given {
        let full = schema::joined(at, &key);
        match known.get_mut(&key) {
            _ if schema.is_free() && value.is_null() => drop(known.remove(&key)),
            Some(known) => merge(known, value, schema.of(&key), &full, whose)?,
            None if schema.is_free() => drop(known.insert(key, value)),
            None => return unknown(&full),
        }
    }
    Ok(())
}

/// The setting that was probably meant by one that there is not: a name of its own in the wrong place, or nearly one.
fn meant_by(unknown: &str) -> Option<String> {
    let all: Vec<String> = leaves(&defaults().ok()?).into_keys().collect();
    // Groups too: whoever misspells one of them has named nothing below it.
    let mut known: Vec<&str> =
        all.iter().flat_map(|path| path.match_indices('.').map(|(end, _)| &path[..end])).collect();
    known.extend(all.iter().map(String::as_str));
    known.sort_unstable();
    known.dedup();
    if known.contains(&unknown) {
        // A group that was given a value.
        return None;
    }
    let (group, name) = unknown.rsplit_once('.').unwrap_or(("", unknown));
    // A name without its group, which only one setting has.
    let mut same = known.iter().filter(|path| last(path).eq_ignore_ascii_case(name));
    if let (Some(only), None) = (same.next(), same.next()) {
        return Some((*only).to_owned());
    }
    let beside = known.iter().filter(|path| path.rsplit_once('.').map_or("", |(group, _)| group) == group);
    let near = nearest(name, beside.map(|path| last(path)))?;
    Some(schema::joined(group, near))
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// One setting by its path, as a tree. A dot that is part of a name is written `\.`, as for Helm.
fn named(values: &Value, schema: Schema<'_>, key: &str, text: &str) -> Value {
    let path: Vec<String> = key.replace("\\.", "\0").split('.').map(|name| name.replace('\0', ".")).collect();
    let known = path.iter().try_fold(values, |value, name| value.get(name));
    let may_go = path.iter().take(path.len() - 1).fold(schema, |schema, name| schema.of(name)).is_free();
    let given = match known {
        Some(Value::String(_)) if !(may_go && text == "null") => text.into(),
        // Lists and objects are JSON. Numbers and booleans keep their type; the schema rejects wrong ones.
        _ => serde_json::from_str(text).unwrap_or_else(|_| text.into()),
    };
    path.into_iter().rev().fold(given, |value, name| json!({ name: value }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(set: &[&str]) -> Result<Value, String> {
        let args = ValuesArgs { set: set.iter().map(|s| (*s).to_owned()).collect(), values: None };
        args.read().map_err(|e| e.to_string())
    }

    #[test]
    fn the_charts_own_settings_pass_its_own_schema() {
        let values = read(&[]).unwrap();
        assert_eq!(values["mesh"]["mode"], "permissive");
    }

    #[test]
    fn settings_from_the_command_line_keep_their_kind() {
        let values =
            read(&["mesh.mode=strict", "injector.replicas=3", "agent.nodesProxyPermission=true", "clusterName=123"])
                .unwrap();
        assert_eq!(values["mesh"]["mode"], "strict");
        assert_eq!(values["injector"]["replicas"], 3);
        assert_eq!(values["agent"]["nodesProxyPermission"], true);
        assert_eq!(values["clusterName"], "123");
    }

    #[test]
    fn mistakes_name_the_setting_and_what_it_takes() {
        for (set, said) in [
            ("mesh.mod=strict", "--set: `mesh.mod` is no setting"),
            ("mesh=strict", "--set: `mesh` is no setting"),
            ("mesh.mode", "--set: `mesh.mode` is no KEY=VALUE"),
            ("mesh.mode=tight", "setting mesh.mode: `tight` is not one of off, permissive, strict"),
            ("injector.replicas=0", "setting injector.replicas: `0` is less than 1"),
            ("injector.replicas=1.0", "setting injector.replicas: `1.0` is no whole number"),
            ("injector.replicas=many", "setting injector.replicas: `many` is no whole number"),
            ("agent.nodesProxyPermission=1", "setting agent.nodesProxyPermission: `1` is neither true nor false"),
            ("server.svidTTL=soon", "setting server.svidTTL:"),
            ("trustDomain=Not A Domain", "setting trustDomain:"),
            ("clusterName=a/b", "setting clusterName:"),
            ("mesh.allowExceptions=a\"b", "setting mesh.allowExceptions:"),
            ("image.name=", "setting image.name: `` is empty"),
            ("agent.csi.driverName=CSI", "setting agent.csi.driverName: `CSI` is no driver's name"),
            ("agent.csi.kubeletDir=kubelet", "setting agent.csi.kubeletDir: `kubelet` is no folder of a kubelet"),
            ("agent.csi.kubeletDir=/a\"b", "setting agent.csi.kubeletDir:"),
            ("agent.csi.kubeletDir=/a/", "setting agent.csi.kubeletDir:"),
            ("cni.binDir=opt/cni", "setting cni.binDir: `opt/cni` is no folder"),
            ("cni.confDir=/etc/../net.d", "setting cni.confDir: `/etc/../net.d` is no folder"),
            ("cni.confDir=/", "setting cni.confDir: `/` is no folder"),
            ("agent.socketLink=a/b", "setting agent.socketLink: `a/b` is no name of a file"),
            ("sidecar.resources.limits.cpu=lots", "setting sidecar.resources.limits.cpu: `lots` is no quantity"),
            (
                "redirect.resources.requests.memory=-1",
                "setting redirect.resources.requests.memory: `-1` is no quantity",
            ),
            ("server.persistence.size=large", "setting server.persistence.size: `large` is no quantity"),
            (
                "agent.serviceAccount.name=a:b",
                "setting agent.serviceAccount.name: `a:b` is no name of a service account",
            ),
            (
                "injector.webhook.failurePolicy=Open",
                "setting injector.webhook.failurePolicy: `Open` is not one of Fail, Ignore",
            ),
            ("podMonitor.interval=often", "setting podMonitor.interval: `often` is no interval, such as 30s"),
            ("sidecar.resources.limits={\"disk\":1}", "--set: `sidecar.resources.limits.disk` is no setting"),
        ] {
            let why = read(&[set]).unwrap_err();
            assert!(why.starts_with(said), "{why}");
        }
    }

    #[test]
    fn lists_and_objects_are_json_and_free_ones_take_any_key() {
        let values = read(&[
            r#"agent.tolerations=[{"key":"gpu","operator":"Exists"}]"#,
            r#"agent.nodeSelector={"disk":"ssd"}"#,
            r"agent.nodeSelector.kubernetes\.io/os=linux",
            "server.resources.limits.memory=1Gi",
            "server.resources.limits.cpu=2",
            "injector.resources.limits.memory=null",
            r#"injector.affinity.podAntiAffinity={"x":[]}"#,
            r#"imagePullSecrets=[{"name":"registry"}]"#,
        ])
        .unwrap();
        assert_eq!(values["agent"]["tolerations"], json!([{ "key": "gpu", "operator": "Exists" }]));
        assert_eq!(values["agent"]["nodeSelector"], json!({ "disk": "ssd", "kubernetes.io/os": "linux" }));
        let resources =
            json!({ "requests": { "cpu": "50m", "memory": "32Mi" }, "limits": { "memory": "1Gi", "cpu": 2 } });
        assert_eq!(values["server"]["resources"], resources, "the rest stays");
        assert_eq!(values["injector"]["resources"]["limits"], json!({}));
        assert_eq!(values["injector"]["affinity"], json!({ "podAntiAffinity": { "x": [] } }));
        assert_eq!(values["imagePullSecrets"][0]["name"], "registry");
        for (set, said) in [
            ("agent.tolerations=Exists", "setting agent.tolerations: `Exists` is no list"),
            (r#"agent.tolerations=["x"]"#, "setting agent.tolerations[0]: `x` is no object"),
            ("agent.nodeSelector=ssd", "setting agent.nodeSelector: `ssd` is no object"),
            ("agent.nodeSelector.disk=1", "setting agent.nodeSelector.disk: `1` is no text"),
            ("server.resources.limits.memory=lots", "setting server.resources.limits.memory: `lots` is no quantity"),
            ("server.resources.limits.cpu=-1", "setting server.resources.limits.cpu: `-1` is less than 0"),
            ("server.resources.limit.cpu=1", "--set: `server.resources.limit` is no setting"),
            ("server.resources=1", "--set: `server.resources` is no setting"),
        ] {
            let why = read(&[set]).unwrap_err();
            assert!(why.starts_with(said), "{why}");
        }
    }

    #[test]
    fn a_setting_that_there_is_not_is_said_with_the_one_that_was_meant() {
        let meant = |set: &str| read(&[set]).unwrap_err();
        for (set, setting) in [
            ("mesh.made=strict", "mesh.mode"),
            ("svidTTL=30m", "server.svidTTL"),
            ("server.svidTtl=30m", "server.svidTTL"),
            ("server.presistence.size=2Gi", "server.persistence"),
            ("agent.csi.enable=false", "agent.csi.enabled"),
            ("trustdomain=a", "trustDomain"),
        ] {
            let why = meant(set);
            assert!(
                why.contains(&format!("; did you mean `{setting}`?; `countersign install --show-values`")),
                "{why}"
            );
        }
        assert!(!meant("colour=red").contains("did you mean"));
        assert!(meant("mesh.mode=stict").ends_with("is not one of off, permissive, strict; did you mean `strict`?"));
    }

    #[test]
    fn an_installation_by_host_path_says_so_and_by_which_setting() {
        let said = |set: &[&str]| host_path(&read(set).unwrap());
        assert_eq!(said(&[]), None, "the driver is the default");
        for setting in ["agent.csi.enabled", "injector.csiVolumes"] {
            let line = said(&[&format!("{setting}=false")]).unwrap();
            assert!(line.starts_with(&format!("{setting}=false: ")) && line.contains("root on a node"), "{line}");
        }
    }

    #[test]
    fn the_pages_examples_are_settings() {
        let page = include_str!("../../../../docs/kubernetes.md");
        let folder = tempfile::tempdir().unwrap();
        let examples = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
        // The third is a part of a pod.
        let examples: Vec<&str> = examples.filter(|text| !text.starts_with("volumes:")).collect();
        assert_eq!(examples.len(), 2);
        for text in examples {
            let path = folder.path().join("values.yaml");
            std::fs::write(&path, text).unwrap();
            ValuesArgs { set: vec![], values: Some(path) }.read().unwrap();
        }
    }

    #[test]
    fn a_file_may_set_what_there_is_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("values.yaml");
        let with = |text: &str| {
            std::fs::write(&path, text).unwrap();
            ValuesArgs { set: vec![], values: Some(path.clone()) }.read().map_err(|e| e.to_string())
        };
        assert_eq!(with("mesh: {mode: strict}").unwrap()["mesh"]["mode"], "strict");
        assert!(with("mesh: {made: strict}").unwrap_err().contains("`mesh.made` is no setting"));
        assert!(with("mesh: strict").unwrap_err().contains("`mesh` is no setting"));
        let tolerations = "agent: {tolerations: [{operator: Exists, effect: NoSchedule}], podLabels: {team: a}}";
        let given = with(tolerations).unwrap();
        assert_eq!(given["agent"]["tolerations"][0]["effect"], "NoSchedule");
        assert_eq!((&given["agent"]["podLabels"]["team"], &given["agent"]["watchPods"]), (&json!("a"), &json!(true)));
        assert!(with("mesh: [").unwrap_err().contains("values.yaml:1"), "where the mistake is");
    }
}
