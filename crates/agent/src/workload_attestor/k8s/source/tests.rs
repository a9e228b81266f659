#![allow(clippy::unwrap_used)]

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher::Event;
use tokio::time::Instant;

use super::super::api_server::tests::{pod, source};
use super::super::kubelet::tests::{FakeKubelet, nothing};
use super::super::{K8s, WorkloadAttestor};
use super::*;
use crate::cache::Cache;
use crate::endpoints::identities::Identities;
use crate::peer::Process;
use crate::testing::cached;
use crate::workload_attestor::{AttestorError, EveryFact, Proof};

const UID: &str = "7f1a6c1e-2c57-4a4f-9f3c-0d9b7f6b2a11";

fn id(digit: &str) -> String {
    digit.repeat(64)
}

fn list(pods: &[Pod]) -> String {
    serde_json::json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods }).to_string()
}

fn container(digit: &str) -> Container {
    Container { pod_uid: UID.into(), id: id(digit) }
}

/// A process in a container of the pod.
fn process(digit: &str) -> Process {
    let cgroup = format!("0::/kubepods/burstable/pod{UID}/{}\n", id(digit));
    Process { pid: 1, uid: 0, gid: 0, groups: [].into(), exe: None, cgroup, foreign: true }
}

fn watched(pods: &[Pod]) -> ApiServer {
    let (api_server, _) = source();
    api_server.hears(Event::Init);
    pods.iter().for_each(|p| api_server.hears(Event::InitApply(p.clone())));
    api_server.hears(Event::InitDone);
    api_server
}

fn both(api_server: ApiServer, kubelet: &FakeKubelet) -> (PodSources, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::default());
    (PodSources::new(Some(api_server), Some(kubelet.client(true)), metrics.clone()), metrics)
}

fn page(metrics: &Metrics) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &metrics.registry).unwrap();
    text
}

#[tokio::test]
async fn whichever_source_knows_the_container_serves_and_is_counted() {
    let kubelet = FakeKubelet::start(list(&[pod(UID, "web", &id("b"))]), true).await;
    let (sources, metrics) = both(watched(&[pod(UID, "web", &id("a"))]), &kubelet);
    let attestor = K8s { sources, namespaces: None };
    assert!(!attestor.attest(&process("a"), &EveryFact).await.unwrap().in_part);
    assert!(page(&metrics).contains(r#"pod_source_served_total{source="api_server"} 1"#));
    assert_eq!(kubelet.seen.0.load(std::sync::atomic::Ordering::Relaxed), 0, "it need not be asked");
    assert!(!attestor.attest(&process("b"), &EveryFact).await.unwrap().in_part);
    assert!(page(&metrics).contains(r#"pod_source_served_total{source="kubelet"} 1"#));
    let sources = &attestor.sources;
    assert!(sources.find(&container("c")).await.unwrap().container.is_none(), "its pod alone");
    let other = Container { pod_uid: UID.replace('7', "8"), id: id("a") };
    let Err(Missing::Yet(why)) = sources.find(&other).await else { panic!("a container of another pod is nobody's") };
    assert!(why.contains("the API server does not know pod") && why.contains("the kubelet does not know pod"), "{why}");
}

#[tokio::test]
async fn a_pod_that_was_deleted_is_not_found_by_a_kubelet_that_still_lists_it() {
    let kubelet = FakeKubelet::start(list(&[pod(UID, "web", &id("a"))]), true).await;
    let api_server = watched(&[pod(UID, "web", &id("a"))]);
    api_server.hears(Event::Delete(pod(UID, "web", &id("a"))));
    let (sources, metrics) = both(api_server, &kubelet);
    assert_eq!(sources.find(&container("a")).await.err(), Some(Missing::Deleted));
    let attestor = K8s { sources, namespaces: None };
    let began = Instant::now();
    let why = attestor.attest(&process("a"), &EveryFact).await.unwrap_err().to_string();
    assert!(why.contains("has been deleted") && began.elapsed() < Duration::from_secs(3), "{why}");
    assert!(!page(&metrics).contains("served_total{"));
}

#[tokio::test]
async fn where_the_kubelet_signs_itself_the_watch_alone_serves_and_the_agent_is_ready() {
    let kubelet = FakeKubelet::start(list(&[pod(UID, "web", &id("f"))]), false).await;
    let (api_server, _) = source();
    let (sources, metrics) = both(api_server, &kubelet);
    let why = sources.missing().unwrap();
    assert!(why.contains("has not listed this node's pods yet") && why.contains("has not answered yet"), "{why}");
    let _ = sources.find(&container("a")).await;
    assert!(sources.missing().unwrap().contains("certificate"));
    sources.api_server.as_ref().unwrap().hears(Event::Init);
    sources.api_server.as_ref().unwrap().hears(Event::InitApply(pod(UID, "web", &id("a"))));
    sources.api_server.as_ref().unwrap().hears(Event::InitDone);
    assert_eq!(sources.missing(), None);
    assert!(sources.find(&container("a")).await.unwrap().container.is_some());
    assert!(
        sources.find(&container("f")).await.unwrap().container.is_none(),
        "what an unverified peer says is nothing"
    );
    sources.observe();
    let page = page(&metrics);
    assert!(page.contains(r#"pod_source_up{source="api_server"} 1"#), "{page}");
    assert!(page.contains(r#"pod_source_up{source="kubelet"} 0"#), "{page}");
    assert!(sources.facts().iter().any(|(k, v)| k == "pods by kubelet" && v.contains("certificate")));
}

#[tokio::test]
async fn an_agent_without_any_source_that_works_says_so() {
    let kubelet = FakeKubelet::start(nothing(), false).await;
    let sources = PodSources::new(None, Some(kubelet.client(false)), Arc::default());
    let _ = sources.find(&container("a")).await;
    let why = sources.missing().unwrap();
    assert!(why.contains("pods of this node cannot be looked up") && why.contains("certificate"), "{why}");
}

/// A watch alone, with paused time: nothing of these tests is on a socket.
fn attestor(pods: &[Pod]) -> Arc<K8s> {
    Arc::new(K8s { sources: PodSources::new(Some(watched(pods)), None, Arc::default()), namespaces: None })
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_not_known_yet_is_attested_as_soon_as_it_is_and_never_as_another() {
    let attestor = attestor(&[pod("8f1a6c1e-2c57-4a4f-9f3c-0d9b7f6b2a11", "neighbour", &id("a"))]);
    let (waits, watch) = (attestor.clone(), attestor.clone());
    let asked = tokio::spawn(async move { waits.attest(&process("a"), &EveryFact).await });
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    let heard = Instant::now();
    watch.sources.api_server.as_ref().unwrap().hears(Event::Apply(pod(UID, "web", &id("a"))));
    let proof = asked.await.unwrap().unwrap();
    assert!(heard.elapsed() < Duration::from_millis(5), "it is told of the change, and need not ask");
    let found: Vec<String> = proof.selectors.iter().map(ToString::to_string).collect();
    assert!(
        found.contains(&format!("k8s:pod-uid:{UID}")) && found.contains(&"k8s:container-name:app".into()),
        "{found:?}"
    );
    assert!(!found.iter().any(|s| s.contains("neighbour")), "{found:?}");
    assert!(!proof.in_part);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_never_becomes_known_is_refused_within_the_deadline() {
    let began = Instant::now();
    let why = attestor(&[]).attest(&process("a"), &EveryFact).await.unwrap_err().to_string();
    assert!(why.contains("does not know pod"), "{why}");
    assert!(began.elapsed() > Duration::from_secs(25) && began.elapsed() <= Duration::from_secs(30));
}

#[tokio::test(start_paused = true)]
async fn a_container_that_stays_unknown_is_attested_by_its_pod_alone() {
    let began = Instant::now();
    let proof = attestor(&[pod(UID, "web", &id("a"))]).attest(&process("b"), &EveryFact).await.unwrap();
    assert!(proof.in_part && began.elapsed() >= Duration::from_secs(3));
    assert!(!proof.selectors.iter().any(|s| s.to_string().starts_with("k8s:container-")));
}

/// Entries with these selectors, in a cache that has been filled.
fn entries(all: &[&[&str]]) -> Cache {
    let cache = Cache::default();
    cache.change(|state| {
        state.synced = true;
        for (n, selectors) in all.iter().enumerate() {
            let mut one = cached(&format!("e{n}"), 1);
            Arc::get_mut(&mut one.entry).unwrap().selectors = selectors.iter().map(|s| s.parse().unwrap()).collect();
            state.entries.insert(one.entry.id.clone(), one);
        }
    });
    cache
}

/// Attests a process for the identities of these entries. The caller's user is known from elsewhere.
async fn attests(attestor: &K8s, digit: &str, cache: &Cache) -> Result<Proof, AttestorError> {
    let known = std::iter::once("unix:uid:2102".parse().unwrap()).collect();
    let now = time::OffsetDateTime::now_utc();
    attestor.attest(&process(digit), &Identities { cache, now, known: &known }).await
}

const POD: &str = "k8s:pod-uid:7f1a6c1e-2c57-4a4f-9f3c-0d9b7f6b2a11";

#[tokio::test(start_paused = true)]
async fn a_container_that_no_entry_asks_for_is_not_waited_for() {
    let (attestor, began) = (attestor(&[pod(UID, "web", &id("a"))]), Instant::now());
    let others = ["k8s:ns:elsewhere", "k8s:container-name:app"];
    let another_users = [POD, "k8s:container-name:app", "unix:uid:0"];
    let proof = attests(&attestor, "b", &entries(&[&[POD], &others, &another_users])).await.unwrap();
    assert!(proof.in_part && began.elapsed().is_zero());
    let found: Vec<String> = proof.selectors.iter().map(ToString::to_string).collect();
    let of_pod = ["k8s:node-name:n1", "k8s:ns:shop", "k8s:pod-label:app:web", "k8s:pod-name:web", POD, "k8s:sa:web-sa"];
    assert_eq!(found, of_pod, "what comes from statuses may change, and gives no identity");
}

#[tokio::test(start_paused = true)]
async fn a_container_that_an_entry_may_ask_for_is_waited_for() {
    for needs in ["k8s:container-name:app", "k8s:container-image:img:1", "k8s:pod-image:img:1", "k8s:pod-image-count:1"]
    {
        let attestor = attestor(&[pod(UID, "web", &id("a"))]);
        let cache = entries(&[&[POD], &["k8s:ns:shop", needs, "unix:uid:2102"]]);
        let heard = async {
            tokio::time::sleep(Duration::from_millis(1_350)).await;
            attestor.sources.api_server.as_ref().unwrap().hears(Event::Apply(pod(UID, "web", &id("b"))));
        };
        let began = Instant::now();
        let (proof, ()) = tokio::join!(attests(&attestor, "b", &cache), heard);
        let proof = proof.unwrap();
        assert!(!proof.in_part && began.elapsed() >= Duration::from_millis(1_350), "{needs}");
        assert!(proof.selectors.contains(&needs.parse().unwrap()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_no_entry_matches_yet_waits_for_its_container_or_an_entry() {
    let attestor = attestor(&[pod(UID, "web", &id("a"))]);
    let (cache, began) = (entries(&[]), Instant::now());
    let arrives = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let more = entries(&[&[POD]]);
        let more = more.change(|m| std::mem::take(&mut m.entries));
        cache.change(|state| state.entries = more);
    };
    let (proof, ()) = tokio::join!(attests(&attestor, "b", &cache), arrives);
    assert!(proof.unwrap().in_part && began.elapsed() < Duration::from_millis(1_600), "{:?}", began.elapsed());
    let (cache, began) = (Cache::default(), Instant::now());
    assert!(attests(&attestor, "b", &cache).await.unwrap().in_part);
    assert!(began.elapsed() >= Duration::from_secs(3), "nothing is settled before the entries are there");
}

#[tokio::test]
async fn a_kubelet_is_not_asked_where_the_watch_knows_enough() {
    let kubelet = FakeKubelet::start(list(&[]), true).await;
    let (sources, metrics) = both(watched(&[pod(UID, "web", &id("a"))]), &kubelet);
    let attestor = K8s { sources, namespaces: None };
    assert!(attests(&attestor, "b", &entries(&[&[POD]])).await.unwrap().in_part);
    assert_eq!(kubelet.seen.0.load(std::sync::atomic::Ordering::Relaxed), 0);
    assert!(page(&metrics).contains(r#"pod_source_served_total{source="api_server"} 1"#));
}
