//! Attested nodes: their identity, the SVID that each of them holds, and bans.
//!
//! An agent's record changes through [`Agents::update`] only: one writer at a time here, and compare-and-set in the
//! store, so that a concurrent renewal never overwrites a ban or an eviction, whichever server made it.

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

/// Most attempts at a change while other servers write the same record.
const MAX_TRIES: usize = 16;

/// Why an agent's SVID is not accepted (SPIRE API, types.PermissionDeniedDetails).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// The agent's SVID has expired.
    Expired,
    /// The agent is unknown: evicted, or never attested here.
    NotAttested,
    /// The agent uses an SVID that was replaced.
    NotActive,
    /// The agent, or the evidence that it attested with, is banned.
    Banned,
}

/// Why an agent's record was not changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The agent may not act any more.
    #[error("agent denied: {0:?}")]
    Denied(Denied),
    /// The agent attested with single-use evidence and has to be evicted first.
    #[error("it was attested with evidence that works once; evict it first")]
    AttestedOnce,
    /// The store rejected the change, so nothing has changed.
    #[error(transparent)]
    Store(#[from] DataStoreError),
}

/// The new SVID of an agent.
#[derive(Debug, Clone)]
pub struct Renewal {
    /// Serial of the SVID that requested the renewal. It remains valid while the response is in transit, or if that is
    /// lost.
    pub in_use: String,
    /// Serial of the new SVID, lower-case hex.
    pub serial: String,
    /// When the new SVID expires.
    pub expires_at: OffsetDateTime,
}

/// All attested agents, in memory and written through to the store.
pub struct Agents {
    store: Arc<dyn DataStore>,
    /// Locked while a record changes; holds the version of each record as last read from the store.
    writer: Mutex<HashMap<String, Version>>,
    known: RwLock<Known>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Known {
    by_id: BTreeMap<String, Arc<AttestedAgent>>,
    /// Evidence of banned agents, with the number of banned agents that have it.
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

    /// Whether the agent is banned, under this ID or by its evidence under another ID.
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
    /// Loads all agents from the store.
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

    /// The agent with this ID; `None` if it is unknown.
    pub fn get(&self, id: &SpiffeId) -> Option<Arc<AttestedAgent>> {
        self.known().by_id.get(&id.to_string()).cloned()
    }

    /// All agents, sorted by ID.
    pub fn list(&self) -> Vec<Arc<AttestedAgent>> {
        self.known().by_id.values().cloned().collect()
    }

    /// Number of attested agents.
    pub fn len(&self) -> usize {
        self.known().by_id.len()
    }

    /// Whether no agent is attested.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// An agent that is known and not banned, whatever SVID it uses.
    pub fn standing(&self, id: &SpiffeId) -> Result<Arc<AttestedAgent>, Denied> {
        let known = self.known();
        let agent = known.by_id.get(&id.to_string()).ok_or(Denied::NotAttested)?;
        if known.is_banned(agent) { Err(Denied::Banned) } else { Ok(agent.clone()) }
    }

    /// Checks whether an agent may act now with this SVID: its serial and end. Errors: see [`Denied`].
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
            // The previous SVID counts too: the agent still uses it until the renewal's response has arrived.
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

    /// Stores a node that has just attested.
    pub async fn attested(&self, agent: AttestedAgent) -> Result<(), ChangeError> {
        self.update(&agent.id, |known| judge_attestation(known).map(|()| agent.clone())).await.map(drop)
    }

    /// Records an agent's new SVID. Rejected if the agent was banned or evicted, or its SVID replaced, since it was
    /// admitted.
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

    /// Removes an agent; returns whether it existed.
    pub async fn evict(&self, id: &SpiffeId) -> Result<bool, DataStoreError> {
        let mut versions = self.writer.lock().await;
        self.store.delete_agent(id).await?;
        versions.remove(&id.to_string());
        let was = self.write(|known| known.remove(&id.to_string())).is_some();
        self.changed.send_modify(|n| *n += 1);
        Ok(was)
    }

    /// The only way to change a record. `change` receives the record as it is when it is written, and may be called
    /// again: if another server has written in between, it receives what that server wrote.
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
                // Another server has banned this agent, or the same node under another name.
                Written::Banned => {
                    self.learn(id, &mut versions).await?;
                    return Err(ChangeError::Denied(Denied::Banned));
                }
                Written::Stale => self.learn(id, &mut versions).await?,
            }
        }
        Err(DataStoreError::Contended(format!("agent `{id}`")).into())
    }

    /// Reads the record that another server has written.
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

/// A banned agent may not attest again, nor may one whose evidence was for single use.
fn judge_attestation(known: Option<&AttestedAgent>) -> Result<(), ChangeError> {
    match known {
        Some(agent) if agent.banned => Err(ChangeError::Denied(Denied::Banned)),
        Some(agent) if !agent.can_reattest => Err(ChangeError::AttestedOnce),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
