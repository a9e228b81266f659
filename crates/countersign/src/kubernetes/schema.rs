//! The chart's JSON schema, and the part of JSON Schema that it uses: `type`, `enum`, `pattern`, `minimum`, `maximum`,
//! `minLength`, `properties`, `additionalProperties`, `items`, and `$ref` within the document. Forms that it expresses as
//! patterns are judged by the parsers that the roles use.

use countersign_controller::quantity::{NoQuantity, Quantity};
use serde_json::Value;

use super::chart;
use crate::settings::Mistake;

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

    /// Judges a value and all that it holds. Errors: the first mistake, with the name of the setting.
    pub fn judge(self, value: &Value, at: &str) -> Result<(), Mistake> {
        let shown = || value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
        let wrong = |what: String| Err(Mistake(format!("setting {at}: `{}` {what}", shown())));
        let schema = self.here;
        if let Some(allowed) = schema["enum"].as_array()
            && !allowed.contains(value)
        {
            let listed: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
            return wrong(format!("is not one of {}", listed.join(", ")));
        }
        if let Some(why) = not_of_type(value, &schema["type"]) {
            return wrong(why.to_owned());
        }
        let (number, bound) = (value.as_f64(), |key: &str| schema[key].as_f64());
        if let (Some(n), Some(least)) = (number, bound("minimum"))
            && n < least
        {
            return wrong(format!("is less than {least}"));
        }
        if let (Some(n), Some(most)) = (number, bound("maximum"))
            && n > most
        {
            return wrong(format!("is more than {most}"));
        }
        if schema["minLength"].as_u64().is_some_and(|least| value.as_str().is_some_and(|s| (s.len() as u64) < least)) {
            return wrong("is empty".into());
        }
        if let (Some(text), Some(_)) = (value.as_str(), schema["pattern"].as_str()) {
            judge_form(at, text)?;
        }
        for (key, value) in value.as_object().into_iter().flatten() {
            self.of(key).judge(value, &joined(at, key))?;
        }
        for (n, item) in value.as_array().into_iter().flatten().enumerate() {
            self.at(&schema["items"]).judge(item, &format!("{at}[{n}]"))?;
        }
        Ok(())
    }
}

/// Why a value is of none of the types that a schema allows.
fn not_of_type(value: &Value, types: &Value) -> Option<&'static str> {
    let is = |name: &str| match name {
        "string" => value.is_string(),
        "integer" => value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    };
    let why = match types.as_str() {
        Some("string") => "is no text",
        Some("integer") => "is no whole number",
        Some("boolean") => "is neither true nor false",
        Some("array") => "is no list",
        Some("object") => "is no object",
        _ => "is neither text nor a number",
    };
    let named = types.as_array().map_or(std::slice::from_ref(types), Vec::as_slice);
    (!types.is_null() && !named.iter().filter_map(Value::as_str).any(is)).then_some(why)
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
