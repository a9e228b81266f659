//! Settings files: bounded reads, parsing into a tree with line numbers, and errors with their place.

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
