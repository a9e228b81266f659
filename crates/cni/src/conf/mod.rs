//! The folder of the node's network configurations, which belongs to others: our plugin is added to the one that the
//! runtime uses, and taken out again. Nothing else in it is touched.

mod json;
mod list;

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use countersign_api::files::{read_bounded, replace};
use countersign_identity::shown::shown;
use serde_json::Value;

use self::list::{List, ListError, list_of};
use crate::plugin::NAME;

/// Largest configuration that is read, in bytes.
const MAX_BYTES: u64 = 1024 * 1024;
/// Most files of the folder that are looked at.
const MAX_FILES: usize = 1_024;
/// Most missing plugins that are named.
const MAX_SHOWN: usize = 10;
/// End of the name of a configuration that a list of ours stands for. No runtime loads such a file.
const SAVED: &str = ".countersign-cni";
/// End of the name of a file that is being written.
const TEMPORARY: &str = ".countersign-cni-new";

/// Why the plugin is not in the folder.
#[derive(Debug, thiserror::Error)]
pub enum ConfError {
    /// A file or the folder cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// No network plugin has written its configuration yet.
    #[error("{} has no network configuration yet", .0.display())]
    Nothing(PathBuf),
    /// The configuration that the runtime uses cannot be extended.
    #[error("{name} {why}")]
    Unusable {
        /// Name of the file, escaped.
        name: String,
        /// What is wrong with it.
        why: ListError,
    },
    /// The runtime would find our plugin no more than it finds these there.
    #[error(
        "{name} has plugins that are not in {dir}: {missing}; the runtime looks for plugins elsewhere (value cni.binDir), or they are not installed yet",
        dir = dir.display(), missing = missing.join(", ")
    )]
    Plugins {
        /// Name of the file, escaped.
        name: String,
        /// The folder of plugins.
        dir: PathBuf,
        /// The plugins' names, escaped.
        missing: Vec<String>,
    },
}

/// The folder, and the entry that belongs into it.
#[derive(Debug, Clone)]
pub struct ConfDir {
    dir: PathBuf,
    /// Folder of plugins.
    plugins: PathBuf,
    entry: Value,
}

impl ConfDir {
    /// The folder at this path. `plugins`: the folder with the plugins' files. `entry`: our plugin's object in
    /// `plugins`.
    pub fn new(dir: PathBuf, plugins: PathBuf, entry: Value) -> Self {
        Self { dir, plugins, entry }
    }

    /// Adds the entry to the configuration that the runtime uses, the first by name (as libcni sorts them), where it is
    /// missing. Returns the file's name, escaped, if something was written.
    ///
    /// # Errors
    /// The configuration cannot have the entry. Where the runtime could not start the plugin, the entry is removed: no
    /// pod of the node would start.
    pub fn ensure(&self) -> Result<Option<String>, ConfError> {
        let ensured = self.added();
        if let Err(ConfError::Plugins { .. } | ConfError::Unusable { why: ListError::Version(_), .. }) = ensured {
            self.remove()?;
        }
        ensured
    }

    fn added(&self) -> Result<Option<String>, ConfError> {
        let mut unusable = None;
        for name in self.names()? {
            let path = self.dir.join(&name);
            let text = match read(&path) {
                Err(ConfError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
                text => text?,
            };
            let list = if is_list(&name) { Ok(text.clone()) } else { list_of(&text) };
            let unusable_for = |why| ConfError::Unusable { name: shown(&name).to_string(), why };
            if let Ok(list) = &list
                && let Ok(list) = List::parse(list)
            {
                self.all_there(&name, &list)?;
            }
            match list.and_then(|list| self.extended(&list)) {
                Ok(None) => return Ok(None),
                Ok(Some(list)) => {
                    let list = Replacement { of: &path, before: &text, text: &list };
                    let written = if is_list(&name) { write(&path, list) } else { convert(list) };
                    return written.map(|()| Some(shown(&name).to_string()));
                }
                // The runtime loads it, although our plugin does not know its version.
                Err(why @ ListError::Version(_)) => return Err(unusable_for(why)),
                // The runtime does not load it either, and takes the next one.
                Err(why @ ListError::Invalid(_)) => unusable = Some(unusable_for(why)),
            }
        }
        Err(unusable.unwrap_or_else(|| ConfError::Nothing(self.dir.clone())))
    }

    /// Checks that the folder of plugins has a file for each plugin of a list, and ours.
    fn all_there(&self, name: &str, list: &List<'_>) -> Result<(), ConfError> {
        // As libcni looks for them, but for links: they may lead into folders of the node that are not here.
        let is_there = |plugin: &str| {
            let found = std::fs::symlink_metadata(self.plugins.join(plugin));
            !plugin.contains('/') && found.is_ok_and(|about| about.is_file() || about.is_symlink())
        };
        let all: BTreeSet<&str> = list.types().iter().map(String::as_str).chain([NAME]).collect();
        let missing: Vec<&str> = all.into_iter().filter(|plugin| !is_there(plugin)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let shown_few = missing.iter().take(MAX_SHOWN).map(|plugin| shown(plugin).to_string());
        Err(ConfError::Plugins {
            name: shown(name).to_string(),
            dir: self.plugins.clone(),
            missing: shown_few.collect(),
        })
    }

    /// The text of a list with the entry; `None` if it has it.
    fn extended(&self, text: &str) -> Result<Option<String>, ListError> {
        let list = List::parse(text)?;
        if list.has(&self.entry) {
            return Ok(None);
        }
        // One of an earlier version, or with other settings.
        Ok(Some(List::parse(&list.without())?.with(&self.entry)))
    }

    /// Removes every entry of ours, and gives configurations that became lists their names back.
    pub fn remove(&self) -> Result<(), ConfError> {
        for name in self.all_names()? {
            let path = self.dir.join(&name);
            if name.ends_with(TEMPORARY) {
                std::fs::remove_file(&path).map_err(|source| failed(&path, source))?;
            } else if let Some(original) = name.strip_suffix(SAVED) {
                give_back(&path, &self.dir.join(original))?;
            }
        }
        for name in self.names()?.into_iter().filter(|name| is_list(name)) {
            let path = self.dir.join(&name);
            let text = read(&path)?;
            if let Ok(list) = List::of_any_version(&text)
                && list.has_any()
            {
                write(&path, Replacement { of: &path, before: &text, text: &list.without() })?;
            }
        }
        Ok(())
    }

    /// Names of the configurations that a runtime may load, in its order.
    fn names(&self) -> Result<Vec<String>, ConfError> {
        let mut names = self.all_names()?;
        names.retain(|name| [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end)));
        names.sort_unstable();
        Ok(names)
    }

    fn all_names(&self) -> Result<Vec<String>, ConfError> {
        let entries = std::fs::read_dir(&self.dir).map_err(|source| failed(&self.dir, source))?;
        let files = entries.take(MAX_FILES).flatten().filter(|e| e.file_type().is_ok_and(|kind| !kind.is_dir()));
        Ok(files.filter_map(|e| e.file_name().into_string().ok()).collect())
    }
}

/// Writes a list beside a single configuration, and takes that one out of the runtime's sight. In this order:
/// without either the runtime would have no network.
fn convert(list: Replacement<'_>) -> Result<(), ConfError> {
    let single = list.of;
    write(&added(single, ".conflist"), list)?;
    std::fs::rename(single, added(single, SAVED)).map_err(|source| failed(single, source))
}

/// Undoes [`convert`], unless others have changed the list since: then it stays, without the entry.
fn give_back(saved: &Path, original: &Path) -> Result<(), ConfError> {
    let list = added(original, ".conflist");
    let before = read(saved)?;
    let now = std::fs::symlink_metadata(&list).is_ok().then(|| read(&list)).transpose()?;
    let unchanged = now.is_none_or(|now| {
        List::parse(&now).map_or_else(|_| false, |list| list_of(&before).is_ok_and(|b| list.without() == b))
    });
    let file = |path: &Path, done: io::Result<()>| match done {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(path, e)),
        _ => Ok(()),
    };
    if !unchanged {
        return file(saved, std::fs::remove_file(saved));
    }
    // Whoever owns the configuration may have written it once more: then that one counts.
    match std::fs::symlink_metadata(original) {
        Ok(_) => file(saved, std::fs::remove_file(saved))?,
        Err(_) => file(saved, std::fs::rename(saved, original))?,
    }
    file(&list, std::fs::remove_file(&list))
}

/// Writes a file atomically, with the mode of the one that it replaces.
fn write(path: &Path, Replacement { of, before, text }: Replacement<'_>) -> Result<(), ConfError> {
    let written = std::fs::symlink_metadata(of).and_then(|about| {
        let permissions = about.permissions();
        replace(path, &added(path, TEMPORARY), 0o600, |file| {
            file.set_permissions(permissions)?;
            file.write_all(text.as_bytes())?;
            // Its owner may be writing it just now, and would not do so again.
            if read(of).is_ok_and(|now| now == before) {
                return Ok(());
            }
            Err(io::Error::other("it has just been changed"))
        })
    });
    written.map_err(|source| failed(path, source))
}

/// A text in the place of another one.
#[derive(Clone, Copy)]
struct Replacement<'a> {
    /// The file with that text.
    of: &'a Path,
    /// The text that was read there.
    before: &'a str,
    text: &'a str,
}

/// Whether a file is a list, by its name.
fn is_list(name: &str) -> bool {
    name.ends_with(".conflist")
}

/// The text of a configuration. A link is refused: to replace it would be to cut it.
fn read(path: &Path) -> Result<String, ConfError> {
    let text = std::fs::symlink_metadata(path).and_then(|about| {
        if about.is_symlink() {
            return Err(io::Error::other("it is a symbolic link, which cannot be extended in its place"));
        }
        read_bounded(path, MAX_BYTES)
    });
    // What is no UTF-8 is no JSON.
    text.map(|text| String::from_utf8(text).unwrap_or_default()).map_err(|source| failed(path, source))
}

/// A path with an end added to its name.
fn added(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

fn failed(path: &Path, source: io::Error) -> ConfError {
    ConfError::File { path: path.to_owned(), source }
}

/// For fuzzing: extends a text, if it can be, and restores it.
///
/// # Panics
/// If it is not what it was.
#[cfg(fuzzing)]
pub fn extend_and_restore(text: &str) {
    let entry = serde_json::json!({ "type": crate::plugin::NAME });
    for text in [Ok(text.to_owned()), list_of(text)].into_iter().flatten() {
        let Ok(list) = List::parse(&text) else { continue };
        let before = list.without();
        let Ok(plain) = List::parse(&before) else { continue };
        let with = plain.with(&entry);
        let with = List::parse(&with).unwrap_or_else(|e| panic!("{e}: {with:?}"));
        assert!(with.has(&entry) && with.without() == before, "{text:?}");
    }
}

#[cfg(test)]
mod tests;
