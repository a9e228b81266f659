//! Bundles of foreign trust domains, in memory and written through to the store.

use std::collections::BTreeMap;
use std::sync::Arc;

use countersign_identity::{TrustBundle, TrustDomain};
use tokio::sync::{Mutex, MutexGuard, watch};

use crate::datastore::{DataStore, DataStoreError, Version, Versioned, Written};

/// All foreign bundles by name of their trust domain.
pub type BundleMap = BTreeMap<String, Arc<TrustBundle>>;

/// The foreign bundles of one server.
pub struct FederatedBundles {
    /// Whose bundle is never touched here: it belongs to the authorities.
    own: TrustDomain,
    store: Arc<dyn DataStore>,
    /// Locked while a bundle changes; holds the version of each bundle as last read from the store.
    writer: Mutex<BTreeMap<String, Version>>,
    bundles: watch::Sender<Arc<BundleMap>>,
}

/// Which bundles may be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Only for a trust domain without a bundle.
    New,
    /// Only for a trust domain that has a bundle.
    Known,
    /// For any trust domain.
    Any,
}

/// Why a bundle was not set or removed.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// The trust domain already has a bundle.
    #[error("a bundle of `{0}` is here")]
    Exists(TrustDomain),
    /// The trust domain has no bundle.
    #[error("no bundle of `{0}` is here")]
    Unknown(TrustDomain),
    /// Our own bundle belongs to the authorities.
    #[error("`{0}` is this server's own trust domain; its bundle follows its authorities")]
    Own(TrustDomain),
    /// The store refused. Nothing has changed.
    #[error(transparent)]
    Store(#[from] DataStoreError),
}

impl FederatedBundles {
    /// Loads all bundles from the store, except our own.
    pub async fn load(store: Arc<dyn DataStore>, own: &TrustDomain) -> Result<Self, DataStoreError> {
        let (mut map, mut versions) = (BundleMap::new(), BTreeMap::new());
        for Versioned { value, version } in store.bundles().await? {
            if value.trust_domain != *own {
                versions.insert(value.trust_domain.to_string(), version);
                map.insert(value.trust_domain.to_string(), Arc::new(value));
            }
        }
        Ok(Self { own: own.clone(), store, writer: Mutex::new(versions), bundles: watch::Sender::new(Arc::new(map)) })
    }

    /// All foreign bundles, with notification of each change.
    pub fn watch(&self) -> watch::Receiver<Arc<BundleMap>> {
        self.bundles.subscribe()
    }

    /// All foreign bundles at this moment.
    pub fn all(&self) -> Arc<BundleMap> {
        self.bundles.borrow().clone()
    }

    /// The bundle of this trust domain; `None` if there is none.
    pub fn get(&self, trust_domain: &str) -> Option<Arc<TrustBundle>> {
        self.bundles.borrow().get(trust_domain).cloned()
    }

    /// Adds or replaces a bundle. Without a sequence number it gets the next one. An empty bundle is rejected.
    pub async fn set(&self, bundle: TrustBundle, expect: Expect) -> Result<Arc<TrustBundle>, SetError> {
        self.change(bundle, expect).await?.store().await
    }

    /// Replaces `before` by a bundle that was fetched meanwhile. `None`, and nothing is changed, if somebody else has changed it
    /// since: what was fetched may be older than that.
    pub async fn refresh(
        &self,
        bundle: TrustBundle,
        before: Option<&Arc<TrustBundle>>,
    ) -> Result<Option<Arc<TrustBundle>>, SetError> {
        let changing = self.change(bundle, Expect::Any).await?;
        let same = match (&changing.known, before) {
            (Some(known), Some(before)) => Arc::ptr_eq(known, before),
            (known, before) => known.is_none() && before.is_none(),
        };
        if same { changing.store().await.map(Some) } else { Ok(None) }
    }

    /// Begins a change, and keeps others from the bundles until it ends. An empty bundle is rejected.
    pub async fn change(&self, mut bundle: TrustBundle, expect: Expect) -> Result<Changing<'_>, SetError> {
        self.refuse_own(&bundle.trust_domain)?;
        if bundle.is_empty() {
            return Err(DataStoreError::EmptyBundle(bundle.trust_domain).into());
        }
        let versions = self.writer.lock().await;
        let known = self.get(bundle.trust_domain.as_str());
        match (expect, &known) {
            (Expect::New, Some(_)) => return Err(SetError::Exists(bundle.trust_domain)),
            (Expect::Known, None) => return Err(SetError::Unknown(bundle.trust_domain)),
            _ => {}
        }
        if bundle.sequence == 0 {
            bundle.sequence = known.as_ref().map_or(1, |b| b.sequence.wrapping_add(1).max(1));
        }
        Ok(Changing { bundles: self, versions, known, bundle })
    }

    /// Deletes one; whether it was there.
    pub async fn remove(&self, trust_domain: &TrustDomain) -> Result<bool, SetError> {
        self.refuse_own(trust_domain)?;
        let name = trust_domain.as_str();
        let mut versions = self.writer.lock().await;
        self.store.delete_bundle(name).await?;
        versions.remove(name);
        let mut was = false;
        self.bundles.send_modify(|map| was = Arc::make_mut(map).remove(name).is_some());
        Ok(was)
    }

    /// Refuses our own trust domain.
    pub fn refuse_own(&self, trust_domain: &TrustDomain) -> Result<(), SetError> {
        if *trust_domain == self.own { Err(SetError::Own(trust_domain.clone())) } else { Ok(()) }
    }

    /// Takes up what another server wrote.
    async fn reload(&self, versions: &mut BTreeMap<String, Version>, name: &str) -> Result<(), DataStoreError> {
        let now = self.store.bundles().await?.into_iter().find(|b| b.value.trust_domain.as_str() == name);
        let Some(Versioned { value, version }) = now else {
            versions.remove(name);
            self.bundles.send_modify(|map| drop(Arc::make_mut(map).remove(name)));
            return Ok(());
        };
        versions.insert(name.to_owned(), version);
        self.bundles.send_modify(|map| drop(Arc::make_mut(map).insert(name.to_owned(), Arc::new(value))));
        Ok(())
    }
}

/// A change of one bundle that is being made. Dropped, it changes nothing.
pub struct Changing<'a> {
    bundles: &'a FederatedBundles,
    versions: MutexGuard<'a, BTreeMap<String, Version>>,
    known: Option<Arc<TrustBundle>>,
    bundle: TrustBundle,
}

impl Changing<'_> {
    /// The bundle to be stored.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// The version that it takes the place of; `None` for none.
    pub fn from(&self) -> Option<Version> {
        self.versions.get(self.bundle.trust_domain.as_str()).copied()
    }

    /// Writes it to the store.
    async fn store(mut self) -> Result<Arc<TrustBundle>, SetError> {
        let Written::Stored(version) = self.bundles.store.put_bundle(&self.bundle, self.from()).await? else {
            self.overtaken().await?;
            return Err(DataStoreError::Contended(format!("the bundle of `{}`", self.bundle.trust_domain)).into());
        };
        Ok(self.stored(version))
    }

    /// It is in the store, with this version.
    pub fn stored(mut self, version: Version) -> Arc<TrustBundle> {
        let name = self.bundle.trust_domain.to_string();
        self.versions.insert(name.clone(), version);
        let bundle = Arc::new(self.bundle);
        self.bundles.bundles.send_modify(|map| drop(Arc::make_mut(map).insert(name, bundle.clone())));
        bundle
    }

    /// Another server was first: takes up what it wrote.
    pub async fn overtaken(&mut self) -> Result<(), DataStoreError> {
        self.bundles.reload(&mut self.versions, self.bundle.trust_domain.as_str()).await
    }
}
