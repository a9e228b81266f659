//! Token buckets by source, so that one caller cannot keep a signer busy.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Most sources that are remembered. Full buckets are forgotten first, then the one that was not asked for the longest.
const MAX_SOURCES: usize = 10_000;

/// A rate limit with one bucket per source, such as an agent, a group of addresses, or an entry.
pub struct RateLimit<K> {
    per_second: f64,
    burst: f64,
    buckets: Mutex<HashMap<K, Bucket>>,
}

struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl<K: Clone + Eq + Hash> RateLimit<K> {
    /// Allows `per_second` on average, and `burst` at once.
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self { per_second: per_second.into(), burst: burst.into(), buckets: Mutex::default() }
    }

    /// Takes `count` tokens from a source's bucket; `false`, and nothing is taken, if it holds fewer.
    pub fn take(&self, source: K, count: u32, now: Instant) -> bool {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let refilled =
            |b: &Bucket| (b.tokens + now.duration_since(b.filled).as_secs_f64() * self.per_second).min(self.burst);
        if buckets.len() >= MAX_SOURCES {
            buckets.retain(|_, b| refilled(b) < self.burst);
        }
        if buckets.len() >= MAX_SOURCES && !buckets.contains_key(&source) {
            let oldest = buckets.iter().min_by_key(|(_, b)| b.filled).map(|(source, _)| source.clone());
            oldest.map(|source| buckets.remove(&source));
        }
        let bucket = buckets.entry(source).or_insert(Bucket { tokens: self.burst, filled: now });
        bucket.tokens = refilled(bucket);
        bucket.filled = now;
        let enough = bucket.tokens >= f64::from(count);
        if enough {
            bucket.tokens -= f64::from(count);
        }
        enough
    }

    /// Gives tokens back that were taken for nothing.
    pub fn give_back(&self, source: &K, count: u32) {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = buckets.get_mut(source) {
            bucket.tokens = (bucket.tokens + f64::from(count)).min(self.burst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;
    use std::time::Duration;

    #[test]
    fn a_source_that_asks_too_often_waits_and_others_do_not() {
        let limit = RateLimit::new(1, 2);
        let (a, b): (IpAddr, IpAddr) = ("127.0.0.1".parse().unwrap(), "127.0.0.2".parse().unwrap());
        let t = Instant::now();
        assert!(limit.take(a, 1, t) && limit.take(a, 1, t));
        assert!(!limit.take(a, 1, t));
        assert!(limit.take(b, 2, t));
        assert!(limit.take(a, 1, t + Duration::from_secs(1)));
        assert!(!limit.take(a, 1, t + Duration::from_secs(1)));
        limit.give_back(&a, 1);
        assert!(limit.take(a, 1, t + Duration::from_secs(1)));
    }

    #[test]
    fn sources_are_bounded_also_where_each_has_taken_something() {
        let limit = RateLimit::new(1, 2);
        let t = Instant::now();
        for source in 0..MAX_SOURCES + 10 {
            assert!(limit.take(source, 2, t + Duration::from_micros(u64::try_from(source).unwrap())));
        }
        assert_eq!(limit.buckets.lock().unwrap().len(), MAX_SOURCES);
        assert!(!limit.take(MAX_SOURCES, 2, t + Duration::from_secs(1)), "the newest are known");
    }
}
