//! The audit record: one JSON line for each SVID that was signed or refused.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// What happened to a request for a signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A certificate was signed.
    Signed,
    /// None was.
    Refused,
}

/// One line of the record.
#[derive(Debug, Serialize)]
pub struct Record<'a> {
    /// Signed or refused.
    pub outcome: Outcome,
    /// `x509_svid`, `agent_svid`, `server_svid`.
    pub kind: &'static str,
    /// Who asked: a SPIFFE ID, `local:uid=<uid>`, or `anonymous@<address>`.
    pub caller: &'a str,
    /// Registration entry, if one is behind it.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub entry_id: &'a str,
    /// Whose identity.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub spiffe_id: &'a str,
    /// Serial of the certificate, lower-case hex.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub serial: &'a str,
    /// End of the certificate, RFC 3339.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub expires_at: &'a str,
    /// The authority that signed.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub authority_id: &'a str,
    /// Why it was refused.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub reason: &'a str,
}

/// RFC 3339, for people and for `jq`.
pub fn rfc3339(t: OffsetDateTime) -> String {
    t.format(&Rfc3339).unwrap_or_default()
}

/// Appends records to a file, or nowhere.
pub struct Audit(Option<(PathBuf, Mutex<File>)>);

impl Audit {
    /// Opens the file for appending, mode 0600.
    pub fn open(path: Option<&Path>) -> std::io::Result<Self> {
        let Some(path) = path else { return Ok(Self(None)) };
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        Ok(Self(Some((path.to_owned(), Mutex::new(file)))))
    }

    /// Appends one record. A full disk costs the record, not the signature: it is logged instead.
    pub fn write(&self, record: &Record<'_>, now: OffsetDateTime) {
        let Some((path, file)) = &self.0 else { return };
        #[derive(Serialize)]
        struct Line<'a> {
            time: String,
            #[serde(flatten)]
            record: &'a Record<'a>,
        }
        let line = serde_json::to_string(&Line { time: rfc3339(now), record }).map(|l| l + "\n");
        let written = line
            .map_err(std::io::Error::other)
            .and_then(|line| file.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes()));
        if let Err(error) = written {
            tracing::error!(path = %path.display(), %error, ?record, "cannot write the audit record");
        }
    }
}
