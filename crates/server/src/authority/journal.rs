//! The journal as it is in the store, and what is read from it.

use countersign_identity::TrustBundle;
use time::OffsetDateTime;

use super::{AuthorityError, Kind, Record, RevokedKeys, Status};
use crate::datastore::Version;

/// Authorities of a kind that are kept in the journal (SPIRE: 10), and besides them all that are still trusted.
pub const JOURNAL_LENGTH: usize = 10;

/// The journal as it is in the store.
pub struct Journal {
    /// Authorities of both kinds, the oldest first.
    pub records: Vec<Record>,
    /// Keys that the bundle never has again.
    pub revoked: RevokedKeys,
    /// Its version in the store.
    pub version: Version,
    /// Whether the key manager may hold keys without a record.
    pub unswept: bool,
}

impl Journal {
    /// The newest authority of this kind in this state.
    pub fn find(&self, kind: Kind, status: Status) -> Option<&Record> {
        self.records.iter().rev().find(|r| r.kind() == kind && r.status == status)
    }

    /// The authority with this ID. Errors: there is none of this kind.
    pub fn named(&self, kind: Kind, id: &str) -> Result<&Record, AuthorityError> {
        if id.is_empty() {
            return Err(AuthorityError::NoId);
        }
        let found = self.records.iter().find(|r| r.kind() == kind && r.id == id);
        found.ok_or_else(|| AuthorityError::Unknown(id.to_owned()))
    }

    /// The prepared authority with this ID. Errors: it is none, or in another state.
    pub fn prepared(&self, kind: Kind, id: &str) -> Result<&Record, AuthorityError> {
        let record = self.named(kind, id)?;
        match record.status {
            Status::Prepared => Ok(record),
            status => {
                let needed = "only a prepared authority can be activated";
                Err(AuthorityError::State { id: id.to_owned(), status, needed })
            }
        }
    }

    /// Names of the keys of the active and the prepared authority of a kind: what a new one is made to follow or replace.
    pub fn in_use(&self, kind: Kind) -> Vec<String> {
        let in_use = |r: &&Record| r.kind() == kind && matches!(r.status, Status::Active | Status::Prepared);
        self.records.iter().filter(in_use).map(|r| r.key_name.clone()).collect()
    }
}

/// Takes the oldest records of a kind out of a journal that has too many, but none that can still sign or that something trusted
/// hangs on: an authority that is not in the journal can be neither tainted nor revoked.
pub fn shorten(records: &mut Vec<Record>, kind: Kind, bundle: &TrustBundle, now: OffsetDateTime) {
    let is_done = |r: &Record| r.status != Status::Active && r.validity().1 <= now && !r.is_trusted(bundle);
    let mut excess = records.iter().filter(|r| r.kind() == kind).count().saturating_sub(JOURNAL_LENGTH);
    records.retain(|r| {
        let drop = excess > 0 && r.kind() == kind && is_done(r);
        excess -= usize::from(drop);
        !drop
    });
}

/// Gives an authority another state; `None` if there is no such one.
pub fn set_status(journal: &mut [Record], id: &str, status: Status) -> Option<Record> {
    let record = journal.iter_mut().find(|r| r.id == id)?;
    record.status = status;
    Some(record.clone())
}
