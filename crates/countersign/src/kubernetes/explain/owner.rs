//! What makes pods and cannot: a Deployment, a Job and so on, by its status, its pods and its events. A pod that the API server
//! refuses is never there to be looked at.

use std::collections::{BTreeMap, BTreeSet};

use countersign_controller::injector::SIDECAR;
use countersign_identity::shown::sentence;
use countersign_watch::in_words;
use futures::future::join_all;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{Api, ApiResource, DynamicObject, ListParams};
use kube::{Client, ResourceExt};
use serde_json::Value;

use super::events::{self, About};
use super::objects::{self, Injection};
use super::target::{Kind, Target};
use super::{Explained, Step};
use crate::kubernetes::cluster::{is_ready, listed};
use crate::kubernetes::pod_state;
use crate::settings::words::count;

/// Longest message of a condition that is repeated, in characters.
const MAX_MESSAGE: usize = 400;
/// Most pods that are told of one by one, and most of a Deployment's older `ReplicaSet`s whose events are read.
const MAX_PODS: usize = 3;
const MAX_SETS: usize = 3;

/// Explains what makes pods. Error: it is not there, or cannot be read.
pub async fn explain(client: &Client, namespace: &str, target: &Target) -> anyhow::Result<Explained> {
    let (kind, name) = (target.kind, &target.name);
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &resource(kind));
    let found = api.get_opt(name).await;
    let found =
        found.map_err(|e| anyhow::anyhow!("cannot read {} {namespace}/{name}: {}", kind.word(), in_words(&e)))?;
    let found = found.ok_or_else(|| anyhow::anyhow!("there is no {} {namespace}/{name}", kind.word()))?;
    let (makers, mut notes) = makers(client, namespace, kind, &found).await;
    let mut steps = vec![Step { name: kind.word(), outcome: counted(kind, &found.data) }];
    // As long as no pod says otherwise: what is missing may be what would have been meshed.
    let mut is_wanted = true;
    match pods_of(client, namespace, &makers).await {
        Ok(pods) => {
            steps.push(Step { name: "pods", outcome: judged(&pods, wanted(kind, &found.data), namespace) });
            let alive: Vec<&Pod> = pods.iter().filter(|pod| !is_leftover(pod)).collect();
            let space = objects::space(client, &alive, namespace).await;
            let look = |pod: &&Pod| (pod.name_any(), objects::injection(pod, space.as_ref()));
            let looked_at: Vec<(String, Injection)> = alive.iter().map(look).collect();
            is_wanted = looked_at.is_empty() || looked_at.iter().any(|(_, injection)| injection.is_wanted);
            steps.extend(injected(&looked_at).map(|outcome| Step { name: "injection", outcome }));
        }
        Err(why) => notes.push(format!("pods were not read: {why}")),
    }
    let mut warned = vec![];
    let abouts = makers.iter().map(|maker| About { kind: maker.kind, name: &maker.name });
    let told = join_all(abouts.map(|about| events::about(client, namespace, about))).await;
    for (Maker { kind, name, .. }, told) in makers.iter().zip(told) {
        match told {
            Ok(more) => warned.extend(more),
            Err(why) => notes.push(format!("events of {} {name} were not read: {why}", kind.word())),
        }
    }
    Ok(Explained { steps, warnings: events::warnings(&warned), notes, is_wanted, ..Explained::default() })
}

/// The controller that could not make a pod of this name; `None` if no event tells of one.
pub async fn of_missing_pod(client: &Client, namespace: &str, pod: &str) -> Result<Option<Target>, String> {
    let failed = events::failed_creations(client, namespace).await?;
    Ok(maker_of(pod, &failed))
}

/// By names: `web-5d8f` makes `web-5d8f-x7k2p`, and `web` is what one says who never saw a pod's name. The closest name counts.
fn maker_of(pod: &str, failed: &[Event]) -> Option<Target> {
    let related = |name: &str| {
        let below = |long: &str, short: &str| long.strip_prefix(short).is_some_and(|rest| rest.starts_with('-'));
        name == pod || below(pod, name) || below(name, pod)
    };
    let objects = failed.iter().map(|e| &e.involved_object);
    let named = objects.filter_map(|o| Some((Kind::of_api(o.kind.as_deref()?)?, o.name.clone()?)));
    let closest = named.filter(|(kind, name)| *kind != Kind::Pod && related(name)).max_by_key(|(_, name)| name.len());
    closest.map(|(kind, name)| Target { kind, name })
}

fn resource(kind: Kind) -> ApiResource {
    match kind {
        Kind::Pod => ApiResource::erase::<Pod>(&()),
        Kind::Deployment => ApiResource::erase::<Deployment>(&()),
        Kind::ReplicaSet => ApiResource::erase::<ReplicaSet>(&()),
        Kind::StatefulSet => ApiResource::erase::<StatefulSet>(&()),
        Kind::DaemonSet => ApiResource::erase::<DaemonSet>(&()),
        Kind::Job => ApiResource::erase::<Job>(&()),
    }
}

/// An object that owns pods, or owns what owns them.
struct Maker {
    kind: Kind,
    name: String,
    uid: String,
}

/// The object itself, and for a Deployment its `ReplicaSet`s, the newest first; and what could not be read.
async fn makers(client: &Client, namespace: &str, kind: Kind, found: &DynamicObject) -> (Vec<Maker>, Vec<String>) {
    let own = Maker { kind, name: found.name_any(), uid: found.uid().unwrap_or_default() };
    if kind != Kind::Deployment {
        return (vec![own], vec![]);
    }
    let sets: Api<ReplicaSet> = Api::namespaced(client.clone(), namespace);
    let mut sets = match sets.list(&ListParams::default()).await {
        Ok(sets) => sets.items,
        Err(error) => return (vec![own], vec![format!("replicasets were not read: {}", in_words(&error))]),
    };
    sets.retain(|set| set.owner_references().iter().any(|o| o.uid == own.uid));
    sets.sort_by_key(|set| std::cmp::Reverse(set.creation_timestamp().map(|t| t.0)));
    let sets = sets.into_iter().take(MAX_SETS);
    let sets =
        sets.map(|set| Maker { kind: Kind::ReplicaSet, name: set.name_any(), uid: set.uid().unwrap_or_default() });
    ([own].into_iter().chain(sets).collect(), vec![])
}

async fn pods_of(client: &Client, namespace: &str, makers: &[Maker]) -> Result<Vec<Pod>, String> {
    let uids: BTreeSet<&str> = makers.iter().map(|maker| maker.uid.as_str()).collect();
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pods = api.list(&ListParams::default()).await.map_err(|e| in_words(&e))?.items;
    Ok(pods.into_iter().filter(|pod| pod.owner_references().iter().any(|o| uids.contains(o.uid.as_str()))).collect())
}

/// How many pods it wants.
fn wanted(kind: Kind, object: &Value) -> i64 {
    match kind {
        Kind::DaemonSet => object["status"]["desiredNumberScheduled"].as_i64().unwrap_or(0),
        Kind::Job => object["spec"]["completions"].as_i64().unwrap_or(1),
        _ => object["spec"]["replicas"].as_i64().unwrap_or(1),
    }
}

/// How many pods it has, and what its conditions say.
fn counted(kind: Kind, object: &Value) -> Result<String, String> {
    let status = &object["status"];
    let of = |field: &str| status[field].as_i64().unwrap_or(0);
    let (wanted, what, has) = match kind {
        Kind::DaemonSet => (wanted(kind, object), "ready", of("numberReady")),
        Kind::Job => (wanted(kind, object), "completed", of("succeeded")),
        _ => (wanted(kind, object), "ready", of("readyReplicas")),
    };
    let mut said = vec![format!("{has} of {wanted} pods {what}")];
    let bad: Vec<String> = status["conditions"].as_array().into_iter().flatten().filter_map(trouble).collect();
    let is_well = has >= wanted || kind == Kind::Job && of("ready") > 0;
    let is_good = is_well && bad.is_empty();
    said.extend(bad);
    let said = said.join("; ");
    if is_good { Ok(said) } else { Err(said) }
}

/// A condition that says what is wrong.
fn trouble(condition: &Value) -> Option<String> {
    let is_bad = match (condition["type"].as_str()?, condition["status"].as_str()?) {
        ("ReplicaFailure" | "Failed", status) => status == "True",
        ("Available" | "Progressing", status) => status == "False",
        _ => false,
    };
    let text = |field: &str| sentence(condition[field].as_str().unwrap_or_default(), MAX_MESSAGE).to_string();
    is_bad.then(|| format!("{} {}: {}: {}", text("type"), text("status"), text("reason"), text("message")))
}

fn is_leftover(pod: &Pod) -> bool {
    let failed = pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Failed");
    failed || pod.metadata.deletion_timestamp.is_some()
}

fn judged(pods: &[Pod], wanted: i64, namespace: &str) -> Result<String, String> {
    let done = |pod: &&Pod| pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Succeeded");
    let is_well = |pod: &&Pod| (is_ready(pod) || done(pod)) && pod.metadata.deletion_timestamp.is_none();
    let well = pods.iter().filter(is_well).count();
    // Where as many as wanted are well, one that failed before them, or is on its way out, is a leftover.
    let enough = i64::try_from(well).is_ok_and(|well| well >= wanted);
    let ill: Vec<&Pod> = pods.iter().filter(|pod| !(is_well(pod) || enough && is_leftover(pod))).collect();
    match (ill.as_slice(), pods) {
        ([], []) if wanted > 0 => Err("none was made".into()),
        ([], _) => Ok(format!("{well} as they should be")),
        ([first, ..], _) => {
            let told = ill
                .iter()
                .take(MAX_PODS)
                .map(|pod| format!("{}: {}", pod.name_any(), pod_state::state(pod).unwrap_or_else(|why| why)));
            let told = told.collect::<Vec<_>>().join("; ");
            let next = format!("`countersign explain pod {} -n {namespace}` tells more", first.name_any());
            Err(format!("{} of {} not ready: {told}; {next}", ill.len(), pods.len()))
        }
    }
}

/// Whether the pods are in the mesh; `None` where there is none to look at.
fn injected(pods: &[(String, Injection)]) -> Option<Result<String, String>> {
    let without = pods.iter().filter_map(|(name, injection)| Some((name, injection.outcome.as_ref().err()?)));
    let mut by_reason = BTreeMap::<&str, Vec<String>>::new();
    for (name, why) in without {
        by_reason.entry(why).or_default().push(name.clone());
    }
    if by_reason.is_empty() {
        return (!pods.is_empty()).then(|| Ok(format!("{} with container {SIDECAR}", count(pods.len(), "pod"))));
    }
    let without: usize = by_reason.values().map(Vec::len).sum();
    let told: Vec<String> = by_reason.iter().map(|(why, names)| format!("{}: {why}", listed(names))).collect();
    Some(Err(format!("{without} of {} not in the mesh: {}", count(pods.len(), "pod"), told.join("; "))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::check::fake_api::{Answer, Asked, client, list};
    use serde_json::json;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;
    use tokio::time::Instant;

    fn failed(kind: &str, name: &str) -> Event {
        let object = json!({ "kind": kind, "name": name });
        serde_json::from_value(json!({ "metadata": { "name": "x" }, "involvedObject": object })).unwrap()
    }

    #[test]
    fn a_pod_that_was_never_made_is_found_by_its_controllers_name() {
        let events = [
            failed("ReplicaSet", "web-5d8f"),
            failed("ReplicaSet", "webshop-77"),
            failed("Job", "once"),
            failed("StatefulSet", "web"),
        ];
        let maker = |pod: &str| maker_of(pod, &events).map(|t| (t.kind, t.name));
        assert_eq!(maker("web-5d8f-x7k2p"), Some((Kind::ReplicaSet, "web-5d8f".into())));
        assert_eq!(maker("once-x7k2p"), Some((Kind::Job, "once".into())));
        assert_eq!(maker("web-0"), Some((Kind::StatefulSet, "web".into())));
        assert_eq!(maker("web"), Some((Kind::ReplicaSet, "web-5d8f".into())), "the name that one knows");
        assert_eq!(maker("we"), None);
        assert_eq!(maker_of("x", &[failed("Pod", "x"), failed("Queue", "x")]), None, "of kinds that make pods");
    }

    #[test]
    fn a_replica_failure_is_told_with_its_message() {
        let condition = json!({
            "type": "ReplicaFailure", "status": "True", "reason": "FailedCreate",
            "message": "pods \"web-\" is forbidden: exceeded quota\u{1b}",
        });
        let progressing = json!({ "type": "Progressing", "status": "True", "reason": "x", "message": "y" });
        let object = json!({ "spec": { "replicas": 2 }, "status": { "conditions": [progressing, condition] } });
        assert_eq!(
            counted(Kind::Deployment, &object).unwrap_err(),
            "0 of 2 pods ready; ReplicaFailure True: FailedCreate: pods \"web-\" is forbidden: exceeded quota\\u{1b}"
        );
        assert!(counted(Kind::Deployment, &json!({ "spec": { "replicas": 0 } })).is_ok());
        assert!(
            counted(Kind::DaemonSet, &json!({ "status": { "desiredNumberScheduled": 2, "numberReady": 2 } })).is_ok()
        );
        assert!(counted(Kind::Job, &json!({ "status": { "active": 1, "ready": 1 } })).is_ok());
        assert!(counted(Kind::Job, &json!({ "status": { "active": 1 } })).is_err());
    }

    #[test]
    fn pods_that_are_not_in_the_mesh_are_named_with_the_reason() {
        let pod = |name: &str, outcome: Result<&str, &str>| {
            let outcome = outcome.map(ToOwned::to_owned).map_err(ToOwned::to_owned);
            (name.to_owned(), Injection { outcome, is_wanted: false })
        };
        assert!(injected(&[]).is_none(), "there is none to look at");
        let meshed = injected(&[pod("a", Ok("it has container countersign-proxy"))]).unwrap();
        assert_eq!(meshed.unwrap(), "1 pod with container countersign-proxy");
        let label = "neither the pod nor its namespace is labelled countersign.dev/inject=enabled";
        let some = [pod("a", Ok("")), pod("b", Err(label)), pod("c", Err(label)), pod("d", Err("older"))];
        let why = injected(&some).unwrap().unwrap_err();
        assert_eq!(why, format!("3 of 4 pods not in the mesh: b, c: {label}; d: older"));
    }

    /// A cluster with a Deployment whose pods run without a sidecar, and whose namespace has this answer.
    fn unmeshed(pods: usize, space: impl Fn() -> Answer + Send + Sync + 'static) -> Client {
        let owned = |name: &str, by: &str| {
            json!({ "name": name, "namespace": "shop", "uid": name,
                    "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "x", "name": by, "uid": by }] })
        };
        client(move |asked: &Asked| match asked.path.as_str() {
            path if path.ends_with("/deployments/web") => Answer::Now(
                200,
                json!({ "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web", "uid": "web" },
                        "spec": { "replicas": pods }, "status": { "readyReplicas": pods } }),
            ),
            path if path.ends_with("/replicasets") => {
                list("ReplicaSetList", vec![json!({ "metadata": owned("web-1", "web"), "spec": { "selector": {} } })])
            }
            path if path.ends_with("/pods") => {
                let status = json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] });
                let spec = json!({ "containers": [{ "name": "app" }] });
                let pod =
                    |n| json!({ "metadata": owned(&format!("web-1-{n}"), "web-1"), "spec": spec, "status": status });
                list("PodList", (0..pods).map(pod).collect())
            }
            path if path.ends_with("/events") => list("EventList", vec![]),
            "/api/v1/namespaces/shop" => space(),
            path => panic!("{path}"),
        })
    }

    #[tokio::test]
    async fn a_deployment_that_is_well_and_not_in_the_mesh_is_not_green() {
        let client = unmeshed(1, || Answer::Now(200, json!({ "metadata": { "name": "shop" } })));
        let target = Target { kind: Kind::Deployment, name: "web".into() };
        let explained = explain(&client, "shop", &target).await.unwrap();
        let told: Vec<_> = explained.steps.iter().map(|s| (s.name, s.outcome.is_ok())).collect();
        assert_eq!(told, [("deployment", true), ("pods", true), ("injection", false)]);
        assert!(!explained.is_wanted, "nobody asked for it, so that the mesh is not to blame");
        let why = explained.steps[2].outcome.as_ref().unwrap_err();
        assert!(why.starts_with("1 of 1 pod not in the mesh: web-1-0: neither the pod nor its namespace"), "{why}");
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_pods_the_namespace_is_read_once_and_not_waited_for_without_end() {
        let (reads, began) = (Arc::new(AtomicUsize::new(0)), Instant::now());
        let counted = reads.clone();
        let client = unmeshed(500, move || {
            counted.fetch_add(1, Ordering::Relaxed);
            Answer::Never
        });
        let target = Target { kind: Kind::Deployment, name: "web".into() };
        let explained = explain(&client, "shop", &target).await.unwrap();
        let why = explained.steps[2].outcome.as_ref().unwrap_err();
        assert!(why.starts_with("500 of 500 pods not in the mesh: ") && why.contains(" and 495 more"), "{why}");
        assert_eq!(reads.load(Ordering::Relaxed), 1);
        assert!(began.elapsed() < Duration::from_secs(11), "{:?}", began.elapsed());
    }

    #[test]
    fn pods_that_are_not_ready_are_named_with_their_state() {
        let pod = |name: &str, ready: &str| -> Pod {
            let status = json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": ready }] });
            let metadata = json!({ "name": name });
            serde_json::from_value(json!({ "metadata": metadata, "spec": { "containers": [] }, "status": status }))
                .unwrap()
        };
        assert_eq!(judged(&[], 1, "shop").unwrap_err(), "none was made");
        assert!(judged(&[], 0, "shop").is_ok() && judged(&[pod("a", "True")], 1, "shop").is_ok());
        let mut evicted = pod("c", "False");
        evicted.status.as_mut().unwrap().phase = Some("Failed".into());
        assert!(judged(&[pod("a", "True"), evicted.clone()], 1, "shop").is_ok(), "what failed before is over");
        assert!(judged(&[pod("a", "True"), evicted], 2, "shop").is_err());
        let mut leaving = pod("d", "True");
        leaving.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        assert_eq!(judged(&[pod("a", "True"), leaving.clone()], 1, "shop").unwrap(), "1 as they should be");
        assert!(judged(&[pod("a", "True"), leaving], 2, "shop").is_err(), "one that is leaving is not as it should be");
        let said = judged(&[pod("a", "True"), pod("b", "False")], 2, "shop").unwrap_err();
        assert_eq!(said, "1 of 2 not ready: b: Running; `countersign explain pod b -n shop` tells more");
    }
}
