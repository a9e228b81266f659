//! Attested nodes: who they are, which SVID they hold, who is banned.

use std::collections::HashMap;
use std::sync::{Arc, RwLock};

use countersign_identity::SpiffeId;
use countersign_identity::selector::SelectorSet;
use countersign_identity::trust_domain::parse_workload_id;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::datastore::{DataStore, DataStoreError};

/// An attested agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct AttestedAgent {
    /// Its identity.
    pub id: SpiffeId,
    /// Which attestor passed it.
    pub attestation_type: String,
    /// What the attestor found.
    pub selectors: SelectorSet,
    /// Serial of its SVID, lower-case hex.
    pub serial: String,
    /// Serial of the SVID before; it may still be in use while the new one travels.
    pub previous_serial: String,
    /// End of its SVID.
    pub expires_at: OffsetDateTime,
    /// Refused until it is evicted.
    pub banned: bool,
    /// May attest itself again with the same evidence.
    pub can_reattest: bool,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    id: String,
    attestation_type: String,
    selectors: Vec<String>,
    serial: String,
    previous_serial: String,
    expires_at: i64,
    banned: bool,
    can_reattest: bool,
}

impl TryFrom<Stored> for AttestedAgent {
    type Error = String;

    fn try_from(s: Stored) -> Result<Self, String> {
        Ok(Self {
            id: parse_workload_id(&s.id).map_err(|e| e.to_string())?,
            attestation_type: s.attestation_type,
            selectors: s.selectors.iter().map(|s| s.parse()).collect::<Result<_, _>>().map_err(|e| format!("{e}"))?,
            serial: s.serial,
            previous_serial: s.previous_serial,
            expires_at: OffsetDateTime::from_unix_timestamp(s.expires_at).map_err(|e| e.to_string())?,
            banned: s.banned,
            can_reattest: s.can_reattest,
        })
    }
}

impl From<AttestedAgent> for Stored {
    fn from(a: AttestedAgent) -> Self {
        Self {
            id: a.id.to_string(),
            attestation_type: a.attestation_type,
            selectors: a.selectors.iter().map(ToString::to_string).collect(),
            serial: a.serial,
            previous_serial: a.previous_serial,
            expires_at: a.expires_at.unix_timestamp(),
            banned: a.banned,
            can_reattest: a.can_reattest,
        }
    }
}

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

/// All attested agents, in memory, written through to the store.
pub struct Agents {
    store: Arc<dyn DataStore>,
    by_id: RwLock<HashMap<String, Arc<AttestedAgent>>>,
    changed: watch::Sender<u64>,
}

impl Agents {
    /// Takes up what the store holds.
    pub async fn load(store: Arc<dyn DataStore>) -> Result<Self, DataStoreError> {
        let by_id = store.agents().await?.into_iter().map(|a| (a.id.to_string(), Arc::new(a))).collect();
        Ok(Self { store, by_id: RwLock::new(by_id), changed: watch::Sender::new(0) })
    }

    fn map(&self) -> std::sync::RwLockReadGuard<'_, HashMap<String, Arc<AttestedAgent>>> {
        self.by_id.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Ticks whenever an agent is banned or evicted.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// One agent.
    pub fn get(&self, id: &SpiffeId) -> Option<Arc<AttestedAgent>> {
        self.map().get(&id.to_string()).cloned()
    }

    /// All agents, by ID.
    pub fn list(&self) -> Vec<Arc<AttestedAgent>> {
        let mut all: Vec<_> = self.map().values().cloned().collect();
        all.sort_by_key(|a| a.id.to_string());
        all
    }

    /// Whether an agent with this SVID may act now.
    pub fn admit(
        &self,
        id: &SpiffeId,
        serial: &str,
        not_after: OffsetDateTime,
        now: OffsetDateTime,
    ) -> Result<Arc<AttestedAgent>, Denied> {
        let agent = self.get(id).ok_or(Denied::NotAttested)?;
        match () {
            () if agent.banned => Err(Denied::Banned),
            () if not_after <= now => Err(Denied::Expired),
            () if agent.serial != serial && agent.previous_serial != serial => Err(Denied::NotActive),
            () => Ok(agent),
        }
    }

    /// Adds or replaces an agent.
    pub async fn put(&self, agent: AttestedAgent) -> Result<(), DataStoreError> {
        self.store.put_agent(&agent).await?;
        let changed = agent.banned;
        self.by_id
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .insert(agent.id.to_string(), Arc::new(agent));
        if changed {
            self.changed.send_modify(|n| *n += 1);
        }
        Ok(())
    }

    /// Forgets an agent; whether it was there.
    pub async fn remove(&self, id: &SpiffeId) -> Result<bool, DataStoreError> {
        self.store.delete_agent(id).await?;
        let was =
            self.by_id.write().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&id.to_string()).is_some();
        self.changed.send_modify(|n| *n += 1);
        Ok(was)
    }
}
