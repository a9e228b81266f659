use std::convert::Infallible;
use std::sync::{Arc, Mutex as Locked};
use std::time::Duration;

use http_body_util::{BodyExt, Full, combinators::BoxBody};
use kube::client::Body;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tonic::codegen::http::{Method, Request, Response};

use super::*;
use crate::bundle_publisher::keep;
use crate::testing;

/// An API server with room for one ConfigMap.
struct Cluster {
    state: watch::Sender<State>,
    requests: Locked<Vec<String>>,
}

#[derive(Clone, Default)]
struct State {
    map: Option<Value>,
    /// Version of the latest change, whichever object it was.
    version: u64,
    /// Oldest version that a watch may begin at.
    oldest: u64,
}

impl Cluster {
    fn with(map: Value) -> Arc<Self> {
        let state = State { map: Some(map), version: 1, oldest: 0 };
        Arc::new(Self { state: watch::Sender::new(state), requests: Locked::default() })
    }

    /// Somebody changes the ConfigMap.
    fn change(&self, change: impl FnOnce(&mut Option<Value>)) {
        self.state.send_modify(|state| {
            change(&mut state.map);
            state.version += 1;
            if let Some(map) = &mut state.map {
                map["metadata"]["resourceVersion"] = state.version.to_string().into();
            }
        });
    }

    fn map(&self) -> Option<Value> {
        self.state.borrow().map.clone()
    }

    fn bundle(&self) -> Option<String> {
        self.map().and_then(|map| map["data"]["bundle.crt"].as_str().map(ToOwned::to_owned))
    }

    /// The answer to a request.
    async fn answer(&self, request: Request<Body>) -> (u16, Value) {
        let (parts, body) = request.into_parts();
        let kind = parts.headers.get("content-type").and_then(|h| h.to_str().ok()).unwrap_or_default().to_owned();
        let query = parts.uri.query().unwrap_or_default().to_owned();
        let is_watch = query.contains("watch=true");
        self.requests.lock().unwrap().push(format!("{} {kind} {query}", parts.method));
        if parts.method == Method::PATCH {
            let given: Value = serde_json::from_slice(&body.collect().await.unwrap().to_bytes()).unwrap();
            if self.map().is_none() && !kind.contains("apply") {
                return (404, json!({ "kind": "Status", "code": 404, "message": "not found" }));
            }
            let before = self.map().unwrap_or_else(|| json!({ "metadata": {} }));
            let mut after = before.clone();
            merge(&mut after, given);
            if after != before {
                self.change(|map| *map = Some(after));
            }
            return (200, self.map().unwrap());
        }
        if !is_watch {
            let State { map, version, .. } = self.state.borrow().clone();
            let items: Vec<Value> = map.into_iter().collect();
            let metadata = json!({ "resourceVersion": version.to_string() });
            return (200, json!({ "kind": "ConfigMapList", "apiVersion": "v1", "metadata": metadata, "items": items }));
        }
        let from = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")).unwrap();
        let from: u64 = from.parse().unwrap();
        let mut states = self.state.subscribe();
        let state = states.wait_for(|state| state.version > from || state.oldest > from).await.unwrap().clone();
        if state.oldest > from {
            let gone = json!({ "kind": "Status", "code": 410, "reason": "Expired", "message": "too old" });
            return (200, json!({ "type": "ERROR", "object": gone }));
        }
        let deleted = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "b" } });
        let (kind, object) = state.map.map_or(("DELETED", deleted), |map| ("MODIFIED", map));
        (200, json!({ "type": kind, "object": object }))
    }
}

/// RFC 7386, for what the tests send.
fn merge(into: &mut Value, given: Value) {
    match given {
        Value::Object(given) if into.is_object() => {
            for (key, value) in given {
                merge(&mut into[key.as_str()], value);
            }
        }
        other => *into = other,
    }
}

/// Keeps the ConfigMap of this cluster until the returned token is cancelled.
fn publishing(cluster: &Arc<Cluster>) -> (TrustBundle, CancellationToken, watch::Sender<Arc<TrustBundle>>) {
    let api = cluster.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        let api = api.clone();
        async move {
            let (status, answer) = api.answer(request).await;
            let body: BoxBody<_, Infallible> = Full::from(format!("{answer}\n")).boxed();
            Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap())
        }
    });
    let place = BundleConfigMap { namespace: "c".into(), name: "b".into(), key: "bundle.crt".into() };
    let publisher = Arc::new(K8sConfigMap::new(place, kube::Client::new(service, "c")));
    let (bundle, shutdown) = (testing::bundle(), CancellationToken::new());
    let (bundles, receiver) = watch::channel(Arc::new(bundle.clone()));
    tokio::spawn(keep(publisher, receiver, shutdown.clone()));
    (bundle, shutdown, bundles)
}

fn installed() -> Value {
    json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": {
        "name": "b",
        "labels": { "app.kubernetes.io/name": "countersign", "app.kubernetes.io/managed-by": "Helm" },
        "annotations": { "meta.helm.sh/release-name": "mesh" },
    } })
}

/// Waits until the ConfigMap is as it should be; the time that it took.
async fn restored(cluster: &Cluster, wanted: impl Fn(&Value) -> bool) -> Duration {
    let began = Instant::now();
    while !cluster.map().as_ref().is_some_and(&wanted) {
        sleep(Duration::from_millis(10)).await;
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", cluster.map());
    }
    began.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_configmap_that_was_deleted_edited_or_emptied_is_as_before_within_two_seconds() {
    let cluster = Cluster::with(installed());
    let (bundle, shutdown, _bundles) = publishing(&cluster);
    let pem = bundle.to_pem();
    let whole = |map: &Value| {
        map["data"]["bundle.crt"] == pem.as_str()
            && map["metadata"]["labels"] == installed()["metadata"]["labels"]
            && map["metadata"]["annotations"] == installed()["metadata"]["annotations"]
    };
    restored(&cluster, whole).await;
    let tries: [fn(&mut Option<Value>); 4] = [
        |map| *map = None,
        |map| map.as_mut().unwrap()["data"]["bundle.crt"] = "garbage".into(),
        |map| drop(map.as_mut().unwrap().as_object_mut().unwrap().remove("data")),
        // Deleted, and made by hand before we could.
        |map| *map = Some(json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "b" }, "data": {} })),
    ];
    for hurt in tries {
        sleep(Duration::from_secs(60)).await;
        cluster.change(hurt);
        let took = restored(&cluster, whole).await;
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
    shutdown.cancel();
}

#[tokio::test(start_paused = true)]
async fn one_that_was_deleted_before_the_server_began_has_the_charts_labels() {
    let cluster = Cluster::with(Value::Null);
    cluster.change(|map| *map = None);
    let (bundle, shutdown, _bundles) = publishing(&cluster);
    let labels = json!({ "app.kubernetes.io/name": "countersign", "app.kubernetes.io/component": "server" });
    restored(&cluster, |map| map["metadata"]["labels"] == labels).await;
    assert_eq!(cluster.bundle(), Some(bundle.to_pem()));
    shutdown.cancel();
}

#[tokio::test(start_paused = true)]
async fn others_keys_and_marks_are_left_alone() {
    let cluster = Cluster::with(installed());
    let (_bundle, shutdown, _bundles) = publishing(&cluster);
    restored(&cluster, |map| map["data"]["bundle.crt"].is_string()).await;
    cluster.change(|map| {
        let map = map.as_mut().unwrap();
        map["metadata"]["labels"]["team"] = "a".into();
        map["data"]["note"] = "theirs".into();
    });
    sleep(Duration::from_secs(1)).await;
    cluster.change(|map| drop(map.as_mut().unwrap()["data"].as_object_mut().unwrap().remove("bundle.crt")));
    restored(&cluster, |map| map["data"]["bundle.crt"].is_string() && map["data"]["note"] == "theirs").await;
    cluster.change(|map| *map = None);
    restored(&cluster, |map| map["metadata"]["labels"]["team"] == "a").await;
    shutdown.cancel();
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_remembers_no_old_version_is_not_asked_without_end() {
    let cluster = Cluster::with(installed());
    let (_bundle, shutdown, _bundles) = publishing(&cluster);
    restored(&cluster, |map| map["data"]["bundle.crt"].is_string()).await;
    // As after its restart: it knows what there is, and nothing of what was before. Other objects have changed meanwhile.
    cluster.state.send_modify(|state| {
        state.version += 100;
        state.oldest = state.version;
    });
    let before = cluster.requests.lock().unwrap().len();
    sleep(Duration::from_secs(600)).await;
    let asked = cluster.requests.lock().unwrap().split_off(before);
    assert!(asked.len() < 20, "{} requests in ten minutes, such as {:?}", asked.len(), &asked[..3]);
    shutdown.cancel();
}
