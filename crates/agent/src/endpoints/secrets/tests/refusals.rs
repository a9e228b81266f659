//! What a caller may not have, and requests that make no sense.

use std::process::Command;

use countersign_api::sds::{DeltaDiscoveryRequest, DiscoveryRequest};
use tonic::Code;

use super::super::{Entitled, Protocol, Rejection, StateOfTheWorld};
use super::state_of_the_world::{asked, without_spiffe_validator};
use super::*;

async fn refused(world: &World, request: DiscoveryRequest) -> Status {
    let fetched = world.client.clone().fetch_secrets(request.clone()).await.unwrap_err();
    let (ask, hear) = Talk::<_, ()>::requests();
    ask.send(request).await.unwrap();
    // It may be refused before or after the stream has begun.
    let streamed = match world.client.clone().stream_secrets(hear).await {
        Ok(stream) => stream.into_inner().message().await.unwrap_err(),
        Err(status) => status,
    };
    assert_eq!(streamed.code(), fetched.code(), "{streamed} {fetched}");
    fetched
}

#[tokio::test]
async fn a_name_that_is_not_the_callers_is_an_invalid_argument_and_the_answer_lists_what_is() {
    let world = World::new().await;
    world.federate();
    for name in ["spiffe://test.local/other", "spiffe://test.local/", "spiffe://elsewhere", "rootca", "test.local", "/"]
    {
        let status = refused(&world, asked(&["default", name])).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let said = format!(
            "the caller may not have `{name}`, but `default`, `ROOTCA`, `ALL`, `{FOREIGN}`, `{TD}`, `{FIRST}`, `{SECOND}`"
        );
        assert_eq!(status.message(), said);
    }
    let forged = refused(&world, asked(&["a\nb\u{1b}[2J`"])).await;
    assert!(forged.message().contains(r"`a\nb\u{1b}[2J\u{60}`"), "{}", forged.message());
    assert_eq!(world.core.metrics.refused_counts()["no_secret"], 14);
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused() {
    let world = World::new().await;
    let of_type = |url: &str| DiscoveryRequest { type_url: url.into(), ..asked(&["default"]) };
    let long = "x".repeat(300 * 1024);
    let many: Vec<String> = (0..101).map(|n| format!("spiffe://test.local/{n}")).collect();
    for (request, code) in [
        (of_type("type.googleapis.com/envoy.config.cluster.v3.Cluster"), Code::InvalidArgument),
        (asked(&[&long[..3_000]]), Code::InvalidArgument),
        (asked(&[&long]), Code::OutOfRange),
        (asked(&many.iter().map(String::as_str).collect::<Vec<_>>()), Code::InvalidArgument),
        (DiscoveryRequest { node: Some(without_spiffe_validator()), ..asked(&["ALL"]) }, Code::FailedPrecondition),
    ] {
        let status = refused(&world, request).await;
        assert_eq!(status.code(), code, "{status}");
    }
    let (ask, hear) = Talk::<_, ()>::requests();
    let mut stream = world.client.clone().delta_secrets(hear).await.unwrap().into_inner();
    ask.send(DeltaDiscoveryRequest { type_url: "else".into(), ..Default::default() }).await.unwrap();
    assert_eq!(stream.message().await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_caller_without_an_identity_has_no_bundle_either() {
    let world = World::new().await;
    world.forget("first");
    world.forget("second");
    let status = refused(&world, asked(&["ROOTCA"])).await;
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    assert!(status.message().starts_with("no identity issued: attested "), "{status}");
}

#[tokio::test]
async fn an_identity_that_is_stored_elsewhere_is_not_waited_for() {
    let world = World::new().await;
    let store = |name: &str| {
        world.core.cache.change(|state| {
            let one = state.entries.get_mut(&key(name)).unwrap();
            Arc::make_mut(&mut one.entry).store_svid = true;
            one.svid = None;
        });
    };
    store("second");
    assert_eq!(refused(&world, asked(&[SECOND])).await.code(), Code::InvalidArgument);
    store("first");
    assert_eq!(refused(&world, asked(&["default"])).await.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_name_that_may_become_the_callers_is_no_mistake_of_a_caller_attested_in_part() {
    let world = World::new().await;
    let (own, _other_end) = UnixStream::pair().unwrap();
    let selectors = std::iter::once(format!("unix:uid:{}", nix::unistd::geteuid()).parse().unwrap()).collect();
    let mut attested = crate::endpoints::Attested { peer: peer_credentials(&own).unwrap(), selectors, in_part: true };
    let mut protocol = StateOfTheWorld::default();
    protocol.hear(asked(&["spiffe://test.local/third"]), false).unwrap();
    let due =
        |protocol: &mut StateOfTheWorld, attested: &_| protocol.due(&Entitled::of(&world.core, attested).unwrap());
    assert!(due(&mut protocol, &attested).unwrap().is_none() && protocol.owes());
    world.sign("third", 3);
    assert!(due(&mut protocol, &attested).unwrap().is_some() && !protocol.owes());
    world.forget("third");
    attested.in_part = false;
    assert_eq!(due(&mut protocol, &attested).unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn the_streams_of_a_caller_that_runs_another_program_end_and_it_gets_no_key_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("caller");
    let listener = UnixListener::bind(&path).unwrap();
    let script = "import os, socket, time
s = socket.socket(socket.AF_UNIX)
s.connect(os.environ['S'])
while not os.path.exists(os.environ['S'] + '.go'): time.sleep(0.01)
os.execv('/bin/sleep', ['sleep', '60'])";
    let mut child = Command::new("python3").args(["-c", script]).env("S", &path).spawn().unwrap();
    let (connection, _) = listener.accept().await.unwrap();
    let world = World::of_caller(peer_credentials(&connection).unwrap(), |_| ()).await;
    let (ask, hear) = Talk::<_, ()>::requests();
    let mut stream = world.client.clone().stream_secrets(hear).await.unwrap().into_inner();
    ask.send(asked(&["default"])).await.unwrap();
    stream.message().await.unwrap().unwrap();
    // One that waits for an SVID meanwhile does not get it.
    let unsigned = world.core.cache.change(|state| state.entries.get_mut(&key("second")).unwrap().svid.take());
    let mut client = world.client.clone();
    let waiting = tokio::spawn(async move { client.fetch_secrets(asked(&[SECOND])).await });
    std::fs::write(dir.path().join("caller.go"), "").unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), stream.message()).await.unwrap().unwrap_err();
    assert_eq!(ended.code(), Code::PermissionDenied, "{ended}");
    world.core.cache.change(|state| state.entries.get_mut(&key("second")).unwrap().svid = unsigned);
    assert_eq!(waiting.await.unwrap().unwrap_err().code(), Code::PermissionDenied);
    let again = world.client.clone().fetch_secrets(asked(&["default"])).await.unwrap_err();
    assert!(again.message().contains("has changed its executable"), "{again}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn an_envoy_that_rejects_everything_leaves_a_few_lines_and_forges_none() {
    let world = World::new().await;
    let (own, _other_end) = UnixStream::pair().unwrap();
    let peer = peer_credentials(&own).unwrap();
    let attested = crate::endpoints::Attested { peer, selectors: std::collections::BTreeSet::new(), in_part: false };
    let (log, _logging) = crate::endpoints::tests::log();
    let reason = format!("no key\n2026 WARN forged\u{1b}[2J {}", "x".repeat(100_000));
    for _ in 0..1_000 {
        tracing::callsite::rebuild_interest_cache();
        world.core.secrets_rejected(&attested, &Rejection(reason.clone()));
    }
    let text = log.text();
    let lines: Vec<_> = text.lines().filter(|line| line.contains("an Envoy has rejected its secrets")).collect();
    assert!((1..=100).contains(&lines.len()), "{}", lines.len());
    assert!(
        lines.iter().all(|line| line.contains(r"no key\n2026 WARN forged\u{1b}[2J") && line.len() < 1_000),
        "{}",
        lines[0]
    );
    assert!(!text.lines().any(|line| line.starts_with("2026 WARN")));
    assert_eq!(world.core.metrics.secrets_rejected.get(), 1_000);
}
