//! Registration entries in memory, written through to the store, with a log of changes so that work is done only where
//! something changed.
//!
//! One writer at a time: the state that a change is based on is read under the lock, and the store accepts the change
//! only if no other server has changed the same entry since. Time alone changes no entry, only which of them count.

mod index;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock};

use countersign_identity::trust_domain::server_id;
use countersign_identity::{Entry, EntryId, SpiffeId, TrustDomain};
use time::OffsetDateTime;
use tokio::sync::{Mutex, watch};

use crate::agents::AttestedAgent;
use crate::datastore::{DataStore, DataStoreError, Version, Versioned, Written};
use index::Index;

/// Most attempts at a change while other servers write the same entries.
const MAX_TRIES: usize = 16;

/// Most expired entries that are deleted at once: other changes wait meanwhile.
const MOST_PRUNED: usize = 1_000;

/// All entries, in memory and written through to the store.
pub struct Entries {
    store: Arc<dyn DataStore>,
    /// Locked while an entry changes; holds the version of each entry as last read from the store.
    writer: Mutex<HashMap<EntryId, Version>>,
    index: RwLock<Index>,
    revision: watch::Sender<u64>,
}

/// A random ID for a new entry, 128 bits.
pub fn fresh_entry_id() -> EntryId {
    let mut bytes = [0u8; 16];
    // The ID is not secret, only unique; `rand` does not fail on a kernel with randomness.
    rand::fill(&mut bytes);
    hex::encode(bytes).parse().unwrap_or_else(|_| unreachable!("32 hex digits are an entry ID"))
}

/// Changes that an agent has to learn.
#[derive(Debug, PartialEq, Eq)]
pub enum Update {
    /// All entries that the agent is authorized for.
    Snapshot(Vec<Arc<Entry>>),
    /// The changes since the agent's revision.
    Delta {
        /// Entries that are new or changed.
        upserted: Vec<Arc<Entry>>,
        /// IDs of entries that the agent is no longer authorized for.
        removed: Vec<EntryId>,
    },
}

/// Outcome for one entry that was to be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    /// The entry was added.
    New(Entry),
    /// An existing entry registers the same thing; nothing was added.
    Same(Entry),
    /// Another entry has this ID; nothing was added.
    IdTaken(EntryId),
}

/// Why an entry was not updated.
#[derive(Debug)]
pub enum UpdateError<E> {
    /// There is no entry with this ID.
    Unknown,
    /// The change itself was rejected.
    Refused(E),
    /// The store rejected the change, so nothing has changed.
    Store(DataStoreError),
}

impl Entries {
    /// Loads all entries from the store.
    pub async fn load(
        store: Arc<dyn DataStore>,
        td: &TrustDomain,
        now: OffsetDateTime,
    ) -> Result<Self, DataStoreError> {
        let (mut index, mut versions) = (Index::new(server_id(td).to_string()), HashMap::new());
        for Versioned { value, version } in store.entries().await? {
            versions.insert(value.id.clone(), version);
            index.insert(Arc::new(value));
        }
        index.advance(now);
        index.clear_log();
        Ok(Self {
            store,
            writer: Mutex::new(versions),
            revision: watch::Sender::new(index.revision),
            index: RwLock::new(index),
        })
    }

    fn index(&self) -> std::sync::RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index in which what has expired by now does not count.
    fn index_at(&self, now: OffsetDateTime) -> std::sync::RwLockReadGuard<'_, Index> {
        self.expire(now);
        self.index()
    }

    /// Makes a change of each entry that has expired by now, of which agents are notified.
    pub fn expire(&self, now: OffsetDateTime) {
        if self.index().is_behind(now) {
            self.change(|index| {
                // Another one may have been first.
                if index.is_behind(now) {
                    index.advance(now);
                }
            });
        }
    }

    /// Notifies of each change, with the new revision.
    pub fn revisions(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// The entry with this ID; `None` if there is none.
    pub fn get(&self, id: &EntryId) -> Option<Arc<Entry>> {
        self.index().get(id).cloned()
    }

    /// At most `most` entries that `wanted` accepts, sorted by ID, starting after `after`.
    pub fn page(&self, after: Option<&EntryId>, most: usize, wanted: impl Fn(&Entry) -> bool) -> Vec<Arc<Entry>> {
        self.index().iter_after(after).filter(|e| wanted(e)).take(most).cloned().collect()
    }

    /// Number of entries that `wanted` accepts.
    pub fn count(&self, wanted: impl Fn(&Entry) -> bool) -> usize {
        self.index().iter_after(None).filter(|e| wanted(e)).count()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.index().len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether an unexpired `admin` entry exists for this ID.
    pub fn is_admin(&self, id: &SpiffeId, now: OffsetDateTime) -> bool {
        self.index_at(now).is_admin(&id.to_string())
    }

    /// An entry that lets this SPIFFE ID be a server below ours; `None` if there is none.
    pub fn downstream(&self, id: &SpiffeId, now: OffsetDateTime) -> Option<Arc<Entry>> {
        self.index_at(now).downstream(&id.to_string()).cloned()
    }

    /// Adds entries. Existing ones are reported and left unchanged. If the store fails, nothing has changed.
    pub async fn create(&self, entries: Vec<Entry>) -> Result<Vec<Created>, DataStoreError> {
        let mut versions = self.writer.lock().await;
        for _ in 0..MAX_TRIES {
            let (judged, fresh) = self.judge_new(&entries);
            if fresh.is_empty() || self.write(&mut versions, fresh).await? {
                return Ok(judged);
            }
        }
        Err(DataStoreError::Contended("an entry".into()))
    }

    /// Decides what becomes of each entry, and which ones have to be stored.
    fn judge_new(&self, entries: &[Entry]) -> (Vec<Created>, Vec<(Entry, Option<Version>)>) {
        let index = self.index();
        let (mut fresh, mut ids, mut batch) = (vec![], HashSet::new(), HashMap::new());
        let mut judged = Vec::with_capacity(entries.len());
        for entry in entries {
            let registers = (entry.spiffe_id.to_string(), entry.parent_id.to_string(), entry.selectors.clone());
            let same = index.same_as(entry).map(AsRef::as_ref).or_else(|| batch.get(&registers).copied());
            judged.push(if let Some(same) = same {
                Created::Same(same.clone())
            } else if index.get(&entry.id).is_some() || !ids.insert(&entry.id) {
                Created::IdTaken(entry.id.clone())
            } else {
                batch.insert(registers, entry);
                fresh.push((entry.clone(), None));
                Created::New(entry.clone())
            });
        }
        (judged, fresh)
    }

    /// Updates an entry. `change` receives the entry as it is when the change is written, and may be called again.
    pub async fn update<E>(
        &self,
        id: &EntryId,
        change: impl Fn(&Entry) -> Result<Entry, E>,
    ) -> Result<Entry, UpdateError<E>> {
        let mut versions = self.writer.lock().await;
        for _ in 0..MAX_TRIES {
            let before = self.get(id).ok_or(UpdateError::Unknown)?;
            let mut entry = change(&before).map_err(UpdateError::Refused)?;
            entry.revision = before.revision + 1;
            let from = versions.get(id).copied();
            if self.write(&mut versions, vec![(entry.clone(), from)]).await.map_err(UpdateError::Store)? {
                return Ok(entry);
            }
        }
        Err(UpdateError::Store(DataStoreError::Contended(format!("entry `{id}`"))))
    }

    /// Removes this trust domain from `federates_with` of all entries.
    pub async fn dissociate(&self, td: &TrustDomain) -> Result<(), DataStoreError> {
        let mut versions = self.writer.lock().await;
        for _ in 0..MAX_TRIES {
            let linked = self.page(None, usize::MAX, |e| e.federates_with.contains(td));
            let changed = linked.iter().map(|before| {
                let mut entry = Entry::clone(before);
                entry.federates_with.remove(td);
                entry.revision += 1;
                (entry, versions.get(&before.id).copied())
            });
            let changed = changed.collect();
            if self.write(&mut versions, changed).await? {
                return Ok(());
            }
        }
        Err(DataStoreError::Contended("an entry".into()))
    }

    /// Deletes entries; returns which of them existed. If the store fails, nothing has changed.
    pub async fn delete(&self, ids: &[EntryId]) -> Result<Vec<bool>, DataStoreError> {
        let mut versions = self.writer.lock().await;
        self.delete_as(&mut versions, ids).await
    }

    /// Deletes entries that expired by `until`; returns how many. Errors: as [`Entries::delete`].
    pub async fn prune(&self, until: OffsetDateTime) -> Result<usize, DataStoreError> {
        // Locked before looking: one that is being prolonged is not deleted.
        let mut versions = self.writer.lock().await;
        let ended = self.index().ended_by(until, MOST_PRUNED);
        if !ended.is_empty() {
            self.delete_as(&mut versions, &ended).await?;
            ended.iter().for_each(|id| tracing::info!(entry = id.as_str(), "entry deleted: it expired long ago"));
        }
        Ok(ended.len())
    }

    async fn delete_as(
        &self,
        versions: &mut HashMap<EntryId, Version>,
        ids: &[EntryId],
    ) -> Result<Vec<bool>, DataStoreError> {
        self.store.delete_entries(ids).await?;
        Ok(self.change(|index| {
            let was = |id| {
                let was = index.get(id).is_some();
                index.remove(id);
                versions.remove(id);
                was
            };
            ids.iter().map(was).collect()
        }))
    }

    /// Stores entries, each over the version it was based on. `false` if another server was first; what that server
    /// wrote has been read then.
    async fn write(
        &self,
        versions: &mut HashMap<EntryId, Version>,
        entries: Vec<(Entry, Option<Version>)>,
    ) -> Result<bool, DataStoreError> {
        if let Written::Stored(version) = self.store.put_entries(&entries).await? {
            versions.extend(entries.iter().map(|(e, _)| (e.id.clone(), version)));
            self.change(|index| entries.into_iter().for_each(|(e, _)| index.insert(Arc::new(e))));
            return Ok(true);
        }
        for (entry, from) in entries {
            match self.store.entry(&entry.id).await? {
                Some(now) if Some(now.version) == from => {}
                Some(Versioned { value, version }) => {
                    versions.insert(entry.id, version);
                    self.change(|index| index.insert(Arc::new(value)));
                }
                None => {
                    versions.remove(&entry.id);
                    self.change(|index| index.remove(&entry.id));
                }
            }
        }
        Ok(false)
    }

    fn change<R>(&self, change: impl FnOnce(&mut Index) -> R) -> R {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        let done = change(&mut index);
        let revision = index.revision;
        drop(index);
        // Of two that change it at once the later may be here first.
        self.revision.send_if_modified(|told| std::mem::replace(told, revision.max(*told)) < revision);
        done
    }

    /// All entries that an agent may serve now: its own, those of its aliases, and everything below them. An expired entry is
    /// none of them, and leads to none.
    pub fn authorized(&self, agent: &AttestedAgent, now: OffsetDateTime) -> Vec<Arc<Entry>> {
        self.index_at(now).authorized(agent)
    }

    /// One entry, if the agent may serve it now.
    pub fn authorized_one(&self, agent: &AttestedAgent, id: &EntryId, now: OffsetDateTime) -> Option<Arc<Entry>> {
        self.index_at(now).authorized_one(agent, id).cloned()
    }

    /// What changed for an agent since `revision`, with the current revision. A snapshot if `revision` is too old or
    /// unknown.
    pub fn since(&self, agent: &AttestedAgent, revision: Option<u64>, now: OffsetDateTime) -> (u64, Update) {
        self.index_at(now).since(agent, revision)
    }
}

#[cfg(test)]
mod tests;
