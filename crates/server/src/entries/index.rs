//! Indexes over registration entries, so that a signature costs the depth of its entry in the tree of parents, not the
//! number of entries.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use countersign_identity::{Entry, EntryId, Selector};
use time::OffsetDateTime;

use super::Update;
use crate::agents::AttestedAgent;

/// Most changes that are remembered; an agent that missed more gets a snapshot.
const LOG_LENGTH: usize = 20_000;

/// A clock that is behind by more was set back.
const CLOCK_STEP: time::Duration = time::Duration::seconds(5);

/// All entries with their indexes.
pub struct Index {
    /// The server's own ID: entries below it are node aliases.
    root: String,
    by_id: BTreeMap<EntryId, Arc<Entry>>,
    by_parent: HashMap<String, BTreeSet<EntryId>>,
    /// By SPIFFE ID, then by parent: leads from an entry up to the agents that may serve it.
    by_spiffe_id: HashMap<String, BTreeMap<String, BTreeSet<EntryId>>>,
    /// Node aliases by one of their selectors: an agent without that selector cannot match the alias.
    aliases: HashMap<Selector, BTreeSet<EntryId>>,
    /// Entries with `admin`, by SPIFFE ID.
    admins: HashMap<String, BTreeSet<EntryId>>,
    /// Entries that expire, by when.
    ends: BTreeMap<OffsetDateTime, BTreeSet<EntryId>>,
    /// What has expired by now counts as if it were not there, and so does what only hangs below it.
    now: OffsetDateTime,
    log: VecDeque<Change>,
    /// Grows by one with each change.
    pub revision: u64,
}

/// An entry's place in the tree: what hangs below its SPIFFE ID hangs below its parent.
#[derive(PartialEq, Eq)]
struct Link {
    spiffe_id: String,
    parent: String,
}

impl Link {
    fn of(entry: &Entry) -> Self {
        Self { spiffe_id: entry.spiffe_id.to_string(), parent: entry.parent_id.to_string() }
    }
}

/// Links that were there in a time that is looked back on, parents by SPIFFE ID.
#[derive(Default)]
struct Past<'a>(HashMap<&'a str, Vec<&'a str>>);

impl<'a> Past<'a> {
    fn of(changes: impl Iterator<Item = &'a Change>) -> Self {
        let mut past = Self::default();
        for link in changes.flat_map(|c| &c.links) {
            past.0.entry(&link.spiffe_id).or_default().push(&link.parent);
        }
        past
    }
}

/// One change of one entry.
struct Change {
    /// The index's revision with it.
    revision: u64,
    /// Which entry.
    id: EntryId,
    /// Where it hangs in the tree, and where it hung before if that was another place.
    links: Vec<Link>,
    /// The change may have moved other entries to or from an agent: an alias, or an entry with children.
    structural: bool,
}

/// The SPIFFE IDs at which an agent's part of the tree starts: its own and its aliases'.
pub struct Starts(HashSet<String>);

impl Index {
    /// An empty index for the server with this ID.
    pub fn new(root: String) -> Self {
        Self {
            root,
            by_id: BTreeMap::new(),
            by_parent: HashMap::new(),
            by_spiffe_id: HashMap::new(),
            aliases: HashMap::new(),
            admins: HashMap::new(),
            ends: BTreeMap::new(),
            now: OffsetDateTime::UNIX_EPOCH,
            log: VecDeque::new(),
            revision: 0,
        }
    }

    /// The entry with this ID; `None` if there is none.
    pub fn get(&self, id: &EntryId) -> Option<&Arc<Entry>> {
        self.by_id.get(id)
    }

    /// All entries after `after`, sorted by ID.
    pub fn iter_after(&self, after: Option<&EntryId>) -> impl Iterator<Item = &Arc<Entry>> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.by_id.range::<EntryId, _>((from, Bound::Unbounded)).map(|(_, entry)| entry)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// An entry that registers the same thing; `None` if there is none.
    pub fn same_as(&self, entry: &Entry) -> Option<&Arc<Entry>> {
        let siblings = self.by_spiffe_id.get(&entry.spiffe_id.to_string())?.get(&entry.parent_id.to_string())?;
        siblings.iter().filter_map(|id| self.by_id.get(id)).find(|e| e.registers_the_same_as(entry))
    }

    /// Whether a SPIFFE ID has an `admin` entry.
    pub fn is_admin(&self, spiffe_id: &str) -> bool {
        self.admins.get(spiffe_id).is_some_and(|ids| ids.iter().any(|id| self.live(id).is_some()))
    }

    /// The first `downstream` entry of a SPIFFE ID; `None` if it has none.
    pub fn downstream(&self, spiffe_id: &str) -> Option<&Arc<Entry>> {
        let ids = self.by_spiffe_id.get(spiffe_id)?.values().flatten();
        ids.filter_map(|id| self.live(id)).find(|e| e.downstream)
    }

    /// An entry that exists and has not expired.
    fn live(&self, id: &EntryId) -> Option<&Arc<Entry>> {
        self.by_id.get(id).filter(|e| !e.is_expired(self.now))
    }

    /// Adds or replaces an entry.
    pub fn insert(&mut self, entry: Arc<Entry>) {
        let mut links = vec![Link::of(&entry)];
        let mut structural = self.is_structural(&entry);
        if let Some(before) = self.by_id.get(&entry.id).cloned() {
            structural |= self.is_structural(&before);
            self.unlink(&before);
            let link = Link::of(&before);
            if !links.contains(&link) {
                links.push(link);
            }
        }
        self.link(&entry);
        self.record(entry.id.clone(), links, structural);
        self.by_id.insert(entry.id.clone(), entry);
    }

    /// Removes an entry, if it exists.
    pub fn remove(&mut self, id: &EntryId) {
        if let Some(before) = self.by_id.remove(id) {
            let structural = self.is_structural(&before);
            self.unlink(&before);
            self.record(id.clone(), vec![Link::of(&before)], structural);
        }
    }

    /// Whether an entry expires between the time of the index and `now`. A caller that looked at the clock before another one
    /// takes nothing back: only a clock that was set back does.
    pub fn is_behind(&self, now: OffsetDateTime) -> bool {
        (self.now <= now || self.now - now > CLOCK_STEP) && self.ends_between(now).next().is_some()
    }

    /// Brings the index to another time, which is a change of each entry that expires on the way. Of time that went backwards
    /// too: the entries are there again.
    pub fn advance(&mut self, now: OffsetDateTime) {
        let changed: Vec<EntryId> = self.ends_between(now).cloned().collect();
        self.now = now;
        if changed.len() > LOG_LENGTH {
            // More than is remembered: each agent gets a snapshot.
            self.log.clear();
            self.revision += 1;
            return;
        }
        for entry in changed {
            let Some(entry) = self.by_id.get(&entry).cloned() else { continue };
            let structural = self.is_structural(&entry);
            self.record(entry.id.clone(), vec![Link::of(&entry)], structural);
        }
    }

    /// At most `most` entries that expired by `until`, those first that expired first.
    pub fn ended_by(&self, until: OffsetDateTime, most: usize) -> Vec<EntryId> {
        self.ends.range(..=until).flat_map(|(_, ids)| ids).take(most).cloned().collect()
    }

    /// An entry expires at its end and not after it.
    fn ends_between(&self, now: OffsetDateTime) -> impl Iterator<Item = &EntryId> {
        let between = (Bound::Excluded(self.now.min(now)), Bound::Included(self.now.max(now)));
        // A range that excludes both its ends must not be empty, and this one is no range where the time stands still.
        let ends = (self.now != now).then(|| self.ends.range(between));
        ends.into_iter().flatten().flat_map(|(_, ids)| ids)
    }

    /// Clears the log of changes after loading, which no agent has seen.
    pub fn clear_log(&mut self) {
        self.log.clear();
    }

    /// What changed since `revision`, the latest first; `None` when that is not remembered.
    fn changes_since(&self, revision: u64) -> Option<impl Iterator<Item = &Change> + Clone> {
        let oldest = self.log.front().map_or(self.revision, |c| c.revision - 1);
        let missed = self.log.len() - self.log.partition_point(|c| c.revision <= revision);
        (oldest..=self.revision).contains(&revision).then(|| self.log.iter().rev().take(missed))
    }

    fn link(&mut self, entry: &Entry) {
        let id = &entry.id;
        let Link { spiffe_id, parent } = Link::of(entry);
        if let Some(selector) = self.alias_key(entry) {
            self.aliases.entry(selector.clone()).or_default().insert(id.clone());
        }
        if entry.admin {
            self.admins.entry(spiffe_id.clone()).or_default().insert(id.clone());
        }
        if let Some(end) = entry.expires_at {
            self.ends.entry(end).or_default().insert(id.clone());
        }
        self.by_parent.entry(parent.clone()).or_default().insert(id.clone());
        self.by_spiffe_id.entry(spiffe_id).or_default().entry(parent).or_default().insert(id.clone());
    }

    fn unlink(&mut self, entry: &Entry) {
        let id = &entry.id;
        let Link { spiffe_id, parent } = Link::of(entry);
        if let Some(selector) = self.alias_key(entry).cloned() {
            take_out(&mut self.aliases, &selector, id);
        }
        if entry.admin {
            take_out(&mut self.admins, &spiffe_id, id);
        }
        if let Some(end) = entry.expires_at
            && let Some(ids) = self.ends.get_mut(&end)
        {
            ids.remove(id);
            if ids.is_empty() {
                self.ends.remove(&end);
            }
        }
        take_out(&mut self.by_parent, &parent, id);
        if let Some(by_parent) = self.by_spiffe_id.get_mut(&spiffe_id) {
            if let Some(ids) = by_parent.get_mut(&parent) {
                ids.remove(id);
                if ids.is_empty() {
                    by_parent.remove(&parent);
                }
            }
            if by_parent.is_empty() {
                self.by_spiffe_id.remove(&spiffe_id);
            }
        }
    }

    fn record(&mut self, id: EntryId, links: Vec<Link>, structural: bool) {
        self.revision += 1;
        self.log.push_back(Change { revision: self.revision, id, links, structural });
        if self.log.len() > LOG_LENGTH {
            self.log.pop_front();
        }
    }

    /// The selector under which an alias is indexed; `None` if the entry is not an alias. Every entry has a selector.
    fn alias_key<'a>(&self, entry: &'a Entry) -> Option<&'a Selector> {
        if entry.parent_id.to_string() == self.root { entry.selectors.last() } else { None }
    }

    /// Whether an entry is a node alias or a parent of other entries.
    fn is_structural(&self, entry: &Entry) -> bool {
        entry.parent_id.to_string() == self.root || self.by_parent.contains_key(&entry.spiffe_id.to_string())
    }

    fn children(&self, parent: &str) -> impl Iterator<Item = &Arc<Entry>> {
        self.by_parent.get(parent).into_iter().flatten().filter_map(|id| self.live(id))
    }

    /// The parents of a SPIFFE ID's entries.
    fn parents(&self, spiffe_id: &str) -> impl Iterator<Item = &str> {
        let by_parent = self.by_spiffe_id.get(spiffe_id).into_iter().flatten();
        by_parent.filter(|(_, ids)| ids.iter().any(|id| self.live(id).is_some())).map(|(parent, _)| parent.as_str())
    }

    /// The SPIFFE IDs at which an agent's part of the tree starts.
    fn starts(&self, agent: &AttestedAgent) -> Starts {
        let aliases = agent.selectors.iter().filter_map(|s| self.aliases.get(s)).flatten();
        let aliases = aliases.filter_map(|id| self.live(id)).filter(|e| e.applies_to(&agent.selectors));
        Starts(std::iter::once(agent.id.to_string()).chain(aliases.map(|e| e.spiffe_id.to_string())).collect())
    }

    /// One entry, if the agent may hand it out.
    pub fn authorized_one(&self, agent: &AttestedAgent, id: &EntryId) -> Option<&Arc<Entry>> {
        let entry = self.live(id)?;
        let is_own = entry.parent_id == agent.id;
        (is_own || self.reaches(&self.starts(agent), &entry.parent_id.to_string())).then_some(entry)
    }

    /// Whether what hangs below `parent` is in the part of the tree that begins there.
    fn reaches(&self, starts: &Starts, parent: &str) -> bool {
        self.has_reached(starts, parent, &Past::default())
    }

    /// Whether it is, or may have been by a link of the past. Looks upwards.
    fn has_reached(&self, starts: &Starts, parent: &str, past: &Past<'_>) -> bool {
        let mut todo = vec![parent];
        let mut seen = HashSet::new();
        while let Some(at) = todo.pop() {
            if starts.0.contains(at) {
                return true;
            }
            // Two entries may be each other's parent, so each ID is visited once.
            if seen.insert(at) {
                todo.extend(self.parents(at));
                todo.extend(past.0.get(at).into_iter().flatten());
            }
        }
        false
    }

    /// What changed for an agent since `revision`, with the revision that this brings it to.
    pub fn since(&self, agent: &AttestedAgent, revision: Option<u64>) -> (u64, Update) {
        let Some(changes) = revision.and_then(|r| self.changes_since(r)) else {
            return (self.revision, Update::Snapshot(self.authorized(agent)));
        };
        if changes.clone().any(|c| c.structural) {
            return (self.revision, Update::Snapshot(self.authorized(agent)));
        }
        let starts = self.starts(agent);
        // Of several changes a later one may have taken away the parent by which the agent had what an earlier one changed.
        // Too many are told to be gone at worst, and only such as were near.
        let past = Past::of(changes.clone());
        let was_its = |link: &Link| self.has_reached(&starts, &link.parent, &past);
        let mut seen = HashSet::new();
        let (mut upserted, mut removed) = (vec![], vec![]);
        for change in changes.filter(|c| c.links.iter().any(was_its)) {
            if !seen.insert(&change.id) {
                continue;
            }
            match self.live(&change.id) {
                Some(e) if self.reaches(&starts, &e.parent_id.to_string()) => upserted.push(e.clone()),
                _ => removed.push(change.id.clone()),
            }
        }
        (self.revision, Update::Delta { upserted, removed })
    }

    /// Everything that an agent may hand out: its own entries, those of its aliases, and what hangs below them.
    pub fn authorized(&self, agent: &AttestedAgent) -> Vec<Arc<Entry>> {
        let mut todo: Vec<String> = self.starts(agent).0.into_iter().collect();
        let (mut parents, mut found) = (HashSet::new(), vec![]);
        while let Some(parent) = todo.pop() {
            if parents.contains(&parent) {
                continue;
            }
            for entry in self.children(&parent) {
                found.push(entry.clone());
                // Only entries that are parents themselves lead further; most do not.
                let id = entry.spiffe_id.to_string();
                if self.by_parent.contains_key(&id) && !parents.contains(&id) {
                    todo.push(id);
                }
            }
            parents.insert(parent);
        }
        found
    }
}

fn take_out<K: std::hash::Hash + Eq>(map: &mut HashMap<K, BTreeSet<EntryId>>, key: &K, id: &EntryId) {
    if let Some(ids) = map.get_mut(key) {
        ids.remove(id);
        if ids.is_empty() {
            map.remove(key);
        }
    }
}
