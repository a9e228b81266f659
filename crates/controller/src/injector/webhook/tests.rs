//! Unauthenticated peers do not delay an API server, whatever they hold open or send.

#![allow(clippy::unwrap_used)]

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::task::AbortOnDropHandle;

use serde_json::{Value, json};

use super::*;
use crate::injector::Sidecar;

const STRANGER: [u8; 4] = [127, 0, 15, 1];
const API_SERVER: [u8; 4] = [127, 0, 15, 2];

struct Served {
    at: SocketAddr,
    client: Arc<rustls::ClientConfig>,
    _task: AbortOnDropHandle<()>,
}

fn hook(bind: SocketAddr) -> Hook {
    let config = InjectorConfig {
        bind,
        agent_socket: "/nowhere".into(),
        sidecar: Sidecar::new("image".into()),
        mode: countersign_identity::policy::Mode::Strict,
        live_settings: None,
    };
    Hook { config, metrics: Arc::default(), parts: Admission::new(PARTS), said: Sampled::default() }
}

/// A review as an API server sends it, with these fields in its request.
fn review_of(fields: Value) -> Value {
    let pod = json!({ "group": "", "version": "v1", "kind": "Pod" });
    let pods = json!({ "group": "", "version": "v1", "resource": "pods" });
    let mut request = json!({
        "uid": "u", "kind": pod, "resource": pods, "operation": "CREATE", "userInfo": { "username": "kubelet" },
        "object": null, "oldObject": null, "dryRun": false,
    });
    request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request })
}

/// What the hook answers to a review, as JSON; `None` if it takes it for none.
fn answer(hook: &Hook, review: &Value, path: &str, from: [u8; 4]) -> Option<Value> {
    let request = request_in(review.to_string().as_bytes())?;
    let answer = hook.review(&request, Asked::by(path).unwrap(), from.into())?;
    Some(serde_json::to_value(answer.into_review()).unwrap())
}

async fn served() -> Served {
    let key = rcgen::generate_simple_self_signed(vec!["webhook".into()]).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![key.cert.der().clone()], key.signing_key.serialize_der().try_into().unwrap())
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(key.cert.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let serving = Serving::default();
    serving.set(Certificate { tls: Arc::new(server), ends_at: OffsetDateTime::now_utc() + Duration::from_secs(60) });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let hook = Arc::new(hook(at));
    let task = tokio::spawn(accept(listener, hook, serving, TaskTracker::new(), CancellationToken::new()));
    Served { at, client: Arc::new(client), _task: AbortOnDropHandle::new(task) }
}

impl Served {
    async fn dial(&self, from: [u8; 4]) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((from, 0))).unwrap();
        socket.connect(self.at).await.unwrap()
    }

    async fn shake_hands(&self, from: [u8; 4]) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from("webhook").unwrap();
        TlsConnector::from(self.client.clone()).connect(name, self.dial(from).await).await
    }

    /// The answer to one review with this many bytes of padding, within two seconds.
    async fn review(&self, from: [u8; 4], padding: usize) -> Option<String> {
        let asked = async {
            let mut stream = self.shake_hands(from).await.ok()?;
            let pod = json!({ "metadata": { "name": "p", "annotations": { "x": "y".repeat(padding) } }, "spec": {} });
            let more = json!({ "namespace": "n", "subResource": "ephemeralcontainers", "object": pod });
            let body = review_of(more).to_string();
            let head = format!(
                "POST /inject/pod HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all(head.as_bytes()).await.ok()?;
            stream.write_all(body.as_bytes()).await.ok()?;
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer).await;
            Some(answer)
        };
        tokio::time::timeout(Duration::from_secs(2), asked).await.ok().flatten()
    }

    async fn is_served(&self, from: [u8; 4], padding: usize) {
        for n in 0..10 {
            let answer = self.review(from, padding).await;
            assert!(answer.as_ref().is_some_and(|a| a.starts_with("HTTP/1.1 200")), "review {n} of 10: {answer:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_keep_no_review_waiting() {
    let served = served().await;
    let mut held = vec![];
    for _ in 0..1_000 {
        held.push(served.dial(STRANGER).await);
    }
    served.is_served(API_SERVER, 10).await;
    served.is_served(STRANGER, 10).await;
    for stream in held.drain(..).take(300) {
        drop(stream);
    }
    // Some send a head that never ends.
    let mut heads = vec![];
    for _ in 0..300 {
        if let Ok(mut stream) = served.shake_hands(STRANGER).await {
            let _ = stream.write_all(b"POST /inject/pod HTTP/1.1\r\nx: ").await;
            heads.push(stream);
        }
    }
    served.is_served(API_SERVER, 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_bodies_of_strangers_are_bounded_and_large_reviews_are_read_all_the_same() {
    let served = served().await;
    let mut held = vec![];
    for _ in 0..40 {
        let mut stream = served.shake_hands(STRANGER).await.unwrap();
        let _ = stream.write_all(b"POST /inject/pod HTTP/1.1\r\nhost: x\r\ncontent-length: 4000000\r\n\r\n").await;
        // Everything but the end: 3.9 MB each, 156 MB together.
        let most = vec![b'x'; 3_900_000];
        let sent = stream.write_all(&most);
        let _ = tokio::time::timeout(Duration::from_millis(300), sent).await;
        held.push(stream);
    }
    served.is_served(API_SERVER, 1_000_000).await;
    // 32 MiB hold eight of them; all others were rejected for lack of room, or cut.
    let mut refused = 0;
    for stream in &mut held {
        let mut answer = [0; 12];
        let read = tokio::time::timeout(Duration::from_millis(50), stream.read(&mut answer)).await;
        refused += usize::from(read.is_ok_and(|r| r.map_or(true, |n| n == 0 || answer.starts_with(b"HTTP/1.1 429"))));
    }
    assert!(refused >= 30, "{refused} of 40");
}

#[tokio::test]
async fn a_review_that_is_too_large_is_refused() {
    let answer = served().await.review(API_SERVER, MAX_REVIEW_BYTES).await.unwrap();
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413"), "{answer}");
}

#[test]
fn a_flood_of_reviews_leaves_a_few_log_lines_and_a_count_for_each_sender() {
    let hook = hook(SocketAddr::from((STRANGER, 0)));
    let review = |namespace: String, from: [u8; 4]| {
        let pod =
            json!({ "metadata": { "name": "p", "labels": { "countersign.dev/inject": "disabled" } }, "spec": {} });
        let review = review_of(json!({ "namespace": namespace, "object": pod }));
        answer(&hook, &review, "/inject/namespace", from).unwrap();
    };
    (0..1_000).for_each(|_| review("noisy".into(), STRANGER));
    review("n".into(), API_SERVER);
    let later = Instant::now() + Duration::from_secs(3_600);
    let unsaid = hook.said.over(later);
    let [one] = &unsaid[..] else { panic!("{unsaid:?}") };
    assert_eq!((one.kind, one.source.as_ref().unwrap().1.as_str()), ("left as it is", "noisy"));
    // Twenty lines in each window of ten seconds.
    assert!((1..=980).contains(&one.count) && one.count % 20 == 0, "{}", one.count);
}

#[test]
fn a_namespace_that_refuses_its_meshed_pods_is_admitted_with_a_warning() {
    let hook = hook(SocketAddr::from((API_SERVER, 0)));
    let labels = |level: &str| json!({ "countersign.dev/inject": "enabled", crate::injector::ENFORCE: level });
    let judged = |level: &str, before: Value| {
        let object = json!({ "metadata": { "name": "n", "labels": labels(level) } });
        let review = review_of(json!({ "object": object, "oldObject": before }));
        let answer = answer(&hook, &review, "/judge/namespace", API_SERVER).unwrap();
        assert_eq!(answer["response"]["allowed"], true);
        answer["response"]["warnings"][0].as_str().unwrap_or_default().to_owned()
    };
    assert!(judged("restricted", Value::Null).contains("Pod Security `restricted` refuses"));
    assert_eq!(judged("restricted", json!({ "metadata": { "labels": labels("restricted") } })), "");
    assert_eq!(judged("privileged", Value::Null), "");
}

/// The patch of an answer, applied to the object that was sent.
fn patched(answer: &Value, object: &Value) -> Value {
    assert_eq!(answer["response"]["patchType"], "JSONPatch");
    let bytes: Vec<u8> = serde_json::from_value(answer["response"]["patch"].clone()).unwrap();
    let patch: json_patch::Patch = serde_json::from_slice(&bytes).unwrap();
    let mut object = object.clone();
    json_patch::patch(&mut object, &patch).unwrap();
    object
}

#[test]
fn a_pod_is_injected_by_a_patch_that_fits_what_the_api_server_sent_fields_unknown_to_us_included() {
    let hook = hook(SocketAddr::from((API_SERVER, 0)));
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "status": {}, "fieldOfTomorrow": [1, { "x": null }],
        "metadata": { "generateName": "web-", "creationTimestamp": null, "managedFields": [] },
        "spec": { "containers": [{ "name": "app", "image": "x", "tomorrow": { "a": 1.5 } }] },
    });
    let answered =
        answer(&hook, &review_of(json!({ "namespace": "n", "object": pod })), "/inject/namespace", API_SERVER);
    let answered = answered.unwrap();
    assert_eq!(
        (&answered["kind"], &answered["apiVersion"]),
        (&json!("AdmissionReview"), &json!("admission.k8s.io/v1"))
    );
    assert_eq!((&answered["response"]["uid"], &answered["response"]["allowed"]), (&json!("u"), &json!(true)));
    let meshed = patched(&answered, &pod);
    let names: Vec<&str> =
        meshed["spec"]["initContainers"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert!(names.contains(&crate::injector::SIDECAR) && names.contains(&crate::injector::REDIRECT), "{names:?}");
    for kept in ["fieldOfTomorrow", "kind"] {
        assert_eq!(meshed[kept], pod[kept]);
    }
    assert_eq!(meshed["spec"]["containers"][0]["tomorrow"], json!({ "a": 1.5 }));
}

#[test]
fn a_refusal_has_its_reason_and_what_is_no_review_of_ours_is_malformed() {
    let hook = hook(SocketAddr::from((API_SERVER, 0)));
    let pod = json!({ "metadata": { "name": "p", "labels": { "countersign.dev/inject": "enabeld" } },
                      "spec": { "containers": [] } });
    let good = review_of(json!({ "namespace": "n", "object": pod }));
    let refused = answer(&hook, &good, "/inject/pod", API_SERVER).unwrap();
    assert_eq!(refused["response"]["allowed"], false);
    let status = &refused["response"]["status"];
    assert_eq!((&status["code"], &status["reason"]), (&json!(422), &json!("Invalid")));
    assert!(status["message"].as_str().unwrap().contains("enabeld"), "{status}");
    for (key, value) in [
        ("/kind", json!("Pod")),
        ("/apiVersion", json!("admission.k8s.io/v1beta1")),
        ("/request", Value::Null),
        ("/request/object", Value::Null),
        ("/request/object", json!([])),
        ("/request/uid", json!(7)),
        ("/request/operation", json!("BREW")),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(key).unwrap() = value;
        assert!(answer(&hook, &bad, "/inject/pod", API_SERVER).is_none(), "{key}");
    }
}
