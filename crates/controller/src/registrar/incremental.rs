//! Passes over what has changed come to the same as a pass over everything, whatever happens in whatever order.

use std::sync::Mutex;

use countersign_api::spire::types::Entry;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tonic::{Code, Status};

use super::entries::keep;
use super::object::Wanted;
use super::*;
use crate::crd::SpiffeIdSpec;
use crate::server_link::{Answers, Done, Entries};
use crate::store::{Node, Service};

/// A server that has one entry at most for an ID, parent and selectors.
#[derive(Default)]
struct Server(Mutex<HashMap<String, Entry>>);

impl Server {
    fn with<T>(&self, change: impl FnOnce(&mut HashMap<String, Entry>) -> T) -> T {
        change(&mut self.0.lock().unwrap())
    }

    fn copy(&self) -> Self {
        Self(Mutex::new(self.with(|entries| entries.clone())))
    }

    fn wanted(&self) -> Vec<(String, Wanted)> {
        let mut all: Vec<_> = self.with(|e| e.iter().map(|(id, e)| (id.clone(), Wanted::read(e))).collect());
        all.sort_by(|a: &(String, Wanted), b| a.0.cmp(&b.0));
        all
    }
}

fn done(code: Code, entry: &str) -> Done {
    Done { code: code as i32, message: "said".into(), entry: Some(entry.to_owned()) }
}

impl Entries for Server {
    async fn list(&self) -> Result<Vec<Entry>, Status> {
        Ok(self.with(|entries| entries.values().cloned().collect()))
    }

    async fn create(&self, new: &[Entry]) -> Answers {
        let one = |entries: &mut HashMap<String, Entry>, new: &Entry| {
            let subject = Wanted::read(new).subject();
            let same = entries.values().find(|e| e.id == new.id || Wanted::read(e).subject() == subject);
            if let Some(same) = same {
                return done(Code::AlreadyExists, &same.id);
            }
            entries.insert(new.id.clone(), new.clone());
            done(Code::Ok, &new.id)
        };
        let done = self.with(|entries| new.iter().map(|new| Some(one(entries, new))).collect());
        Answers { done, failed: vec![] }
    }

    async fn update(&self, changed: &[Entry]) -> Answers {
        let one = |entries: &mut HashMap<String, Entry>, changed: &Entry| match entries.get_mut(&changed.id) {
            Some(entry) => {
                *entry = changed.clone();
                done(Code::Ok, &changed.id)
            }
            None => done(Code::NotFound, &changed.id),
        };
        let done = self.with(|entries| changed.iter().map(|changed| Some(one(entries, changed))).collect());
        Answers { done, failed: vec![] }
    }

    async fn delete(&self, ids: &[String]) -> Answers {
        let one = |entries: &mut HashMap<String, Entry>, id: &String| {
            let gone = if entries.remove(id).is_some() { Code::Ok } else { Code::NotFound };
            done(gone, id)
        };
        let done = self.with(|entries| ids.iter().map(|id| Some(one(entries, id))).collect());
        Answers { done, failed: vec![] }
    }
}

pub(super) fn config() -> RegistrarConfig {
    RegistrarConfig {
        server_socket: "/x".into(),
        cluster: "c".into(),
        template: crate::template::DEFAULT.parse().unwrap(),
        excluded_namespaces: ["closed".to_owned()].into(),
        lease_namespace: None,
        control_namespace: None,
    }
}

/// A cluster, the watch's news of it, and the registrar's state.
struct World {
    random: StdRng,
    store: Store,
    changed: Changed,
    progress: Progress,
    server: Server,
    outcome: HashMap<String, Result<String, Refused>>,
    uids: usize,
}

const NAMESPACES: [&str; 3] = ["shop", "bank", "closed"];

impl World {
    fn new(seed: u64) -> Self {
        let mut store = Store::default();
        for name in ["node1", "node2"] {
            let node = Node { uid: format!("uid-{name}"), ..Node::default() };
            store.nodes.insert((String::new(), name.to_owned()), node);
        }
        Self {
            random: StdRng::seed_from_u64(seed),
            store,
            changed: Changed::default(),
            progress: Progress::new(),
            server: Server::default(),
            outcome: HashMap::new(),
            uids: 0,
        }
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.random.random_range(0..of.len())].clone()
    }

    fn uid(&mut self) -> String {
        self.uids += 1;
        format!("uid-{}", self.uids)
    }

    fn key(&mut self, prefix: &str) -> Key {
        (self.pick(&NAMESPACES).to_owned(), format!("{prefix}-{}", self.random.random_range(0..4)))
    }

    /// Something happens, and the watch reports it.
    fn happen(&mut self) {
        match self.random.random_range(0..10) {
            0..=4 => {
                let key = self.key("pod");
                let node = self.pick(&[None, Some("node1"), Some("node2"), Some("nowhere")]);
                let app = self.pick(&["a", "b"]);
                // The same pod changes, another one takes its name, or it goes.
                let uid = match self.store.pods.get(&key).map(|pod| pod.uid.clone()) {
                    Some(uid) if self.random.random_bool(0.5) => uid,
                    _ => self.uid(),
                };
                let pod = Pod {
                    namespace: key.0.clone(),
                    name: key.1.clone(),
                    uid,
                    service_account: "web".into(),
                    node: node.map(ToOwned::to_owned),
                    labels: [("app".to_owned(), app.to_owned())].into(),
                    over: self.random.random_bool(0.1),
                    ..Pod::default()
                };
                if self.random.random_bool(0.3) {
                    self.store.pods.remove(&key);
                } else {
                    self.store.pods.insert(key.clone(), pod);
                }
                self.changed.pods.insert(key);
            }
            5 => {
                // Somebody deletes an object, or it begins to go.
                let keys: Vec<Key> = self.store.spiffe_ids.keys().cloned().collect();
                if keys.is_empty() {
                    return;
                }
                let key = self.pick(&keys);
                self.store.spiffe_ids.remove(&key);
                self.changed.spiffe_ids.insert(key);
            }
            6..=8 => {
                // By hand; several ask for the same ID, parent and selectors.
                let key = self.key("hand");
                if self.store.spiffe_ids.remove(&key).is_none() {
                    let node = self.pick(&["uid-node1", "uid-nowhere"]);
                    let spec = SpiffeIdSpec {
                        spiffe_id: format!("spiffe://td/ns/{}/sa/web", key.0),
                        parent_id: format!("spiffe://td/spire/agent/k8s_psat/c/{node}"),
                        ..SpiffeIdSpec::default()
                    };
                    let mut object = SpiffeID::new(&key.1, spec);
                    object.metadata.namespace = Some(key.0.clone());
                    object.metadata.uid = Some(self.uid());
                    self.store.spiffe_ids.insert(key.clone(), object);
                }
                self.changed.spiffe_ids.insert(key);
            }
            _ => {
                let key = self.key("svc");
                if self.store.services.remove(&key).is_none() {
                    let app = self.pick(&["a", "b"]);
                    let service = Service {
                        namespace: key.0.clone(),
                        name: key.1.clone(),
                        selector: [("app".to_owned(), app.to_owned())].into(),
                        ..Service::default()
                    };
                    self.store.services.insert(key, service);
                }
                self.changed.services = true;
            }
        }
    }

    /// A pass as [`Registrar::pass`] makes it, with a store that the API server's answers go into.
    async fn pass(&mut self) {
        let (config, trust_domain) = (config(), TrustDomain::new("td").unwrap());
        let rules = Rules { config: &config, trust_domain: &trust_domain };
        self.progress.hear(&self.store, std::mem::take(&mut self.changed));
        let desired = rules.desired(&self.store, &self.progress);
        for step in steps(&desired, &self.store.spiffe_ids, &self.progress.scope) {
            match step {
                Step::Create(mut object) => {
                    object.metadata.uid = Some(self.uid());
                    self.changed.spiffe_ids.insert(key_of(&object));
                    self.store.spiffe_ids.insert(key_of(&object), object);
                }
                Step::Replace(object) => {
                    self.store.spiffe_ids.get_mut(&key_of(&object)).unwrap().spec = object.spec.clone();
                    self.changed.spiffe_ids.insert(key_of(&object));
                }
                Step::Delete(object) => {
                    self.store.spiffe_ids.remove(&key_of(&object));
                    self.changed.spiffe_ids.insert(key_of(&object));
                }
            }
        }
        let judged = rules.judge(&desired, &self.store, &self.progress.scope);
        let kept = keep(&self.server, judged, &mut self.progress.known).await.unwrap();
        assert!(kept.failed.is_empty());
        self.outcome.extend(kept.outcome);
        self.progress.scope = Scope::Keys(HashSet::new());
    }

    /// What a pass over everything would still change.
    async fn assert_nothing_is_left(&self, when: &str) {
        let (config, trust_domain) = (config(), TrustDomain::new("td").unwrap());
        let rules = Rules { config: &config, trust_domain: &trust_domain };
        let mut fresh = Progress::new();
        fresh.hear(&self.store, Changed::default());
        let desired = rules.desired(&self.store, &fresh);
        assert!(steps(&desired, &self.store.spiffe_ids, &Scope::All).is_empty(), "{when}: objects");
        let (judged, server) = (rules.judge(&desired, &self.store, &Scope::All), self.server.copy());
        let kept = keep(&server, judged, &mut fresh.known).await.unwrap();
        assert_eq!(server.wanted(), self.server.wanted(), "{when}: entries");
        for (uid, outcome) in kept.outcome.iter().filter(|(uid, _)| !uid.is_empty()) {
            let known = &self.outcome[uid];
            // Several may claim an entry whose object is gone. One of them has it, whoever that is.
            let contested =
                |entry: &str, refused: &Refused| refused.why.starts_with(&format!("entry {entry} registers"));
            let same = match (known, outcome) {
                (Ok(entry), Err(refused)) | (Err(refused), Ok(entry)) => contested(entry, refused),
                _ => known == outcome,
            };
            assert!(same, "{when}: outcome of {uid}: {known:?}, {outcome:?}");
        }
        let granted = |all: &HashMap<String, Result<String, Refused>>| {
            let live = kept.outcome.keys().filter(|uid| !uid.is_empty());
            let mut all: Vec<String> = live.filter_map(|uid| all.get(uid)?.clone().ok()).collect();
            all.sort();
            all
        };
        assert_eq!(granted(&self.outcome), granted(&kept.outcome), "{when}: each entry is one object's");
        let held = &self.progress.known.as_ref().unwrap().held;
        assert_eq!(held.len(), self.server.wanted().len(), "{when}: what is held is what there is");
    }
}

#[tokio::test]
async fn passes_over_what_has_changed_leave_nothing_for_a_pass_over_everything() {
    let (mut most, mut refused) = (0, 0);
    for seed in 0..30 {
        let mut world = World::new(seed);
        world.pass().await;
        for turn in 0..60 {
            for _ in 0..world.random.random_range(1..4) {
                world.happen();
            }
            let mut passes = 0;
            while world.changed != Changed::default() {
                world.pass().await;
                passes += 1;
                assert!(passes < 6, "seed {seed}, turn {turn}: passes come to an end");
            }
            world.assert_nothing_is_left(&format!("seed {seed}, turn {turn}")).await;
            most = most.max(world.server.wanted().len());
            refused += world.progress.known.as_ref().unwrap().waiting.len();
        }
    }
    assert!(most >= 8 && refused > 50, "the test meets what it is for: {most} entries, {refused} waits");
}

#[tokio::test]
async fn a_pod_event_looks_at_that_pod_alone() {
    let mut world = World::new(1);
    (0..200).for_each(|_| world.happen());
    while world.changed != Changed::default() {
        world.pass().await;
    }
    let key = ("shop".to_owned(), "new".to_owned());
    let pod = Pod { namespace: key.0.clone(), name: key.1.clone(), node: Some("node1".into()), ..Pod::default() };
    world.store.pods.insert(key.clone(), pod);
    let waiting = world.progress.known.as_ref().unwrap().waiting.clone();
    world.progress.hear(&world.store, Changed { pods: [key.clone()].into(), ..Changed::default() });
    let expected: HashSet<Key> = waiting.into_iter().chain([key]).collect();
    assert_eq!(world.progress.scope, Scope::Keys(expected));
}
