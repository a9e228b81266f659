//! Rate limit for log lines that others cause: whoever calls a thousand times per second must not fill the log, nor push what
//! was there before out of it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Most lines of one source and kind per [`WINDOW`].
const LINES: u32 = 20;
/// Most lines of one kind per [`WINDOW`], of all sources together.
const LINES_IN_ALL: u32 = 200;
/// Length of a counting window.
const WINDOW: Duration = Duration::from_secs(10);
/// Most sources and kinds that are counted on their own; all others share the lines of one source.
const MAX_SOURCES: usize = 1_000;

/// Rate limits by source, such as a user ID, and by kind of line. Kinds are constants of the program: few, and never chosen by
/// a peer. `()` stands for a single source.
#[derive(Debug)]
pub struct Sampled<S = ()>(Mutex<Table<S>>);

#[derive(Debug)]
struct Table<S> {
    /// `None` stands for all the sources that no room was left for.
    sources: HashMap<(Option<S>, &'static str), State>,
    kinds: HashMap<&'static str, Lines>,
}

#[derive(Debug, Default)]
struct State {
    lines: Lines,
    unsaid: u64,
}

/// Lines of one window.
#[derive(Debug, Default)]
struct Lines {
    began: Option<Instant>,
    said: u32,
}

impl Lines {
    fn is_over(&self, now: Instant) -> bool {
        self.began.is_none_or(|began| now.saturating_duration_since(began) >= WINDOW)
    }

    /// Whether one more line is within this bound. Begins a new window where the last is over.
    fn has_room(&mut self, most: u32, now: Instant) -> bool {
        if self.is_over(now) {
            *self = Self { began: Some(now), said: 0 };
        }
        self.said < most
    }
}

impl<S> Default for Sampled<S> {
    fn default() -> Self {
        Self(Mutex::new(Table { sources: HashMap::new(), kinds: HashMap::new() }))
    }
}

/// Lines that were left out and that no other line has told of.
#[derive(Debug, PartialEq, Eq)]
pub struct Unsaid<S> {
    /// `None`: sources beyond the number that is counted.
    pub source: Option<S>,
    /// Kind of the lines.
    pub kind: &'static str,
    /// Number of lines.
    pub count: u64,
}

impl<S: Clone + Eq + Hash> Sampled<S> {
    /// Whether to write a line of this source and kind now. `Some` holds the number of its lines that were left out since the
    /// last one.
    pub fn next(&self, source: S, kind: &'static str, now: Instant) -> Option<u64> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Table { sources, kinds } = &mut *table;
        let key = key(sources, source, kind, now);
        let state = sources.entry(key).or_default();
        let in_all = kinds.entry(kind).or_default();
        if !state.lines.has_room(LINES, now) || !in_all.has_room(LINES_IN_ALL, now) {
            state.unsaid += 1;
            return None;
        }
        state.lines.said += 1;
        in_all.said += 1;
        Some(std::mem::take(&mut state.unsaid))
    }

    /// Forgets the sources whose window is over, and returns what was left out in it. For a task that looks now and then: a
    /// source that calls no more has no next line to tell of it.
    pub fn over(&self, now: Instant) -> Vec<Unsaid<S>> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = table.sources.extract_if(|_, state| state.lines.is_over(now));
        let unsaid = ended.map(|((source, kind), state)| Unsaid { source, kind, count: state.unsaid });
        unsaid.filter(|unsaid| unsaid.count > 0).collect()
    }
}

/// The key that a source is counted under. Makes room where windows are over; what was left out in them is told with the next
/// line of the sources beyond the bound.
fn key<S: Clone + Eq + Hash>(
    sources: &mut HashMap<(Option<S>, &'static str), State>,
    source: S,
    kind: &'static str,
    now: Instant,
) -> (Option<S>, &'static str) {
    let own = (Some(source), kind);
    if sources.len() < MAX_SOURCES || sources.contains_key(&own) {
        return own;
    }
    let ended: Vec<_> = sources.extract_if(|(s, _), state| s.is_some() && state.lines.is_over(now)).collect();
    for ((_, kind), state) in ended {
        sources.entry((None, kind)).or_default().unsaid += state.unsaid;
    }
    if sources.len() < MAX_SOURCES { own } else { (None, kind) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_writes_twenty_lines_and_the_next_window_tells_how_many_it_left_out() {
        let (sampled, now) = (Sampled::default(), Instant::now());
        let said = (0..1_000).filter(|_| sampled.next(1, "tls", now).is_some()).count();
        assert_eq!(said, 20);
        assert_eq!(sampled.next(1, "expired", now), Some(0), "another kind is still seen");
        assert_eq!(sampled.next(2, "tls", now), Some(0), "another source is still seen");
        assert_eq!(sampled.next(1, "tls", now + WINDOW), Some(980));
        assert_eq!(sampled.next(1, "tls", now + WINDOW), Some(0));
    }

    #[test]
    fn a_storm_that_ends_is_told_of_once() {
        let (sampled, now) = (Sampled::default(), Instant::now());
        for _ in 0..50 {
            let _ = sampled.next(1, "tls", now);
        }
        sampled.next(2, "tls", now);
        assert_eq!(sampled.over(now), []);
        assert_eq!(sampled.over(now + WINDOW), [Unsaid { source: Some(1), kind: "tls", count: 30 }]);
        assert_eq!(sampled.over(now + WINDOW), []);
    }

    #[test]
    fn neither_lines_nor_memory_grow_with_the_number_of_sources() {
        let (sampled, now) = (Sampled::default(), Instant::now());
        let said = (0..100_000).filter(|source| sampled.next(*source, "tls", now).is_some()).count();
        assert_eq!(said, 200);
        assert!(sampled.0.lock().unwrap().sources.len() <= MAX_SOURCES + 1);
        // The same once more, when the windows of the first are over: nothing is lost.
        let later = now + WINDOW;
        let said: Vec<u64> = (100_000..200_000).filter_map(|source| sampled.next(source, "tls", later)).collect();
        let left: u64 = sampled.over(later + WINDOW).iter().map(|unsaid| unsaid.count).sum();
        assert_eq!(said.len(), 200);
        assert_eq!(said.iter().sum::<u64>() + left, 200_000 - 400);
    }
}
