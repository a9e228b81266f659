//! Deserializes the tree with serde, for settings that are plain structs. Errors have line and key, and our own
//! wording.

use std::fmt;

use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess, Visitor};

use super::super::words::{did_you_mean, shown};
use super::tree::{Entry, Node, Value};

/// A deserialization error with its place.
#[derive(Debug)]
pub struct DeError {
    /// Line number from 1; `None` until a caller adds it.
    pub line: Option<usize>,
    /// The key with the wrong value; empty for the whole file.
    pub key: String,
    /// What is wrong, without the place.
    pub why: String,
}

impl fmt::Display for DeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for DeError {}

impl DeError {
    fn new(why: String) -> Self {
        Self { line: None, key: String::new(), why }
    }

    fn at(mut self, line: usize, key: &str) -> Self {
        if self.line.is_none() {
            self.line = Some(line);
        }
        if self.key.is_empty() {
            key.clone_into(&mut self.key);
        } else if !key.is_empty() {
            self.key = format!("{key}.{}", self.key);
        }
        self
    }
}

impl de::Error for DeError {
    fn custom<T: fmt::Display>(msg: T) -> Self {
        Self::new(msg.to_string())
    }

    fn invalid_type(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::new(format!("expected {expected}, found {}", in_words(&found)))
    }

    fn invalid_value(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(format!("the key `{field}` is missing"))
    }

    fn unknown_field(field: &str, known: &'static [&'static str]) -> Self {
        let hint = did_you_mean(field, known.iter().copied());
        let hint = if hint.is_empty() { format!("; known keys: {}", known.join(", ")) } else { hint };
        Self::new(format!("unknown key `{}`{hint}", shown(field)))
    }

    fn unknown_variant(variant: &str, known: &'static [&'static str]) -> Self {
        Self::new(format!("`{}` is not one of {}", shown(variant), known.join(", ")))
    }
}

fn in_words(found: &de::Unexpected<'_>) -> String {
    match found {
        de::Unexpected::Str(text) => format!("`{}`", shown(text)),
        de::Unexpected::Unit => "nothing".into(),
        de::Unexpected::Seq => "a list".into(),
        de::Unexpected::Map => "keys with values".into(),
        de::Unexpected::Bool(value) => format!("`{value}`"),
        de::Unexpected::Signed(n) => format!("the number {n}"),
        de::Unexpected::Unsigned(n) => format!("the number {n}"),
        other => other.to_string(),
    }
}

/// Deserializes a value from a tree.
pub fn from_node<T: DeserializeOwned>(node: &Node) -> Result<T, DeError> {
    T::deserialize(De(node)).map_err(|e| e.at(node.line, ""))
}

struct De<'a>(&'a Node);

impl De<'_> {
    fn unexpected(&self, expected: &dyn de::Expected) -> DeError {
        DeError::new(format!("expected {expected}, found {}", self.0.found()))
    }

    fn number<T: std::str::FromStr>(&self) -> Option<T> {
        match &self.0.value {
            Value::Scalar { text, .. } if !text.starts_with('+') => text.parse().ok(),
            _ => None,
        }
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $type:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
            match self.number::<$type>() {
                Some(n) => visitor.$visit(n),
                None => Err(self.unexpected(&visitor)),
            }
        }
    )*};
}

impl<'de> de::Deserializer<'de> for De<'de> {
    type Error = DeError;

    /// By YAML's core schema, an unquoted scalar may be a number or a boolean.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.0.value {
            Value::Null => visitor.visit_unit(),
            Value::List(_) => self.deserialize_seq(visitor),
            Value::Map(_) => self.deserialize_map(visitor),
            Value::Scalar { text, quoted: true } => visitor.visit_str(text),
            Value::Scalar { text, .. } => match text.as_str() {
                "true" | "True" | "TRUE" => visitor.visit_bool(true),
                "false" | "False" | "FALSE" => visitor.visit_bool(false),
                _ => {
                    let digits = text.trim_start_matches('-').bytes().all(|b| b.is_ascii_digit() || b == b'.');
                    if let (true, Some(n)) = (digits, self.number::<u64>()) {
                        visitor.visit_u64(n)
                    } else if let (true, Some(n)) = (digits, self.number::<i64>()) {
                        visitor.visit_i64(n)
                    } else if let (true, Some(n)) = (digits, self.number::<f64>()) {
                        visitor.visit_f64(n)
                    } else {
                        visitor.visit_str(text)
                    }
                }
            },
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.0.value {
            Value::Scalar { text, .. } if text.eq_ignore_ascii_case("true") => visitor.visit_bool(true),
            Value::Scalar { text, .. } if text.eq_ignore_ascii_case("false") => visitor.visit_bool(false),
            _ => Err(self.unexpected(&"true or false")),
        }
    }

    numbers! {
        deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64, deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16,
        deserialize_i32 visit_i32 i32, deserialize_i64 visit_i64 i64, deserialize_f32 visit_f32 f32,
        deserialize_f64 visit_f64 f64
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.0.value {
            Value::Scalar { text, .. } => visitor.visit_str(text),
            _ => Err(self.unexpected(&visitor)),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        if self.0.value == Value::Null { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, DeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.0.value {
            Value::List(items) => visitor.visit_seq(Items(items.iter())),
            _ => Err(self.unexpected(&"a list")),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.0.value {
            Value::Map(entries) => visitor.visit_map(Pairs { entries: entries.iter(), at: None }),
            _ => Err(self.unexpected(&"keys with values")),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        match &self.0.value {
            Value::Scalar { text, .. } => visitor.visit_enum(text.as_str().into_deserializer()),
            _ => Err(self.unexpected(&format!("one of {}", variants.join(", ")).as_str())),
        }
    }

    serde::forward_to_deserialize_any! { bytes byte_buf unit unit_struct tuple tuple_struct ignored_any }
}

struct Items<'a>(std::slice::Iter<'a, Node>);

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = DeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, DeError> {
        self.0.next().map(|node| seed.deserialize(De(node)).map_err(|e| e.at(node.line, ""))).transpose()
    }
}

struct Pairs<'a> {
    entries: std::slice::Iter<'a, Entry>,
    at: Option<&'a Entry>,
}

impl<'de> MapAccess<'de> for Pairs<'de> {
    type Error = DeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, DeError> {
        self.at = self.entries.next();
        let Some(entry) = self.at else { return Ok(None) };
        seed.deserialize(entry.key.as_str().into_deserializer()).map(Some).map_err(|e: DeError| e.at(entry.line, ""))
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, DeError> {
        let entry = self.at.take().ok_or_else(|| DeError::new("a value without a key".into()))?;
        seed.deserialize(De(&entry.value)).map_err(|e| e.at(entry.value.line, &entry.key))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tree::parse;
    use super::*;

    #[derive(Debug, Default, serde::Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Settings {
        bind: Option<std::net::SocketAddr>,
        names: Option<Vec<String>>,
        size: Option<u64>,
        on: Option<bool>,
    }

    fn read(text: &str) -> Result<Settings, String> {
        from_node(&parse(text).unwrap().unwrap()).map_err(|e| format!("{}:{}: {}", e.line.unwrap_or(0), e.key, e.why))
    }

    #[test]
    fn a_struct_is_read_and_mistakes_have_line_and_key() {
        let s = read("bind: 1.2.3.4:5\nnames: [a, 7]\nsize: 9\non: true\n").unwrap();
        assert_eq!((s.size, s.on, s.names), (Some(9), Some(true), Some(vec!["a".into(), "7".into()])));
        assert!(s.bind.is_some());
        for (text, expected) in [
            ("size: x\n", "1:size: expected u64, found `x`"),
            ("\nnames: a\n", "2:names: expected a list, found `a`"),
            ("names:\n- [a]\n", "2:names: expected a string, found a list"),
            ("on: 1\n", "1:on: expected true or false, found the number 1"),
            ("bnid: x\n", "1:: unknown key `bnid`; did you mean `bind`?"),
            ("[]\n", "1:: expected keys with values, found an empty list"),
        ] {
            assert_eq!(read(text).unwrap_err(), expected, "{text}");
        }
        assert!(read("bind: here\n").unwrap_err().starts_with("1:bind: "));
    }

    #[test]
    fn values_of_any_kind_follow_the_core_schema() {
        let node = parse("{a: 1, b: '1', c: true, d: off, e: -2, f: 1.5, g: , h: 1h}").unwrap().unwrap();
        let value: serde_json::Value = from_node(&node).unwrap();
        let expected =
            serde_json::json!({"a": 1, "b": "1", "c": true, "d": "off", "e": -2, "f": 1.5, "g": null, "h": "1h"});
        assert_eq!(value, expected);
    }
}
