//! Entries that the server refused to sign for: each has its own backoff, so that one that is always refused delays no
//! other.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_identity::{Entry, EntryId};
use time::OffsetDateTime;
use tokio::time::Instant;

use crate::cache::{Cached, State};

/// The entries whose last request was refused; at most as many as there are entries.
#[derive(Default)]
pub struct Retries(HashMap<EntryId, Refused>);

struct Refused {
    /// Revision of the entry: after a change it may be signed.
    revision: i64,
    times: u32,
    backoff: Backoff,
    next: Instant,
}

impl Retries {
    /// Records that the server refused to sign for this entry.
    pub fn refused(&mut self, entry: &Entry, now: Instant) {
        let fresh = || Refused {
            revision: entry.revision,
            times: 0,
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(60)),
            next: now,
        };
        let refused = self.0.entry(entry.id.clone()).or_insert_with(fresh);
        if refused.revision != entry.revision {
            *refused = fresh();
        }
        refused.times = refused.times.saturating_add(1);
        refused.next = now + refused.backoff.next_delay();
    }

    /// Records that an entry has its SVID.
    pub fn signed(&mut self, id: &EntryId) {
        self.0.remove(id);
    }

    /// Forgets entries that no longer exist.
    pub fn forget_removed(&mut self, state: &State) {
        self.0.retain(|id, _| state.entries.contains_key(id));
    }

    /// The `count` most urgent entries that need not wait: those that were never refused first, and of these the ones
    /// that expire first.
    pub fn pick<'a>(&self, due: impl Iterator<Item = &'a Cached>, count: usize, now: Instant) -> Vec<EntryId> {
        let waiting =
            |c: &&Cached| self.0.get(&c.entry.id).is_some_and(|r| r.revision == c.entry.revision && r.next > now);
        let mut due: Vec<&Cached> = due.filter(|c| !waiting(c)).collect();
        due.sort_by_cached_key(|c| {
            let times = self.0.get(&c.entry.id).map_or(0, |r| r.times);
            // An entry without an SVID serves nothing; one with an SVID serves it until it expires.
            (
                times,
                c.svid.as_ref().map_or(OffsetDateTime::UNIX_EPOCH, |s| s.facts().not_after),
                Reverse(c.entry.revision),
            )
        });
        due.into_iter().take(count).map(|c| c.entry.id.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::cached;

    #[test]
    fn an_entry_that_is_refused_for_good_lets_all_others_pass() {
        let entries: Vec<Cached> = (0..10).map(|n| cached(&format!("e{n}"), 1)).collect();
        let (mut retries, start) = (Retries::default(), Instant::now());
        for refused in &entries[..5] {
            retries.refused(&refused.entry, start);
        }
        let pick = |retries: &Retries, of: &[Cached], count, at| {
            retries.pick(of.iter(), count, at).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let others = ["e5", "e6", "e7", "e8", "e9"];
        assert_eq!(pick(&retries, &entries, 100, start), others, "the refused wait");
        let later = start + Duration::from_secs(2);
        assert_eq!(pick(&retries, &entries, 5, later), others, "and then come last");
        assert_eq!(pick(&retries, &entries, 100, later).len(), 10);
        // The second backoff is longer; a change of the entry resets it.
        retries.refused(&entries[0].entry, later);
        assert!(pick(&retries, &entries[..1], 1, later + Duration::from_millis(900)).is_empty());
        assert_eq!(pick(&retries, &[cached("e0", 2)], 1, later), ["e0"]);
        retries.signed(&entries[0].entry.id);
        assert_eq!(pick(&retries, &entries[..1], 1, later), ["e0"]);
    }
}
