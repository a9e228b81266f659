//! Registration entries in memory: an index by parent, and a log of changes so that work is done only where something changed.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, PoisonError, RwLock};

use countersign_identity::trust_domain::server_id;
use countersign_identity::{Entry, EntryId, TrustDomain};
use tokio::sync::{Mutex, watch};

use crate::agents::AttestedAgent;
use crate::datastore::{DataStore, DataStoreError};

/// Changes remembered; an agent that missed more gets a snapshot.
const LOG_LENGTH: usize = 20_000;

/// All entries, written through to the store.
pub struct Entries {
    store: Arc<dyn DataStore>,
    root: String,
    writer: Mutex<()>,
    index: RwLock<Index>,
    revision: watch::Sender<u64>,
}

#[derive(Default)]
struct Index {
    by_id: HashMap<EntryId, Arc<Entry>>,
    by_parent: HashMap<String, BTreeSet<EntryId>>,
    log: VecDeque<Change>,
    revision: u64,
}

struct Change {
    revision: u64,
    id: EntryId,
    parents: Vec<String>,
    /// The change may have moved other entries to or from an agent: an alias, or an entry with children.
    structural: bool,
}

/// A name for a new entry: 128 random bits.
pub fn fresh_entry_id() -> EntryId {
    let mut bytes = [0u8; 16];
    // The name is no secret, only unique; `rand` does not fail where the kernel has randomness.
    rand::fill(&mut bytes);
    hex::encode(bytes).parse().unwrap_or_else(|_| unreachable!("32 hex digits are an entry ID"))
}

/// What an agent must be told.
#[derive(Debug, PartialEq, Eq)]
pub enum Update {
    /// Everything it is authorized for.
    Snapshot(Vec<Arc<Entry>>),
    /// What changed since it last asked.
    Delta {
        /// New or changed.
        upserted: Vec<Arc<Entry>>,
        /// Not its any more.
        removed: Vec<EntryId>,
    },
}

impl Entries {
    /// Takes up what the store holds.
    pub async fn load(store: Arc<dyn DataStore>, td: &TrustDomain) -> Result<Self, DataStoreError> {
        let mut index = Index::default();
        for entry in store.entries().await? {
            index.insert(Arc::new(entry));
        }
        index.log.clear();
        Ok(Self {
            store,
            root: server_id(td).to_string(),
            writer: Mutex::default(),
            revision: watch::Sender::new(index.revision),
            index: RwLock::new(index),
        })
    }

    fn index(&self) -> std::sync::RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ticks with each change.
    pub fn revisions(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// One entry.
    pub fn get(&self, id: &EntryId) -> Option<Arc<Entry>> {
        self.index().by_id.get(id).cloned()
    }

    /// All entries, by ID.
    pub fn list(&self) -> Vec<Arc<Entry>> {
        let mut all: Vec<_> = self.index().by_id.values().cloned().collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.index().by_id.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// An entry that registers the same thing.
    pub fn same_as(&self, entry: &Entry) -> Option<Arc<Entry>> {
        let index = self.index();
        let siblings = index.by_parent.get(&entry.parent_id.to_string())?;
        siblings.iter().filter_map(|id| index.by_id.get(id)).find(|e| e.registers_the_same_as(entry)).cloned()
    }

    /// Adds or replaces entries. If the store refuses, nothing has changed.
    pub async fn put(&self, entries: Vec<Entry>) -> Result<(), DataStoreError> {
        let _writer = self.writer.lock().await;
        self.store.put_entries(&entries).await?;
        self.change(|index| entries.into_iter().for_each(|e| index.insert(Arc::new(e))));
        Ok(())
    }

    /// Deletes entries. If the store refuses, nothing has changed.
    pub async fn delete(&self, ids: &[EntryId]) -> Result<(), DataStoreError> {
        let _writer = self.writer.lock().await;
        self.store.delete_entries(ids).await?;
        self.change(|index| ids.iter().for_each(|id| index.remove(id)));
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut Index)) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut index);
        let revision = index.revision;
        drop(index);
        self.revision.send_replace(revision);
    }

    /// Everything an agent may hand out: its own entries, those of its aliases, and what hangs below them.
    pub fn authorized(&self, agent: &AttestedAgent) -> Vec<Arc<Entry>> {
        self.index().authorized(&self.root, agent)
    }

    /// One entry, if the agent may hand it out.
    pub fn authorized_one(&self, agent: &AttestedAgent, id: &EntryId) -> Option<Arc<Entry>> {
        let index = self.index();
        let entry = index.by_id.get(id)?;
        if entry.parent_id == agent.id {
            return Some(entry.clone());
        }
        index.authorized(&self.root, agent).into_iter().find(|e| e.id == *id)
    }

    /// What changed for an agent since `revision`, with the revision that this brings it to.
    pub fn since(&self, agent: &AttestedAgent, revision: Option<u64>) -> (u64, Update) {
        let index = self.index();
        let oldest = index.log.front().map_or(index.revision, |c| c.revision - 1);
        let Some(since) = revision.filter(|r| (oldest..=index.revision).contains(r)) else {
            return (index.revision, Update::Snapshot(index.authorized(&self.root, agent)));
        };
        let missed = index.log.len() - index.log.partition_point(|c| c.revision <= since);
        let changes = || index.log.iter().rev().take(missed);
        if changes().any(|c| c.structural) {
            return (index.revision, Update::Snapshot(index.authorized(&self.root, agent)));
        }
        let parents = index.parents(&self.root, agent);
        let mut seen = HashSet::new();
        let (mut upserted, mut removed) = (vec![], vec![]);
        for change in changes().filter(|c| c.parents.iter().any(|p| parents.contains(p))) {
            if !seen.insert(&change.id) {
                continue;
            }
            match index.by_id.get(&change.id) {
                Some(e) if parents.contains(&e.parent_id.to_string()) => upserted.push(e.clone()),
                _ => removed.push(change.id.clone()),
            }
        }
        (index.revision, Update::Delta { upserted, removed })
    }
}

impl Index {
    fn insert(&mut self, entry: Arc<Entry>) {
        let parent = entry.parent_id.to_string();
        let mut parents = vec![parent.clone()];
        let mut structural = self.is_structural(&entry);
        if let Some(before) = self.by_id.get(&entry.id).cloned() {
            structural |= self.is_structural(&before);
            let old_parent = before.parent_id.to_string();
            if old_parent != parent {
                self.unlink(&before);
                parents.push(old_parent);
            }
        }
        self.by_parent.entry(parent).or_default().insert(entry.id.clone());
        self.record(entry.id.clone(), parents, structural);
        self.by_id.insert(entry.id.clone(), entry);
    }

    fn remove(&mut self, id: &EntryId) {
        if let Some(before) = self.by_id.remove(id) {
            let structural = self.is_structural(&before);
            self.unlink(&before);
            self.record(id.clone(), vec![before.parent_id.to_string()], structural);
        }
    }

    fn unlink(&mut self, entry: &Entry) {
        let parent = entry.parent_id.to_string();
        if let Some(siblings) = self.by_parent.get_mut(&parent) {
            siblings.remove(&entry.id);
            if siblings.is_empty() {
                self.by_parent.remove(&parent);
            }
        }
    }

    fn record(&mut self, id: EntryId, parents: Vec<String>, structural: bool) {
        self.revision += 1;
        self.log.push_back(Change { revision: self.revision, id, parents, structural });
        if self.log.len() > LOG_LENGTH {
            self.log.pop_front();
        }
    }

    /// An alias of nodes, or a parent of other entries.
    fn is_structural(&self, entry: &Entry) -> bool {
        entry.parent_id.path() == "/spire/server" || self.by_parent.contains_key(&entry.spiffe_id.to_string())
    }

    fn children(&self, parent: &str) -> impl Iterator<Item = &Arc<Entry>> {
        self.by_parent.get(parent).into_iter().flatten().filter_map(|id| self.by_id.get(id))
    }

    /// Every SPIFFE ID whose children an agent may hand out: its own, its aliases', and theirs in turn.
    fn parents(&self, root: &str, agent: &AttestedAgent) -> HashSet<String> {
        let aliases = self.children(root).filter(|e| e.applies_to(&agent.selectors)).map(|e| e.spiffe_id.to_string());
        let mut todo: Vec<String> = std::iter::once(agent.id.to_string()).chain(aliases).collect();
        let mut parents = HashSet::new();
        while let Some(parent) = todo.pop() {
            // Only entries that are themselves parents lead further; most lead nowhere.
            let below = self.children(&parent).map(|e| e.spiffe_id.to_string());
            todo.extend(below.filter(|id| self.by_parent.contains_key(id) && !parents.contains(id)));
            parents.insert(parent);
        }
        parents
    }

    fn authorized(&self, root: &str, agent: &AttestedAgent) -> Vec<Arc<Entry>> {
        self.parents(root, agent).iter().flat_map(|parent| self.children(parent)).cloned().collect()
    }
}

#[cfg(test)]
mod tests;
