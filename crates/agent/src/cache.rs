//! Entries, SVIDs and bundles in memory: everything that workloads need, available without calling the server.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use countersign_identity::selector::{SelectorSet, missing};
use countersign_identity::shown::shown_up_to;
use countersign_identity::{Entry, EntryId, Selector, SpiffeId, TrustBundle, X509Svid};
use time::OffsetDateTime;
use tokio::sync::watch;

/// One entry with its SVID.
#[derive(Clone)]
pub struct Cached {
    /// The registration entry.
    pub entry: Arc<Entry>,
    /// The entry's SVID; `None` until it is signed.
    pub svid: Option<Arc<X509Svid>>,
    /// Whether the entry has changed since the SVID was signed, so that a new one is due.
    pub stale: bool,
    /// When the SVID was obtained.
    pub obtained: OffsetDateTime,
    /// Jitter of this SVID's renewal, -1.0 to 1.0.
    pub jitter: f64,
}

/// How far the entries follow the server's changes; the default stands for not at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Position {
    /// The agent whose entries they are.
    pub agent: Option<SpiffeId>,
    /// The server's name for its sequence of revisions.
    pub epoch: String,
    /// The revision in it.
    pub revision: u64,
}

/// The content of the cache.
#[derive(Default)]
pub struct State {
    /// The server's changes that `entries` hold. Kept here because whoever empties the entries must lose it: the server would
    /// send only what has changed since.
    position: Position,
    /// Number of times that the entries were withdrawn.
    withdrawals: u64,
    /// Whether the server has sent all entries at least once.
    pub synced: bool,
    /// Entries with their SVIDs, by entry ID.
    pub entries: BTreeMap<EntryId, Cached>,
    /// Our trust domain's bundle; `None` until the server has sent it.
    pub bundle: Option<Arc<TrustBundle>>,
    /// Foreign bundles, by trust domain.
    pub federated: BTreeMap<String, Arc<TrustBundle>>,
}

impl State {
    /// Removes all entries, and the position with them. Counts as synced, so that callers are told that they have no identity
    /// instead of being asked to wait.
    pub fn withdraw(&mut self) {
        self.entries.clear();
        self.position = Position::default();
        self.withdrawals += 1;
        self.synced = true;
    }

    /// Number of withdrawals so far. A message from a stream that began before the last one must not be taken up.
    pub fn withdrawals(&self) -> u64 {
        self.withdrawals
    }

    /// Where a stream of this agent goes on. Another agent's position is none: its entries were others.
    pub fn position(&self, agent: &SpiffeId) -> Position {
        if self.position.agent.as_ref() == Some(agent) { self.position.clone() } else { Position::default() }
    }

    /// Notes what the entries hold now.
    pub fn set_position(&mut self, position: Position) {
        self.position = position;
    }
}

/// The cache, with notification of each change.
pub struct Cache {
    state: RwLock<State>,
    version: watch::Sender<u64>,
}

impl Default for Cache {
    fn default() -> Self {
        Self { state: RwLock::default(), version: watch::Sender::new(0) }
    }
}

/// Why a caller gets no identity.
#[derive(Debug, PartialEq, Eq)]
pub enum NoIdentity {
    /// The server has not sent the entries yet.
    NotSynced,
    /// No entry applies. Holds the closest miss in words.
    NoEntry(String),
}

impl Cache {
    /// A read lock on the content.
    pub fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the content and notifies all watchers.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut state);
        drop(state);
        self.version.send_modify(|v| *v += 1);
        result
    }

    /// Notifies of each change.
    pub fn versions(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// The unexpired entries of a caller with these selectors: those whose selectors are a subset. Errors: see
    /// [`NoIdentity`].
    pub fn matching(&self, attested: &SelectorSet, now: OffsetDateTime) -> Result<Vec<Cached>, NoIdentity> {
        let state = self.read();
        if !state.synced {
            return Err(NoIdentity::NotSynced);
        }
        let applies = |c: &&Cached| c.entry.applies_to(attested) && !c.entry.is_expired(now);
        let found: Vec<Cached> = state.entries.values().filter(applies).cloned().collect();
        if found.is_empty() { Err(NoIdentity::NoEntry(closest_miss(&state, attested))) } else { Ok(found) }
    }

    /// Whether the identities of a caller with these selectors are settled although others may follow: it has one, and no other
    /// entry lacks nothing but selectors that may follow. What matches already goes on to match, because selectors are only
    /// added.
    pub fn is_settled(&self, attested: &SelectorSet, may_follow: fn(&Selector) -> bool, now: OffsetDateTime) -> bool {
        let state = self.read();
        let mut has_one = false;
        for entry in state.entries.values().map(|c| &c.entry).filter(|e| !e.is_expired(now)) {
            let lacking = missing(&entry.selectors, attested);
            if lacking.is_empty() {
                has_one = true;
            } else if lacking.into_iter().all(may_follow) {
                return false;
            }
        }
        state.synced && has_one
    }
}

/// Longest selector in a message, in characters.
const MAX_SELECTOR_SHOWN: usize = 300;

/// A message: what was attested, and which entry came closest.
fn closest_miss(state: &State, attested: &SelectorSet) -> String {
    // A caller chooses the path of its executable, and this text goes into logs.
    let list = |set: &mut dyn Iterator<Item = String>| {
        set.map(|s| shown_up_to(&s, MAX_SELECTOR_SHOWN).to_string()).collect::<Vec<_>>().join(", ")
    };
    let have = list(&mut attested.iter().map(ToString::to_string));
    let nearest =
        state.entries.values().map(|c| (missing(&c.entry.selectors, attested), &c.entry)).min_by_key(|(m, _)| m.len());
    match nearest {
        None => {
            format!("attested {have}; this agent has no registration entries; `countersign entry create` makes one")
        }
        Some((lacking, entry)) if lacking.is_empty() => {
            format!("attested {have}; the entry that these match, `{}`, has expired", entry.spiffe_id)
        }
        Some((lacking, entry)) => {
            let lacking = list(&mut lacking.iter().map(ToString::to_string));
            format!("attested {have}; the closest entry, `{}`, also needs {lacking}", entry.spiffe_id)
        }
    }
}

#[cfg(test)]
mod tests;
