//! `StreamSecrets` and `FetchSecrets`.

use countersign_api::sds::{DiscoveryRequest, DiscoveryResponse, Node, RpcStatus};
use prost_types::value::Kind;
use tonic::Code;

use super::*;

type Stream = Talk<DiscoveryRequest, DiscoveryResponse>;

impl World {
    async fn stream(&self) -> Stream {
        let (ask, asked) = Stream::requests();
        Talk { ask, hear: self.client.clone().stream_secrets(asked).await.unwrap().into_inner() }
    }

    /// The secrets of one request.
    async fn fetch(&self, names: &[&str]) -> Vec<(String, Read)> {
        let response = self.client.clone().fetch_secrets(asked(names)).await.unwrap().into_inner();
        secrets(&response)
    }
}

pub fn asked(names: &[&str]) -> DiscoveryRequest {
    DiscoveryRequest { resource_names: names.iter().map(|&name| name.into()).collect(), ..Default::default() }
}

/// The request by which an Envoy acknowledges a response.
fn ack(response: &DiscoveryResponse, names: &[&str]) -> DiscoveryRequest {
    let (version_info, response_nonce) = (response.version_info.clone(), response.nonce.clone());
    DiscoveryRequest { version_info, response_nonce, type_url: SECRET_TYPE.into(), ..asked(names) }
}

fn secrets(response: &DiscoveryResponse) -> Vec<(String, Read)> {
    response.resources.iter().map(read).collect()
}

pub fn without_spiffe_validator() -> Node {
    let yes = prost_types::Value { kind: Some(Kind::BoolValue(true)) };
    let fields = [("disable_spiffe_cert_validation".to_owned(), yes)].into();
    Node { metadata: Some(prost_types::Struct { fields }), user_agent_build_version: None }
}

#[tokio::test]
async fn each_name_has_its_secret_and_several_are_answered_together() {
    let world = World::new().await;
    let partner = world.federate();
    let own = ("test.local".to_owned(), roots(&world.ca));
    let foreign = ("partner.test".to_owned(), roots(&partner));
    for (name, secret) in [
        ("default", Read::Svid(world.leaf("first"))),
        (FIRST, Read::Svid(world.leaf("first"))),
        (SECOND, Read::Svid(world.leaf("second"))),
        ("ROOTCA", Read::Spiffe(vec![own.clone()])),
        (TD, Read::Spiffe(vec![own.clone()])),
        (FOREIGN, Read::Spiffe(vec![foreign.clone()])),
        ("ALL", Read::Spiffe(vec![own.clone(), foreign])),
    ] {
        assert_eq!(world.fetch(&[name]).await, [(name.to_owned(), secret)]);
    }
    let together = world.fetch(&["ROOTCA", "default", TD, FIRST, "default"]).await;
    let names: Vec<_> = together.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["ROOTCA", "default", TD, FIRST]);
}

#[tokio::test]
async fn nothing_named_is_everything_by_its_id() {
    let world = World::new().await;
    world.federate();
    for names in [&[][..], &[""], &["*"]] {
        let all = world.fetch(names).await;
        let names: Vec<_> = all.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, [FOREIGN, TD, FIRST, SECOND]);
    }
}

#[tokio::test]
async fn names_and_validator_are_the_settings_and_an_envoys_own_word_comes_first() {
    let world = World::with(|config| {
        config.sds.names = crate::SecretNames::new(None, Some("null".into()), Some("ROOTCA".into())).unwrap();
    });
    let world = world.await;
    let own = Read::Spiffe(vec![("test.local".to_owned(), roots(&world.ca))]);
    assert_eq!(
        world.fetch(&["ROOTCA", "null"]).await.into_iter().map(|(_, s)| s).collect::<Vec<_>>(),
        [Read::Spiffe(vec![("test.local".to_owned(), roots(&world.ca))]), own]
    );
    let request = DiscoveryRequest { node: Some(without_spiffe_validator()), ..asked(&["null"]) };
    let response = world.client.clone().fetch_secrets(request.clone()).await.unwrap().into_inner();
    assert_eq!(secrets(&response), [("null".to_owned(), Read::Chain(roots(&world.ca)))]);
    // The node is told once in a stream.
    let mut stream = world.stream().await;
    stream.say(request).await;
    let first = stream.heard().await.unwrap();
    stream.say(ack(&first, &[TD])).await;
    assert_eq!(secrets(&stream.heard().await.unwrap()), [(TD.to_owned(), Read::Chain(roots(&world.ca)))]);
    let disabled = World::with(|config| config.sds.disable_spiffe_validation = true).await;
    assert_eq!(disabled.fetch(&["ROOTCA"]).await, [("ROOTCA".to_owned(), Read::Chain(roots(&disabled.ca)))]);
}

#[tokio::test]
async fn a_rotation_and_a_new_bundle_are_pushed_and_nothing_else_is() {
    let world = World::new().await;
    let mut stream = world.stream().await;
    stream.is_quiet().await;
    stream.say(asked(&["default", "ROOTCA"])).await;
    let first = stream.heard().await.unwrap();
    stream.say(ack(&first, &["default", "ROOTCA"])).await;
    stream.is_quiet().await;
    // The other identity's rotation is none of what was asked for.
    world.sign("second", 2);
    stream.is_quiet().await;
    world.sign("first", 1);
    let second = stream.heard().await.unwrap();
    assert_ne!(second.version_info, first.version_info);
    assert_ne!(second.nonce, first.nonce);
    assert!(secrets(&second).contains(&("default".into(), Read::Svid(world.leaf("first")))));
    // A second authority is prepared; the first stays, tainted or not, until it is revoked.
    let next = Ca::new(OffsetDateTime::now_utc());
    let mut both = world.ca.bundle();
    both.authorities.extend(next.bundle().authorities);
    world.core.cache.change(|state| state.bundle = Some(Arc::new(both)));
    let third = stream.heard().await.unwrap();
    let authorities = [roots(&world.ca), roots(&next)].concat();
    assert!(secrets(&third).contains(&("ROOTCA".into(), Read::Spiffe(vec![("test.local".into(), authorities)]))));
    stream.say(ack(&third, &["default", "ROOTCA"])).await;
    stream.is_quiet().await;
}

#[tokio::test]
async fn a_later_request_for_other_names_is_answered_and_one_that_is_out_of_date_is_not() {
    let world = World::new().await;
    let mut stream = world.stream().await;
    stream.say(asked(&["default"])).await;
    let first = stream.heard().await.unwrap();
    // Written before the first response was read: an Envoy says it again with the nonce.
    stream.say(asked(&["ROOTCA"])).await;
    stream.is_quiet().await;
    stream.say(ack(&first, &["default", "ROOTCA"])).await;
    let second = stream.heard().await.unwrap();
    assert_eq!(second.resources.len(), 2);
    stream.say(ack(&first, &["default"])).await;
    stream.is_quiet().await;
    stream.say(ack(&second, &["ROOTCA"])).await;
    assert_eq!(secrets(&stream.heard().await.unwrap()).len(), 1);
}

#[tokio::test]
async fn a_rejection_is_noted_once_and_the_same_is_not_sent_again() {
    let world = World::new().await;
    let mut stream = world.stream().await;
    stream.say(asked(&["default"])).await;
    let first = stream.heard().await.unwrap();
    let nack = |response: &DiscoveryResponse| DiscoveryRequest {
        version_info: String::new(),
        error_detail: Some(RpcStatus { code: 13, message: "no\nsuch\u{1b}[2Jkey".into() }),
        ..ack(response, &["default"])
    };
    let stale = DiscoveryResponse { nonce: "another".into(), ..first.clone() };
    for response in [&stale, &first, &first, &first] {
        stream.say(nack(response)).await;
    }
    stream.is_quiet().await;
    assert_eq!(world.core.metrics.secrets_rejected.get(), 1);
    world.sign("first", 1);
    let second = stream.heard().await.unwrap();
    stream.say(nack(&second)).await;
    stream.is_quiet().await;
    assert_eq!(world.core.metrics.secrets_rejected.get(), 2);
    world.sign("first", 1);
    let third = stream.heard().await.unwrap();
    stream.say(ack(&third, &["default"])).await;
    stream.is_quiet().await;
    assert_eq!(world.core.metrics.secrets_rejected.get(), 2);
}

#[tokio::test]
async fn an_identity_that_is_not_signed_yet_is_waited_for() {
    let world = World::new().await;
    let svid = world.core.cache.change(|state| state.entries.get_mut(&key("first")).unwrap().svid.take());
    let mut stream = world.stream().await;
    stream.say(asked(&[FIRST, "ROOTCA"])).await;
    stream.is_quiet().await;
    world.core.cache.change(|state| state.entries.get_mut(&key("first")).unwrap().svid = svid);
    assert_eq!(stream.heard().await.unwrap().resources.len(), 2);
    // One that ends while the server is away ends no stream.
    world.core.cache.change(|state| state.entries.get_mut(&key("first")).unwrap().svid = None);
    stream.is_quiet().await;
}

#[tokio::test]
async fn a_stream_ends_with_the_name_that_its_caller_has_lost_and_with_its_last_identity() {
    let world = World::new().await;
    let (mut second, mut bundle) = (world.stream().await, world.stream().await);
    second.say(asked(&[SECOND])).await;
    bundle.say(asked(&["ROOTCA"])).await;
    second.heard().await.unwrap();
    bundle.heard().await.unwrap();
    world.forget("second");
    assert_eq!(second.heard().await.unwrap_err().code(), Code::InvalidArgument);
    bundle.is_quiet().await;
    world.forget("first");
    assert_eq!(bundle.heard().await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn what_is_written_about_a_message_has_no_key() {
    let world = World::new().await;
    let response = world.client.clone().fetch_secrets(asked(&["default"])).await.unwrap().into_inner();
    let secret = Secret::decode(&*response.resources[0].value).unwrap();
    for text in [format!("{response:?}"), format!("{secret:?}")] {
        assert!(text.len() < 300 && !text.contains("KEY"), "{text}");
    }
}
