//! When an authority is due. All of it is arithmetic on times that are given.

use std::time::Duration;

use countersign_identity::rotation::{activate_at, prepare_at};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::Record;

/// An authority that begins later than this from now was made while the clock was ahead.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(60);
/// How long an authority is kept after its end, at least and at most: its own lifetime in between. A clock that is ahead for
/// a moment must not cost keys and roots. (SPIRE keeps them for a day; with a TTL of seconds a day would hold thousands.)
const GRACE: (Duration, Duration) = (Duration::from_secs(3_600), Duration::from_secs(86_400));

/// What has to be done for the active authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Another one has to stand ready.
    pub prepare: bool,
    /// The other one has to sign.
    pub activate: bool,
}

impl Due {
    /// What is due at `now`. Without an active authority, or with one that cannot sign now, all of it.
    pub fn at(now: OffsetDateTime, active: Option<&Record>) -> Self {
        let Some(active) = active.filter(|r| is_usable(r, now)) else { return Self { prepare: true, activate: true } };
        let (from, until) = validity_of(&active.certificate);
        Self { prepare: now >= prepare_at(from, until), activate: now >= activate_at(from, until) }
    }
}

/// Whether an authority's certificate is valid now, clocks that differ a little granted.
pub fn is_usable(record: &Record, now: OffsetDateTime) -> bool {
    let (from, until) = validity_of(&record.certificate);
    from <= now + CLOCK_TOLERANCE && now < until
}

/// Whether an authority ended so long ago that nothing of it has to be kept.
pub fn is_forgotten(certificate: &CertificateDer<'_>, now: OffsetDateTime) -> bool {
    let (from, until) = validity_of(certificate);
    let lifetime: Duration = (until - from).try_into().unwrap_or(Duration::ZERO);
    until + lifetime.clamp(GRACE.0, GRACE.1) <= now
}

/// Validity of a certificate that was parsed before it came into the journal.
pub fn validity_of(certificate: &CertificateDer<'_>) -> (OffsetDateTime, OffsetDateTime) {
    X509Certificate::from_der(certificate).map_or((OffsetDateTime::UNIX_EPOCH, OffsetDateTime::UNIX_EPOCH), |(_, c)| {
        (c.validity().not_before.to_datetime(), c.validity().not_after.to_datetime())
    })
}
