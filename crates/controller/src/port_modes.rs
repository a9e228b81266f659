//! Modes of single ports of a pod, as its annotation `countersign.dev/port-modes` lists them: `9443=permissive,8080=strict`.

use std::collections::BTreeMap;

use countersign_identity::policy::Mode;

/// Annotation with the modes of a pod's ports.
pub const PORT_MODES: &str = "countersign.dev/port-modes";
/// Most ports in one annotation.
const MAX_PORTS: usize = 64;

/// An item that is no `PORT=MODE`, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// The item.
    pub item: String,
    /// Continues the sentence that starts with the item.
    pub why: String,
}

/// Parses the whole list. Errors: the first item that is wrong, or too many items.
pub fn parse(text: &str) -> Result<BTreeMap<u16, Mode>, Wrong> {
    let mut modes = BTreeMap::new();
    for item in items(text) {
        let wrong = |why: String| Wrong { item: item.to_owned(), why };
        let (port, mode) =
            item.split_once('=').ok_or_else(|| wrong("is no PORT=MODE, such as 9443=permissive".into()))?;
        let port = number(port).ok_or_else(|| wrong("names no port: use a number from 1 to 65535".into()))?;
        let mode: Mode = mode.trim().parse().map_err(|e| wrong(format!("names no mode: {e}")))?;
        if modes.insert(port, mode).is_some_and(|before| before != mode) {
            return Err(wrong("gives its port a second mode".into()));
        }
    }
    if modes.len() > MAX_PORTS {
        let why = format!("items are too many: list at most {MAX_PORTS}");
        return Err(Wrong { item: modes.len().to_string(), why });
    }
    Ok(modes)
}

/// Reads the list on a running pod, where nobody may have judged it: what is no mode counts as strict, what names no port is
/// left out, and of several modes of one port the strictest counts.
pub fn read(text: &str) -> BTreeMap<u16, Mode> {
    let mut modes = BTreeMap::new();
    for item in items(text) {
        let (port, mode) = item.split_once('=').unwrap_or((item, ""));
        let Some(port) = number(port) else { continue };
        if modes.len() >= MAX_PORTS && !modes.contains_key(&port) {
            continue;
        }
        let mode = mode.trim().parse().unwrap_or(Mode::Strict);
        modes.entry(port).and_modify(|before: &mut Mode| *before = mode.max(*before)).or_insert(mode);
    }
    modes
}

/// The ports that are opened beyond strict, written as in the annotation.
pub fn weakening(modes: &BTreeMap<u16, Mode>) -> String {
    let open = modes.iter().filter(|(_, mode)| **mode != Mode::Strict);
    open.map(|(port, mode)| format!("{port}={mode}")).collect::<Vec<_>>().join(",")
}

fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

fn number(text: &str) -> Option<u16> {
    text.trim().parse().ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Mode::{Off, Permissive, Strict};

    #[test]
    fn a_list_is_read_and_its_mistakes_are_named() {
        assert_eq!(parse(" 9443=permissive, 80 = off,").unwrap(), [(9443, Permissive), (80, Off)].into());
        assert_eq!(parse("").unwrap(), [].into());
        for (text, item, why) in [
            ("9443", "9443", "is no PORT=MODE"),
            ("0=off", "0=off", "names no port"),
            ("http=off", "http=off", "names no port"),
            ("80=open", "80=open", "names no mode: `open` is not a mode"),
            ("80=off,80=strict", "80=strict", "gives its port a second mode"),
        ] {
            let wrong = parse(text).unwrap_err();
            assert!(wrong.item == item && wrong.why.starts_with(why), "{wrong:?}");
        }
        let many: Vec<String> = (1..=65).map(|port| format!("{port}=off")).collect();
        assert!(parse(&many.join(",")).unwrap_err().why.contains("too many"));
        assert!(parse(&many[..64].join(",")).is_ok());
        assert_eq!(read(&many.join(",")).len(), 64);
    }

    #[test]
    fn on_a_running_pod_a_mistake_opens_nothing() {
        let read_as = read("80=open, 81, http=off, 0=off, 82=off, 83=off, 83=permissive");
        assert_eq!(read_as, [(80, Strict), (81, Strict), (82, Off), (83, Permissive)].into());
        assert_eq!(weakening(&read_as), "82=off,83=permissive");
    }
}
