//! Bounds how many addresses each caller may follow, so that a greedy caller starves only itself.
//!
//! A caller may follow another address while it follows fewer than are still free. Callers that want ever more end up
//! with equal shares, and a share of that size remains free for the next one (the "dynamic threshold" of Choudhury and
//! Hahne, 1998). The number of callers does not have to be known, and no address is ever taken away.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most concurrent streams per caller.
const MAX_STREAMS: usize = 32;

/// The number of addresses that all callers may follow together.
pub struct Quota<C>(Arc<Shared<C>>);

struct Shared<C> {
    most: usize,
    per_caller: usize,
    state: Mutex<State<C>>,
}

struct State<C> {
    followed: usize,
    callers: HashMap<C, Counts>,
}

#[derive(Default, Clone, Copy)]
struct Counts {
    streams: usize,
    /// Addresses that the caller follows.
    followed: usize,
    /// Addresses that the caller named, followed or waiting for room.
    named: usize,
}

/// Why a caller is rejected.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QuotaError {
    /// The caller has too many streams open.
    #[error("the caller has {MAX_STREAMS} streams of the directory open already")]
    Streams,
    /// The caller named more than this many addresses.
    #[error("the caller names more than {0} addresses")]
    Named(usize),
}

impl<C: Clone + Eq + Hash> Quota<C> {
    /// A quota of `most` addresses in total and `per_caller` per caller.
    pub fn new(most: usize, per_caller: usize) -> Self {
        Self(Arc::new(Shared { most, per_caller, state: Mutex::new(State { followed: 0, callers: HashMap::new() }) }))
    }

    /// Registers a stream of a caller.
    ///
    /// # Errors
    /// [`QuotaError::Streams`] if the caller has too many.
    pub fn join(&self, caller: C) -> Result<Share<C>, QuotaError> {
        let mut state = self.0.state();
        let counts = state.callers.entry(caller.clone()).or_default();
        if counts.streams >= MAX_STREAMS {
            return Err(QuotaError::Streams);
        }
        counts.streams += 1;
        drop(state);
        Ok(Share { shared: self.0.clone(), caller, own: Counts::default() })
    }
}

impl<C> Shared<C> {
    fn state(&self) -> MutexGuard<'_, State<C>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The addresses of one stream, given back when dropped.
pub struct Share<C: Clone + Eq + Hash> {
    shared: Arc<Shared<C>>,
    caller: C,
    own: Counts,
}

impl<C: Clone + Eq + Hash> Share<C> {
    /// Counts an address that the caller named. It may name twice as many as it may follow, because both streams count
    /// while one replaces the other.
    ///
    /// # Errors
    /// [`QuotaError::Named`] if the caller named too many.
    pub fn name(&mut self) -> Result<(), QuotaError> {
        let most = 2 * self.shared.per_caller;
        let mut state = self.shared.state();
        let counts = state.callers.entry(self.caller.clone()).or_default();
        if counts.named >= most {
            return Err(QuotaError::Named(most));
        }
        counts.named += 1;
        self.own.named += 1;
        Ok(())
    }

    /// Takes room to follow one more address. `false` if there is no room for this caller now.
    #[must_use]
    pub fn follow(&mut self) -> bool {
        let mut state = self.shared.state();
        let free = self.shared.most - state.followed;
        let counts = state.callers.entry(self.caller.clone()).or_default();
        if counts.followed >= free.min(self.shared.per_caller) {
            return false;
        }
        counts.followed += 1;
        state.followed += 1;
        self.own.followed += 1;
        true
    }

    /// Gives the room of an address back.
    pub fn leave(&mut self, was_followed: bool) {
        let given = Counts { streams: 0, followed: usize::from(was_followed), named: 1 };
        self.own.named -= given.named;
        self.own.followed -= given.followed;
        self.give_back(given);
    }

    fn give_back(&self, given: Counts) {
        let mut state = self.shared.state();
        state.followed -= given.followed;
        if let Some(counts) = state.callers.get_mut(&self.caller) {
            counts.streams -= given.streams;
            counts.followed -= given.followed;
            counts.named -= given.named;
            if counts.streams == 0 {
                state.callers.remove(&self.caller);
            }
        }
    }
}

impl<C: Clone + Eq + Hash> Drop for Share<C> {
    fn drop(&mut self) {
        self.give_back(Counts { streams: 1, ..self.own });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn follow_all(share: &mut Share<&'static str>, wanted: usize) -> usize {
        (0..wanted).take_while(|_| share.name().is_ok() && share.follow()).count()
    }

    #[test]
    fn greedy_callers_leave_room_for_the_next_one() {
        let quota = Quota::new(1_000, 800);
        let mut first = quota.join("first").unwrap();
        assert_eq!(follow_all(&mut first, 10_000), 500);
        let mut second = quota.join("second").unwrap();
        assert_eq!(follow_all(&mut second, 10_000), 250);
        let mut modest = quota.join("modest").unwrap();
        assert_eq!(follow_all(&mut modest, 100), 100);
        drop(first);
        assert_eq!(follow_all(&mut second, 10_000), 200, "what is given back is there for the others");
    }

    #[test]
    fn the_bound_is_the_callers_and_not_the_streams() {
        let quota = Quota::new(1_000, 10);
        let mut streams: Vec<_> = (0..MAX_STREAMS).map(|_| quota.join("one").unwrap()).collect();
        assert_eq!(quota.join("one").err(), Some(QuotaError::Streams));
        assert_eq!(streams.iter_mut().map(|s| follow_all(s, 3)).sum::<usize>(), 10);
        while streams[0].name().is_ok() {}
        assert_eq!(streams[1].name(), Err(QuotaError::Named(20)));
        assert!(quota.join("other").unwrap().follow());
        drop(streams);
        let state = quota.0.state();
        assert!(state.followed == 0 && state.callers.is_empty());
    }

    #[test]
    fn an_address_that_is_left_makes_room() {
        let quota = Quota::new(10, 2);
        let mut share = quota.join("one").unwrap();
        assert_eq!(follow_all(&mut share, 5), 2);
        assert!(!share.follow());
        share.leave(true);
        assert!(share.follow());
    }
}
