use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::step::gone_past;
use super::*;
use crate::kubernetes::check::fake_api::{Answer, Asked, client, list, refused};
use countersign_controller::injector::SIDECAR;
use serde_json::Value;
use tokio::time::Instant;

#[test]
fn a_sidecar_has_taken_a_step_once_no_port_of_it_is_strict() {
    assert_eq!(INBOUND.lacks("permissive\n"), None);
    assert_eq!(INBOUND.lacks("off\n"), None);
    assert_eq!(INBOUND.lacks("permissive\n9443 off\n"), None);
    assert_eq!(INBOUND.lacks("strict\n").as_deref(), Some("its mode is strict"));
    assert_eq!(INBOUND.lacks("permissive\n9443 off\n8080 strict\n").as_deref(), Some("its port 8080 is strict"));
    assert_eq!(FULL.lacks("permissive\n").as_deref(), Some("its mode is permissive"));
    assert_eq!(FULL.lacks("off\n"), None);
    assert!(FULL.lacks("").is_some());
}

/// A cluster with meshed pods and its ConfigMap.
struct World {
    client: Client,
    /// Each value that was written.
    written: Arc<Mutex<Vec<Value>>>,
}

fn pod(name: &str, container: &str) -> Value {
    json!({ "metadata": { "namespace": "shop", "name": name }, "spec": { "containers": [{ "name": container }] },
            "status": { "phase": "Running" } })
}

/// With one pod, whose sidecar has one mode whatever it is told.
fn world(present: Option<&'static str>, mode: &'static str, mesh: fn() -> Answer) -> World {
    world_of(present, vec![pod("web", SIDECAR)], move |_| Answer::Now(200, json!(mode)), mesh)
}

fn world_of(
    present: Option<&'static str>,
    pods: Vec<Value>,
    mode: impl Fn(&str) -> Answer + Send + Sync + 'static,
    mesh: fn() -> Answer,
) -> World {
    let written = Arc::<Mutex<Vec<Value>>>::default();
    let seen = written.clone();
    let client = client(move |asked: &Asked| match asked.path.as_str() {
        path if path.ends_with("/configmaps/countersign-mesh") => {
            let mut now = json!(present);
            let mut seen = seen.lock().unwrap();
            if asked.body["data"].is_object() {
                assert_eq!(asked.body["metadata"]["resourceVersion"], "7", "what it was when it was read");
                seen.push(asked.body["data"][KEY].clone());
            }
            if let Some(last) = seen.last() {
                now = last.clone();
            }
            let data = if now.is_null() { json!({}) } else { json!({ KEY: now }) };
            Answer::Now(200, json!({ "metadata": { "name": "m", "resourceVersion": "7" }, "data": data }))
        }
        "/api/v1/namespaces/mesh/pods" => list("PodList", vec![pod("countersign-server-0", "server")]),
        "/api/v1/pods" => list("PodList", pods.clone()),
        path if path.ends_with(":9465/proxy/mesh") => mesh(),
        path if path.ends_with("/proxy/mode") => mode(path),
        path => panic!("{path}"),
    });
    World { client, written }
}

async fn go(world: &World, at_once: bool) -> Result<()> {
    go_without(world, at_once, &[]).await
}

async fn go_without(world: &World, at_once: bool, without: &[&str]) -> Result<()> {
    let without = without.iter().map(|text| text.parse().unwrap()).collect();
    let way = Way { namespace: "mesh".into(), patience: Duration::from_secs(5), at_once, without };
    way.go(&world.client, &CancellationToken::new()).await
}

fn new() -> Answer {
    Answer::Now(200, json!({ "mode": "strict" }))
}

/// What a page that is not there says through the API server's proxy.
fn old() -> Answer {
    Answer::Now(404, json!("not found\n"))
}

#[tokio::test(start_paused = true)]
async fn an_older_control_plane_is_told_nothing_that_it_does_not_know() {
    let world = world(None, "strict\n", old);
    let why = go(&world, false).await.unwrap_err().to_string();
    assert!(why.contains("pod countersign-server-0") && why.contains("--at-once"), "{why}");
    assert!(world.written.lock().unwrap().is_empty());
    let silent = self::world(None, "off\n", || refused(404, "pods \"countersign-server-0\" not found"));
    let why = go(&silent, false).await.unwrap_err().to_string();
    assert!(why.contains("does not say whether") && why.contains("--at-once") && !why.contains("older"), "{why}");
    let asked = self::world(None, "off\n", old);
    go(&asked, true).await.unwrap();
    assert_eq!(*asked.written.lock().unwrap(), [json!("true")]);
}

#[tokio::test(start_paused = true)]
async fn a_mesh_whose_sidecars_do_not_take_the_first_step_is_what_it_was() {
    let stays = world(Some("false"), "strict\n", new);
    let why = go(&stays, false).await.unwrap_err().to_string();
    assert!(why.contains("shop/web among them (its mode is strict)"), "{why}");
    assert!(why.ends_with("nothing was removed, and the mesh is what it was"), "{why}");
    assert_eq!(*stays.written.lock().unwrap(), [json!("inbound"), json!("false")]);
    let interrupted = world(None, "strict\n", new);
    let way = Way { namespace: "mesh".into(), patience: Duration::from_secs(60), at_once: false, without: vec![] };
    let stop = CancellationToken::new();
    stop.cancel();
    let why = way.go(&interrupted.client, &stop).await.unwrap_err().to_string();
    assert!(why.starts_with("interrupted before all sidecars accept plaintext"), "{why}");
    assert_eq!(*interrupted.written.lock().unwrap(), [json!("inbound"), Value::Null]);
    // Of an earlier run that was killed: nobody knows what it was before.
    let left = world(Some("inbound"), "strict\n", new);
    let why = go(&left, false).await.unwrap_err().to_string();
    assert!(why.contains("still told to accept plaintext") && !why.contains("what it was"), "{why}");
    let unset = world(None, "permissive\n8080 strict\n", new);
    let why = go(&unset, false).await.unwrap_err().to_string();
    assert!(why.contains("its port 8080 is strict"), "{why}");
    assert_eq!(*unset.written.lock().unwrap(), [json!("inbound"), Value::Null]);
}

/// Of two pods, one whose sidecar does not answer.
fn one_is_silent(path: &str) -> Answer {
    if path.contains("/broken:") { Answer::Never } else { Answer::Now(200, json!("off\n")) }
}

fn ready(mut pod: Value) -> Value {
    pod["status"]["conditions"] = json!([{ "type": "Ready", "status": "True" }]);
    pod
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_does_not_answer_holds_nobody_up_for_ever() {
    let pods = vec![ready(pod("web", SIDECAR)), pod("broken", SIDECAR)];
    let world = world_of(None, pods, one_is_silent, new);
    let began = Instant::now();
    go(&world, false).await.unwrap();
    assert_eq!(*world.written.lock().unwrap(), [json!("inbound"), json!("true")]);
    // Once for its patience and a look's own time, and for one look in the second step.
    assert!(began.elapsed() < Duration::from_secs(18), "{:?}", began.elapsed());
    let silent = [("shop/broken".to_owned(), "no answer within 5 s".to_owned())];
    let said = gone_past(&silent);
    assert!(said.starts_with("going on without 1 sidecar that cannot be asked: shop/broken (no answer"), "{said}");
    // The only one, which its kubelet finds broken too.
    let alone = world_of(None, vec![pod("broken", SIDECAR)], one_is_silent, new);
    go(&alone, false).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_ready_is_not_broken_because_its_sidecar_cannot_be_asked() {
    let broken = || ready(pod("broken", SIDECAR));
    // Whether others answer or nobody can be asked.
    for pods in [vec![ready(pod("web", SIDECAR)), broken()], vec![broken()]] {
        let unreachable = world_of(None, pods.clone(), one_is_silent, new);
        let why = go(&unreachable, false).await.unwrap_err().to_string();
        for part in ["shop/broken among them (no answer within 5 s)", "ready", "--without NAMESPACE/POD"] {
            assert!(why.contains(part), "{part}: {why}");
        }
        assert_eq!(*unreachable.written.lock().unwrap(), [json!("inbound"), Value::Null], "it is what it was");
        go_without(&world_of(None, pods, one_is_silent, new), false, &["shop/broken"]).await.unwrap();
    }
    // One that is broken beside it does not hide it.
    let both = |path: &str| if path.contains("/web:") { Answer::Now(200, json!("off\n")) } else { Answer::Never };
    let pods = vec![ready(pod("web", SIDECAR)), pod("ill", SIDECAR), broken()];
    let why = go(&world_of(None, pods, both, new), false).await.unwrap_err().to_string();
    assert!(why.contains("shop/broken among them") && !why.contains("shop/ill"), "{why}");
}

/// Of two pods, one whose sidecar does not answer until the second step.
fn one_comes_back(mode: &'static str) -> World {
    let asked = AtomicUsize::new(0);
    let answer = move |path: &str| match path.contains("/broken:") {
        // Twice within its patience.
        true if asked.fetch_add(1, Ordering::Relaxed) < 2 => Answer::Never,
        true => Answer::Now(200, json!(mode)),
        false => Answer::Now(200, json!("off\n")),
    };
    world_of(None, vec![pod("web", SIDECAR), pod("broken", SIDECAR)], answer, new)
}

#[tokio::test(start_paused = true)]
async fn a_sidecar_that_was_passed_is_asked_again_in_the_next_step() {
    go(&one_comes_back("off\n"), false).await.unwrap();
    let strict = one_comes_back("strict\n");
    let why = go(&strict, false).await.unwrap_err().to_string();
    assert!(why.contains("1 sidecar has yet to send plaintext, shop/broken among them (its mode is strict)"), "{why}");
    assert_eq!(*strict.written.lock().unwrap(), [json!("inbound"), json!("true")]);
}

#[tokio::test(start_paused = true)]
async fn a_sidecar_that_is_down_is_not_waited_for_and_one_that_is_strict_is() {
    let mut down = pod("broken", SIDECAR);
    let waits = json!({ "waiting": { "reason": "CrashLoopBackOff" } });
    down["status"]["containerStatuses"] = json!([{ "name": SIDECAR, "state": waits, "ready": false, "restartCount": 9,
                                                   "image": "", "imageID": "" }]);
    let world = world_of(None, vec![pod("web", SIDECAR), down], one_is_silent, new);
    let began = Instant::now();
    go(&world, false).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let strict =
        |path: &str| if path.contains("/broken:") { Answer::Never } else { Answer::Now(200, json!("strict\n")) };
    let stays = world_of(None, vec![pod("web", SIDECAR), pod("broken", SIDECAR)], strict, new);
    let why = go(&stays, false).await.unwrap_err().to_string();
    assert!(why.contains("2 sidecars have yet to accept plaintext, shop/web, shop/broken"), "{why}");
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_answers_and_never_does_what_it_is_told_can_be_left_out() {
    let stubborn =
        |path: &str| Answer::Now(200, if path.contains("/broken:") { json!("strict\n") } else { json!("off\n") });
    let pods = || vec![pod("web", SIDECAR), pod("broken", SIDECAR)];
    let why = go(&world_of(None, pods(), stubborn, new), false).await.unwrap_err().to_string();
    assert!(why.contains("shop/broken among them (its mode is strict)") && why.contains("--without"), "{why}");
    let left_out = world_of(None, pods(), stubborn, new);
    go_without(&left_out, false, &["shop/broken"]).await.unwrap();
    assert_eq!(*left_out.written.lock().unwrap(), [json!("inbound"), json!("true")]);
}

#[tokio::test(start_paused = true)]
async fn a_mesh_that_is_on_its_way_takes_no_step_back() {
    let first = world(None, "off\n", new);
    go(&first, false).await.unwrap();
    assert_eq!(*first.written.lock().unwrap(), [json!("inbound"), json!("true")]);
    let again = world(Some("true"), "off\n", old);
    let why = without_effect(&again.client, "mesh").await.unwrap();
    assert!(why.contains("`transparent: true`") && why.contains(r#""path":"/data/transparent"}]'"#), "{why}");
    assert_eq!(without_effect(&world(None, "off\n", old).client, "mesh").await, None);
    go(&again, false).await.unwrap();
    assert_eq!(*again.written.lock().unwrap(), [json!("true")]);
    let stuck = world(Some("inbound"), "permissive\n", new);
    let why = go(&stuck, false).await.unwrap_err().to_string();
    assert!(why.contains("1 sidecar has yet to send plaintext") && why.contains("to go back"), "{why}");
    assert_eq!(*stuck.written.lock().unwrap(), [json!("inbound"), json!("true")]);
}
