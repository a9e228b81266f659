use std::convert::Infallible;

use countersign_proxy::status_page::{Carried, Direction};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use kube::core::Status;
use serde_json::{Value, json};
use tokio::io::DuplexStream;
use tokio_util::task::AbortOnDropHandle;

use super::*;

/// A sidecar's page, as it stands on the wire.
pub fn page() -> Value {
    json!({
        "version": "0.1.0", "started_at": 100, "missing": null, "mode": "permissive",
        "identity": { "spiffe_id": "spiffe://a.org/ns/shop/sa/web", "serial": "0a", "expires_at": 4_000_000_000_i64, "authority_id": "ab" },
        "agent_refusal": null, "open": 1,
        "connections": [{ "direction": "inbound", "mode": "mtls", "count": 7 }],
        "refused": [{ "direction": "inbound", "reason": "plaintext", "count": 2 }],
        "plaintext": { "forgotten": 0, "peers": [
            { "peer": "10.0.0.9", "port": 8080, "direction": "inbound", "mode": "plain", "first_seen": 110, "last_seen": 120, "open": 1, "total": 3 },
        ] },
        "of a later version": [1],
    })
}

/// The far end of a port-forward: an HTTP server that answers each path with a status and a body.
fn pod(answer: impl Fn(&str) -> (u16, String) + Clone + Send + 'static) -> (DuplexStream, AbortOnDropHandle<()>) {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let service = service_fn(move |request: Request<Incoming>| {
        let (status, body) = answer(request.uri().path());
        async move { Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap()) }
    });
    let serve = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(theirs), service);
    (ours, AbortOnDropHandle::new(tokio::spawn(async move { drop(serve.await) })))
}

async fn asked(status: u16, body: String) -> Result<SidecarStatus, Unasked> {
    let (stream, _serving) =
        pod(move |path| if path == "/status" { (status, body.clone()) } else { (404, String::new()) });
    status_over(stream, std::future::pending()).await
}

#[tokio::test]
async fn a_sidecars_status_is_read_over_the_stream() {
    let status = asked(200, page().to_string()).await.unwrap();
    let row = &status.plaintext.peers[0];
    assert_eq!((row.key.peer.to_string().as_str(), row.key.port), ("10.0.0.9", 8080));
    assert_eq!((row.key.direction, row.key.mode), (Direction::Inbound, Carried::Plain));
    assert_eq!((row.open, row.total, row.first_seen, row.last_seen), (1, 3, 110, 120));
    assert_eq!((status.started_at, status.mode.as_deref()), (100, Some("permissive")));
}

#[tokio::test]
async fn what_is_no_status_is_told_apart() {
    assert_eq!(asked(404, "not found".into()).await, Err(Unasked::NoPage));
    for (status, body) in [(500, "{}"), (200, "{}"), (200, "<html>"), (200, "")] {
        assert_eq!(asked(status, body.into()).await.unwrap_err().code(), "unreadable", "{status} {body}");
    }
    let mut strange = page();
    strange["mode"] = json!("loose");
    assert!(asked(200, strange.to_string()).await.unwrap_err().to_string().contains("`loose` is not a mode"));
    let long = asked(200, " ".repeat(MAX_ANSWER_BYTES + 1)).await.unwrap_err();
    assert!(long.to_string().contains("at most 1048576 bytes"), "{long}");
}

#[tokio::test]
async fn a_stream_that_breaks_is_told_with_the_kubelets_reason() {
    let why = "failed to connect to localhost:15020: connection refused\n\u{1b}[31m";
    // The reason comes while nothing else does.
    let (open, _theirs) = tokio::io::duplex(64);
    let told = status_over(open, std::future::ready(Some(why.into()))).await.unwrap_err();
    assert!(told.to_string().contains("connection refused") && !told.to_string().contains('\u{1b}'), "{told}");
    assert_eq!(told.code(), "unreachable");
    // The stream ends first, with and without a reason.
    let ended = || tokio::io::duplex(64).0;
    let (tell, heard) = tokio::sync::oneshot::channel();
    let later = async {
        tokio::task::yield_now().await;
        tell.send("no such container".to_owned())
    };
    let (told, _) = tokio::join!(status_over(ended(), async { heard.await.ok() }), later);
    assert!(told.unwrap_err().to_string().contains("no such container"));
    let told = status_over(ended(), std::future::ready(None)).await.unwrap_err();
    assert_eq!(told.code(), "unreachable");
}

#[test]
fn what_a_pod_writes_cannot_write_over_the_terminal() {
    let hostile = "a\n\u{1b}[2J\u{202e}";
    let mut page = page();
    for field in ["version", "missing", "not_admitted"] {
        page[field] = json!(hostile);
    }
    page["identity"]["spiffe_id"] = json!(hostile);
    page["refused"][0]["reason"] = json!(hostile);
    page["agent_refusal"] = json!({ "at": 1, "code": hostile, "message": hostile });
    let status = parse(page.to_string().as_bytes()).unwrap();
    let identity = status.identity.unwrap();
    let refusal = status.agent_refusal.unwrap();
    for text in [
        status.version,
        status.missing.unwrap(),
        status.not_admitted.unwrap(),
        identity.spiffe_id,
        status.refused[0].reason.clone(),
        refusal.code,
        refusal.message,
    ] {
        assert!(text.starts_with("a\\n") && text.chars().all(|c| c.is_ascii_graphic()), "{text:?}");
    }
    page["mode"] = json!(hostile);
    assert!(!parse(page.to_string().as_bytes()).unwrap_err().to_string().contains(['\n', '\u{1b}']));
}

#[test]
fn the_api_servers_refusals_say_what_to_do() {
    let api = |code: u16, message: &str| {
        let status: Status =
            serde_json::from_value(json!({ "message": message, "reason": "x", "code": code })).unwrap();
        Unasked::of(&kube::Error::Api(Box::new(status)))
    };
    let forbidden = api(403, "pods \"web\" is forbidden: User \"eve\" cannot get resource \"pods/portforward\"");
    assert_eq!(forbidden.code(), "forbidden");
    assert!(forbidden.to_string().contains("cannot get resource"), "{forbidden}");
    assert!(forbidden.mend().contains("get and create on pods/portforward"));
    assert_eq!(api(404, "pods \"web\" not found"), Unasked::Gone);
    assert_eq!(api(500, "the node is away").code(), "unreachable");
}

#[test]
fn a_sidecar_that_does_not_run_is_named_and_one_beside_hanging_init_containers_is_asked() {
    let with = |list: &str, state: Value| -> Result<(), Unasked> {
        let status =
            json!({ "name": SIDECAR, "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state });
        runs(&serde_json::from_value(json!({ "status": { "phase": "Pending", list: [status] } })).unwrap())
    };
    for list in ["initContainerStatuses", "containerStatuses"] {
        assert_eq!(with(list, json!({ "running": {} })), Ok(()));
        let waiting = with(list, json!({ "waiting": { "reason": "CrashLoopBackOff" } })).unwrap_err();
        assert_eq!(waiting, Unasked::NotRunning("CrashLoopBackOff".into()));
        let ended = with(list, json!({ "terminated": { "exitCode": 137 } })).unwrap_err();
        assert_eq!(ended, Unasked::NotRunning("it ended with 137".into()));
    }
    let pending: Pod = serde_json::from_value(json!({ "status": { "phase": "Pending" } })).unwrap();
    assert_eq!(runs(&pending), Err(Unasked::NotRunning("the pod is Pending".into())));
    assert_eq!(runs(&Pod::default()).unwrap_err().code(), "not_running");
}
