//! Which foreign bundles an agent is told: those that its own entries federate with, and no others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use countersign_identity::{Entry, EntryId, TrustBundle, TrustDomain};

use crate::federation::bundles::BundleMap;

/// The entries of one agent that federate, and the bundles that it was told for them.
#[derive(Default)]
pub struct Federating {
    entries: BTreeMap<EntryId, BTreeSet<TrustDomain>>,
    names: BTreeSet<TrustDomain>,
    told: BundleMap,
}

impl Federating {
    /// Takes up all entries of the agent.
    pub fn replace(&mut self, entries: &[Arc<Entry>]) {
        self.entries.clear();
        self.names.clear();
        self.change(entries, &[]);
    }

    /// Takes up entries that are new, changed or gone.
    pub fn change(&mut self, upserted: &[Arc<Entry>], removed: &[EntryId]) {
        let mut changed = false;
        for id in removed {
            changed |= self.entries.remove(id).is_some();
        }
        for entry in upserted {
            changed |= if entry.federates_with.is_empty() {
                self.entries.remove(&entry.id).is_some()
            } else {
                self.entries.insert(entry.id.clone(), entry.federates_with.clone()).as_ref()
                    != Some(&entry.federates_with)
            };
        }
        if changed {
            self.names = self.entries.values().flatten().cloned().collect();
        }
    }

    /// The bundles that the agent is to have, all of them, if they are others than it was told.
    pub fn news(&mut self, known: &BundleMap) -> Option<Vec<Arc<TrustBundle>>> {
        let wanted = self.names.iter().filter_map(|td| Some((td.to_string(), known.get(td.as_str())?.clone())));
        let wanted: BundleMap = wanted.collect();
        if wanted == self.told {
            return None;
        }
        self.told = wanted;
        Some(self.told.values().cloned().collect())
    }
}
