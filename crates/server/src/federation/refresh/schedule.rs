//! When a bundle is fetched next.

use std::time::Duration;

use countersign_api::backoff::Backoff;

/// Pause where the bundle has no hint (SPIFFE Federation 5.1, SPIRE: 5 minutes).
const NO_HINT: Duration = Duration::from_secs(300);
/// Shortest and longest pause after a fetch, whatever the hint asks for. What is new is stored and pushed to every agent that wants it, so
/// the shortest is not the other trust domain's to choose (SPIRE: a quarter of a minute).
const SHORTEST: Duration = Duration::from_secs(15);
const LONGEST: Duration = Duration::from_secs(86_400);
/// Share of the hint that is drawn by lot, so that servers do not come all at once.
const JITTER: f64 = 0.1;
/// Pauses after failures grow from the first to the last, or to the hint if that is shorter.
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LAST_RETRY: Duration = Duration::from_secs(300);

/// The pauses of one relationship.
pub struct Schedule(Backoff);

impl Default for Schedule {
    fn default() -> Self {
        Self(Backoff::new(FIRST_RETRY, LAST_RETRY))
    }
}

impl Schedule {
    /// The pause after a fetch of a bundle with this hint; zero is none.
    pub fn after_success(&mut self, hint: Duration) -> Duration {
        self.0.reset();
        let full = of_hint(hint);
        full.mul_f64(1.0 - JITTER * rand::random::<f64>()).max(SHORTEST)
    }

    /// The pause after a failed fetch, while there is a bundle with this hint or none at all.
    pub fn after_failure(&mut self, hint: Option<Duration>) -> Duration {
        let most = hint.map_or(LAST_RETRY, of_hint);
        self.0.next_delay().min(most)
    }
}

fn of_hint(hint: Duration) -> Duration {
    if hint.is_zero() { NO_HINT } else { hint.clamp(SHORTEST, LONGEST) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_followed_within_bounds_and_somewhat_early() {
        let mut schedule = Schedule::default();
        let seconds = Duration::from_secs;
        for (hint, full) in [(0, 300), (600, 600), (1, 15), (u64::MAX, 86_400)] {
            for _ in 0..100 {
                let pause = schedule.after_success(seconds(hint));
                assert!(
                    pause <= seconds(full) && pause >= seconds(full).mul_f64(0.9).max(SHORTEST),
                    "{hint}: {pause:?}"
                );
            }
        }
    }

    #[test]
    fn failures_are_tried_again_ever_later_and_not_later_than_the_hint() {
        let mut schedule = Schedule::default();
        let pauses: Vec<_> = (0..12).map(|_| schedule.after_failure(None)).collect();
        assert!(pauses[0] <= FIRST_RETRY && !pauses[0].is_zero(), "{pauses:?}");
        assert!(pauses[11] >= LAST_RETRY / 2 && pauses[11] <= LAST_RETRY, "{pauses:?}");
        assert!(schedule.after_failure(Some(Duration::from_secs(20))) <= Duration::from_secs(20));
        schedule.after_success(Duration::ZERO);
        assert!(schedule.after_failure(None) <= FIRST_RETRY, "a success starts it anew");
    }
}
