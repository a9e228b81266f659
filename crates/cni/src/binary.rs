//! The plugin's file in the node's folder of plugins: a copy of this program.

use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use countersign_api::files::replace;

use crate::plugin::NAME;

/// Who may read and run it: everybody, as with other plugins.
const MODE: u32 = 0o755;

/// The file, and what it was when it was written last.
#[derive(Debug)]
pub struct Binary {
    source: PathBuf,
    path: PathBuf,
    written: Option<Written>,
}

/// What tells a file from another one that was put in its place.
#[derive(Debug, PartialEq, Eq)]
struct Written {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Written {
    fn of(about: &Metadata) -> Self {
        Self {
            device: about.dev(),
            inode: about.ino(),
            size: about.size(),
            // The time of a change of mode, too.
            changed: (about.ctime(), about.ctime_nsec()),
        }
    }
}

impl Binary {
    /// A copy of `source` in this folder.
    pub fn new(source: PathBuf, folder: &Path) -> Self {
        Self { source, path: folder.join(NAME), written: None }
    }

    /// Writes it where it is missing, or is not what was written. Returns whether it was written.
    pub fn ensure(&mut self) -> io::Result<bool> {
        let now = std::fs::symlink_metadata(&self.path).map(|about| Written::of(&about)).ok();
        if now.is_some() && now == self.written {
            return Ok(false);
        }
        replace(&self.path, &self.temporary(), MODE, |file| {
            file.set_permissions(Permissions::from_mode(MODE))?;
            io::copy(&mut File::open(&self.source)?, file).map(drop)
        })?;
        self.written = Some(Written::of(&std::fs::symlink_metadata(&self.path)?));
        Ok(true)
    }

    /// Whether there is a file of its name.
    pub fn exists(&self) -> bool {
        self.path.is_file()
    }

    fn temporary(&self) -> PathBuf {
        self.path.with_extension("new")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_copied_once_and_again_where_somebody_changed_it() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        std::fs::write(&source, vec![7; 3 << 20]).unwrap();
        let mut binary = Binary::new(source.clone(), dir.path());
        let path = dir.path().join(NAME);
        assert!(binary.ensure().unwrap() && !binary.ensure().unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&source).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        std::fs::write(&path, "other").unwrap();
        assert!(binary.ensure().unwrap() && !binary.ensure().unwrap());
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert!(binary.ensure().unwrap());
        std::fs::remove_file(&path).unwrap();
        assert!(binary.ensure().unwrap());
        assert!(Binary::new(source, dir.path()).ensure().unwrap(), "another version's");
        assert!(binary.exists() && std::fs::read_dir(dir.path()).unwrap().count() == 2, "nothing else is left");
    }
}
