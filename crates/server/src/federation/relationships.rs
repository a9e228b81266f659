//! All relationships, in memory and written through to the store.

use std::collections::BTreeMap;
use std::sync::Arc;

use countersign_identity::{TrustBundle, TrustDomain};
use tokio::sync::{Mutex, watch};

use super::bundles::{Expect, FederatedBundles, SetError};
use super::relationship::Relationship;
use crate::datastore::{DataStore, DataStoreError, Version, Versioned, Written};

/// Most relationships: each has a task of its own.
pub const MAX_RELATIONSHIPS: usize = 1_000;
/// Most attempts at a change while other servers write the same relationship or bundle.
const MAX_TRIES: usize = 16;

/// All relationships by name of their trust domain.
pub type RelationshipMap = BTreeMap<String, Arc<Relationship>>;

/// The relationships of one server.
pub struct Relationships {
    own: TrustDomain,
    store: Arc<dyn DataStore>,
    /// Locked while a relationship changes, before the bundles if both are; holds the version of each as last read from the store.
    writer: Mutex<BTreeMap<String, Version>>,
    current: watch::Sender<Arc<RelationshipMap>>,
}

/// Why a relationship was not changed. Nothing was, its bundle included.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// There is one with this trust domain.
    #[error("there is a federation relationship with `{0}`")]
    Exists(TrustDomain),
    /// There is none with this trust domain.
    #[error("there is no federation relationship with `{0}`")]
    Unknown(TrustDomain),
    /// With ourselves.
    #[error("`{0}` is this server's own trust domain, which it does not federate with")]
    Own(TrustDomain),
    /// There are as many as can be followed.
    #[error("there are {MAX_RELATIONSHIPS} federation relationships, which is the most; delete some first")]
    TooMany,
    /// The bundle that comes with it cannot be set.
    #[error(transparent)]
    Bundle(#[from] SetError),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] DataStoreError),
}

/// A relationship, and the bundle to be set with it.
pub type WithBundle = (Relationship, Option<TrustBundle>);

impl Relationships {
    /// Loads all relationships from the store.
    pub async fn load(store: Arc<dyn DataStore>, own: &TrustDomain) -> Result<Self, DataStoreError> {
        let (mut map, mut versions) = (RelationshipMap::new(), BTreeMap::new());
        for Versioned { value, version } in store.relationships().await? {
            versions.insert(value.trust_domain.to_string(), version);
            map.insert(value.trust_domain.to_string(), Arc::new(value));
        }
        let current = watch::Sender::new(Arc::new(map));
        Ok(Self { own: own.clone(), store, writer: Mutex::new(versions), current })
    }

    /// All relationships, with notification of each change.
    pub fn watch(&self) -> watch::Receiver<Arc<RelationshipMap>> {
        self.current.subscribe()
    }

    /// All relationships at this moment.
    pub fn all(&self) -> Arc<RelationshipMap> {
        self.current.borrow().clone()
    }

    /// The relationship with this trust domain; `None` if there is none.
    pub fn get(&self, trust_domain: &TrustDomain) -> Option<Arc<Relationship>> {
        self.current.borrow().get(trust_domain.as_str()).cloned()
    }

    /// Adds a relationship, and sets its bundle if one is given: both or neither.
    pub async fn create(
        &self,
        (relationship, bundle): WithBundle,
        bundles: &FederatedBundles,
    ) -> Result<Arc<Relationship>, ChangeError> {
        let td = relationship.trust_domain.clone();
        if td == self.own {
            return Err(ChangeError::Own(td));
        }
        let mut versions = self.writer.lock().await;
        for _ in 0..MAX_TRIES {
            if self.get(&td).is_some() {
                return Err(ChangeError::Exists(td));
            }
            if self.all().len() >= MAX_RELATIONSHIPS {
                return Err(ChangeError::TooMany);
            }
            if let Some(stored) = self.write(&mut versions, (&relationship, bundle.clone()), bundles).await? {
                return Ok(stored);
            }
        }
        Err(contended(&td).into())
    }

    /// Changes a relationship, and sets its bundle if one is given: both or neither. `change` is given the relationship as it is
    /// when the change is written, and may be called again.
    pub async fn update(
        &self,
        trust_domain: &TrustDomain,
        bundles: &FederatedBundles,
        change: impl Fn(&Relationship) -> WithBundle,
    ) -> Result<Arc<Relationship>, ChangeError> {
        let mut versions = self.writer.lock().await;
        for _ in 0..MAX_TRIES {
            let before = self.get(trust_domain).ok_or_else(|| ChangeError::Unknown(trust_domain.clone()))?;
            let (relationship, bundle) = change(&before);
            if let Some(stored) = self.write(&mut versions, (&relationship, bundle), bundles).await? {
                return Ok(stored);
            }
        }
        Err(contended(trust_domain).into())
    }

    /// Deletes one; whether it was there. Its bundle stays (SPIRE): entries federate with it until it is deleted too.
    pub async fn delete(&self, trust_domain: &TrustDomain) -> Result<bool, DataStoreError> {
        let mut versions = self.writer.lock().await;
        self.store.delete_relationship(trust_domain).await?;
        versions.remove(trust_domain.as_str());
        Ok(self.change(|map| map.remove(trust_domain.as_str()).is_some()))
    }

    /// Stores a relationship over the version it was based on. `None` if another server was first; what that server wrote has been
    /// read then.
    async fn write(
        &self,
        versions: &mut BTreeMap<String, Version>,
        (relationship, bundle): (&Relationship, Option<TrustBundle>),
        bundles: &FederatedBundles,
    ) -> Result<Option<Arc<Relationship>>, ChangeError> {
        let name = relationship.trust_domain.to_string();
        let mut changing = match bundle {
            Some(bundle) => Some(bundles.change(bundle, Expect::Any).await?),
            None => None,
        };
        let with = changing.as_ref().map(|c| (c.bundle(), c.from()));
        let written = self.store.put_relationship(relationship, versions.get(&name).copied(), with).await?;
        let Written::Stored(version) = written else {
            if let Some(changing) = &mut changing {
                changing.overtaken().await?;
            }
            self.reload(versions, &name).await?;
            return Ok(None);
        };
        if let Some(changing) = changing {
            changing.stored(version);
        }
        versions.insert(name.clone(), version);
        let stored = Arc::new(relationship.clone());
        self.change(|map| map.insert(name, stored.clone()));
        Ok(Some(stored))
    }

    /// Takes up what another server wrote.
    async fn reload(&self, versions: &mut BTreeMap<String, Version>, name: &str) -> Result<(), DataStoreError> {
        let now = self.store.relationships().await?.into_iter().find(|r| r.value.trust_domain.as_str() == name);
        let Some(Versioned { value, version }) = now else {
            versions.remove(name);
            self.change(|map| map.remove(name));
            return Ok(());
        };
        versions.insert(name.to_owned(), version);
        self.change(|map| map.insert(name.to_owned(), Arc::new(value)));
        Ok(())
    }

    fn change<R>(&self, change: impl FnOnce(&mut RelationshipMap) -> R) -> R {
        let mut done = None;
        self.current.send_modify(|map| done = Some(change(Arc::make_mut(map))));
        done.unwrap_or_else(|| unreachable!("send_modify calls what it is given"))
    }
}

fn contended(trust_domain: &TrustDomain) -> DataStoreError {
    DataStoreError::Contended(format!("the federation relationship with `{trust_domain}`"))
}
