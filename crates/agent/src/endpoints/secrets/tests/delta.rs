//! `DeltaSecrets`.

use std::collections::HashMap;

use countersign_api::sds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, RpcStatus};
use tonic::Code;

use super::*;

type Stream = Talk<DeltaDiscoveryRequest, DeltaDiscoveryResponse>;

impl World {
    async fn delta(&self) -> Stream {
        let (ask, asked) = Stream::requests();
        Talk { ask, hear: self.client.clone().delta_secrets(asked).await.unwrap().into_inner() }
    }
}

fn change(subscribe: &[&str], unsubscribe: &[&str]) -> DeltaDiscoveryRequest {
    let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    DeltaDiscoveryRequest {
        resource_names_subscribe: owned(subscribe),
        resource_names_unsubscribe: owned(unsubscribe),
        ..Default::default()
    }
}

fn subscribe(names: &[&str]) -> DeltaDiscoveryRequest {
    change(names, &[])
}

fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { response_nonce: response.nonce.clone(), type_url: SECRET_TYPE.into(), ..Default::default() }
}

/// Names of what a response brings.
fn brought(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    for resource in &response.resources {
        assert_eq!(read(resource.resource.as_ref().unwrap()).0, resource.name);
    }
    response.resources.iter().map(|resource| resource.name.as_str()).collect()
}

#[tokio::test]
async fn only_what_has_changed_is_sent_and_only_of_what_is_subscribed() {
    let world = World::new().await;
    let mut stream = world.delta().await;
    stream.say(subscribe(&["default", "ROOTCA"])).await;
    let first = stream.heard().await.unwrap();
    assert_eq!(brought(&first), ["ROOTCA", "default"]);
    stream.say(ack(&first)).await;
    stream.is_quiet().await;
    world.sign("first", 1);
    let second = stream.heard().await.unwrap();
    assert_eq!(brought(&second), ["default"]);
    assert_ne!(second.nonce, first.nonce);
    assert_eq!(read(second.resources[0].resource.as_ref().unwrap()).1, Read::Svid(world.leaf("first")));
    stream.say(change(&[SECOND], &["default"])).await;
    assert_eq!(brought(&stream.heard().await.unwrap()), [SECOND]);
    world.sign("first", 1);
    stream.is_quiet().await;
    // An Envoy that has dropped a secret and wants it again gets it again, in one request too.
    stream.say(subscribe(&[SECOND])).await;
    assert_eq!(brought(&stream.heard().await.unwrap()), [SECOND]);
    stream.say(change(&[SECOND], &[SECOND])).await;
    assert_eq!(brought(&stream.heard().await.unwrap()), [SECOND]);
}

#[tokio::test]
async fn what_is_lost_is_removed_and_comes_back_when_it_is_back() {
    let world = World::new().await;
    world.federate();
    let mut stream = world.delta().await;
    stream.say(subscribe(&[SECOND, FOREIGN, "ROOTCA"])).await;
    assert_eq!(brought(&stream.heard().await.unwrap()), ["ROOTCA", FOREIGN, SECOND]);
    world.forget("second");
    let lost = stream.heard().await.unwrap();
    assert_eq!((brought(&lost).len(), lost.removed_resources), (0, vec![FOREIGN.to_owned(), SECOND.to_owned()]));
    stream.is_quiet().await;
    world.sign("second", 2);
    assert_eq!(brought(&stream.heard().await.unwrap()), [SECOND]);
}

#[tokio::test]
async fn what_an_envoy_brings_along_from_another_stream_is_not_sent_again() {
    let world = World::new().await;
    let mut before = world.delta().await;
    before.say(subscribe(&["default", "ROOTCA"])).await;
    let held = before.heard().await.unwrap();
    let versions: HashMap<_, _> = held.resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect();
    drop(before);
    let again = |versions: &HashMap<String, String>, names: &[&str]| DeltaDiscoveryRequest {
        initial_resource_versions: versions.clone(),
        ..subscribe(names)
    };
    let mut stream = world.delta().await;
    stream.say(again(&versions, &["default", "ROOTCA"])).await;
    stream.is_quiet().await;
    // While it was away, one has changed, and one that it had is gone.
    world.sign("first", 1);
    assert_eq!(brought(&stream.heard().await.unwrap()), ["default"]);
    let more = versions.into_iter().chain([(SECOND.to_owned(), "old".to_owned()), ("else".into(), "old".into())]);
    world.forget("second");
    let mut stream = world.delta().await;
    stream.say(again(&more.collect(), &["default", "ROOTCA", SECOND])).await;
    let changed = stream.heard().await.unwrap();
    assert_eq!((brought(&changed), &changed.removed_resources[..]), (vec!["default"], &[SECOND.to_owned()][..]));
}

#[tokio::test]
async fn a_stream_that_names_nothing_has_everything_until_it_says_otherwise() {
    let world = World::new().await;
    let mut stream = world.delta().await;
    stream.say(subscribe(&[])).await;
    let all = stream.heard().await.unwrap();
    assert_eq!(brought(&all), [TD, FIRST, SECOND]);
    // Nothing named later is nothing asked for.
    stream.say(ack(&all)).await;
    stream.is_quiet().await;
    world.federate();
    assert_eq!(brought(&stream.heard().await.unwrap()), [FOREIGN]);
    world.forget("second");
    let lost = stream.heard().await.unwrap();
    assert_eq!(lost.removed_resources, [FOREIGN, SECOND]);
    stream.say(change(&["default"], &["*"])).await;
    assert_eq!(brought(&stream.heard().await.unwrap()), ["default"]);
    world.sign("third", 3);
    stream.is_quiet().await;
    stream.say(subscribe(&["*"])).await;
    let third = "spiffe://test.local/third";
    assert_eq!(brought(&stream.heard().await.unwrap()), ["default", TD, FIRST, third]);
}

#[tokio::test]
async fn a_name_that_was_never_the_callers_is_refused_and_a_rejection_noted() {
    let world = World::new().await;
    let mut stream = world.delta().await;
    stream.say(subscribe(&["default"])).await;
    let first = stream.heard().await.unwrap();
    let nack = |nonce: &str| DeltaDiscoveryRequest {
        response_nonce: nonce.into(),
        error_detail: Some(RpcStatus { code: 13, message: "no".into() }),
        ..Default::default()
    };
    for nonce in ["another", &first.nonce, &first.nonce, ""] {
        stream.say(nack(nonce)).await;
    }
    stream.is_quiet().await;
    assert_eq!(world.core.metrics.secrets_rejected.get(), 1);
    stream.say(subscribe(&["spiffe://test.local/other"])).await;
    let refused = stream.heard().await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("may not have `spiffe://test.local/other`"), "{}", refused.message());
}

#[tokio::test]
async fn responses_that_nobody_answers_are_remembered_in_a_bounded_number() {
    let world = World::new().await;
    let mut stream = world.delta().await;
    stream.say(subscribe(&["default"])).await;
    let mut nonces = vec![stream.heard().await.unwrap().nonce];
    for _ in 0..20 {
        world.sign("first", 1);
        nonces.push(stream.heard().await.unwrap().nonce);
    }
    for nonce in [&nonces[0], &nonces[20]] {
        let error_detail = Some(RpcStatus { code: 13, message: "no".into() });
        stream.say(DeltaDiscoveryRequest { response_nonce: nonce.clone(), error_detail, ..Default::default() }).await;
    }
    stream.is_quiet().await;
    assert_eq!(world.core.metrics.secrets_rejected.get(), 1, "of the newest, not of the oldest");
}
