//! Builds a tree from the parser's events, with bounds on its size.

use std::collections::HashMap;

use granit_parser::{ErrorKind, Event, Parser, ScalarStyle, ScanError, Span, Tag};

use super::super::words::shown;

/// Most values in one file; values behind aliases count each time.
const MAX_NODES: usize = 100_000;
/// Deepest nesting of lists and maps.
const MAX_DEPTH: usize = 32;

/// A value and the line where it starts.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Line number of the value, from 1.
    pub line: usize,
    /// The value itself.
    pub value: Value,
}

/// A YAML value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// No value: `null`, `~`, or no text at all.
    Null,
    /// A text or a number; the reader decides which it expects.
    Scalar {
        /// The content, with quotes and escapes resolved.
        text: String,
        /// Whether it is quoted or a block, so that it is always a text.
        quoted: bool,
    },
    /// A list of values.
    List(Vec<Node>),
    /// Keys with values, in file order; keys are unique.
    Map(Vec<Entry>),
}

/// A key and its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The key as text.
    pub key: String,
    /// Line number of the key, from 1.
    pub line: usize,
    /// The value of the key.
    pub value: Node,
}

/// A place where the text is not valid YAML, or uses unsupported YAML.
#[derive(Debug, PartialEq, Eq)]
pub struct SyntaxError {
    /// Line number of the error, from 1.
    pub line: usize,
    /// What is wrong there.
    pub why: String,
}

impl Node {
    /// Describes the value for an error message.
    pub fn found(&self) -> String {
        match &self.value {
            Value::Null => "nothing".into(),
            Value::Scalar { text, quoted: false } if text.parse::<f64>().is_ok() => {
                format!("the number {}", shown(text))
            }
            Value::Scalar { text, .. } if text.is_empty() => "an empty text".into(),
            Value::Scalar { text, .. } => format!("`{}`", shown(text)),
            Value::List(items) if items.is_empty() => "an empty list".into(),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "keys with values".into(),
        }
    }

    /// Number of values in it, including itself.
    fn size(&self) -> usize {
        1 + match &self.value {
            Value::Null | Value::Scalar { .. } => 0,
            Value::List(items) => items.iter().map(Self::size).sum(),
            Value::Map(entries) => entries.iter().map(|e| e.value.size()).sum(),
        }
    }

    /// Depth of nested lists and maps, including itself.
    fn depth(&self) -> usize {
        match &self.value {
            Value::Null | Value::Scalar { .. } => 0,
            Value::List(items) => 1 + items.iter().map(Self::depth).max().unwrap_or(0),
            Value::Map(entries) => 1 + entries.iter().map(|e| e.value.depth()).max().unwrap_or(0),
        }
    }
}

/// Parses a text with one document; `None` if there is none.
pub fn parse(text: &str) -> Result<Option<Node>, SyntaxError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut events = Events {
        parser: Parser::new_from_str_with_options(text, granit_parser::options! { emit_comments: false }),
        anchors: HashMap::new(),
        nodes: 0,
        last_line: 1,
    };
    let mut document = None;
    loop {
        let Some((event, span)) = events.next()? else { return Ok(document) };
        match event {
            Event::StreamEnd => return Ok(document),
            Event::DocumentStart(..) if document.is_some() => {
                return Err(at(&span, "a second YAML document begins here; expected one document in the file"));
            }
            // For the parser, an empty file has no document; a file with only `---` has an empty one.
            Event::StreamStart | Event::DocumentEnd | Event::DocumentStart(..) => {}
            event => document = Some(events.node(event, &span, 0)?),
        }
    }
}

fn at(span: &Span, why: impl Into<String>) -> SyntaxError {
    SyntaxError { line: span.start.line().max(1), why: why.into() }
}

struct Events<'a> {
    parser: Parser<'a, granit_parser::StrInput<'a>>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
    last_line: usize,
}

impl<'a> Events<'a> {
    /// The next event that is not a comment.
    fn next(&mut self) -> Result<Option<(Event<'a>, Span)>, SyntaxError> {
        match self.parser.next_event() {
            None => Ok(None),
            Some(Ok((event, span))) => {
                self.last_line = span.start.line().max(1);
                Ok(Some((event, span)))
            }
            Some(Err(error)) => Err(explained(&error)),
        }
    }

    fn inside(&mut self) -> Result<(Event<'a>, Span), SyntaxError> {
        let line = self.last_line;
        self.next()?.ok_or_else(|| SyntaxError { line, why: "the file ends in the middle of a list or map".into() })
    }

    fn count(&mut self, span: &Span, more: usize) -> Result<(), SyntaxError> {
        self.nodes += more;
        if self.nodes > MAX_NODES {
            return Err(at(
                span,
                format!("more than {MAX_NODES} values are in this file, those behind aliases counted each time"),
            ));
        }
        Ok(())
    }

    fn node(&mut self, event: Event<'a>, span: &Span, depth: usize) -> Result<Node, SyntaxError> {
        self.count(span, 1)?;
        if depth > MAX_DEPTH {
            return Err(at(span, format!("lists and maps are nested more than {MAX_DEPTH} deep")));
        }
        let line = span.start.line().max(1);
        let (value, anchor) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                let tagged_text = check_tag(tag.as_deref(), span)?;
                let quoted = tagged_text || style != ScalarStyle::Plain;
                let null = !quoted && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
                (if null { Value::Null } else { Value::Scalar { text: text.into_owned(), quoted } }, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                check_tag(tag.as_deref(), span)?;
                (Value::List(self.list(depth)?), anchor)
            }
            Event::MappingStart(_, anchor, tag) => {
                check_tag(tag.as_deref(), span)?;
                (Value::Map(self.map(depth)?), anchor)
            }
            Event::Alias(id) => {
                // The alias's own line, not the anchor's: a value may be wrong here and right there.
                let Some(known) = self.anchors.get(&id).cloned() else {
                    return Err(at(span, "an alias cannot stand inside what it names"));
                };
                self.count(span, known.size())?;
                if depth + known.depth() > MAX_DEPTH {
                    return Err(at(span, format!("lists and maps are nested more than {MAX_DEPTH} deep")));
                }
                return Ok(Node { line, value: known.value });
            }
            _ => return Err(at(span, "expected a value")),
        };
        let node = Node { line, value };
        if anchor != 0 {
            self.count(span, node.size())?;
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn list(&mut self, depth: usize) -> Result<Vec<Node>, SyntaxError> {
        let mut items = vec![];
        loop {
            match self.inside()? {
                (Event::SequenceEnd, _) => return Ok(items),
                (event, span) => items.push(self.node(event, &span, depth + 1)?),
            }
        }
    }

    fn map(&mut self, depth: usize) -> Result<Vec<Entry>, SyntaxError> {
        let mut entries: Vec<Entry> = vec![];
        let mut lines: HashMap<String, usize> = HashMap::new();
        loop {
            let (event, span) = self.inside()?;
            if event == Event::MappingEnd {
                return Ok(entries);
            }
            let key = self.node(event, &span, depth + 1)?;
            let (event, value_at) = self.inside()?;
            let value = self.node(event, &value_at, depth + 1)?;
            let Value::Scalar { text, .. } = key.value else {
                return Err(at(&span, format!("expected a text as key, found {}", key.found())));
            };
            if let Some(before) = lines.insert(text.clone(), key.line) {
                return Err(at(
                    &span,
                    format!("{}: this key is there twice; it is first set on line {before}", shown(&text)),
                ));
            }
            // `key:` without a value: the parser places it at the next token, but a person looks at the key.
            let value = if value.value == Value::Null { Node { line: key.line, ..value } } else { value };
            entries.push(Entry { key: text, line: key.line, value });
        }
    }
}

/// Rejects tags other than `!!str` and similar, because tags change the meaning of a value. Returns whether the tag
/// makes it a text.
fn check_tag(tag: Option<&Tag>, span: &Span) -> Result<bool, SyntaxError> {
    match tag {
        None => Ok(false),
        Some(tag) => match tag.core_suffix() {
            Some("str") => Ok(true),
            Some("int" | "float" | "bool" | "seq" | "map" | "null") => Ok(false),
            _ => Err(at(span, format!("the tag `{}` is not supported; leave it out", shown(&tag.original())))),
        },
    }
}

/// Rewords the parser's error for people who do not know its grammar.
fn explained(error: &ScanError) -> SyntaxError {
    use ErrorKind as E;
    let why = match error.kind() {
        E::TabNotAllowed | E::TabInBlockIndentation | E::TabInIndentation | E::TabAtBlockScalarStart => {
            "a tab is used for indentation; use spaces".to_owned()
        }
        E::UnclosedQuotedScalar => "a quote is opened and not closed".into(),
        E::UnclosedFlowCollection { open, .. } => format!("`{open}` is opened and not closed"),
        E::UnexpectedEofFlowSequence | E::ExpectedFlowSequenceSeparator => {
            "a list is opened by `[` and not closed: expected `,` or `]`".into()
        }
        E::UnexpectedEofFlowMapping | E::UnexpectedEofImplicitFlowMapping | E::ExpectedFlowMappingSeparator => {
            "a map is opened by `{` and not closed: expected `,` or `}`".into()
        }
        E::MisplacedFlowCollectionEnd => "a bracket is closed that was not opened".into(),
        E::MismatchedFlowCollectionEnd { open, close } => format!("`{open}` is closed by `{close}`"),
        E::MappingValueNotAllowed | E::MappingKeyNotAllowed | E::InvalidColonPlacement => {
            "`: ` stands where no key can be: check the indentation, or quote a text that contains it".into()
        }
        E::SimpleKeyExpected | E::ExpectedBlockMappingKey | E::InvalidSimpleKey | E::UnexpectedEofBlockMapping => {
            "expected `key: value`: check the indentation, and the space after `:`".into()
        }
        E::ExpectedBlockSequenceEntry | E::BlockSequenceEntryNotAllowed | E::UnexpectedEofBlockSequence => {
            "expected a list item, `- …`: check the indentation".into()
        }
        E::InvalidIndentation | E::InvalidFlowScalarIndent | E::InvalidQuotedScalarIndent => {
            "the indentation does not fit that of the lines above".into()
        }
        E::UnknownAnchor => "this alias names an anchor that is not set above it".into(),
        E::UnknownQuotedScalarEscape => "an unknown `\\` escape stands in double quotes; use single quotes".into(),
        E::RecursionLimitExceeded => format!("lists and maps are nested more than {MAX_DEPTH} deep"),
        other => format!("this is not YAML: {}", shown(&other.to_string())),
    };
    SyntaxError { line: error.marker().line().max(1), why }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(text: &str) -> (usize, String) {
        let e = parse(text).expect_err(text);
        (e.line, e.why)
    }

    #[test]
    fn every_value_knows_its_line() {
        let tree = parse("# head\na: 1\nb:\n  - x\n  - {c: 'y', d: }\n").unwrap().unwrap();
        let Value::Map(entries) = &tree.value else { panic!("{tree:?}") };
        assert_eq!((entries[0].line, entries[1].line), (2, 3));
        let Value::List(items) = &entries[1].value.value else { panic!("{tree:?}") };
        assert_eq!((items[0].line, items[1].line), (4, 5));
        let Value::Map(inner) = &items[1].value else { panic!("{tree:?}") };
        assert_eq!(inner[0].value.value, Value::Scalar { text: "y".into(), quoted: true });
        assert_eq!(inner[1].value.value, Value::Null);
    }

    #[test]
    fn a_bomb_of_aliases_is_refused() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for n in 1..10 {
            let before = format!("*a{}", n - 1);
            text.push_str(&format!("a{n}: &a{n} [{}]\n", vec![before; 10].join(", ")));
        }
        assert!(wrong(&text).1.starts_with("more than 100000 values"));
        assert!(wrong(&"[".repeat(100_000)).1.contains("nested more than 32 deep"));
    }

    #[test]
    fn syntax_errors_speak_of_what_a_person_sees() {
        assert_eq!(wrong("a: 1\na: 2\n"), (2, "a: this key is there twice; it is first set on line 1".into()));
        assert_eq!(wrong("a: [1, 2\n").1, "`[` is opened and not closed");
        assert_eq!(wrong("a:\n\tb: 1\n"), (2, "a tab is used for indentation; use spaces".into()));
        assert_eq!(
            wrong("a: 1\n---\nb: 2\n").1,
            "a second YAML document begins here; expected one document in the file"
        );
        assert_eq!(wrong("a: !secret x\n"), (1, "the tag `!secret` is not supported; leave it out".into()));
        assert_eq!(parse("\u{feff}a: 1\n").unwrap(), parse("a: 1\n").unwrap(), "a byte order mark is passed over");
        assert_eq!(parse("# nothing\n"), Ok(None));
    }
}
