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

use crate::changed::{Changed, Reader, Readers};
use crate::crd::SpiffeID;
use crate::store::{Key, Mesh, Namespace, Node, Pod, Service, Slice, Store};

/// The view of the cluster, with notification of each change.
pub struct Cluster {
    store: RwLock<Store>,
    version: watch::Sender<u64>,
    readers: Readers,
    /// Number of kinds whose first complete list has not arrived yet.
    missing: AtomicUsize,
    watches: Watches,
}

/// Where the objects of a kind are.
type Place<V> = fn(&mut Store) -> &mut HashMap<Key, V>;

/// Number of kinds that are always watched.
const KINDS: usize = 6;

impl Cluster {
    /// Nothing is known yet. `with_mesh`: the mesh's ConfigMap will be watched too.
    pub fn new(with_mesh: bool, watches: Watches) -> Self {
        let missing = AtomicUsize::new(KINDS + usize::from(with_mesh));
        let version = watch::Sender::new(0);
        Self { store: RwLock::default(), version, readers: Readers::default(), missing, watches }
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
    pub fn reader(&self) -> Reader {
        self.readers.subscribe(self.version.subscribe())
    }

    /// The current view, and what has changed in it since the reader looked last; `None` until every kind was listed
    /// completely once.
    pub fn look(&self, reader: &mut Reader) -> Option<(RwLockReadGuard<'_, Store>, Changed)> {
        let store = self.store()?;
        let changed = reader.take();
        Some((store, changed))
    }

    /// Changes the view and tells all readers what was changed.
    pub fn change(&self, mark: impl Fn(&mut Changed), change: impl FnOnce(&mut Store)) {
        let mut store = self.store.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut store);
        self.readers.tell(mark);
        drop(store);
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
            self.kind(api, one, &health("configmaps"), |f| &mut f.mesh, |c, _| c.mesh = true, |m| Mesh::read(&m)).await;
        };
        let (pods, nodes, namespaces) = (health("pods"), health("nodes"), health("namespaces"));
        let (services, slices, spiffe_ids) = (health("services"), health("endpointslices"), health("spiffeids"));
        let pods_api = Api::<v1::Pod>::all(all(&client));
        tokio::join!(
            follow_mesh,
            self.kind(
                pods_api,
                everything.clone(),
                &pods,
                |f| &mut f.pods,
                |c, key| c.pods.extend([key]),
                |p| Pod::read(&p)
            ),
            self.kind(
                Api::<v1::Node>::all(all(&client)),
                everything.clone(),
                &nodes,
                |f| &mut f.nodes,
                |c, _| c.nodes = true,
                |n| Node::read(&n)
            ),
            self.kind(
                Api::<v1::Namespace>::all(all(&client)),
                everything.clone(),
                &namespaces,
                |f| &mut f.namespaces,
                |c, _| c.namespaces = true,
                |n| Namespace::read(&n)
            ),
            self.kind(
                Api::<v1::Service>::all(all(&client)),
                everything.clone(),
                &services,
                |f| &mut f.services,
                |c, _| c.services = true,
                |s| Service::read(&s)
            ),
            self.kind(
                Api::<EndpointSlice>::all(all(&client)),
                everything.clone(),
                &slices,
                |f| &mut f.slices,
                |c, key| c.slices.extend([key]),
                |s| Slice::read(&s)
            ),
            self.kind(
                Api::<SpiffeID>::all(all(&client)),
                everything.clone(),
                &spiffe_ids,
                |f| &mut f.spiffe_ids,
                |c, key| c.spiffe_ids.extend([key]),
                |mut s| {
                    s.metadata.managed_fields = None;
                    Some(s)
                }
            ),
        );
    }

    /// Takes in what an object is now; `None` if it is nothing that is kept.
    fn put<V: PartialEq>(&self, key: Key, value: Option<V>, place: Place<V>, mark: fn(&mut Changed, Key)) {
        let mut store = self.store.write().unwrap_or_else(PoisonError::into_inner);
        let known = place(&mut store);
        let changed = match value {
            Some(value) if known.get(&key) == Some(&value) => false,
            Some(value) => known.insert(key.clone(), value).is_none_or(|_| true),
            None => known.remove(&key).is_some(),
        };
        if changed {
            self.readers.tell(|readers| mark(readers, key.clone()));
            drop(store);
            self.version.send_modify(|v| *v += 1);
        }
    }

    /// Takes in that an object is gone. Readers hear of it even if it was not in the store: somebody may wait for its
    /// name, as the registrar does when it has removed an object that finalizers have kept.
    fn remove<V>(&self, key: &Key, place: Place<V>, mark: fn(&mut Changed, Key)) {
        self.change(|changed| mark(changed, key.clone()), |store| drop(place(store).remove(key)));
    }

    async fn kind<K, V: PartialEq>(
        &self,
        api: Api<K>,
        config: watcher::Config,
        health: &Health,
        place: Place<V>,
        mark: fn(&mut Changed, Key),
        read: impl Fn(K) -> Option<V>,
    ) where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
        K::DynamicType: Default,
    {
        let key = |o: &K| (o.namespace().unwrap_or_default(), o.name_any());
        let mut fresh: HashMap<Key, V> = HashMap::new();
        let mut first = true;
        countersign_watch::follow(api, config, health, |event| match event {
            Event::Init => fresh.clear(),
            Event::InitApply(object) => {
                let key = key(&object);
                if let Some(value) = read(object) {
                    fresh.insert(key, value);
                }
            }
            Event::InitDone => {
                let whole = std::mem::take(&mut fresh);
                self.change(|changed| changed.everything = true, |store| *place(store) = whole);
                if std::mem::take(&mut first) {
                    self.missing.fetch_sub(1, Ordering::AcqRel);
                    self.version.send_modify(|v| *v += 1);
                }
            }
            Event::Apply(object) => self.put(key(&object), read(object), place, mark),
            Event::Delete(object) => self.remove(&key(&object), place, mark),
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_hear_of_every_object_that_is_gone_and_of_no_object_that_is_as_it_was() {
        let cluster = Cluster::new(false, Watches::default());
        let mut reader = cluster.reader();
        reader.take();
        let key = ("shop".to_owned(), "web-0".to_owned());
        let place: Place<SpiffeID> = |store| &mut store.spiffe_ids;
        let mark = |changed: &mut Changed, key| changed.spiffe_ids.extend([key]);
        let told = Changed { spiffe_ids: [key.clone()].into(), ..Changed::default() };
        let object = SpiffeID::new("web-0", crate::crd::SpiffeIdSpec::default());
        cluster.put(key.clone(), Some(object.clone()), place, mark);
        assert_eq!(reader.take(), told);
        cluster.put(key.clone(), Some(object), place, mark);
        assert_eq!(reader.take(), Changed::default());
        // The registrar deletes it, and it stays at the API server until its finalizers are gone.
        cluster.change(|_| {}, |store| drop(store.spiffe_ids.remove(&key)));
        cluster.remove(&key, place, mark);
        assert_eq!(reader.take(), told, "its name is free only now");
    }
}
