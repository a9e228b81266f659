//! Where the parts of a JSON text stand. The text has been parsed before, so that only what is valid has to be told
//! apart; what is not gives nothing.

use std::ops::Range;

/// The members of the object that the text is: name, and where its value stands.
pub fn members(text: &str) -> Option<Vec<(String, Range<usize>)>> {
    let bytes = text.as_bytes();
    let mut at = blank(bytes, 0);
    if bytes.get(at) != Some(&b'{') {
        return None;
    }
    let mut all = vec![];
    at = blank(bytes, at + 1);
    while bytes.get(at) == Some(&b'"') {
        let end = value(bytes, at)?;
        let name = serde_json::from_str(text.get(at..end)?).ok()?;
        let colon = blank(bytes, end);
        if bytes.get(colon) != Some(&b':') {
            return None;
        }
        let start = blank(bytes, colon + 1);
        let end = value(bytes, start)?;
        all.push((name, start..end));
        at = next(bytes, end);
    }
    Some(all)
}

/// Where the elements of the list that begins at `start` stand.
pub fn elements(text: &str, start: usize) -> Option<Vec<Range<usize>>> {
    let bytes = text.as_bytes();
    if bytes.get(start) != Some(&b'[') {
        return None;
    }
    let mut all = vec![];
    let mut at = blank(bytes, start + 1);
    while *bytes.get(at)? != b']' {
        let end = value(bytes, at)?;
        all.push(at..end);
        at = next(bytes, end);
    }
    Some(all)
}

/// The next place that is not blank.
fn blank(bytes: &[u8], from: usize) -> usize {
    let blanks = bytes.iter().skip(from).take_while(|b| b" \t\r\n".contains(b));
    from + blanks.count()
}

/// The place behind blanks and one comma.
fn next(bytes: &[u8], from: usize) -> usize {
    let at = blank(bytes, from);
    if bytes.get(at) == Some(&b',') { blank(bytes, at + 1) } else { at }
}

/// The end of the value that begins here.
fn value(bytes: &[u8], start: usize) -> Option<usize> {
    let mut depth = 0_usize;
    let mut at = start;
    loop {
        match *bytes.get(at)? {
            b'"' => at = string(bytes, at)?,
            b'{' | b'[' => (depth, at) = (depth + 1, at + 1),
            b'}' | b']' => (depth, at) = (depth.checked_sub(1)?, at + 1),
            _ if depth > 0 => at += 1,
            // A number or a word.
            _ => at += bytes.iter().skip(at).take_while(|b| b.is_ascii_alphanumeric() || b"+-.".contains(b)).count(),
        }
        if depth == 0 {
            return (at > start).then_some(at);
        }
    }
}

/// The end of the string that begins here.
fn string(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        match *bytes.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}
