//! Output of commands: tables for people, JSON for programs.

use serde_json::Value;

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
        if self.is_json() {
            stdout::line(&serde_json::to_string_pretty(json).unwrap_or_default())
        } else {
            stdout::put(&table.render())
        }
    }
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

    /// The text of the table, columns aligned.
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
