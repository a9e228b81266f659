//! Tables for people, JSON for programs.

use serde_json::Value;

use crate::stdout::{self, StdoutError};

/// How a command prints.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Output {
    /// table or json.
    #[arg(long = "output", short = 'o', default_value = "table", value_parser = ["table", "json"])]
    format: String,
}

impl Output {
    /// Whether JSON is wanted.
    pub fn is_json(&self) -> bool {
        self.format == "json"
    }

    /// Prints one of the two.
    pub fn print(&self, table: &Table, json: &Value) -> Result<(), StdoutError> {
        if self.is_json() {
            stdout::line(&serde_json::to_string_pretty(json).unwrap_or_default())
        } else {
            stdout::put(&table.render())
        }
    }
}

/// Rows under a head.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|h| h.to_uppercase()).collect()] }
    }

    /// Two columns without a head.
    pub fn facts(facts: impl IntoIterator<Item = (String, String)>) -> Self {
        Self { rows: facts.into_iter().map(|(k, v)| vec![k, v]).collect() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The text, columns aligned.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width =
            |c: usize| self.rows.iter().filter_map(|r| r.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
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
}
