//! Keeps [`Store`] up to date with a watch on each kind of object.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use futures::StreamExt;
use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch_objects};
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
}

/// Number of kinds that are always watched.
const KINDS: usize = 6;

impl Cluster {
    /// Nothing is known yet. `with_mesh`: the mesh's ConfigMap will be watched too.
    pub fn new(with_mesh: bool) -> Self {
        let missing = AtomicUsize::new(KINDS + usize::from(with_mesh));
        Self { store: RwLock::default(), version: watch::Sender::new(0), missing }
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
        let follow_mesh = async {
            let Some((namespace, name)) = &mesh else { return };
            let api = Api::<v1::ConfigMap>::namespaced(all(&client), namespace);
            let one = watcher::Config::default().fields(&format!("metadata.name={name}"));
            self.kind(api, one, |f| &mut f.mesh, |m| Mesh::read(&m)).await;
        };
        tokio::join!(
            follow_mesh,
            self.kind(Api::<v1::Pod>::all(all(&client)), everything.clone(), |f| &mut f.pods, |p| Pod::read(&p)),
            self.kind(Api::<v1::Node>::all(all(&client)), everything.clone(), |f| &mut f.nodes, |n| n.uid()),
            self.kind(
                Api::<v1::Namespace>::all(all(&client)),
                everything.clone(),
                |f| &mut f.namespaces,
                |n| Namespace::read(&n)
            ),
            self.kind(
                Api::<v1::Service>::all(all(&client)),
                everything.clone(),
                |f| &mut f.services,
                |s| Service::read(&s)
            ),
            self.kind(
                Api::<EndpointSlice>::all(all(&client)),
                everything.clone(),
                |f| &mut f.slices,
                |s| Slice::read(&s)
            ),
            self.kind(
                Api::<SpiffeID>::all(all(&client)),
                everything.clone(),
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
        place: fn(&mut Store) -> &mut HashMap<Key, V>,
        read: impl Fn(K) -> Option<V>,
    ) where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
        K::DynamicType: Default,
    {
        let key = |o: &K| (o.namespace().unwrap_or_default(), o.name_any());
        let mut fresh: HashMap<Key, V> = HashMap::new();
        let mut first = true;
        let mut events = watch_objects(api, config).default_backoff().boxed();
        while let Some(event) = events.next().await {
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
                Ok(Event::Init) => fresh.clear(),
                Ok(Event::InitApply(object)) => {
                    let key = key(&object);
                    if let Some(value) = read(object) {
                        fresh.insert(key, value);
                    }
                }
                Ok(Event::InitDone) => {
                    let whole = std::mem::take(&mut fresh);
                    self.change(|store| *place(store) = whole);
                    if std::mem::take(&mut first) {
                        self.missing.fetch_sub(1, Ordering::AcqRel);
                        self.version.send_modify(|v| *v += 1);
                    }
                }
                Ok(Event::Apply(object)) => put(key(&object), read(object)),
                Ok(Event::Delete(object)) => put(key(&object), None),
                Err(error) => {
                    let kind = K::kind(&K::DynamicType::default()).into_owned();
                    tracing::warn!(kind, %error, "the API server does not let us watch; trying again");
                }
            }
        }
    }
}
