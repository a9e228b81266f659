//! Untrusted text in a form that is safe to print: escaped and shortened.
//!
//! A certificate's names, a preamble's workload UID or a peer's reason end up in errors, and errors in logs and
//! terminals. A line feed in them would forge a log line; an escape sequence would overwrite what an operator sees.

use std::fmt::{self, Write};

/// Most characters of untrusted text that are printed; the rest is counted in bytes.
pub const MAX_SHOWN: usize = 128;

/// Untrusted text for an error or a log line. [`fmt::Display`] escapes and shortens it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown<'a> {
    text: &'a str,
    limit: usize,
    quoted: bool,
}

/// Escapes `text` and shortens it to [`MAX_SHOWN`] characters.
pub fn shown(text: &str) -> Shown<'_> {
    Shown { text, limit: MAX_SHOWN, quoted: true }
}

/// Escapes `text` and shortens it to `limit` characters.
pub fn shown_up_to(text: &str, limit: usize) -> Shown<'_> {
    Shown { text, limit, quoted: true }
}

/// A whole sentence from another program, such as a peer's reason for a refusal: [`shown_up_to`], but its backticks and
/// backslashes are kept, and the mark where an earlier hand has cut it.
pub fn sentence(text: &str, limit: usize) -> Shown<'_> {
    Shown { text, limit, quoted: false }
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut characters = self.text.chars();
        for c in characters.by_ref().take(self.limit) {
            // The backslash and the backtick are escaped too: the output can be read back in one way only, and the text
            // cannot close the backticks around it.
            match c {
                '`' if self.quoted => f.write_str("\\u{60}")?,
                ' ' => f.write_char(c)?,
                // What we cut ourselves passes through here again, such as an error within an error within a table.
                '…' if !self.quoted => f.write_char(c)?,
                _ if !(c == '\\' && self.quoted) && (c.is_alphanumeric() || c.is_ascii_punctuation()) => {
                    f.write_char(c)?;
                }
                _ => write!(f, "{}", c.escape_default())?,
            }
        }
        match characters.as_str().len() {
            0 => Ok(()),
            rest => write!(f, "… ({rest} bytes more)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_terminals_cannot_be_written_to_through_foreign_text() {
        let hostile = "x y\n2026-01-01 WARN all is well\r\x1b[31m\u{9b}31m\u{202e}\u{2028}\0`\\";
        let printed = shown(hostile).to_string();
        assert!(printed.starts_with(r"x y\n2026-01-01 WARN all is well\r\u{1b}[31m"), "{printed}");
        assert!(printed.chars().all(|c| c == ' ' || c.is_ascii_graphic()), "{printed}");
        assert!(!printed.contains('`'), "the quotes cannot be ended: {printed}");
    }

    #[test]
    fn ordinary_text_stays_as_it_is_and_long_text_is_cut() {
        for plain in ["spiffe://example.org/ns/default/sa/web", "a-b_c.d:80 (x)", "Zürich"] {
            assert_eq!(shown(plain).to_string(), plain);
        }
        let long = "a".repeat(22_000);
        assert_eq!(shown(&long).to_string(), format!("{}… (21872 bytes more)", "a".repeat(MAX_SHOWN)));
        assert_eq!(shown_up_to("abc", 2).to_string(), "ab… (1 bytes more)");
        let reason = r"`spiffe://a/b` is not allowed: \n";
        assert_eq!(sentence(reason, 100).to_string(), reason, "escaped once is enough");
        assert_eq!(sentence("a\nb\u{1b}", 100).to_string(), r"a\nb\u{1b}");
    }

    #[test]
    fn the_mark_of_a_cut_survives_the_next_one() {
        let once = sentence("abc\u{1b}", 2).to_string();
        assert_eq!(sentence(&once, 100).to_string(), "ab… (2 bytes more)");
        assert_eq!(shown("ab…").to_string(), r"ab\u{2026}", "between backticks there is one way to read it");
    }
}
