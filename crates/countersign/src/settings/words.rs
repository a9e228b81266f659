//! Text for people: untrusted text made safe for one line of a terminal, and suggestions for misspelt words.

/// Most characters of untrusted text in a message.
const SHOWN: usize = 80;
/// Lowest similarity of two words for a suggestion; 1 is equal.
const ALIKE: f64 = 0.75;

/// Untrusted text for a message: control and direction characters escaped, and shortened.
pub fn shown(text: &str) -> String {
    let cut: String = text.chars().take(SHOWN).collect();
    let escaped = escaped(&cut);
    if cut.len() == text.len() { escaped } else { format!("{escaped}… ({} bytes)", text.len()) }
}

/// Escapes control and direction characters, so that the text can neither move a cursor nor start a line.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // Apart from control characters: marks that change the direction of text, and separators of lines and
        // paragraphs.
        if c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
        {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// The known word that is most similar to an unknown one; `None` if none is similar enough.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > SHOWN {
        return None;
    }
    let likeness = |k: &str| {
        let edits = strsim::normalized_damerau_levenshtein(word, k);
        // A plural or a truncated word is meant more often than its edit distance suggests.
        if k.starts_with(word) || word.starts_with(k) { edits.max(strsim::jaro_winkler(word, k)) } else { edits }
    };
    let scored = known.into_iter().map(|k| (likeness(k), k));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0));
    // One letter changes a short word much: the similarity of `prot` and `port` is only one half.
    best.filter(|(score, k)| *score >= if k.len() <= 6 { 0.5 } else { ALIKE }).map(|(_, k)| k)
}

/// `; did you mean …?`, or an empty string.
pub fn did_you_mean<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(word, known).map(|k| format!("; did you mean `{k}`?")).unwrap_or_default()
}

/// A count with its noun: `1 port`, `2 ports`.
pub fn count(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}

/// A duration in its two largest units: `58m 41s`, `2d 3h`, `41s`.
pub fn duration(seconds: u64) -> String {
    let units = [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")];
    let Some(first) = units.iter().position(|(size, _)| seconds >= *size) else { return "0s".into() };
    let (size, unit) = units[first];
    let whole = format!("{}{unit}", seconds / size);
    match units.get(first + 1) {
        Some((next, unit)) if seconds % size / next > 0 => format!("{whole} {}{unit}", seconds % size / next),
        _ => whole,
    }
}

/// A number of bytes in the largest fitting unit: `812 B`, `3.4 MiB`.
pub fn bytes(n: u64) -> String {
    let units = [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(size, _)| n >= *size) {
        Some((size, unit)) => format!("{}.{} {unit}", n / size, n % size * 10 / size),
        None => format!("{n} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_counts_and_bytes_are_said_as_people_do() {
        let said: Vec<String> = [0, 41, 60, 3_521, 3_600, 97_200, 259_200].into_iter().map(duration).collect();
        assert_eq!(said, ["0s", "41s", "1m", "58m 41s", "1h", "1d 3h", "3d"]);
        assert_eq!((count(1, "port"), count(0, "port")), ("1 port".into(), "0 ports".into()));
        assert_eq!((bytes(812), bytes(3_565_158)), ("812 B".into(), "3.3 MiB".into()));
    }

    #[test]
    fn a_hostile_text_cannot_move_the_cursor_or_fill_the_screen() {
        assert_eq!(shown("web"), "web");
        assert_eq!(shown("\u{1b}[2Ja\nb\u{202e}"), "\\u{1b}[2Ja\\nb\\u{202e}");
        let long = shown(&"x".repeat(900_000));
        assert!(long.len() < 120 && long.ends_with("… (900000 bytes)"), "{long}");
    }

    #[test]
    fn the_nearest_word_is_suggested_and_a_strange_one_is_not() {
        let known = ["name", "ports", "port_allow", "service_account", "exclude_outbound_ports", "mode", "egress"];
        for (wrong, meant) in [
            ("prots", "ports"),
            ("port", "ports"),
            ("Mode", "mode"),
            ("port_alow", "port_allow"),
            ("serviceAccount", "service_account"),
            ("exclude_outbound_port", "exclude_outbound_ports"),
            ("nmae", "name"),
        ] {
            assert_eq!(nearest(wrong, known), Some(meant), "{wrong}");
        }
        assert_eq!(nearest("colour", known), None);
        assert_eq!(nearest(&"x".repeat(900_000), known), None);
    }
}
