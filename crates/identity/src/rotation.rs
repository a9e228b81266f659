//! When things rotate: arithmetic on the times that callers pass in.

use std::time::Duration;

use time::OffsetDateTime;

/// How far back not-before is set, so that peers with a slow clock accept a new certificate.
pub const BACKDATE: Duration = Duration::from_secs(10);

/// Shortest time from one signature to the next for the same identity. An authority that is about to end signs lives of
/// seconds, whose every fraction would be over at once.
pub const PAUSE: Duration = Duration::from_secs(2);

/// Longest time that an SVID below a tainted or missing authority is used on when its successor was below one too: the bundle
/// in which that is good may still be under way.
const STEADY: Duration = Duration::from_secs(5);

const DAY: u64 = 24 * 60 * 60;

/// When to prepare the next authority: once min(lifetime / 2, 30 days) is left.
pub fn prepare_at(not_before: OffsetDateTime, not_after: OffsetDateTime) -> OffsetDateTime {
    not_after - (lifetime(not_before, not_after) / 2).min(Duration::from_secs(30 * DAY))
}

/// When to activate the prepared authority: once min(lifetime / 6, 7 days) of the active one is left.
pub fn activate_at(not_before: OffsetDateTime, not_after: OffsetDateTime) -> OffsetDateTime {
    not_after - (lifetime(not_before, not_after) / 6).min(Duration::from_secs(7 * DAY))
}

/// When to renew an SVID: at half of its lifetime, shifted by up to 10 % of that half.
///
/// `jitter` is between -1.0 and 1.0. The caller draws it once per SVID and keeps it: SVIDs that were issued together
/// renew at different times, and each of them at one fixed time.
pub fn renew_at(not_before: OffsetDateTime, not_after: OffsetDateTime, jitter: f64) -> OffsetDateTime {
    let half = lifetime(not_before, not_after) / 2;
    let shift = half.mul_f64(0.1 * jitter.abs().min(1.0));
    if jitter < 0.0 { not_before + half - shift } else { not_before + half + shift }
}

/// Whether an SVID that is due has been used for long enough. `obtained`: when it came; `left`: what was left of its life then;
/// `distrusted`: it is due because its authority is tainted or missing.
pub fn is_rested(obtained: OffsetDateTime, left: Duration, distrusted: bool, now: OffsetDateTime) -> bool {
    // A clock that was set back says nothing of how long ago the last signature was.
    if obtained > now {
        return true;
    }
    // Half of a life that began before the signature may be over at once: a quarter of what was left is waited for.
    let quarter = left / 4;
    let wait = if distrusted { quarter.min(STEADY) } else { quarter };
    obtained + wait.max(PAUSE) <= now
}

/// The validity window for something issued now: backdated, and never past `latest`.
pub fn validity(
    now: OffsetDateTime,
    ttl: Duration,
    latest: Option<OffsetDateTime>,
) -> (OffsetDateTime, OffsetDateTime) {
    // Certificates hold whole seconds. Rounding the end down keeps a certificate from outliving what was meant.
    let whole = |t: OffsetDateTime| t.replace_nanosecond(0).unwrap_or(t);
    // A TTL beyond the last date of the calendar ends there.
    let end = now.saturating_add(ttl.try_into().unwrap_or(time::Duration::MAX));
    (whole(now - BACKDATE), whole(latest.map_or(end, |l| end.min(l))))
}

fn lifetime(not_before: OffsetDateTime, not_after: OffsetDateTime) -> Duration {
    (not_after - not_before).try_into().unwrap_or(Duration::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    const T0: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;
    const fn secs(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn thresholds_of_a_day_and_of_a_year() {
        let day = T0 + secs(DAY);
        assert_eq!(prepare_at(T0, day), T0 + secs(DAY / 2));
        assert_eq!(activate_at(T0, day), T0 + secs(DAY - DAY / 6));
        let year = T0 + secs(365 * DAY);
        assert_eq!(prepare_at(T0, year), year - secs(30 * DAY));
        assert_eq!(activate_at(T0, year), year - secs(7 * DAY));
    }

    #[test]
    fn an_svid_is_renewed_at_half_life_within_a_tenth_of_it() {
        let end = T0 + secs(200);
        assert_eq!(renew_at(T0, end, 0.0), T0 + secs(100));
        assert_eq!(renew_at(T0, end, -1.0), T0 + secs(90));
        assert_eq!(renew_at(T0, end, 1.0), T0 + secs(110));
    }

    #[test]
    fn an_svid_is_used_for_a_while_whatever_it_is_due_for() {
        let rested = |left, distrusted, after| is_rested(T0, secs(left), distrusted, T0 + secs(after));
        assert!(!rested(0, false, 1) && rested(0, false, 2), "a life that is over is no reason to spin");
        assert!(!rested(100, false, 24) && rested(100, false, 25));
        assert!(!rested(100, true, 4) && rested(100, true, 5));
        assert!(is_rested(T0 + secs(60), secs(100), false, T0), "the clock was set back");
    }

    #[test]
    fn nothing_outlives_its_issuer() {
        let now = T0 + secs(1000);
        assert_eq!(validity(now, secs(60), None), (now - secs(10), now + secs(60)));
        assert_eq!(validity(now, secs(60), Some(now + secs(5))).1, now + secs(5));
    }

    proptest::proptest! {
        #[test]
        fn the_times_of_any_certificate_stand_in_their_order(start in 0i64..4_000_000_000, life in 0u64..3_000_000_000, jitter in -2.0f64..2.0) {
            let begin = T0 + time::Duration::seconds(start);
            let end = begin + secs(life);
            let (prepare, activate) = (prepare_at(begin, end), activate_at(begin, end));
            assert!(begin <= prepare && prepare <= activate && activate <= end);
            let renew = renew_at(begin, end, jitter);
            assert!(begin + secs(life).mul_f64(0.449) <= renew + secs(1) && renew <= begin + secs(life).mul_f64(0.551) + secs(1));
        }

        #[test]
        fn nothing_issued_outlives_its_issuer_or_begins_late(at in 0i64..4_000_000_000, nanos in 0i64..1_000_000_000, ttl: u64, left in 0u64..3_000_000_000) {
            let now = T0 + time::Duration::seconds(at) + time::Duration::nanoseconds(nanos);
            let issuer_ends = now + secs(left);
            let (from, until) = validity(now, secs(ttl), Some(issuer_ends));
            assert!(from <= now && until <= issuer_ends && (until - now) <= time::Duration::seconds(ttl.min(1 << 40).try_into().unwrap()));
            assert_eq!((from.nanosecond(), until.nanosecond()), (0, 0), "certificates hold whole seconds");
        }
    }
}
