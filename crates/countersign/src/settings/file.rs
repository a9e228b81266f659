//! YAML files, and mistakes in them with their place.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_saphyr::Location;

use super::Mistake;

/// Largest settings file, in bytes.
const MAX_BYTES: u64 = 1024 * 1024;

/// Reads a file; a mistake names file, line and key.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<(T, String), Mistake> {
    let shown = path.display();
    let size = std::fs::metadata(path).map_err(|e| Mistake(format!("{shown}: cannot be read: {e}")))?.len();
    if size > MAX_BYTES {
        return Err(Mistake(format!("{shown}: {size} bytes long, {MAX_BYTES} is the most")));
    }
    let text = std::fs::read_to_string(path).map_err(|e| Mistake(format!("{shown}: cannot be read: {e}")))?;
    let parsed = serde_saphyr::from_str(&text).map_err(|e| {
        let why = e.without_snippet().to_string();
        let why = why
            .split(" at line ")
            .next()
            .unwrap_or(&why)
            .replace(", set DuplicateKeyPolicy in Options if acceptable", "");
        match e.location() {
            Some(location) => located(path, &text, location, &why),
            None => Mistake(format!("{shown}: {why}")),
        }
    })?;
    Ok((parsed, text))
}

/// A mistake at a place: `file:line: key: what is wrong`.
pub fn located(path: &Path, text: &str, location: Location, why: &str) -> Mistake {
    let number = usize::try_from(location.line()).unwrap_or(1).max(1);
    let key = text.lines().nth(number - 1).and_then(key_of);
    match key.filter(|k| !why.contains(&format!("`{k}`"))) {
        Some(key) => Mistake(format!("{}:{number}: {key}: {why}", path.display())),
        None => Mistake(format!("{}:{number}: {why}", path.display())),
    }
}

/// The key that a line sets.
fn key_of(line: &str) -> Option<&str> {
    let (key, _) = line.trim_start_matches([' ', '-']).split_once(':')?;
    key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_').then_some(key)
}
