//! Keeps [`Store`] up to date with a watch on each kind of object.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use countersign_watch::{Health, Watches};
use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::crd::SpiffeID;
use crate::store::{Key, Mesh, Namespace, Pod, Service, Slice, Store};

/// The view of the cluster, with notification of each change.
pub struct Cluster {
    store: RwLock<Store>,
    version: watch::Sender<u64>,
    /// Number of kinds whose first complete list has not arrived yet.
    missing: AtomicUsize,
    watches: Watches,
}

/// Number of kinds that are always watched.
const KINDS: usize = 6;

impl Cluster {
    /// Nothing is known yet. `with_mesh`: the mesh's ConfigMap will be watched too.
    pub fn new(with_mesh: bool, watches: Watches) -> Self {
        let missing = AtomicUsize::new(KINDS + usize::from(with_mesh));
        Self { store: RwLock::default(), version: watch::Sender::new(0), missing, watches }
    }

    /// What is missing of the view, in words; `None` if it is complete and up to date. A watch that fails is tolerated
    /// for a moment.
    pub fn missing(&self) -> Option<String> {
        let unheard = || {
            let why = self.watches.troubles().map(|t| format!(": {t}")).unwrap_or_default();
            format!("the API server has not been heard whole yet{why}")
        };
        if self.store().is_none() { Some(unheard()) } else { self.watches.lasting() }
    }

    /// The current view; `None` until every kind was listed completely once.
    pub fn store(&self) -> Option<RwLockReadGuard<'_, Store>> {
        (self.missing.load(Ordering::Acquire) == 0).then(|| self.store.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notifies of each change.
    pub fn versions(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Changes the view and notifies all watchers.
    pub fn change(&self, change: impl FnOnce(&mut Store)) {
        change(&mut self.store.write().unwrap_or_else(PoisonError::into_inner));
        self.version.send_modify(|v| *v += 1);
    }

    /// Watches all kinds, without end; `mesh` is namespace and name of the mesh's ConfigMap.
    pub async fn follow(self: Arc<Self>, client: Client, mesh: Option<(String, String)>) {
        let all = |client: &Client| client.clone();
        let everything = watcher::Config::default().page_size(500);
        let health = |kind| self.watches.health(kind);
        let follow_mesh = async {
            let Some((namespace, name)) = &mesh else { return };
            let api = Api::<v1::ConfigMap>::namespaced(all(&client), namespace);
            let one = watcher::Config::default().fields(&format!("metadata.name={name}"));
            self.kind(api, one, &health("configmaps"), |f| &mut f.mesh, |m| Mesh::read(&m)).await;
        };
        let (pods, nodes, namespaces) = (health("pods"), health("nodes"), health("namespaces"));
        let (services, slices, spiffe_ids) = (health("services"), health("endpointslices"), health("spiffeids"));
        let pods_api = Api::<v1::Pod>::all(all(&client));
        tokio::join!(
            follow_mesh,
            self.kind(pods_api, everything.clone(), &pods, |f| &mut f.pods, |p| Pod::read(&p)),
            self.kind(Api::<v1::Node>::all(all(&client)), everything.clone(), &nodes, |f| &mut f.nodes, |n| n.uid()),
            self.kind(
                Api::<v1::Namespace>::all(all(&client)),
                everything.clone(),
                &namespaces,
                |f| &mut f.namespaces,
                |n| Namespace::read(&n)
            ),
            self.kind(
                Api::<v1::Service>::all(all(&client)),
                everything.clone(),
                &services,
                |f| &mut f.services,
                |s| Service::read(&s)
            ),
            self.kind(
                Api::<EndpointSlice>::all(all(&client)),
                everything.clone(),
                &slices,
                |f| &mut f.slices,
                |s| Slice::read(&s)
            ),
            self.kind(
                Api::<SpiffeID>::all(all(&client)),
                everything.clone(),
                &spiffe_ids,
                |f| &mut f.spiffe_ids,
                |mut s| {
                    s.metadata.managed_fields = None;
                    Some(s)
                }
            ),
        );
    }

    async fn kind<K, V: PartialEq>(
        &self,
        api: Api<K>,
        config: watcher::Config,
        health: &Health,
        place: fn(&mut Store) -> &mut HashMap<Key, V>,
        read: impl Fn(K) -> Option<V>,
    ) where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
        K::DynamicType: Default,
    {
        let key = |o: &K| (o.namespace().unwrap_or_default(), o.name_any());
        let mut fresh: HashMap<Key, V> = HashMap::new();
        let mut first = true;
        countersign_watch::follow(api, config, health, |event| {
            let put = |key: Key, value: Option<V>| {
                let mut store = self.store.write().unwrap_or_else(PoisonError::into_inner);
                let known = place(&mut store);
                let changed = match value {
                    Some(value) if known.get(&key) == Some(&value) => false,
                    Some(value) => known.insert(key, value).is_none_or(|_| true),
                    None => known.remove(&key).is_some(),
                };
                drop(store);
                if changed {
                    self.version.send_modify(|v| *v += 1);
                }
            };
            match event {
                Event::Init => fresh.clear(),
                Event::InitApply(object) => {
                    let key = key(&object);
                    if let Some(value) = read(object) {
                        fresh.insert(key, value);
                    }
                }
                Event::InitDone => {
                    let whole = std::mem::take(&mut fresh);
                    self.change(|store| *place(store) = whole);
                    if std::mem::take(&mut first) {
                        self.missing.fetch_sub(1, Ordering::AcqRel);
                        self.version.send_modify(|v| *v += 1);
                    }
                }
                Event::Apply(object) => put(key(&object), read(object)),
                Event::Delete(object) => put(key(&object), None),
            }
        })
        .await;
    }
}
