//! The pods of this node from a watch on the API server: a peer that every cluster lets us verify, whereas most
//! kubelets sign their own certificates.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use countersign_watch::Health;
use countersign_watch::cgroup::Container;
use countersign_watch::node::{NodeName, is_on, pods_of};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher::Event;
use kube::{Api, Client};
use tokio::sync::watch;

use super::pods::{KnownPod, Pods};
use super::source::Standing;

/// How long pods are remembered while the API server cannot be reached. Nobody can delete or change pods then, and the
/// kubelet too goes on with those that it knows. An SVID that was issued just before lasts as long.
const MEMORY: Duration = Duration::from_secs(3_600);
/// How long pods are remembered once the API server refuses us: pods change, and we do not see it.
const MEMORY_REFUSED: Duration = Duration::from_secs(30);
/// Most UIDs of deleted pods that are remembered.
const MAX_DELETED: usize = 4_096;

/// The pods of a node, kept up to date by [`ApiServer::follow`].
pub struct ApiServer {
    node: NodeName,
    client: Client,
    health: Arc<Health>,
    store: RwLock<Store>,
    version: watch::Sender<u64>,
}

/// What the watch knows of a container's pod.
pub enum Known {
    /// The pod exists.
    Pod(Arc<KnownPod>),
    /// It existed. Its UID is never given to another pod.
    Deleted,
    /// It is not known, or not any more.
    No(String),
}

impl ApiServer {
    /// Nothing is known yet.
    pub fn new(node: NodeName, client: Client, health: Arc<Health>) -> Self {
        Self { node, client, health, store: RwLock::default(), version: watch::Sender::new(0) }
    }

    /// Watches the node's pods, without end.
    pub async fn follow(&self) {
        let pods = Api::<Pod>::all(self.client.clone());
        countersign_watch::follow(pods, pods_of(&self.node), &self.health, |e| self.take(e)).await;
    }

    fn take(&self, event: Event<Pod>) {
        self.store.write().unwrap_or_else(PoisonError::into_inner).take(event, &self.node);
        self.version.send_modify(|v| *v += 1);
    }

    /// What is known of the pod with this UID.
    pub fn look(&self, uid: &str) -> Known {
        let store = self.store.read().unwrap_or_else(PoisonError::into_inner);
        if store.deleted.contains(uid) {
            return Known::Deleted;
        }
        if let Err(why) = self.remembers(&store) {
            return Known::No(why);
        }
        match store.pods.get(uid) {
            Some(pod) => Known::Pod(pod.clone()),
            None => Known::No(format!("the API server does not know pod {uid} on this node yet")),
        }
    }

    /// Whether what is stored still counts.
    fn remembers(&self, store: &Store) -> Result<(), String> {
        let Some(trouble) = self.health.unheard() else {
            return if store.listed {
                Ok(())
            } else {
                Err("the API server has not listed this node's pods yet".into())
            };
        };
        let refused = trouble.refused_since.is_some_and(|since| since.elapsed() >= MEMORY_REFUSED);
        if store.listed && !refused && trouble.since.elapsed() < MEMORY { Ok(()) } else { Err(trouble.words) }
    }

    /// Resolves once the container is known, or its pod is known to be deleted.
    pub async fn known(&self, Container { pod_uid, id }: &Container) {
        let mut version = self.version.subscribe();
        loop {
            match self.look(pod_uid) {
                Known::Deleted => return,
                Known::Pod(pod) if pod.container(id).is_some() => return,
                _ => {}
            }
            if version.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Whether it can be relied on.
    pub fn standing(&self) -> Standing {
        let store = self.store.read().unwrap_or_else(PoisonError::into_inner);
        match (self.remembers(&store), self.health.lasting()) {
            (Ok(()), None) => Standing::Works,
            (_, Some(why)) => Standing::Fails { why, lasting: true },
            (Err(why), None) => Standing::Fails { why, lasting: false },
        }
    }

    /// Number of pods that are known.
    pub fn pods(&self) -> usize {
        self.store.read().unwrap_or_else(PoisonError::into_inner).pods.len()
    }
}

#[derive(Default)]
struct Store {
    /// Whether a complete list has arrived.
    listed: bool,
    pods: Pods,
    /// The list that is arriving.
    fresh: Pods,
    deleted: Deleted,
}

impl Store {
    fn take(&mut self, event: Event<Pod>, node: &NodeName) {
        // The API server's answer is filtered by the node; that it is, is checked.
        let is_ours = |pod: &Pod| is_on(node, pod);
        match event {
            Event::Init => self.fresh = Pods::default(),
            Event::InitApply(pod) if is_ours(&pod) && !self.deleted.has(&pod) => self.fresh.insert(&pod),
            Event::InitDone => {
                // What it lacks may be deleted, or newer than the list of an API server that is behind: not known, until
                // an event tells.
                self.pods = std::mem::take(&mut self.fresh);
                self.listed = true;
            }
            Event::Apply(pod) if is_ours(&pod) && !self.deleted.has(&pod) => self.pods.insert(&pod),
            Event::Delete(pod) => {
                if let Some(uid) = pod.metadata.uid {
                    self.pods.remove(&uid);
                    self.deleted.insert(uid);
                }
            }
            Event::InitApply(_) | Event::Apply(_) => {}
        }
    }
}

/// UIDs of deleted pods, the latest [`MAX_DELETED`]. Neither a list from the memory of an API server that is behind,
/// nor a kubelet that has not heard of the deletion, brings such a pod back.
#[derive(Default)]
struct Deleted {
    order: VecDeque<String>,
    uids: HashSet<String>,
}

impl Deleted {
    fn insert(&mut self, uid: String) {
        if !self.uids.insert(uid.clone()) {
            return;
        }
        self.order.push_back(uid);
        if self.order.len() > MAX_DELETED
            && let Some(oldest) = self.order.pop_front()
        {
            self.uids.remove(&oldest);
        }
    }

    fn contains(&self, uid: &str) -> bool {
        self.uids.contains(uid)
    }

    fn has(&self, pod: &Pod) -> bool {
        pod.metadata.uid.as_deref().is_some_and(|uid| self.contains(uid))
    }
}

#[cfg(test)]
pub mod tests {
    use countersign_watch::Watches;
    use serde_json::json;

    use super::*;

    /// A pod of node `n1` as the API server shows it, with one running container.
    pub fn pod(uid: &str, name: &str, container: &str) -> Pod {
        let pod = json!({
            "metadata": { "name": name, "namespace": "shop", "uid": uid, "labels": { "app": name } },
            "spec": { "nodeName": "n1", "serviceAccountName": "web-sa", "containers": [{ "name": "app", "image": "img:1" }] },
            "status": { "phase": "Running", "containerStatuses": [{
                "name": "app", "image": "img:1", "imageID": "img@sha256:1", "containerID": format!("containerd://{container}"),
                "ready": true, "restartCount": 0, "state": { "running": { "startedAt": "2026-01-01T00:00:00Z" } } }] },
        });
        serde_json::from_value(pod).unwrap()
    }

    /// A watch whose events the test makes.
    pub fn source() -> (ApiServer, Arc<Health>) {
        let service = tower::service_fn(|_: http::Request<kube::client::Body>| async {
            Err::<http::Response<kube::client::Body>, _>(std::io::Error::other("no API server here"))
        });
        let health = Watches::default().health("pods");
        (ApiServer::new("n1".parse().unwrap(), Client::new(service, "default"), health.clone()), health)
    }

    impl ApiServer {
        /// Takes one event, with what the watch itself would note.
        pub fn hears(&self, event: Event<Pod>) {
            if matches!(event, Event::InitDone) {
                self.health.listed();
            }
            self.take(event);
        }
    }

    fn list(source: &ApiServer, pods: &[Pod]) {
        source.hears(Event::Init);
        pods.iter().for_each(|p| source.hears(Event::InitApply(p.clone())));
        source.hears(Event::InitDone);
    }

    fn finds(source: &ApiServer, uid: &str, container: &str) -> bool {
        matches!(source.look(uid), Known::Pod(pod) if pod.container(container).is_some())
    }

    #[tokio::test]
    async fn a_pod_is_known_from_its_list_or_its_event_and_until_it_is_deleted() {
        let (source, _) = source();
        assert!(matches!(source.look("u1"), Known::No(why) if why.contains("has not listed")));
        source.hears(Event::Init);
        source.hears(Event::InitApply(pod("u1", "a", "c1")));
        assert!(!finds(&source, "u1", "c1"), "half a list is none");
        source.hears(Event::InitDone);
        assert!(finds(&source, "u1", "c1") && !finds(&source, "u1", "c2") && !finds(&source, "u2", "c1"));
        assert!(matches!(source.look("u2"), Known::No(why) if why.contains("yet")));
        source.hears(Event::Apply(pod("u2", "b", "c2")));
        assert!(finds(&source, "u2", "c2"));
        // Its container starts anew: the one of the past is nobody's.
        source.hears(Event::Apply(pod("u2", "b", "c3")));
        assert!(finds(&source, "u2", "c3") && !finds(&source, "u2", "c2"));
        source.hears(Event::Delete(pod("u2", "b", "c3")));
        assert!(matches!(source.look("u2"), Known::Deleted));
    }

    #[tokio::test]
    async fn a_successor_of_the_same_name_is_another_pod() {
        let (source, _) = source();
        list(&source, &[pod("u1", "web-0", "c1")]);
        source.hears(Event::Delete(pod("u1", "web-0", "c1")));
        source.hears(Event::Apply(pod("u2", "web-0", "c2")));
        assert!(matches!(source.look("u1"), Known::Deleted));
        assert!(finds(&source, "u2", "c2") && !finds(&source, "u2", "c1"));
    }

    #[tokio::test]
    async fn an_api_server_that_is_behind_brings_no_deleted_pod_back() {
        let (source, _) = source();
        list(&source, &[pod("u1", "a", "c1"), pod("u2", "b", "c2")]);
        source.hears(Event::Delete(pod("u1", "a", "c1")));
        list(&source, &[pod("u1", "a", "c1")]);
        source.hears(Event::Apply(pod("u1", "a", "c1")));
        assert!(matches!(source.look("u1"), Known::Deleted));
        assert!(matches!(source.look("u2"), Known::No(_)), "deleted while nobody watched, or too new for this list");
        source.hears(Event::Apply(pod("u2", "b", "c2")));
        assert!(finds(&source, "u2", "c2"));
        (0..=MAX_DELETED).for_each(|n| source.hears(Event::Delete(pod(&format!("x{n}"), "x", "x"))));
        assert_eq!(source.store.read().unwrap().deleted.order.len(), MAX_DELETED);
        assert_eq!(source.store.read().unwrap().deleted.uids.len(), MAX_DELETED);
    }

    #[tokio::test]
    async fn a_pod_of_another_node_is_not_taken() {
        let (source, _) = source();
        let mut other = pod("u1", "a", "c1");
        other.spec.as_mut().unwrap().node_name = Some("n2".into());
        list(&source, &[other.clone()]);
        source.hears(Event::Apply(other));
        assert!(!finds(&source, "u1", "c1") && source.pods() == 0);
    }

    #[tokio::test]
    async fn pods_beyond_the_bound_are_left_out() {
        let (source, _) = source();
        let many: Vec<Pod> = (0..4_200).map(|n| pod(&format!("u{n}"), "a", &format!("c{n}"))).collect();
        list(&source, &many);
        assert_eq!(source.pods(), 4_096);
        source.hears(Event::Apply(pod("u0", "a", "c9999")));
        assert!(finds(&source, "u0", "c9999"), "those that are known go on changing");
    }

    fn refusal() -> kube::runtime::watcher::Error {
        let status = json!({ "status": "Failure", "code": 403, "reason": "Forbidden", "message": "pods is forbidden" });
        kube::runtime::watcher::Error::WatchStartFailed(kube::Error::Api(serde_json::from_value(status).unwrap()))
    }

    #[tokio::test(start_paused = true)]
    async fn pods_are_forgotten_soon_if_the_api_server_refuses_and_late_if_it_is_away() {
        let (source, health) = source();
        list(&source, &[pod("u1", "a", "c1")]);
        assert!(matches!(source.standing(), Standing::Works));
        health.failed(&refusal());
        assert!(finds(&source, "u1", "c1"), "a moment is nothing");
        tokio::time::sleep(Duration::from_secs(31)).await;
        assert!(matches!(source.look("u1"), Known::No(why) if why.contains("pods is forbidden")));
        assert!(
            matches!(source.standing(), Standing::Fails { lasting: true, why } if why.contains("pods is forbidden"))
        );
        list(&source, &[pod("u1", "a", "c1")]);
        assert!(finds(&source, "u1", "c1"));
        tokio::time::sleep(Duration::from_secs(11)).await;
        assert!(matches!(source.standing(), Standing::Works));
        health.failed(&kube::runtime::watcher::Error::NoResourceVersion);
        tokio::time::sleep(Duration::from_secs(3_500)).await;
        assert!(finds(&source, "u1", "c1"), "nobody changes pods while the API server is away");
        assert!(matches!(source.standing(), Standing::Fails { lasting: true, .. }), "and yet it is said");
        tokio::time::sleep(Duration::from_secs(101)).await;
        assert!(!finds(&source, "u1", "c1"));
    }
}
