//! Settings files: bounded reads, parsing into a tree with line numbers, and errors with their place.

use std::io::Read;
use std::path::Path;

use countersign_api::files::read_bounded;
use serde::de::DeserializeOwned;

use super::Mistake;
use super::yaml::{Node, from_node, parse};

/// Largest settings file or PEM file, in bytes.
pub const MAX_BYTES: u64 = 1024 * 1024;

/// Reads a file into settings; also returns its text. Errors name file, line and key.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<(T, String), Mistake> {
    let (node, text) = load_tree(path)?;
    let settings = from_node(&node).map_err(|e| {
        let key = if e.key.is_empty() { String::new() } else { format!("{}: ", e.key) };
        Mistake(format!("{}:{}: {key}{}", path.display(), e.line.unwrap_or(1), e.why))
    })?;
    Ok((settings, text))
}

/// Reads a file into a tree; also returns its text.
pub fn load_tree(path: &Path) -> Result<(Node, String), Mistake> {
    let shown = path.display();
    let bytes = read_file(path)?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let good = String::from_utf8_lossy(&e.as_bytes()[..e.utf8_error().valid_up_to()]);
        let line = good.matches('\n').count() + 1;
        Mistake(format!("{shown}:{line}: this is not UTF-8 text; save the file as UTF-8"))
    })?;
    let tree = parse(&text).map_err(|e| Mistake(format!("{shown}:{}: {}", e.line, e.why)))?;
    let tree = tree.ok_or_else(|| Mistake(format!("{shown}: the file is empty; expected keys with values")))?;
    Ok((tree, text))
}

/// Reads a file that the user named: settings or PEM, at most 1 MiB; not a device, pipe or folder.
pub fn read_file(path: &Path) -> Result<Vec<u8>, Mistake> {
    read_bounded(path, MAX_BYTES).map_err(|e| Mistake(format!("{}: cannot be read: {e}", path.display())))
}

/// Reads standard input in place of such a file, to its end and at most as much.
pub fn read_stdin() -> Result<Vec<u8>, Mistake> {
    whole(std::io::stdin().lock())
}

fn whole(from: impl Read) -> Result<Vec<u8>, Mistake> {
    let wrong = |why: &str| Mistake(format!("standard input: {why}"));
    let mut bytes = vec![];
    // One byte more than is allowed tells what is cut from what ends there.
    from.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| wrong(&format!("cannot be read: {e}")))?;
    match bytes.len() as u64 {
        0 => Err(wrong("it is empty; is the file there that it comes from?")),
        1..=MAX_BYTES => Ok(bytes),
        _ => Err(wrong(&format!("it is longer than {MAX_BYTES} bytes"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_input_is_read_to_its_end_and_bounded() {
        let said = |bytes: &[u8]| whole(bytes).map(|read| read.len()).map_err(|e| e.to_string());
        assert_eq!(said(b"pem"), Ok(3));
        assert!(said(b"").unwrap_err().contains("standard input: it is empty"));
        let most = usize::try_from(MAX_BYTES).unwrap();
        assert_eq!(said(&vec![b'x'; most]), Ok(most));
        assert!(said(&vec![b'x'; most + 1]).unwrap_err().contains("longer than"));
    }
}
