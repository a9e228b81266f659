//! The archive: a compressed tar file that its owner alone can read, with a list of what is not in it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;
use tar::{Builder, Header};
use time::OffsetDateTime;

use super::scrub;

/// Most bytes of all parts together, before compression: what a supporter still wants to be sent.
const MAX_BYTES: usize = 256 * 1024 * 1024;

/// An archive that is being written.
pub struct Archive {
    tar: Builder<GzEncoder<File>>,
    folder: String,
    path: PathBuf,
    now: OffsetDateTime,
    room: usize,
    parts: usize,
    left_out: Vec<String>,
}

/// What became of an archive.
#[derive(Debug)]
pub struct Written {
    /// Path of the file.
    pub path: PathBuf,
    /// Size of the file, in bytes.
    pub bytes: u64,
    /// Number of parts.
    pub parts: usize,
    /// What is not in it, and why; one sentence each.
    pub left_out: Vec<String>,
}

impl Archive {
    /// A new file; one that exists is not replaced. All parts are below one folder, which is named like the file.
    pub fn create(path: &Path, now: OffsetDateTime) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let folder = plain(name.split('.').next().unwrap_or_default());
        let tar = Builder::new(GzEncoder::new(file, Compression::default()));
        Ok(Self { tar, folder, path: path.to_owned(), now, room: MAX_BYTES, parts: 0, left_out: vec![] })
    }

    /// Adds a text, without what has the form of a secret. What no longer fits is left out.
    pub fn text(&mut self, name: &[&str], text: &str) -> io::Result<()> {
        self.part(name, &scrub::text(text))
    }

    /// Adds a JSON value, as [`Archive::text`] does: without secrets in its texts, and JSON all the same.
    pub fn json(&mut self, name: &[&str], mut value: Value) -> io::Result<()> {
        scrub::texts(&mut value);
        self.part(name, &format!("{value:#}\n"))
    }

    fn part(&mut self, name: &[&str], text: &str) -> io::Result<()> {
        let name: Vec<String> = name.iter().map(|part| plain(part)).collect();
        let name = name.join("/");
        if text.len() > self.room {
            self.leave_out(format!("{name}: the archive is full"));
            return Ok(());
        }
        self.room -= text.len();
        self.parts += 1;
        self.put(&name, text)
    }

    /// Records what is not in the archive, and why.
    pub fn leave_out(&mut self, what: String) {
        self.left_out.push(what);
    }

    /// Adds the list of what was left out, and writes the rest of the file.
    pub fn finish(mut self) -> io::Result<Written> {
        let list: String = self.left_out.iter().map(|line| format!("{}\n", scrub::text(line))).collect();
        self.put("left-out.txt", &list)?;
        let file = self.tar.into_inner()?.finish()?;
        file.sync_all()?;
        let bytes = file.metadata()?.len();
        Ok(Written { path: self.path, bytes, parts: self.parts, left_out: self.left_out })
    }

    fn put(&mut self, name: &str, text: &str) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(u64::try_from(self.now.unix_timestamp()).unwrap_or(0));
        self.tar.append_data(&mut header, format!("{}/{name}", self.folder), text.as_bytes())
    }
}

/// A name as a part of a path: nothing in it leads elsewhere when the archive is unpacked.
fn plain(name: &str) -> String {
    let form = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let name: String = name.chars().map(form).take(200).collect();
    if name.chars().all(|c| c == '.') { "_".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_archive_is_its_owners_holds_no_secret_and_says_what_it_lacks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar.gz");
        let mut archive = Archive::create(&path, OffsetDateTime::UNIX_EPOCH).unwrap();
        archive.text(&["logs", "../../etc", ".."], "Bearer abc").unwrap();
        archive.room = 10;
        archive.text(&["logs", "long"], "more than ten bytes").unwrap();
        archive.leave_out("Secrets: never".into());
        let written = archive.finish().unwrap();
        assert_eq!((written.parts, written.left_out.len()), (1, 2));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(
            Archive::create(&path, OffsetDateTime::UNIX_EPOCH).err().unwrap().kind(),
            io::ErrorKind::AlreadyExists
        );
        let mut read = tar::Archive::new(flate2::read::GzDecoder::new(File::open(&path).unwrap()));
        let mut found = vec![];
        for entry in read.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            found.push((entry.path().unwrap().display().to_string(), text));
        }
        let expected = [
            ("a/logs/.._.._etc/_", "Bearer (left out)"),
            ("a/left-out.txt", "logs/long: the archive is full\nSecrets: never\n"),
        ];
        assert_eq!(found, expected.map(|(name, text)| (name.to_owned(), text.to_owned())));
    }
}
