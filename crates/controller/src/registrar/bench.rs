//! What the registrar and the directory publisher take to compute, at two sizes of a cluster: a pass over everything,
//! and what one event costs. The command is in docs/benchmarks.md.

use std::net::IpAddr;
use std::time::Instant as Clock;

use countersign_api::spire::types::Entry;
use countersign_identity::directory::{Hints, Readiness};
use tonic::{Code, Status};

use super::entries::keep;
use super::incremental::config;
use super::*;
use crate::config::DirectoryConfig;
use crate::directory::{Directory, Source};
use crate::injector::Leave;
use crate::server_link::{Answers, Done, Entries};
use crate::store::{Node, Service, Slice, SliceEndpoint};

/// Events of each kind.
const EVENTS: usize = 200;

fn address(number: usize) -> IpAddr {
    IpAddr::from([10, 1, u8::try_from(number / 200).unwrap(), u8::try_from(number % 200).unwrap()])
}

fn pod_key(number: usize) -> Key {
    (format!("ns-{}", number % 20), format!("pod-{number}"))
}

fn pod(number: usize, services: usize) -> Pod {
    let ((namespace, name), app) = (pod_key(number), format!("svc-{}", number % services));
    Pod {
        namespace,
        name,
        uid: format!("p-{number}"),
        service_account: "web".into(),
        node: Some(format!("node-{}", number % 100)),
        addresses: vec![address(number)],
        meshed: true,
        labels: [("app", app.as_str()), ("tier", "web"), ("version", "v1")].map(|(k, v)| (k.into(), v.into())).into(),
        ..Pod::default()
    }
}

/// Pods of 20 namespaces on 100 nodes, ten of them behind each Service, with their objects.
fn cluster(pods: usize) -> Store {
    let (mut store, services) = (Store::default(), pods / 10);
    for node in 0..100 {
        let known = Node { uid: format!("node-uid-{node}"), ..Node::default() };
        store.nodes.insert((String::new(), format!("node-{node}")), known);
    }
    for number in 0..services {
        let (namespace, name) = (format!("ns-{}", number % 20), format!("svc-{number}"));
        let virtual_ip = [10, 91, u8::try_from(number / 200).unwrap(), u8::try_from(number % 200).unwrap()];
        let service = Service {
            uid: format!("s-{number}"),
            namespace: namespace.clone(),
            name: name.clone(),
            addresses: vec![virtual_ip.into()],
            ports: vec![(80, "http".into())],
            selector: [("app".to_owned(), name.clone())].into(),
            ..Service::default()
        };
        store.services.insert((namespace.clone(), name.clone()), service);
        let endpoint = |pod: usize| SliceEndpoint {
            address: address(pod),
            readiness: Readiness::Ready,
            node: format!("node-{}", pod % 100),
            hints: Hints::default(),
        };
        let endpoints = (number..pods).step_by(services).map(endpoint).collect();
        let slice = Slice { service: name.clone(), endpoints, ports: vec![("http".into(), 8080)] };
        store.slices.insert((namespace, format!("{name}-1")), slice);
    }
    (0..pods).for_each(|number| drop(store.pods.insert(pod_key(number), pod(number, services))));
    store
}

/// A server that does whatever it is told.
struct Willing;

impl Willing {
    fn done(ids: impl Iterator<Item = String>) -> Answers {
        let done = ids.map(|id| Some(Done { code: Code::Ok as i32, message: String::new(), entry: Some(id) }));
        Answers { done: done.collect(), failed: vec![] }
    }
}

impl Entries for Willing {
    async fn list(&self) -> Result<Vec<Entry>, Status> {
        Ok(vec![])
    }

    async fn create(&self, entries: &[Entry]) -> Answers {
        Self::done(entries.iter().map(|entry| entry.id.clone()))
    }

    async fn update(&self, entries: &[Entry]) -> Answers {
        Self::done(entries.iter().map(|entry| entry.id.clone()))
    }

    async fn delete(&self, ids: &[String]) -> Answers {
        Self::done(ids.iter().cloned())
    }
}

/// A pass without the API server: its objects go into the store at once. Returns its duration in microseconds.
async fn pass(store: &mut Store, progress: &mut Progress, changed: Changed) -> f64 {
    let (config, td) = (config(), TrustDomain::new("td").unwrap());
    let rules = Rules { config: &config, trust_domain: &td };
    let began = Clock::now();
    progress.hear(store, changed);
    let desired = rules.desired(store, progress);
    for step in steps(&desired, &store.spiffe_ids, &progress.scope) {
        match step {
            Step::Create(mut object) | Step::Replace(mut object) => {
                object.metadata.uid = Some(format!("o-{}", object.name_any()));
                store.spiffe_ids.insert(key_of(&object), object);
            }
            Step::Delete(object) => drop(store.spiffe_ids.remove(&key_of(&object))),
        }
    }
    let judged = rules.judge(&desired, store, &progress.scope);
    keep(&Willing, judged, &mut progress.known).await.unwrap();
    progress.scope = Scope::Keys(HashSet::new());
    began.elapsed().as_secs_f64() * 1e6
}

/// One event at a time: what it does to the store, and what the watch says of it.
type Event = fn(&mut Store, usize) -> Changed;

fn of_pod(key: Key) -> Changed {
    Changed { pods: [key].into(), ..Changed::default() }
}

fn added(store: &mut Store, n: usize) -> Changed {
    let services = store.services.len();
    store.pods.insert(pod_key(9_000 + n), pod(9_000 + n, services));
    of_pod(pod_key(9_000 + n))
}

fn changed(store: &mut Store, n: usize) -> Changed {
    store.pods.get_mut(&pod_key(n)).unwrap().labels.insert("app".into(), "other".into());
    of_pod(pod_key(n))
}

fn deleted(store: &mut Store, n: usize) -> Changed {
    store.pods.remove(&pod_key(n));
    of_pod(pod_key(n))
}

fn slice(store: &mut Store, n: usize) -> Changed {
    let number = n % store.services.len();
    let key = (format!("ns-{}", number % 20), format!("svc-{number}-1"));
    let endpoint = &mut store.slices.get_mut(&key).unwrap().endpoints[0];
    let ready = endpoint.readiness == Readiness::Ready;
    endpoint.readiness = if ready { Readiness::NotReady } else { Readiness::Ready };
    Changed { slices: [key].into(), ..Changed::default() }
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

#[tokio::test]
#[ignore = "prints figures, judges the growth alone"]
async fn bench_one_event_at_500_and_5000_pods() {
    let settings = DirectoryConfig {
        server_socket: "/x".into(),
        template: crate::template::DEFAULT.parse().unwrap(),
        mode: countersign_identity::policy::Mode::Strict,
        leave: Leave::default(),
        open_metrics: false,
        mesh_configmap: None,
    };
    let td = TrustDomain::new("td").unwrap();
    let events: [(&str, Event); 4] =
        [("pod added", added), ("pod changed", changed), ("EndpointSlice changed", slice), ("pod deleted", deleted)];
    let mut per_event = vec![];
    for pods in [500, 5_000] {
        let (mut store, mut progress) = (cluster(pods), Progress::new());
        pass(&mut store, &mut progress, Changed::default()).await;
        let everything = Changed { everything: true, ..Changed::default() };
        let whole = pass(&mut store, &mut progress, everything).await;
        let began = Clock::now();
        let mut directory = Directory::of(Source { store: &store, config: &settings, trust_domain: &td });
        let built = began.elapsed().as_secs_f64() * 1e6;
        eprintln!("{pods} pods: everything: registrar {whole:.0} us, directory {built:.0} us");
        for (name, event) in events {
            let (mut registrar, mut publisher) = (vec![], vec![]);
            for n in 0..EVENTS {
                let said = event(&mut store, n);
                let began = Clock::now();
                directory.update(Source { store: &store, config: &settings, trust_domain: &td }, &said);
                publisher.push(began.elapsed().as_secs_f64() * 1e6);
                registrar.push(pass(&mut store, &mut progress, said).await);
                directory.unpublished.clear();
            }
            let (registrar, publisher) = (median(registrar), median(publisher));
            eprintln!("{pods} pods: {name}: registrar {registrar:.1} us, directory {publisher:.1} us");
            per_event.push((name, registrar, publisher));
        }
    }
    let (small, large) = per_event.split_at(events.len());
    for ((name, registrar, publisher), (_, registrar_at_5000, publisher_at_5000)) in small.iter().zip(large) {
        // Ten times the pods; a cost that grew with them would be ten times as high.
        assert!(*registrar_at_5000 < registrar * 4.0 + 20.0, "{name}: {registrar} us, {registrar_at_5000} us");
        assert!(*publisher_at_5000 < publisher * 4.0 + 20.0, "{name}: {publisher} us, {publisher_at_5000} us");
    }
}
