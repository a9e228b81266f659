//! A network configuration list (CNI specification 1.1.0, section 1) as text: our entry is put into `plugins` and taken
//! out of it, and every other byte stays as it is.

use std::ops::Range;

use serde_json::Value;

use super::json::{elements, members};
use crate::plugin::{NAME, VERSIONS};

/// Why a text is no list that can be extended.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ListError {
    /// The runtime cannot load it either.
    #[error("is no network configuration: {0}")]
    Invalid(&'static str),
    /// The plugin would be refused by the runtime, and every pod of the node with it.
    #[error("has CNI version {0}, which the plugin does not know; it knows {known}", known = VERSIONS.join(", "))]
    Version(String),
}

/// A list that a runtime can load.
#[derive(Debug)]
pub struct List<'a> {
    text: &'a str,
    /// Where each plugin's object stands.
    plugins: Vec<Range<usize>>,
    /// Their `type`s.
    types: Vec<String>,
    /// Index of our own among them.
    ours: Option<usize>,
}

impl<'a> List<'a> {
    /// Parses a list.
    ///
    /// # Errors
    /// It is no list, has no plugin besides ours, or a version that our plugin does not know.
    pub fn parse(text: &'a str) -> Result<Self, ListError> {
        let value = json(text)?;
        supported(&value)?;
        Self::of(text, &value)
    }

    /// Parses a list of any version, for the removal of our entry.
    ///
    /// # Errors
    /// As [`List::parse`].
    pub fn of_any_version(text: &'a str) -> Result<Self, ListError> {
        Self::of(text, &json(text)?)
    }

    fn of(text: &'a str, value: &Value) -> Result<Self, ListError> {
        // Of several members of one name the last one counts, for the runtime too.
        let all = members(text).into_iter().flatten();
        let (_, at) = all.rev().find(|(key, _)| key == "plugins").ok_or(ListError::Invalid("it has no `plugins`"))?;
        let plugins = elements(text, at.start).ok_or(ListError::Invalid("`plugins` is no list"))?;
        let types = value["plugins"].as_array().into_iter().flatten().map(|plugin| plugin["type"].as_str());
        let types = types.map(|name| name.map(ToOwned::to_owned));
        let types: Vec<String> = types.collect::<Option<_>>().ok_or(ListError::Invalid("a plugin has no `type`"))?;
        let ours = types.iter().position(|name| name == NAME);
        if types.len() != plugins.len() || types.iter().all(|name| name == NAME) {
            return Err(ListError::Invalid("`plugins` is empty"));
        }
        Ok(Self { text, plugins, types, ours })
    }

    /// The plugins' `type`s: names of their files.
    pub fn types(&self) -> &[String] {
        &self.types
    }

    /// Whether this entry is in it, once, and behind another plugin: in the first place there is no result to pass on,
    /// so that no pod of the node would start.
    pub fn has(&self, entry: &Value) -> bool {
        if self.types.iter().filter(|name| *name == NAME).count() != 1 {
            return false;
        }
        let ours = self.ours.filter(|n| *n > 0).and_then(|n| self.text.get(self.plugins[n].clone()));
        ours.and_then(|text| serde_json::from_str::<Value>(text).ok()).as_ref() == Some(entry)
    }

    /// Whether an entry of ours is in it.
    pub fn has_any(&self) -> bool {
        self.ours.is_some()
    }

    /// The text with the entry behind the last plugin. It must not have one.
    pub fn with(&self, entry: &Value) -> String {
        let (start, end) = self.plugins.last().map_or((0, 0), |last| (last.start, last.end));
        // On a line of its own where the plugin before has one.
        let before = &self.text[..start];
        let blank = &before[before.trim_end_matches([' ', '\t']).len()..];
        let line = if before.trim_end_matches([' ', '\t']).ends_with('\n') { format!("\n{blank}") } else { " ".into() };
        format!("{},{line}{entry}{}", &self.text[..end], &self.text[end..])
    }

    /// The text without any entry of ours: byte for byte what it was before [`List::with`].
    pub fn without(&self) -> String {
        let Some(ours) = self.ours else { return self.text.to_owned() };
        let range = match ours {
            // To the next plugin, which somebody put behind ours and then moved.
            0 => self.plugins[0].start..self.plugins.get(1).map_or(self.plugins[0].end, |next| next.start),
            _ => self.plugins[ours - 1].end..self.plugins[ours].end,
        };
        let rest = format!("{}{}", &self.text[..range.start], &self.text[range.end..]);
        match List::of_any_version(&rest) {
            Ok(list) if list.has_any() => list.without(),
            _ => rest,
        }
    }
}

/// A single configuration (`*.conf`, `*.json`) as the list that runtimes make of it.
///
/// # Errors
/// As [`List::parse`].
pub fn list_of(conf: &str) -> Result<String, ListError> {
    let value = json(conf)?;
    let text = |key: &str| value[key].as_str().filter(|text| !text.is_empty());
    text("type").ok_or(ListError::Invalid("it has no `type`"))?;
    let name = text("name").ok_or(ListError::Invalid("it has no `name`"))?;
    supported(&value)?;
    let version = &value["cniVersion"];
    let name = Value::from(name);
    Ok(format!("{{\n  \"cniVersion\": {version},\n  \"name\": {name},\n  \"plugins\": [\n{}\n  ]\n}}\n", conf.trim()))
}

fn json(text: &str) -> Result<Value, ListError> {
    serde_json::from_str(text).map_err(|_| ListError::Invalid("it is no JSON"))
}

/// Whether the plugin knows every version that the runtime may choose for it.
fn supported(value: &Value) -> Result<(), ListError> {
    let several = value["cniVersions"].as_array().into_iter().flatten();
    let mut versions = several.chain(value.get("cniVersion")).peekable();
    if versions.peek().is_none() {
        return Err(ListError::Version("0.1.0".into()));
    }
    for version in versions {
        let version = version.as_str().ok_or(ListError::Invalid("`cniVersion` is no text"))?;
        if !VERSIONS.contains(&version) {
            return Err(ListError::Version(countersign_identity::shown::shown(version).to_string()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const PRETTY: &str = r#"{
  "cniVersion": "0.4.0",
  "name": "pods",
  "plugins": [
    { "type": "bridge", "note": "] } \" plugins" },
    { "type": "portmap" }
  ],
  "disableCheck": true
}
"#;

    fn entry() -> Value {
        json!({ "type": NAME, "socket": "/run/x.sock" })
    }

    #[test]
    fn the_entry_comes_last_and_its_removal_leaves_the_bytes_of_before() {
        let compact = r#"{"plugins":[{"type":"bridge"}],"cniVersion":"1.0.0","name":"n"}"#;
        let escaped = r#"{"plug\u0069ns":[{"type":"a"}, [1] ,{"type":"b"}],"cniVersion":"1.1.0","name":"n"}"#;
        assert_eq!(List::parse(escaped).unwrap_err(), ListError::Invalid("a plugin has no `type`"));
        let escaped = escaped.replace("[1]", r#"{"type":"x"}"#);
        let twice = r#"{"plugins":[],"plugins":[{"type":"a"}],"cniVersion":"0.3.1","name":"plugins"}"#;
        for text in [PRETTY, compact, &escaped, twice] {
            let list = List::parse(text).unwrap();
            assert!(!list.has(&entry()) && !list.has_any());
            let with = list.with(&entry());
            let read: Value = serde_json::from_str(&with).unwrap();
            assert_eq!(read["plugins"].as_array().unwrap().last(), Some(&entry()), "{with}");
            let with = List::parse(&with).unwrap();
            assert!(with.has(&entry()) && with.has_any() && !with.has(&json!({ "type": NAME })));
            assert_eq!(with.without(), text);
            assert_eq!(list.without(), text);
        }
        assert!(List::parse(PRETTY).unwrap().with(&entry()).contains("\"portmap\" },\n    {\"socket\""));
    }

    #[test]
    fn entries_that_others_moved_or_doubled_are_all_removed() {
        let ours = entry().to_string();
        let around = |plugins: &str| format!(r#"{{"cniVersion":"1.0.0","name":"n","plugins":[{plugins}]}}"#);
        let plain = around(r#"{"type":"a"},{"type":"b"}"#);
        for plugins in [
            format!(r#"{ours}, {{"type":"a"}},{{"type":"b"}}"#),
            format!(r#"{{"type":"a"}}, {ours},{{"type":"b"}}"#),
            format!(r#"{ours},{{"type":"a"}},{ours},{{"type":"b"}}  , {ours}"#),
        ] {
            assert_eq!(List::parse(&around(&plugins)).unwrap().without(), plain, "{plugins}");
        }
    }

    #[test]
    fn an_entry_in_the_first_place_or_doubled_does_not_count() {
        let ours = entry().to_string();
        let has = |plugins: &str| {
            let list = format!(r#"{{"cniVersion":"1.0.0","name":"n","plugins":[{plugins}]}}"#);
            List::parse(&list).unwrap().has(&entry())
        };
        assert!(has(&format!(r#"{{"type":"a"}},{ours}"#)) && has(&format!(r#"{{"type":"a"}},{ours},{{"type":"b"}}"#)));
        assert!(!has(&format!(r#"{ours},{{"type":"a"}}"#)), "it has no result before it");
        assert!(!has(&format!(r#"{{"type":"a"}},{ours},{ours}"#)));
        assert!(!has(&format!(r#"{{"type":"a"}},{ours},{{"type":"{NAME}"}}"#)));
    }

    #[test]
    fn what_the_runtime_would_not_load_or_the_plugin_not_know_is_left_alone() {
        let said = |text: &str| List::parse(text).unwrap_err().to_string();
        assert!(said("{").contains("no JSON") && said("[]").contains("CNI version 0.1.0"));
        assert!(said(r#"{"cniVersion":"1.0.0"}"#).contains("no `plugins`"));
        assert!(said(r#"{"cniVersion":"1.0.0","plugins":{}}"#).contains("no list"));
        assert!(said(r#"{"cniVersion":"1.0.0","plugins":[]}"#).contains("is empty"));
        assert!(said(r#"{"cniVersion":"1.0.0","plugins":[{"type":"countersign-cni"}]}"#).contains("is empty"));
        let of_version = |v: &str| said(&format!(r#"{{{v},"plugins":[{{"type":"a"}}]}}"#));
        assert!(of_version(r#""cniVersion":"9.0.0""#).contains("CNI version 9.0.0"));
        assert!(of_version(r#""cniVersion":"1.0.0","cniVersions":["1.0.0","2.0.0"]"#).contains("CNI version 2.0.0"));
        assert!(of_version(r#""cniVersion":7"#).contains("no text"));
    }

    #[test]
    fn a_single_configuration_becomes_a_list_of_one() {
        let list = list_of("{\"cniVersion\":\"1.0.0\",\"name\":\"n\\\"\",\"type\":\"bridge\"}\n").unwrap();
        let read: Value = serde_json::from_str(&list).unwrap();
        assert_eq!((&read["name"], &read["plugins"][0]["type"]), (&json!("n\""), &json!("bridge")));
        assert!(List::parse(&list).is_ok());
        assert!(list_of(r#"{"cniVersion":"1.0.0","name":"n"}"#).is_err(), "a list in a file of the wrong name");
        assert!(list_of(r#"{"cniVersion":"1.0.0","type":"n"}"#).is_err());
        assert!(list_of(r#"{"name":"n","type":"n"}"#).is_err());
    }
}
