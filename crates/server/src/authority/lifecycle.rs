//! When an authority is due: arithmetic on times that callers pass in.

use std::time::Duration;

use countersign_identity::rotation::{activate_at, prepare_at};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::Record;

/// An authority whose validity starts later than this from now was created while the clock was ahead.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(60);
/// How long an expired authority is kept: its own lifetime, but at least the first and at most the second. A clock that
/// is ahead for a moment must not delete keys and roots. (SPIRE keeps them for a day; with a lifetime of seconds a day
/// would keep thousands.)
pub const GRACE: (Duration, Duration) = (Duration::from_secs(3_600), Duration::from_secs(86_400));

/// The work that is due for the active authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Whether a successor must be prepared.
    pub prepare: bool,
    /// Whether the successor must be activated.
    pub activate: bool,
}

impl Due {
    /// The work that is due at `now`: both steps if there is no active authority, or it is not valid now.
    pub fn at(now: OffsetDateTime, active: Option<&Record>) -> Self {
        let Some(active) = active.filter(|r| is_usable(r, now)) else { return Self { prepare: true, activate: true } };
        let (from, until) = active.validity();
        Self { prepare: now >= prepare_at(from, until), activate: now >= activate_at(from, until) }
    }
}

/// Whether an authority is valid now, with a tolerance for clocks that differ.
pub fn is_usable(record: &Record, now: OffsetDateTime) -> bool {
    let (from, until) = record.validity();
    from <= now + CLOCK_TOLERANCE && now < until
}

/// Whether an authority with this validity (start, end) expired so long ago that it may be deleted.
pub fn is_forgotten((from, until): (OffsetDateTime, OffsetDateTime), now: OffsetDateTime) -> bool {
    let lifetime: Duration = (until - from).try_into().unwrap_or(Duration::ZERO);
    // RFC 5280, 4.1.2.5: what has no end of its own ends with the calendar.
    let kept = lifetime.clamp(GRACE.0, GRACE.1).try_into().unwrap_or(time::Duration::MAX);
    until.saturating_add(kept) <= now
}

/// Validity (start, end) of a certificate that was parsed before it entered the journal.
pub fn validity_of(certificate: &CertificateDer<'_>) -> (OffsetDateTime, OffsetDateTime) {
    X509Certificate::from_der(certificate).map_or((OffsetDateTime::UNIX_EPOCH, OffsetDateTime::UNIX_EPOCH), |(_, c)| {
        (c.validity().not_before.to_datetime(), c.validity().not_after.to_datetime())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_with_the_calendar_is_kept() {
        let last = OffsetDateTime::from_unix_timestamp(253_402_300_799).unwrap();
        assert_eq!(last.year(), 9_999);
        assert!(!is_forgotten((OffsetDateTime::UNIX_EPOCH, last), OffsetDateTime::UNIX_EPOCH));
    }
}
