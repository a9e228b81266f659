//! Events of a mesh: parts that ended and were restarted, programs that ended. Kept in memory for the table, and in a
//! file.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::settings::words::escaped;

/// Most events in memory; the newest are kept.
const KEPT: usize = 200;
/// Size in bytes at which the file is rotated; one older file is kept.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// Name of the file.
pub const FILE: &str = "events.log";

/// An event of the mesh.
#[derive(Debug, Clone)]
pub struct Event {
    /// Time of the event.
    pub at: OffsetDateTime,
    /// Description in one line.
    pub text: String,
}

/// Events of a mesh. Clones share them.
#[derive(Clone, Default)]
pub struct Events(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    recent: VecDeque<Event>,
    file: Option<(PathBuf, File)>,
    /// Whether a table shows events; otherwise they are logged.
    shown: bool,
}

impl Events {
    /// Also writes events to a file in this folder from now on.
    pub fn keep_in(&self, folder: &Path) -> std::io::Result<()> {
        let path = folder.join(FILE);
        let file = open(&path)?;
        self.lock().file = Some((path, file));
        Ok(())
    }

    /// Sets whether a table shows the events.
    pub fn shown(&self, shown: bool) {
        self.lock().shown = shown;
    }

    /// Records that something went wrong.
    pub fn record(&self, text: &str) {
        self.add(text, true);
    }

    /// Records something that may be intended.
    pub fn mention(&self, text: &str) {
        self.add(text, false);
    }

    fn add(&self, text: &str, bad: bool) {
        let event = Event { at: OffsetDateTime::now_utc(), text: escaped(text) };
        let mut kept = self.lock();
        match (kept.shown, bad) {
            (true, _) => {}
            (false, true) => tracing::warn!("{}", event.text),
            (false, false) => tracing::info!("{}", event.text),
        }
        kept.write(&event);
        kept.recent.push_back(event);
        if kept.recent.len() > KEPT {
            kept.recent.pop_front();
        }
    }

    /// The newest events, at most `most`, in chronological order.
    pub fn newest(&self, most: usize) -> Vec<Event> {
        let kept = self.lock();
        kept.recent.iter().skip(kept.recent.len().saturating_sub(most)).cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Event {
    /// Time of day of the event (UTC).
    pub fn time(&self) -> String {
        let (h, m, s) = self.at.to_hms();
        format!("{h:02}:{m:02}:{s:02}Z")
    }
}

impl Kept {
    /// Best effort: a full disk must not stop the mesh, and the event is still in memory.
    fn write(&mut self, event: &Event) {
        let Some((path, file)) = &mut self.file else { return };
        // What lies at the path may be another's by now, or a link.
        let is_ours = |m: &std::fs::Metadata| {
            std::fs::symlink_metadata(&*path).is_ok_and(|at| (at.dev(), at.ino()) == (m.dev(), m.ino()))
        };
        if file.metadata().is_ok_and(|m| m.len() > MAX_FILE_BYTES && is_ours(&m)) {
            // A full disk costs the file its events; the table shows them all the same.
            let _ = std::fs::rename(&*path, path.with_extension("log.1"));
            if let Ok(fresh) = open(path) {
                *file = fresh;
            }
        }
        let at = event.at.format(&Rfc3339).unwrap_or_default();
        let _ = writeln!(file, "{at} {}", event.text);
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_kept_in_memory_with_a_bound_and_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let events = Events::default();
        events.keep_in(folder.path()).unwrap();
        events.record("web: killed by signal 9\nforged line \u{1b}[2J");
        for n in 0..KEPT {
            events.record(&format!("event {n}"));
        }
        let newest = events.newest(KEPT * 2);
        assert_eq!((newest.len(), newest[0].text.as_str()), (KEPT, "event 0"));
        assert_eq!(events.newest(1)[0].text, "event 199");
        let file = std::fs::read_to_string(folder.path().join(FILE)).unwrap();
        assert_eq!(file.lines().count(), KEPT + 1);
        assert!(file.lines().next().unwrap().ends_with("Z web: killed by signal 9\\nforged line \\u{1b}[2J"));
    }
    #[test]
    fn a_long_file_of_events_moves_aside_and_what_is_not_ours_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let events = Events::default();
        events.keep_in(folder.path()).unwrap();
        let lengthen = || OpenOptions::new().write(true).open(&path).unwrap().set_len(MAX_FILE_BYTES + 1).unwrap();
        lengthen();
        events.record("after");
        let before = folder.path().join("events.log.1");
        assert_eq!(std::fs::metadata(&before).unwrap().len(), MAX_FILE_BYTES + 1);
        lengthen();
        std::fs::rename(&path, folder.path().join("away")).unwrap();
        std::fs::write(&path, "another's").unwrap();
        events.record("later");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "another's");
        assert_eq!(std::fs::metadata(&before).unwrap().len(), MAX_FILE_BYTES + 1);
    }
}
