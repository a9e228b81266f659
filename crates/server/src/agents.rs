//! Attested nodes: who they are, which SVID they hold, who is banned.
//!
//! An agent's record is changed by [`Agents::update`] alone: one writer at a time here, and compare-and-set in the store, so
//! that no renewal under way writes a ban or an eviction back, whichever server wrote it.

mod record;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use countersign_identity::SpiffeId;
use countersign_identity::selector::SelectorSet;
use time::OffsetDateTime;
use tokio::sync::{Mutex, watch};

use crate::datastore::{DataStore, DataStoreError, Version, Versioned, Written};
use crate::node_attestor::{AttestedNode, EvidenceKey, is_same_node};

pub use record::AttestedAgent;

/// How often a change is tried anew when other servers write the same record.
const MAX_TRIES: usize = 16;

/// Why an agent's SVID does not open the door (SPIRE API, types.PermissionDeniedDetails).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// Its SVID is over.
    Expired,
    /// We don't know it: evicted, or never attested here.
    NotAttested,
    /// It uses an SVID that was replaced.
    NotActive,
    /// Banned.
    Banned,
}

/// Why an agent's record was not changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The agent may not act any more.
    #[error("agent denied: {0:?}")]
    Denied(Denied),
    /// It attested with evidence that works once.
    #[error("it was attested with evidence that works once; evict it first")]
    AttestedOnce,
    /// The store refused. Nothing has changed.
    #[error(transparent)]
    Store(#[from] DataStoreError),
}

/// What an agent's SVID is replaced by.
#[derive(Debug, Clone)]
pub struct Renewal {
    /// Serial of the SVID that asked; it works on while the answer travels, and if the answer is lost.
    pub in_use: String,
    /// Serial of the new one, lower-case hex.
    pub serial: String,
    /// End of the new one.
    pub expires_at: OffsetDateTime,
}

/// All attested agents, in memory, written through to the store.
pub struct Agents {
    store: Arc<dyn DataStore>,
    /// Held by the one who changes records; the states in which the store was last seen.
    writer: Mutex<HashMap<String, Version>>,
    known: RwLock<Known>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Known {
    by_id: BTreeMap<String, Arc<AttestedAgent>>,
    /// Evidence of banned agents, and how many of them have it.
    banned: HashMap<EvidenceKey, usize>,
    /// Agents that were banned without evidence: they attested before it was kept.
    unnamed: BTreeSet<String>,
}

impl Known {
    fn insert(&mut self, agent: AttestedAgent) {
        self.remove(&agent.id.to_string());
        if let (true, Some(evidence)) = (agent.banned, &agent.evidence) {
            *self.banned.entry(evidence.clone()).or_default() += 1;
        }
        if agent.banned && agent.lacks_evidence() {
            self.unnamed.insert(agent.id.to_string());
        }
        self.by_id.insert(agent.id.to_string(), Arc::new(agent));
    }

    fn remove(&mut self, id: &str) -> Option<Arc<AttestedAgent>> {
        let was = self.by_id.remove(id)?;
        self.unnamed.remove(id);
        if let (true, Some(evidence)) = (was.banned, &was.evidence)
            && let Some(count) = self.banned.get_mut(evidence)
        {
            *count -= 1;
            if *count == 0 {
                self.banned.remove(evidence);
            }
        }
        Some(was)
    }

    /// Whether it is banned, under this ID or by its evidence under another.
    fn is_banned(&self, agent: &AttestedAgent) -> bool {
        agent.banned || self.bans(agent.evidence.as_ref(), &agent.selectors)
    }

    /// Whether a banned agent has this evidence, or showed the same certificate when none was kept yet.
    fn bans(&self, evidence: Option<&EvidenceKey>, selectors: &SelectorSet) -> bool {
        evidence.is_some_and(|e| self.banned.contains_key(e))
            || self.unnamed.iter().filter_map(|id| self.by_id.get(id)).any(|a| is_same_node(&a.selectors, selectors))
    }
}

impl Agents {
    /// Takes up what the store holds.
    pub async fn load(store: Arc<dyn DataStore>) -> Result<Self, DataStoreError> {
        let (mut known, mut versions) = (Known::default(), HashMap::new());
        for Versioned { value, version } in store.agents().await? {
            versions.insert(value.id.to_string(), version);
            known.insert(value);
        }
        Ok(Self { store, writer: Mutex::new(versions), known: RwLock::new(known), changed: watch::Sender::new(0) })
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ticks whenever an agent is banned or evicted, here or at another server.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// One agent.
    pub fn get(&self, id: &SpiffeId) -> Option<Arc<AttestedAgent>> {
        self.known().by_id.get(&id.to_string()).cloned()
    }

    /// All agents, by ID.
    pub fn list(&self) -> Vec<Arc<AttestedAgent>> {
        self.known().by_id.values().cloned().collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.known().by_id.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// An agent that is known and not banned, whatever SVID it uses.
    pub fn standing(&self, id: &SpiffeId) -> Result<Arc<AttestedAgent>, Denied> {
        let known = self.known();
        let agent = known.by_id.get(&id.to_string()).ok_or(Denied::NotAttested)?;
        if known.is_banned(agent) { Err(Denied::Banned) } else { Ok(agent.clone()) }
    }

    /// Whether an agent with this SVID may act now.
    pub fn admit(
        &self,
        id: &SpiffeId,
        serial: &str,
        not_after: OffsetDateTime,
        now: OffsetDateTime,
    ) -> Result<Arc<AttestedAgent>, Denied> {
        let agent = self.standing(id)?;
        match () {
            () if not_after <= now => Err(Denied::Expired),
            () if agent.serial != serial && agent.previous_serial != serial => Err(Denied::NotActive),
            () => Ok(agent),
        }
    }

    /// Whether a node may attest itself.
    pub fn may_attest(&self, node: &AttestedNode) -> Result<(), ChangeError> {
        let known = self.known();
        if known.bans(node.evidence.as_ref(), &node.selectors) {
            return Err(ChangeError::Denied(Denied::Banned));
        }
        judge_attestation(known.by_id.get(&node.id.to_string()).map(AsRef::as_ref))
    }

    /// Takes up a node that has just attested itself.
    pub async fn attested(&self, agent: AttestedAgent) -> Result<(), ChangeError> {
        self.update(&agent.id, |known| judge_attestation(known).map(|()| agent.clone())).await.map(drop)
    }

    /// Notes an agent's new SVID. Refused when it was banned or evicted, or its SVID replaced, since it was admitted.
    pub async fn renewed(&self, id: &SpiffeId, renewal: &Renewal) -> Result<(), ChangeError> {
        let change = |known: Option<&AttestedAgent>| {
            let agent = known.ok_or(ChangeError::Denied(Denied::NotAttested))?;
            if agent.banned {
                return Err(ChangeError::Denied(Denied::Banned));
            }
            // Without evidence a ban could be dodged: it has to show it once more.
            if agent.lacks_evidence() {
                return Err(ChangeError::Denied(Denied::NotActive));
            }
            if agent.serial != renewal.in_use && agent.previous_serial != renewal.in_use {
                return Err(ChangeError::Denied(Denied::NotActive));
            }
            let (previous_serial, serial) = (renewal.in_use.clone(), renewal.serial.clone());
            Ok(AttestedAgent { previous_serial, serial, expires_at: renewal.expires_at, ..agent.clone() })
        };
        self.update(id, change).await.map(drop)
    }

    /// Bans an agent, and with it the evidence that it attested with.
    pub async fn ban(&self, id: &SpiffeId) -> Result<(), ChangeError> {
        let change = |known: Option<&AttestedAgent>| {
            let agent = known.ok_or(ChangeError::Denied(Denied::NotAttested))?;
            Ok(AttestedAgent { banned: true, ..agent.clone() })
        };
        self.update(id, change).await?;
        self.changed.send_modify(|n| *n += 1);
        Ok(())
    }

    /// Forgets an agent; whether it was there.
    pub async fn evict(&self, id: &SpiffeId) -> Result<bool, DataStoreError> {
        let mut versions = self.writer.lock().await;
        self.store.delete_agent(id).await?;
        versions.remove(&id.to_string());
        let was = self.write(|known| known.remove(&id.to_string())).is_some();
        self.changed.send_modify(|n| *n += 1);
        Ok(was)
    }

    /// The one way to change a record. `change` sees the record as it is when it is written and may be asked again: should
    /// another server have written in between, it looks at what that one wrote.
    async fn update(
        &self,
        id: &SpiffeId,
        change: impl Fn(Option<&AttestedAgent>) -> Result<AttestedAgent, ChangeError> + Send + Sync,
    ) -> Result<(), ChangeError> {
        let name = id.to_string();
        let mut versions = self.writer.lock().await;
        for _ in 0..MAX_TRIES {
            let next = change(self.get(id).as_deref())?;
            if !next.banned && self.known().is_banned(&next) {
                return Err(ChangeError::Denied(Denied::Banned));
            }
            match self.store.put_agent(&next, versions.get(&name).copied()).await? {
                Written::Stored(version) => {
                    versions.insert(name, version);
                    self.write(|known| known.insert(next));
                    return Ok(());
                }
                // A ban that another server has written, of this agent or of the same node under another name.
                Written::Banned => {
                    self.learn(id, &mut versions).await?;
                    return Err(ChangeError::Denied(Denied::Banned));
                }
                Written::Stale => self.learn(id, &mut versions).await?,
            }
        }
        Err(DataStoreError::Contended(format!("agent `{id}`")).into())
    }

    /// Takes up what another server has written of an agent.
    async fn learn(&self, id: &SpiffeId, versions: &mut HashMap<String, Version>) -> Result<(), DataStoreError> {
        let name = id.to_string();
        if let Some(Versioned { value, version }) = self.store.agent(id).await? {
            versions.insert(name, version);
            self.write(|known| known.insert(value));
        } else {
            versions.remove(&name);
            self.write(|known| known.remove(&name));
        }
        // Its streams end, should it have been banned or evicted there.
        self.changed.send_modify(|n| *n += 1);
        Ok(())
    }

    fn write<R>(&self, change: impl FnOnce(&mut Known) -> R) -> R {
        change(&mut self.known.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A banned agent does not attest again, nor does one whose evidence works once.
fn judge_attestation(known: Option<&AttestedAgent>) -> Result<(), ChangeError> {
    match known {
        Some(agent) if agent.banned => Err(ChangeError::Denied(Denied::Banned)),
        Some(agent) if !agent.can_reattest => Err(ChangeError::AttestedOnce),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
