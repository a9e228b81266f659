//! Refusals that anyone can cause as fast as the network allows: counted, and logged once per minute and source.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Interval between two log lines of one source.
const WINDOW: Duration = Duration::from_secs(60);
/// Most sources that are counted on their own; all others share one line.
const MAX_SOURCES: usize = 1_000;

/// Address of the caller; `None` stands for all sources beyond the bound.
pub type Source = Option<IpAddr>;

/// Counts refusals by source.
#[derive(Default)]
pub struct Refusals(Mutex<HashMap<Source, Counted>>);

struct Counted {
    since: Instant,
    /// Refusals that are in no log line yet.
    untold: u64,
}

impl Refusals {
    /// Counts one refusal; `true` if it has to be logged now, as the first of its source in a minute.
    pub fn count(&self, source: IpAddr, now: Instant) -> bool {
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let full = sources.len() >= MAX_SOURCES;
        let source = Some(source).filter(|s| !full || sources.contains_key(&Some(*s)));
        let mut is_first = false;
        let counted = sources.entry(source).or_insert_with(|| {
            is_first = true;
            Counted { since: now, untold: 0 }
        });
        if !is_first {
            counted.untold += 1;
        }
        is_first
    }

    /// Counts of the sources whose minute is over: the source, and the number of refusals beyond the first.
    pub fn over(&self, now: Instant) -> Vec<(Source, u64)> {
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut told = vec![];
        sources.retain(|source, counted| {
            if now.duration_since(counted.since) < WINDOW {
                return true;
            }
            if counted.untold == 0 {
                return false;
            }
            told.push((*source, counted.untold));
            // The source continues: its next minute starts without a line of its own.
            *counted = Counted { since: now, untold: 0 };
            true
        });
        told
    }

    /// All counts that are in no log line yet.
    pub fn rest(&self) -> Vec<(Source, u64)> {
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sources.drain().map(|(source, counted)| (source, counted.untold)).filter(|(_, untold)| *untold > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_has_one_line_a_minute_and_nothing_is_lost() {
        let refusals = Refusals::default();
        let (a, t) = ("127.0.0.1".parse().unwrap(), Instant::now());
        let told = (0..100_000).filter(|_| refusals.count(a, t)).count();
        assert_eq!(told, 1);
        assert_eq!(refusals.over(t + Duration::from_secs(59)), []);
        assert_eq!(refusals.over(t + WINDOW), [(Some(a), 99_999)]);
        assert!(!refusals.count(a, t + WINDOW), "counted for the next line");
        assert_eq!(refusals.over(t + WINDOW * 2), [(Some(a), 1)]);
        assert_eq!(refusals.over(t + WINDOW * 3), []);
        assert!(refusals.count(a, t + WINDOW * 3), "after a quiet minute it is told at once again");
    }

    #[test]
    fn sources_beyond_the_bound_share_a_line() {
        let refusals = Refusals::default();
        let t = Instant::now();
        let told = (0..50_000u32).filter(|n| refusals.count(IpAddr::from(n.to_be_bytes()), t)).count();
        assert_eq!(told, MAX_SOURCES + 1);
        assert_eq!(refusals.rest(), [(None, u64::try_from(50_000 - MAX_SOURCES - 1).unwrap())]);
    }
}
