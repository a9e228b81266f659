//! Settings of an installation: the chart's defaults, overridden by a file and by `--set`, validated by the chart's
//! schema.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::chart;
use crate::settings::{Mistake, load};

/// Settings from a file and from the command line.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ValuesArgs {
    /// One setting, KEY=VALUE, such as `mesh.mode=strict`; may be repeated. `--show-values` lists all settings.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// YAML file with settings, in the form of the chart's values.yaml.
    #[arg(long, value_name = "FILE")]
    values: Option<PathBuf>,
}

impl ValuesArgs {
    /// All settings, merged and validated.
    pub fn read(&self) -> Result<Value, Mistake> {
        let mut values = defaults()?;
        if let Some(path) = &self.values {
            let (given, _): (Value, String) = load(path)?;
            merge(&mut values, given, "", path)?;
        }
        for set in &self.set {
            let (key, text) =
                set.split_once('=').ok_or_else(|| Mistake::flag("--set", &format!("`{set}` is no KEY=VALUE")))?;
            put(&mut values, key, text)?;
        }
        judge(&values)?;
        Ok(values)
    }
}

/// The chart's default settings.
fn defaults() -> Result<Value, Mistake> {
    serde_saphyr::from_str(chart::VALUES).map_err(|e| Mistake(format!("the chart's values.yaml: {e}")))
}

fn merge(into: &mut Value, given: Value, at: &str, path: &Path) -> Result<(), Mistake> {
    let Value::Object(given) = given else {
        *into = given;
        return Ok(());
    };
    for (key, value) in given {
        let full = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
        match into.get_mut(&key) {
            Some(known) => merge(known, value, &full, path)?,
            None => {
                return Err(Mistake(format!("{}: `{full}` is no setting; --show-values lists them", path.display())));
            }
        }
    }
    Ok(())
}

fn put(values: &mut Value, key: &str, text: &str) -> Result<(), Mistake> {
    let known = key.split('.').try_fold(&mut *values, |value, part| value.get_mut(part));
    let Some(known) = known.filter(|k| !k.is_object()) else {
        return Err(Mistake::flag("--set", &format!("`{key}` is no setting; --show-values lists them")));
    };
    *known = match known {
        Value::String(_) => text.into(),
        // Numbers and booleans keep their type; the schema rejects wrong ones.
        _ => serde_json::from_str(text).unwrap_or_else(|_| text.into()),
    };
    Ok(())
}

/// Validates by the part of JSON schema that the chart uses: `type`, `enum`, `pattern`, `minimum`, `maximum`,
/// `minLength`.
fn judge(values: &Value) -> Result<(), Mistake> {
    let schema: Value = serde_json::from_str(chart::SCHEMA).map_err(|e| Mistake(format!("the chart's schema: {e}")))?;
    judge_one(values, &schema, "")
}

fn judge_one(value: &Value, schema: &Value, at: &str) -> Result<(), Mistake> {
    if let Some(properties) = value.as_object() {
        for (key, value) in properties {
            let full = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
            judge_one(value, &schema["properties"][key], &full)?;
        }
        return Ok(());
    }
    let wrong = |what: String| {
        Err(Mistake(format!(
            "setting {at}: `{}` {what}",
            value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
        )))
    };
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        let listed: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
        return wrong(format!("is not one of {}", listed.join(", ")));
    }
    match schema["type"].as_str() {
        Some("string") if !value.is_string() => return wrong("is no text".into()),
        Some("integer") if !value.is_u64() => return wrong("is no whole number".into()),
        Some("boolean") if !value.is_boolean() => return wrong("is neither true nor false".into()),
        _ => {}
    }
    let number = value.as_u64();
    if let (Some(n), Some(least)) = (number, schema["minimum"].as_u64())
        && n < least
    {
        return wrong(format!("is less than {least}"));
    }
    if let (Some(n), Some(most)) = (number, schema["maximum"].as_u64())
        && n > most
    {
        return wrong(format!("is more than {most}"));
    }
    if schema["minLength"].as_u64().is_some_and(|least| value.as_str().is_some_and(|s| (s.len() as u64) < least)) {
        return wrong("is empty".into());
    }
    if let (Some(text), Some(_)) = (value.as_str(), schema["pattern"].as_str()) {
        return judge_form(at, text);
    }
    Ok(())
}

/// Validates what the schema expresses as patterns, with the parsers that the roles use.
fn judge_form(at: &str, text: &str) -> Result<(), Mistake> {
    let wrong = |why: String| Mistake(format!("setting {at}: {why}"));
    match at {
        "trustDomain" => {
            countersign_identity::trust_domain::parse_trust_domain(text).map_err(|e| wrong(e.to_string()))?;
        }
        "mesh.allowExceptions" => {
            let form = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-*, ".contains(&b);
            if !text.bytes().all(form) {
                return Err(wrong(format!("`{text}` is no list of namespaces, comma separated, nor `*`")));
            }
        }
        _ if at.ends_with("TTL") => {
            text.parse::<crate::settings::Ttl>().map_err(wrong)?;
        }
        _ => {
            let ok = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
            if !ok {
                return Err(wrong(format!("`{text}` may have letters, digits, `.`, `_`, `-` only")));
            }
        }
    }
    Ok(())
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
            ("injector.replicas=many", "setting injector.replicas: `many` is no whole number"),
            ("agent.nodesProxyPermission=1", "setting agent.nodesProxyPermission: `1` is neither true nor false"),
            ("server.svidTTL=soon", "setting server.svidTTL:"),
            ("trustDomain=Not A Domain", "setting trustDomain:"),
            ("clusterName=a/b", "setting clusterName:"),
            ("mesh.allowExceptions=a\"b", "setting mesh.allowExceptions:"),
            ("image.name=", "setting image.name: `` is empty"),
        ] {
            let why = read(&[set]).unwrap_err();
            assert!(why.starts_with(said), "{why}");
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
        assert!(with("mesh: [").unwrap_err().contains("values.yaml:1"), "where the mistake is");
    }
}
