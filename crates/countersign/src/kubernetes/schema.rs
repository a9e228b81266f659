//! The chart's JSON schema. Forms that it expresses as patterns are judged by the parsers that the roles use.
//!
//! A setting is required wherever the templates take its absence for something: `helm upgrade --reuse-values` has none of those that are
//! new, and a `true` that is missing would be a `false`.

use countersign_controller::quantity::{NoQuantity, Quantity};
use jsonschema::error::{TypeKind, ValidationErrorKind};
use jsonschema::paths::LocationSegment;
use jsonschema::{JsonType, ValidationError};
use serde_json::Value;

use super::chart;
use crate::settings::Mistake;
use crate::settings::words::did_you_mean;

const NO_INTEGER: &str = "is no whole number";

/// Reads the schema.
pub fn read() -> Result<Value, Mistake> {
    serde_json::from_str(chart::SCHEMA).map_err(|e| Mistake(format!("the chart's schema: {e}")))
}

/// The name of a key within the setting `at`.
pub fn joined(at: &str, key: &str) -> String {
    if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") }
}

/// A place in the schema.
#[derive(Clone, Copy)]
pub struct Schema<'a> {
    root: &'a Value,
    here: &'a Value,
}

impl<'a> Schema<'a> {
    /// The outermost place.
    pub fn new(root: &'a Value) -> Self {
        Self { root, here: root }
    }

    fn at(self, here: &'a Value) -> Self {
        let named = here["$ref"].as_str().and_then(|name| self.root.pointer(name.strip_prefix('#')?));
        Self { root: self.root, here: named.unwrap_or(here) }
    }

    /// The schema of a key of this object.
    pub fn of(self, key: &str) -> Self {
        self.at(self.here["properties"].get(key).unwrap_or(&self.here["additionalProperties"]))
    }

    /// Whether an object here may have any key.
    pub fn is_free(self) -> bool {
        !self.here["properties"].is_object()
    }

    /// Judges what the schema expresses as patterns, and whether whole numbers are written as such: for JSON Schema `1.0` is one, for
    /// Kubernetes it is none. In this value and all that it holds. Errors: the first mistake.
    fn judge_details(self, value: &Value, at: &str) -> Result<(), Mistake> {
        if self.here["type"] == "integer" && value.is_f64() {
            return Err(Mistake(format!("setting {at}: `{value}` {NO_INTEGER}")));
        }
        if let (Some(text), true) = (value.as_str(), self.here["pattern"].is_string()) {
            judge_form(at, text)?;
        }
        for (key, value) in value.as_object().into_iter().flatten() {
            self.of(key).judge_details(value, &joined(at, key))?;
        }
        for (n, item) in value.as_array().into_iter().flatten().enumerate() {
            self.at(&self.here["items"]).judge_details(item, &format!("{at}[{n}]"))?;
        }
        Ok(())
    }
}

/// Judges all settings by the schema. Errors: the first mistake, with the name of the setting.
pub fn judge(schema: &Value, values: &Value) -> Result<(), Mistake> {
    // Before the patterns themselves, which say nothing to people.
    Schema::new(schema).judge_details(values, "")?;
    let validator = jsonschema::draft7::new(schema).map_err(|e| Mistake(format!("the chart's schema: {e}")))?;
    validator.iter_errors(values).next().map_or(Ok(()), |error| Err(in_words(&error)))
}

/// An error of the schema's library, in words that name the setting as for `--set`.
fn in_words(error: &ValidationError<'_>) -> Mistake {
    let at = error.instance_path().into_iter().fold(String::new(), |at, segment| match segment {
        LocationSegment::Property(key) => joined(&at, &key),
        LocationSegment::Index(n) => format!("{at}[{n}]"),
    });
    let value = error.instance();
    let shown = value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    let wrong = |what: &str| Mistake(format!("setting {at}: `{shown}` {what}"));
    match error.kind() {
        ValidationErrorKind::Required { property } => {
            let setting = joined(&at, property.as_str().unwrap_or_default());
            Mistake(format!("setting {setting}: is missing, and null is no value"))
        }
        ValidationErrorKind::Enum { options } => {
            let listed: Vec<&str> = options.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let meant = did_you_mean(&shown, listed.iter().copied());
            wrong(&format!("is not one of {}{meant}", listed.join(", ")))
        }
        ValidationErrorKind::Type { kind } => wrong(match kind {
            TypeKind::Single(JsonType::String) => "is no text",
            TypeKind::Single(JsonType::Integer) => NO_INTEGER,
            TypeKind::Single(JsonType::Boolean) => "is neither true nor false",
            TypeKind::Single(JsonType::Array) => "is no list",
            TypeKind::Single(JsonType::Object) => "is no object",
            _ => "is neither text nor a number",
        }),
        ValidationErrorKind::Minimum { limit } => wrong(&format!("is less than {limit}")),
        ValidationErrorKind::Maximum { limit } => wrong(&format!("is more than {limit}")),
        ValidationErrorKind::MinLength { .. } => wrong("is empty"),
        ValidationErrorKind::Pattern { .. } => wrong("has not the form that the setting takes"),
        _ => Mistake(format!("setting {at}: {error}")),
    }
}

/// Judges the path of a folder on the nodes.
fn judge_folder(text: &str) -> Result<(), String> {
    let form = |b: u8| b.is_ascii_alphanumeric() || b"._-/".contains(&b);
    let mut parts = text.split('/').skip(1).peekable();
    let is_normal = text.starts_with('/') && parts.peek().is_some() && parts.all(|p| !["", ".", ".."].contains(&p));
    if is_normal && text.bytes().all(form) {
        return Ok(());
    }
    Err(format!(
        "`{text}` is no folder: an absolute path of letters, digits, `.`, `_` and `-`, without `..` and without `/` at its end"
    ))
}

/// Judges what the schema expresses as a pattern.
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
        "agent.socketLink" if text.is_empty() => {}
        "agent.socketLink" => drop(text.parse::<countersign_agent::LinkName>().map_err(wrong)?),
        "agent.csi.driverName" => drop(text.parse::<countersign_csi::DriverName>().map_err(wrong)?),
        "agent.csi.kubeletDir" => {
            text.parse::<countersign_csi::KubeletDir>().map_err(wrong)?;
            judge_folder(text).map_err(wrong)?;
        }
        "cni.binDir" | "cni.confDir" => judge_folder(text).map_err(wrong)?,
        _ if at.ends_with("serviceAccount.name") => {
            let form = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b);
            let ends = text.starts_with(['-', '.']) || text.ends_with(['-', '.']);
            if text.is_empty() || text.len() > 253 || ends || !text.bytes().all(form) {
                return Err(wrong(format!("`{text}` is no name of a service account")));
            }
        }
        "podMonitor.interval" => {
            let number = text.strip_suffix("ms").or_else(|| text.strip_suffix(['s', 'm', 'h']));
            if number.is_none_or(|number| number.parse::<u32>().is_err()) {
                return Err(wrong(format!("`{text}` is no interval, such as 30s")));
            }
        }
        _ if at.contains("resources.") || at == "server.persistence.size" => {
            // In ours an empty one is none.
            let ours = at.starts_with("sidecar.") || at.starts_with("redirect.");
            if !(ours && text.is_empty()) {
                text.parse::<Quantity>().map_err(|e: NoQuantity| wrong(format!("`{text}` {e}")))?;
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
    use crate::kubernetes::values::defaults;
    use serde_json::json;

    /// Each single setting with a default that says something, by its path. A pod's own fields are left out: whoever sets one to null
    /// means to have none, and the templates leave it out then.
    fn told(values: &Value, at: &str, found: &mut Vec<String>) {
        for (key, value) in values.as_object().into_iter().flatten() {
            let name = format!("{at}/{key}");
            let pods_own =
                name.ends_with("/priorityClassName") || key == "resources" && !["/sidecar", "/redirect"].contains(&at);
            match value {
                _ if pods_own => {}
                Value::Object(_) => told(value, &name, found),
                Value::Bool(_) | Value::Number(_) => found.push(name),
                Value::String(text) if !text.is_empty() => found.push(name),
                _ => {}
            }
        }
    }

    #[test]
    fn a_setting_that_is_missing_is_never_taken_for_one_that_is_off() {
        let (root, values) = (read().unwrap(), defaults().unwrap());
        judge(&root, &values).unwrap();
        let mut all = vec![];
        told(&values, "", &mut all);
        assert!(all.len() > 35 && all.contains(&"/injector/cniRedirect".to_owned()), "{all:?}");
        for path in all {
            let setting = path[1..].replace('/', ".");
            for (place, _) in path.match_indices('/').skip(1).chain([(path.len(), "")]) {
                // The setting, or a whole group that has it.
                let gone = &path[..place];
                let (group, key) = gone.rsplit_once('/').unwrap();
                let mut without = values.clone();
                without.pointer_mut(group).unwrap().as_object_mut().unwrap().remove(key);
                let why = judge(&root, &without).unwrap_err().to_string();
                let named = gone[1..].replace('/', ".");
                assert_eq!(why, format!("setting {named}: is missing, and null is no value"), "{setting}");
            }
        }
        let null = crate::kubernetes::given::Given::of(json!({ "injector": { "cniRedirect": null } })).unwrap();
        assert!(null.whole("the settings").unwrap_err().to_string().contains("injector.cniRedirect"));
    }
}
