//! Suggests the word that was probably meant.

/// Words with a larger distance count as different words.
const FURTHEST: usize = 2;
/// Longest word that is compared: the running time is the product of the lengths.
const LONGEST: usize = 64;

/// `; did you mean …?` if one of the words is close, otherwise an empty string.
pub fn did_you_mean(word: &str, words: &[&str]) -> String {
    let lower = word.trim().to_ascii_lowercase();
    if lower.len() > LONGEST {
        return String::new();
    }
    // `enable` is as close to `enabled` as `enabld`. Common words for yes and no are not close, but clear.
    let meant = match lower.as_str() {
        "true" | "yes" | "on" | "1" => words.iter().find(|w| **w == "enabled"),
        "false" | "no" | "off" | "0" => words.iter().find(|w| **w == "disabled"),
        _ => None,
    };
    let near = || words.iter().map(|w| (distance(&lower, w), w)).filter(|(d, _)| *d <= FURTHEST).min().map(|(_, w)| w);
    meant.or_else(near).map_or_else(String::new, |w| format!("; did you mean `{w}`?"))
}

/// Number of insertions, deletions and replacements between two words (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, one) in a.chars().enumerate() {
        let mut before = row[0];
        row[0] = i + 1;
        for (j, other) in b.iter().enumerate() {
            let replaced = before + usize::from(one != *other);
            before = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(before + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_words_and_the_common_yes_and_no_are_guessed() {
        let words = ["enabled", "disabled"];
        for (word, meant) in [
            ("enable", "enabled"),
            ("true", "enabled"),
            ("Enabled", "enabled"),
            ("disable", "disabled"),
            ("no", "disabled"),
        ] {
            assert_eq!(did_you_mean(word, &words), format!("; did you mean `{meant}`?"), "{word}");
        }
        assert_eq!(did_you_mean("stict", &["off", "permissive", "strict"]), "; did you mean `strict`?");
        for word in ["purple", "", &"e".repeat(100_000)] {
            assert_eq!(did_you_mean(word, &words), "");
        }
    }
}
