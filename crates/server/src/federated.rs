//! Bundles of other trust domains, in memory, written through to the store.

use std::collections::BTreeMap;
use std::sync::Arc;

use countersign_identity::{TrustDomain, X509Bundle};
use tokio::sync::{Mutex, watch};

use crate::datastore::{DataStore, DataStoreError};

/// All foreign bundles by trust domain.
pub type BundleMap = BTreeMap<String, Arc<X509Bundle>>;

/// The foreign bundles of one server.
pub struct FederatedBundles {
    store: Arc<dyn DataStore>,
    writer: Mutex<()>,
    bundles: watch::Sender<Arc<BundleMap>>,
}

impl FederatedBundles {
    /// Takes up what the store holds, our own bundle left out.
    pub async fn load(store: Arc<dyn DataStore>, own: &TrustDomain) -> Result<Self, DataStoreError> {
        let foreign = store.bundles().await?.into_iter().filter(|b| b.trust_domain != *own);
        let map = foreign.map(|b| (b.trust_domain.to_string(), Arc::new(b))).collect::<BundleMap>();
        Ok(Self { store, writer: Mutex::default(), bundles: watch::Sender::new(Arc::new(map)) })
    }

    /// All of them, and each change.
    pub fn watch(&self) -> watch::Receiver<Arc<BundleMap>> {
        self.bundles.subscribe()
    }

    /// All of them now.
    pub fn all(&self) -> Arc<BundleMap> {
        self.bundles.borrow().clone()
    }

    /// Adds or replaces one; its sequence grows where the caller named none.
    pub async fn set(&self, mut bundle: X509Bundle) -> Result<Arc<X509Bundle>, DataStoreError> {
        let _writer = self.writer.lock().await;
        let name = bundle.trust_domain.to_string();
        if bundle.sequence == 0 {
            bundle.sequence = self.all().get(&name).map_or(1, |b| b.sequence + 1);
        }
        self.store.put_bundle(&bundle).await?;
        let bundle = Arc::new(bundle);
        self.bundles.send_modify(|map| drop(Arc::make_mut(map).insert(name, bundle.clone())));
        Ok(bundle)
    }

    /// Deletes one; whether it was there.
    pub async fn remove(&self, trust_domain: &str) -> Result<bool, DataStoreError> {
        let _writer = self.writer.lock().await;
        self.store.delete_bundle(trust_domain).await?;
        let mut was = false;
        self.bundles.send_modify(|map| was = Arc::make_mut(map).remove(trust_domain).is_some());
        Ok(was)
    }
}
