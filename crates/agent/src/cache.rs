//! Entries, SVIDs and bundles, in memory: what a workload gets without anybody being asked.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use countersign_identity::selector::{SelectorSet, missing};
use countersign_identity::shown::shown_up_to;
use countersign_identity::{Entry, EntryId, X509Bundle, X509Svid};
use time::OffsetDateTime;
use tokio::sync::watch;

/// One entry with its SVID.
#[derive(Clone)]
pub struct Cached {
    /// The entry.
    pub entry: Arc<Entry>,
    /// Its SVID, once it is signed.
    pub svid: Option<Arc<X509Svid>>,
    /// The entry has changed since the SVID was signed: a new one is due.
    pub stale: bool,
    /// When the SVID came.
    pub obtained: OffsetDateTime,
    /// Moves the renewal of this SVID, from -1.0 to 1.0.
    pub jitter: f64,
}

/// Everything at one moment.
#[derive(Default)]
pub struct State {
    /// Whether the server has told everything at least once.
    pub synced: bool,
    /// By entry ID.
    pub entries: BTreeMap<EntryId, Cached>,
    /// Our trust domain's bundle.
    pub bundle: Option<Arc<X509Bundle>>,
    /// Others', by trust domain.
    pub federated: BTreeMap<String, Arc<X509Bundle>>,
}

/// The cache, and a tick with each change.
pub struct Cache {
    state: RwLock<State>,
    version: watch::Sender<u64>,
}

impl Default for Cache {
    fn default() -> Self {
        Self { state: RwLock::default(), version: watch::Sender::new(0) }
    }
}

/// Why a caller gets nothing.
#[derive(Debug, PartialEq, Eq)]
pub enum NoIdentity {
    /// The agent does not know yet.
    NotSynced,
    /// No entry applies; the nearest miss in words.
    NoEntry(String),
}

impl Cache {
    /// Everything now.
    pub fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something, and tells everybody who watches.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut state);
        drop(state);
        self.version.send_modify(|v| *v += 1);
        result
    }

    /// Ticks with each change.
    pub fn versions(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// The entries that a caller with these selectors gets: those whose selectors are all among them.
    pub fn matching(&self, attested: &SelectorSet, now: OffsetDateTime) -> Result<Vec<Cached>, NoIdentity> {
        let state = self.read();
        if !state.synced {
            return Err(NoIdentity::NotSynced);
        }
        let applies = |c: &&Cached| c.entry.applies_to(attested) && !c.entry.is_expired(now);
        let found: Vec<Cached> = state.entries.values().filter(applies).cloned().collect();
        if found.is_empty() { Err(NoIdentity::NoEntry(closest_miss(&state, attested))) } else { Ok(found) }
    }
}

/// Characters of a selector that are told.
const MAX_SELECTOR_SHOWN: usize = 300;

/// In words: what was attested, and which entry came closest.
fn closest_miss(state: &State, attested: &SelectorSet) -> String {
    // A caller chooses the path of its executable, and this goes to logs.
    let list = |set: &mut dyn Iterator<Item = String>| {
        set.map(|s| shown_up_to(&s, MAX_SELECTOR_SHOWN).to_string()).collect::<Vec<_>>().join(", ")
    };
    let have = list(&mut attested.iter().map(ToString::to_string));
    let nearest =
        state.entries.values().map(|c| (missing(&c.entry.selectors, attested), &c.entry)).min_by_key(|(m, _)| m.len());
    match nearest {
        None => format!("attested {have}; this agent has no registration entries"),
        Some((lacking, entry)) => {
            let lacking = list(&mut lacking.iter().map(ToString::to_string));
            format!("attested {have}; the closest entry, `{}`, also needs {lacking}", entry.spiffe_id)
        }
    }
}

#[cfg(test)]
mod tests;
