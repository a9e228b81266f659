//! Output of commands: tables for people, JSON for programs.

use countersign_identity::shown::sentence;
use serde_json::Value;

use crate::settings::words::escaped;
use crate::stdout::{self, StdoutError};

/// The argument for the output format.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Output {
    /// Output format: table or json.
    #[arg(long = "output", short = 'o', default_value = "table", value_parser = ["table", "json"])]
    format: String,
}

impl Output {
    /// Whether JSON was requested.
    pub fn is_json(&self) -> bool {
        self.format == "json"
    }

    /// Prints the table or the JSON value.
    pub fn print(&self, table: &Table, json: &Value) -> Result<(), StdoutError> {
        if self.is_json() { stdout::line(&json_text(json)) } else { stdout::put(&table.render()) }
    }
}

/// JSON for a program that a terminal may have as well: control and direction characters that JSON lets through are written
/// as its escapes, so that it means the same.
pub fn json_text(json: &Value) -> String {
    let text = serde_json::to_string_pretty(json).unwrap_or_default();
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // Outside of strings there is ASCII alone, and none of it but the line feed is a control character.
        if c == '\n' || escaped(c.encode_utf8(&mut [0; 4])).len() == c.len_utf8() {
            out.push(c);
        } else {
            out.push_str(&format!("\\u{:04x}", u32::from(c)));
        }
    }
    out
}

/// Text that another process or machine wrote, as a terminal may have it: whole, in one line, escaped.
pub fn told(text: &str) -> String {
    sentence(text, usize::MAX).to_string()
}

/// A table with aligned columns.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column headings.
    pub fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|h| h.to_uppercase()).collect()] }
    }

    /// A table of two columns without headings.
    pub fn facts(facts: impl IntoIterator<Item = (String, String)>) -> Self {
        Self { rows: facts.into_iter().map(|(k, v)| vec![k, v]).collect() }
    }

    /// Adds a row; cells in the order of the columns.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The text, columns aligned. Whatever a cell holds, it stays in its line and moves no cursor.
    pub fn render(&self) -> String {
        let rows: Vec<Vec<String>> = self.rows.iter().map(|row| row.iter().map(|cell| told(cell)).collect()).collect();
        let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &rows {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:<w$}")).collect();
            text.push_str(cells.join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let mut t = Table::new(&["name", "id"]);
        t.row(vec!["web".into(), "1".into()]);
        t.row(vec!["productpage".into(), String::new()]);
        assert_eq!(t.render(), "NAME         ID\nweb          1\nproductpage\n");
    }

    #[test]
    fn a_cell_neither_moves_the_cursor_nor_forges_a_row_nor_shifts_a_column() {
        let mut t = Table::new(&["peer", "count"]);
        t.row(vec!["\u{1b}]52;c;ZXZpbA==\u{7}:1\nforged".into(), "1".into()]);
        t.row(vec!["\u{9b}31m\u{202e}web".into(), "2".into()]);
        let text = t.render();
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.chars().all(|c| c == '\n' || !c.is_control() && c != '\u{202e}'), "{text:?}");
        assert!(text.contains(r"\u{1b}]52;c;ZXZpbA==\u{7}:1\nforged  1"), "{text}");
    }

    #[test]
    fn a_cell_that_was_cut_shows_where() {
        let mut t = Table::new(&["found"]);
        t.row(vec!["the API server sa…".into()]);
        assert_eq!(t.render(), "FOUND\nthe API server sa…\n");
    }

    #[test]
    fn json_means_the_same_and_moves_no_cursor_either() {
        let value = serde_json::json!({ "peer": "\u{1b}[2J\u{9b}31m\u{7f}\u{202e}\n\\ Zürich", "n": [1] });
        let text = json_text(&value);
        assert!(text.chars().all(|c| c == '\n' || !c.is_control() && c != '\u{202e}'), "{text:?}");
        assert!(text.contains("Zürich") && text.contains(r"\u009b31m"), "{text}");
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }
}
