//! When an SVID is due for renewal, for the agent's own and its workloads' alike.

use countersign_identity::rotation::is_rested;
use countersign_identity::{TrustBundle, X509Svid};
use time::OffsetDateTime;

/// Whether a new SVID should be asked for. `obtained`: when this one came; `jitter` from -1.0 to 1.0; `bundle`: our trust
/// domain's, by the latest word of the server.
pub fn is_due(
    svid: &X509Svid,
    obtained: OffsetDateTime,
    jitter: f64,
    bundle: Option<&TrustBundle>,
    now: OffsetDateTime,
) -> bool {
    let of_life = svid.renew_at(jitter) <= now;
    let of_trust = bundle.is_some_and(|bundle| !svid.is_below_good_authority(bundle));
    (of_life || of_trust) && is_rested(obtained, svid.remaining(obtained), of_trust, now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Ca;
    use std::time::Duration;

    const fn secs(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn an_svid_is_due_at_half_of_its_life() {
        let now = OffsetDateTime::now_utc();
        let ca = Ca::new(now);
        let svid = ca.svid("/w", secs(200), now);
        let due = |at| is_due(&svid, now, 0.0, Some(&ca.bundle()), at);
        assert!(!due(now + secs(90)));
        assert!(due(now + secs(96)), "10 s of its life were over when it came");
    }

    #[test]
    fn lives_of_seconds_are_signed_at_most_every_other_second() {
        let start = OffsetDateTime::now_utc();
        // The authority expires in nine seconds, and so does every SVID that it signs.
        let ca = Ca::lasting(secs(9), start);
        let (mut signatures, mut at) = (0, start);
        let (mut svid, mut obtained) = (ca.svid("/w", secs(3_600), start), start);
        while at < start + secs(8) {
            at += Duration::from_millis(10);
            if is_due(&svid, obtained, 0.0, Some(&ca.bundle()), at) {
                (svid, obtained, signatures) = (ca.svid("/w", secs(3_600), at), at, signatures + 1);
            }
        }
        assert!((1..=4).contains(&signatures), "{signatures}");
        // An authority that has already expired must not cause a busy loop.
        assert!(!is_due(&svid, at, 0.0, Some(&ca.bundle()), at + secs(1)));
    }

    #[test]
    fn a_tainted_or_missing_authority_makes_an_svid_due_without_a_spin() {
        let now = OffsetDateTime::now_utc();
        let ca = Ca::new(now);
        let svid = ca.svid("/w", secs(3_600), now);
        let long_ago = now - secs(600);
        let mut tainted = ca.bundle();
        tainted.authorities[0].tainted = true;
        let gone = Ca::new(now).bundle();
        for bundle in [&tainted, &gone] {
            assert!(is_due(&svid, long_ago, 0.0, Some(bundle), now));
            assert!(!is_due(&svid, now, 0.0, Some(bundle), now + secs(4)), "just signed: the bundle is under way");
            assert!(is_due(&svid, now, 0.0, Some(bundle), now + secs(6)));
        }
        assert!(!is_due(&svid, long_ago, 0.0, Some(&ca.bundle()), now));
        assert!(!is_due(&svid, long_ago, 0.0, None, now), "without a bundle nothing is known of the authority");
    }
}
