//! Rate limit for log lines: a peer that is refused a thousand times per second must not fill the log.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Most lines of one kind per [`WINDOW`].
const LINES: u32 = 20;
/// Length of a counting window.
const WINDOW: Duration = Duration::from_secs(10);

/// Rate limits by kind of line, independent of each other. Kinds must be few and never chosen by a peer.
#[derive(Debug, Default)]
pub struct Sampled(Mutex<BTreeMap<String, State>>);

#[derive(Debug, Default)]
struct State {
    began: Option<Instant>,
    said: u32,
    unsaid: u64,
}

impl Sampled {
    /// Whether to write a line of this kind now. `Some` holds the number of lines that were suppressed since the last
    /// one.
    pub fn next(&self, kind: &str, now: Instant) -> Option<u64> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !kinds.contains_key(kind) {
            kinds.insert(kind.to_owned(), State::default());
        }
        let state = kinds.get_mut(kind)?;
        if state.began.is_none_or(|began| now.saturating_duration_since(began) >= WINDOW) {
            (state.began, state.said) = (Some(now), 0);
        }
        if state.said >= LINES {
            state.unsaid += 1;
            return None;
        }
        state.said += 1;
        Some(std::mem::take(&mut state.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_writes_twenty_lines_and_the_next_window_tells_how_many_it_left_out() {
        let (sampled, now) = (Sampled::default(), Instant::now());
        let said = (0..1_000).filter(|_| sampled.next("tls", now).is_some()).count();
        assert_eq!(said, 20);
        assert_eq!(sampled.next("expired", now), Some(0), "another kind is still seen");
        assert_eq!(sampled.next("tls", now + WINDOW), Some(980));
        assert_eq!(sampled.next("tls", now + WINDOW), Some(0));
    }
}
