//! The audit log: one JSON line for each SVID that was signed or refused.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Outcome of a signing request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A certificate was signed and returned.
    Signed,
    /// The request was refused; nothing was signed.
    Refused,
}

/// One line of the audit log. Empty fields are left out.
#[derive(Debug, Serialize)]
pub struct Record<'a> {
    /// Whether the request was signed or refused.
    pub outcome: Outcome,
    /// Kind of certificate: `x509_svid`, `agent_svid`, `server_svid` or `jwt_svid`.
    pub kind: &'static str,
    /// The caller: a SPIFFE ID, `local:uid=<uid>`, `anonymous@<address>`; for calls over a rate limit
    /// `address@<address>`.
    pub caller: &'a str,
    /// ID of the registration entry; empty if there is none.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub entry_id: &'a str,
    /// The SPIFFE ID that was requested.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub spiffe_id: &'a str,
    /// Serial of the certificate, lower-case hex; tokens have none.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub serial: &'a str,
    /// When the certificate expires, RFC 3339.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub expires_at: &'a str,
    /// For whom a token is; certificates have none.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    pub audience: &'a [String],
    /// ID of the signing authority.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub authority_id: &'a str,
    /// Why the request was refused, for people.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub reason: &'a str,
}

/// A time in RFC 3339, readable by people and `jq`.
pub fn rfc3339(t: OffsetDateTime) -> String {
    t.format(&Rfc3339).unwrap_or_default()
}

/// Size in bytes at which the file is rotated.
const MAX_BYTES: u64 = 64 * 1024 * 1024;
/// Number of rotated files that are kept, `<file>.1` the newest: with the current one they take at most 320 MiB.
const KEPT: u32 = 4;
/// Bytes left free on the file system: the database may be on the same one, and signing without an audit line is better
/// than a server that cannot store a ban.
const RESERVE_BYTES: u64 = 64 * 1024 * 1024;
/// Shortest interval between two error messages about lost lines.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(60);

/// The audit log: appends to a file, or discards.
pub struct Audit(Option<Mutex<Log>>);

struct Log {
    path: PathBuf,
    file: File,
    bytes: u64,
    max_bytes: u64,
    open: fn(&Path) -> io::Result<File>,
    /// Records lost since it was last said.
    lost: u64,
    complained: Option<Instant>,
}

impl Audit {
    /// Opens the file for appending, mode 0600; without a path it discards all lines.
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        Self::with_size(path, MAX_BYTES)
    }

    fn with_size(path: Option<&Path>, max_bytes: u64) -> io::Result<Self> {
        let Some(path) = path else { return Ok(Self(None)) };
        let file = append_to(path)?;
        let bytes = file.metadata()?.len();
        let log = Log { path: path.to_owned(), file, bytes, max_bytes, open: append_to, lost: 0, complained: None };
        Ok(Self(Some(Mutex::new(log))))
    }

    /// Appends one line. A full disk loses the line, not the signature; the number of lost lines is logged.
    pub fn write(&self, record: &Record<'_>, now: OffsetDateTime) {
        #[derive(Serialize)]
        struct Line<'a> {
            time: String,
            #[serde(flatten)]
            record: &'a Record<'a>,
        }
        let Some(log) = &self.0 else { return };
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        let line = serde_json::to_string(&Line { time: rfc3339(now), record }).map(|l| l + "\n");
        if let Err(error) = line.map_err(io::Error::other).and_then(|line| log.append(line.as_bytes())) {
            log.complain(&error);
        }
    }

    /// Reopens the file, after it was renamed. Keeps the old one if that fails.
    pub fn reopen(&self) {
        let Some(log) = &self.0 else { return };
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        match append_to(&log.path).and_then(|file| file.metadata().map(|meta| (file, meta.len()))) {
            Ok((file, bytes)) => (log.file, log.bytes) = (file, bytes),
            Err(error) => tracing::error!(path = %log.path.display(), %error, "cannot open the audit log anew"),
        }
    }
}

impl Log {
    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.bytes >= self.max_bytes {
            self.rotate()?;
        }
        let free = nix::sys::statvfs::fstatvfs(&self.file)?;
        if free.blocks_available() * free.fragment_size() < RESERVE_BYTES {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the rest of the disk is left to the database"));
        }
        self.file.write_all(line)?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Puts the file aside and begins a new one. Whatever step fails, the next try begins there: no file that was put aside
    /// is moved twice for one rotation. One that somebody else has moved away is not waited for.
    fn rotate(&mut self) -> io::Result<()> {
        // Left by a try that failed.
        self.shift()?;
        match std::fs::rename(&self.path, self.aside(0)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        self.file = (self.open)(&self.path)?;
        self.bytes = 0;
        self.shift()
    }

    /// Makes `<file>.0` the youngest of the files that are kept. The oldest goes only when all numbers are taken.
    fn shift(&self) -> io::Result<()> {
        if !self.aside(0).try_exists()? {
            return Ok(());
        }
        let mut free = 1;
        while free < KEPT && self.aside(free).try_exists()? {
            free += 1;
        }
        (0..free).rev().try_for_each(|n| std::fs::rename(self.aside(n), self.aside(n + 1)))
    }

    fn aside(&self, n: u32) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(format!(".{n}"));
        PathBuf::from(name)
    }

    /// Logs at most once per minute that lines are lost: the server's own log is usually on the same disk.
    fn complain(&mut self, error: &io::Error) {
        self.lost += 1;
        if self.complained.is_none_or(|last| last.elapsed() >= COMPLAINT_PAUSE) {
            tracing::error!(path = %self.path.display(), %error, lost = self.lost, "cannot write the audit record");
            (self.lost, self.complained) = (0, Some(Instant::now()));
        }
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record<'static> {
        Record {
            outcome: Outcome::Refused,
            kind: "x509_svid",
            caller: "somebody",
            entry_id: "",
            spiffe_id: "",
            serial: "",
            expires_at: "",
            audience: &[],
            authority_id: "",
            reason: "",
        }
    }

    #[test]
    fn the_record_is_bounded_and_the_youngest_lines_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let audit = Audit::with_size(Some(&path), 1_000).unwrap();
        for _ in 0..500 {
            audit.write(&record(), OffsetDateTime::UNIX_EPOCH);
        }
        let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().path()).collect();
        assert_eq!(files.len(), 1 + KEPT as usize);
        assert!(files.iter().all(|f| std::fs::metadata(f).unwrap().len() < 1_200), "bounded");
        for file in files {
            let text = std::fs::read_to_string(file).unwrap();
            assert!(text.lines().all(|l| serde_json::from_str::<serde_json::Value>(l).is_ok()), "whole lines");
        }
    }

    #[test]
    fn after_a_rename_the_next_line_is_in_a_new_file_and_none_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let audit = Audit::open(Some(&path)).unwrap();
        audit.write(&record(), OffsetDateTime::UNIX_EPOCH);
        std::fs::rename(&path, dir.path().join("old.log")).unwrap();
        audit.reopen();
        audit.write(&record(), OffsetDateTime::UNIX_EPOCH);
        let lines = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap().lines().count();
        assert_eq!((lines("old.log"), lines("audit.log")), (1, 1));
    }

    /// A record full to the last file, each with its own name in it.
    fn full(dir: &tempfile::TempDir) -> (PathBuf, Audit) {
        let path = dir.path().join("audit.log");
        let audit = Audit::with_size(Some(&path), 1).unwrap();
        for n in 0..=KEPT {
            audit.write(&Record { caller: &format!("caller-{n}"), ..record() }, OffsetDateTime::UNIX_EPOCH);
        }
        (path, audit)
    }

    fn kept(dir: &tempfile::TempDir, n: u32) -> String {
        std::fs::read_to_string(dir.path().join(format!("audit.log.{n}"))).unwrap_or_default()
    }

    #[test]
    fn a_file_that_was_moved_away_costs_no_older_one_and_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let (path, audit) = full(&dir);
        std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        audit.write(&record(), OffsetDateTime::UNIX_EPOCH);
        assert!(std::fs::read_to_string(&path).unwrap().contains("somebody"));
        (1..=KEPT).for_each(|n| assert!(kept(&dir, n).contains(&format!("caller-{}", KEPT - n)), "{n}"));
    }

    #[test]
    fn a_rotation_that_fails_again_and_again_puts_one_file_aside() {
        let dir = tempfile::tempdir().unwrap();
        let (path, audit) = full(&dir);
        let log = audit.0.as_ref().unwrap();
        log.lock().unwrap().open = |_| Err(io::Error::other("too many open files"));
        (0..10).for_each(|_| audit.write(&record(), OffsetDateTime::UNIX_EPOCH));
        log.lock().unwrap().open = append_to;
        audit.write(&record(), OffsetDateTime::UNIX_EPOCH);
        assert!(std::fs::read_to_string(&path).unwrap().contains("somebody"), "written again once it can be");
        (1..=KEPT).for_each(|n| assert!(kept(&dir, n).contains(&format!("caller-{}", KEPT + 1 - n)), "{n}"));
    }
}
