//! Takes values out of the tree one by one. Each error has the form `FILE:LINE: KEY: what was expected, what was
//! found`.

use std::collections::BTreeMap;
use std::path::Path;

use super::super::Mistake;
use super::super::words::{did_you_mean, shown};
use super::tree::{Entry, Node, Value};

/// Reads the tree of a file.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    path: &'a Path,
}

/// The entries of a map that were not taken yet.
pub struct Fields<'a> {
    reader: Reader<'a>,
    /// Line of the map, for errors about missing keys.
    line: usize,
    /// Description of the map for errors about missing keys, such as: workload `a`.
    what: String,
    known: &'static [&'static str],
    left: BTreeMap<&'a str, &'a Entry>,
}

impl<'a> Reader<'a> {
    /// A reader for the tree of this file.
    pub fn new(path: &'a Path) -> Self {
        Self { path }
    }

    /// An error at a line, in the value of `key` (empty: not in a value).
    pub fn wrong(self, line: usize, key: &str, why: &str) -> Mistake {
        let key = if key.is_empty() { String::new() } else { format!("{}: ", shown(key)) };
        Mistake(format!("{}:{line}: {key}{why}", self.path.display()))
    }

    /// An error about a value of the wrong type.
    pub fn unexpected(self, node: &Node, key: &str, expected: &str) -> Mistake {
        self.wrong(node.line, key, &format!("expected {expected}, found {}", node.found()))
    }

    /// The folder that the file's relative paths start from.
    pub fn folder(self) -> &'a Path {
        self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// A map with these keys and no others.
    pub fn fields(
        self,
        node: &'a Node,
        key: &str,
        what: &str,
        known: &'static [&'static str],
    ) -> Result<Fields<'a>, Mistake> {
        let Value::Map(entries) = &node.value else {
            return Err(self.unexpected(node, key, &format!("keys of {what} such as `{}: …`", known[0])));
        };
        for e in entries {
            if !known.contains(&e.key.as_str()) {
                let hint = did_you_mean(&e.key, known.iter().copied());
                let hint = if hint.is_empty() { format!("; known keys of {what}: {}", known.join(", ")) } else { hint };
                return Err(self.wrong(e.line, "", &format!("unknown key `{}`{hint}", shown(&e.key))));
            }
        }
        let left = entries.iter().map(|e| (e.key.as_str(), e)).collect();
        Ok(Fields { reader: self, line: node.line, what: what.into(), known, left })
    }

    /// A map whose keys the file chooses.
    pub fn pairs(self, node: &'a Node, key: &str, example: &str) -> Result<&'a [Entry], Mistake> {
        match &node.value {
            Value::Map(entries) => Ok(entries),
            _ => Err(self.unexpected(node, key, &format!("names with values such as {example}"))),
        }
    }

    /// The items of a list.
    pub fn list(self, node: &'a Node, key: &str, example: &str) -> Result<&'a [Node], Mistake> {
        match &node.value {
            Value::List(items) => Ok(items),
            Value::Scalar { text, .. } => {
                let words: Vec<&str> = text.split_whitespace().collect();
                let meant = if words.len() > 20 || words.is_empty() || text.len() > 80 {
                    example.to_owned()
                } else {
                    format!("[{}]", words.join(", "))
                };
                Err(self.unexpected(node, key, &format!("a list such as {meant}")))
            }
            _ => Err(self.unexpected(node, key, &format!("a list such as {example}"))),
        }
    }

    /// A text or a number; an empty value is an error.
    pub fn text(self, node: &'a Node, key: &str, expected: &str) -> Result<&'a str, Mistake> {
        match &node.value {
            Value::Scalar { text, .. } if text.contains('\0') => {
                Err(self.wrong(node.line, key, &format!("`{}` contains a NUL byte", shown(text))))
            }
            Value::Scalar { text, .. } => Ok(text),
            _ => Err(self.unexpected(node, key, expected)),
        }
    }

    /// Parses a text. The parser's message is shortened and escaped like the text itself.
    pub fn parse<T, E: std::fmt::Display>(
        self,
        node: &'a Node,
        key: &str,
        expected: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<T, Mistake> {
        let text = self.text(node, key, expected)?;
        parse(text).map_err(|e| {
            let why = e.to_string();
            let why = if text.is_empty() { why } else { why.replace(text, &shown(text)) };
            self.wrong(node.line, key, &why)
        })
    }
}

impl<'a> Fields<'a> {
    /// Takes a key's value; a key without a value counts as missing.
    pub fn optional(&mut self, key: &'static str) -> Option<&'a Node> {
        debug_assert!(self.known.contains(&key));
        self.left.remove(key).map(|e| &e.value).filter(|v| v.value != Value::Null)
    }

    /// Takes the value of a required key.
    pub fn required(&mut self, key: &'static str) -> Result<&'a Node, Mistake> {
        let (line, what) = (self.line, self.what.clone());
        let reader = self.reader;
        if let Some(e) = self.left.get(key).filter(|e| e.value.value == Value::Null) {
            return Err(reader.wrong(e.line, key, "expected a value, found nothing"));
        }
        self.optional(key).ok_or_else(|| reader.wrong(line, "", &format!("{what} has no `{key}`, and needs one")))
    }
}
