//! A caller whose authority was revoked is rejected, however old its connection.

use std::time::Duration;

use super::*;
use crate::authority::Kind;
use crate::testing::{agent_call, call, server};
use countersign_identity::Entry;

fn admin_entry(id: &SpiffeId) -> Entry {
    Entry {
        id: "admin".parse().unwrap(),
        spiffe_id: id.clone(),
        parent_id: SpiffeId::new("spiffe://td/spire/agent/x/1").unwrap(),
        selectors: ["unix:uid:0".parse().unwrap()].into(),
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        federates_with: Default::default(),
        admin: true,
        downstream: false,
        dns_names: vec![],
        expires_at: None,
        hint: String::new(),
        store_svid: false,
        additional: Default::default(),
        revision: 0,
        created_at: time::OffsetDateTime::UNIX_EPOCH,
    }
}

#[tokio::test]
async fn an_administrator_whose_authority_is_revoked_is_refused_and_its_streams_end() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let id = SpiffeId::new("spiffe://td/admin").unwrap();
    core.entries.create(vec![admin_entry(&id)]).await.unwrap();
    let request = call(&core, &id).await;
    assert!(matches!(Caller::operator(&core, &request), Ok(Caller::Admin(_))));
    let ended = cut_off(&core, &request);
    tokio::pin!(ended);
    let first = core.authorities.journal()[0].id.clone();
    let next = core.authorities.prepare(Kind::X509).await.unwrap();
    core.authorities.activate(Kind::X509, &next.id).await.unwrap();
    core.authorities.taint(Kind::X509, &first).await.unwrap();
    assert!(Caller::operator(&core, &request).is_ok(), "a taint asks for renewal and cuts nobody");
    tokio::select! {
        biased;
        _ = &mut ended => panic!("not revoked yet"),
        () = std::future::ready(()) => {}
    }
    core.authorities.revoke(Kind::X509, &first).await.unwrap();
    let refused = Caller::of(&core, &request).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    let ended = tokio::time::timeout(Duration::from_secs(5), ended).await.unwrap();
    assert_eq!(ended.code(), tonic::Code::Unauthenticated);
    assert!(Caller::operator(&core, &call(&core, &id).await).is_ok(), "under the new authority it is who it was");
}

#[tokio::test]
async fn a_banned_and_an_evicted_agents_streams_end_and_a_renewed_ones_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let (banned, ban_call) = agent_call(&core, "1").await;
    let (evicted, evict_call) = agent_call(&core, "2").await;
    let (_, other_call) = agent_call(&core, "3").await;
    let (first, second, other) = (cut_off(&core, &ban_call), cut_off(&core, &evict_call), cut_off(&core, &other_call));
    tokio::pin!(other);
    let bound = Duration::from_secs(5);
    let first = tokio::spawn(first);
    let second = tokio::spawn(second);
    core.agents.ban(&banned).await.unwrap();
    assert!(tokio::time::timeout(bound, first).await.unwrap().unwrap().message().contains("is banned"));
    core.agents.evict(&evicted).await.unwrap();
    assert!(tokio::time::timeout(bound, second).await.unwrap().unwrap().message().contains("is not attested"));
    let late = cut_off(&core, &ban_call);
    tokio::time::timeout(bound, late).await.expect("it was banned before somebody waited");
    tokio::select! {
        biased;
        _ = &mut other => panic!("nothing has happened to this one"),
        () = std::future::ready(()) => {}
    }
}

#[tokio::test]
async fn a_ban_that_another_server_wrote_ends_streams_once_it_is_learnt() {
    let dir = tempfile::tempdir().unwrap();
    let store = crate::testing::store(&dir).await;
    let core = crate::testing::server_on(store.clone(), &dir).await;
    let (id, request) = agent_call(&core, "1").await;
    let ended = tokio::spawn(cut_off(&core, &request));
    crate::agents::Agents::load(store).await.unwrap().ban(&id).await.unwrap();
    let serial = core.agents.get(&id).unwrap().serial.clone();
    let renewal = crate::agents::Renewal { in_use: serial, serial: "1".into(), expires_at: core.now() };
    core.agents.renewed(&id, &renewal).await.unwrap_err();
    let ended = tokio::time::timeout(Duration::from_secs(5), ended).await.unwrap().unwrap();
    assert!(ended.message().contains("is banned"));
}
