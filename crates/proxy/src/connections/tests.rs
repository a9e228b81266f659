//! Bounds, and what a revocation cuts.

use super::*;
use countersign_identity::profile::issue_root;
use countersign_identity::svid::LeafFacts;
use countersign_identity::{KeyType, PrivateKey, SpiffeId, TrustBundle, TrustDomain, X509Authority};
use std::time::Duration;

#[test]
fn the_bounds_hold_in_all_and_for_each_peer_and_free_themselves() {
    let limits = Limits { connections: 3, connections_per_peer: 2 };
    let all = Arc::new(Connections::new(limits, Gauge::default()));
    let (a, b): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
    let first = all.admit(Kind::Mesh, a).unwrap();
    let _second = all.admit(Kind::Mesh, a).unwrap();
    assert_eq!(all.admit(Kind::Mesh, a).err().unwrap().code(), "too_many");
    let _third = all.admit(Kind::Mesh, b).unwrap();
    assert!(all.admit(Kind::Mesh, b).is_err());
    drop(first);
    assert!(all.admit(Kind::Mesh, b).is_ok());
}

#[test]
fn strangers_in_plaintext_leave_room_for_the_mesh_and_callers_for_the_app() {
    let limits = Limits { connections: 16, connections_per_peer: 8 };
    let all = Arc::new(Connections::new(limits, Gauge::default()));
    let host = |network: u16, n: u16| IpAddr::from([0x2001, 0xdb8, 0, network, 0, 0, 0, n]);
    let admit = |kind, from: &dyn Fn(u16) -> IpAddr| -> Vec<_> {
        (0..16).filter_map(|n| all.admit(kind, from(n)).ok()).collect()
    };
    let one_network = admit(Kind::Plaintext, &|n| host(1, n));
    assert_eq!(one_network.len(), 4, "a quarter for one network, however many addresses it has");
    let others = admit(Kind::Plaintext, &|n| host(n + 2, 1));
    assert_eq!(others.len(), 4, "half for all of them");
    let meshed = admit(Kind::Mesh, &|n| host(1, n));
    assert_eq!(meshed.len(), 4, "three quarters for all who call");
    let own = admit(Kind::Outbound, &|_| host(1, 1));
    assert_eq!(own.len(), 4);
    assert_eq!(
        all.admit(Kind::Outbound, host(1, 1)).err().unwrap().to_string(),
        "too many connections at once (in all)"
    );
    drop((one_network, others, meshed, own));
    assert_eq!(admit(Kind::Outbound, &|_| host(1, 1)).len(), 12, "the app leaves room for those who call it");
    assert!(all.open().peers.is_empty());
}

fn authority(td: &str) -> TrustBundle {
    let (td, now) = (TrustDomain::new(td).unwrap(), OffsetDateTime::now_utc());
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let root = issue_root(&td, &key, Duration::from_secs(600), now).unwrap();
    let authorities = vec![X509Authority::from_der(root.to_vec()).unwrap()];
    TrustBundle { authorities, sequence: 1, ..TrustBundle::empty(td) }
}

fn peer_of(bundle: &TrustBundle) -> VerifiedPeer {
    let id = SpiffeId::new(format!("spiffe://{}/a", bundle.trust_domain.as_str())).unwrap();
    let now = OffsetDateTime::now_utc();
    let facts =
        LeafFacts { serial: "1".into(), not_before: now, not_after: now, authority_id: "what the peer says".into() };
    let top = &bundle.authorities[0];
    VerifiedPeer { id, facts, authority: top.id().into(), anchor: top.key() }
}

#[test]
fn a_revocation_cuts_who_is_entered_and_refuses_who_comes_with_an_older_handshake() {
    let all = Arc::new(Connections::new(Limits { connections: 9, connections_per_peer: 9 }, Gauge::default()));
    let (old, new) = (authority("td"), authority("td"));
    let before: BundleSet =
        [TrustBundle { authorities: [old.authorities.clone(), new.authorities.clone()].concat(), ..old.clone() }]
            .into_iter()
            .collect();
    let after: BundleSet = [new.clone()].into_iter().collect();
    let admit = || all.admit(Kind::Mesh, "10.0.0.1".parse().unwrap()).unwrap();
    let (first, second, idle, late) = (admit(), admit(), admit(), admit());
    let trusted = |set: &BundleSet| {
        let set = set.clone();
        move |td: &str, key| set.holds(td, key)
    };
    first.authenticated_as(&peer_of(&old), trusted(&before)).unwrap();
    second.authenticated_as(&peer_of(&new), trusted(&before)).unwrap();
    all.cut_revoked(&before, &after, OffsetDateTime::now_utc());
    assert_eq!(first.check().unwrap_err().code(), "authority_revoked", "its preamble may come seconds later");
    assert!(second.check().is_ok() && idle.check().is_ok());
    // The handshake was verified against the bundle before; the entry is made after the cut.
    let refused = late.authenticated_as(&peer_of(&old), trusted(&after)).unwrap_err();
    assert_eq!(refused.code(), "authority_revoked");
}

#[test]
fn an_authority_that_ended_is_not_one_that_was_revoked() {
    let all = Arc::new(Connections::new(Limits { connections: 9, connections_per_peer: 9 }, Gauge::default()));
    let old = authority("td");
    let (before, after): (BundleSet, BundleSet) =
        ([old.clone()].into_iter().collect(), [authority("td")].into_iter().collect());
    let open = all.admit(Kind::Mesh, "10.0.0.1".parse().unwrap()).unwrap();
    open.authenticated_as(&peer_of(&old), |td, key| before.holds(td, key)).unwrap();
    all.cut_revoked(&before, &after, OffsetDateTime::now_utc() + Duration::from_secs(601));
    assert!(open.check().is_ok());
}

fn open_to(all: &Arc<Connections>, bundle: &TrustBundle) -> Admitted {
    let open = all.admit(Kind::Mesh, "10.0.0.1".parse().unwrap()).unwrap();
    open.authenticated_as(&peer_of(bundle), |_, _| true).unwrap();
    open
}

fn nine() -> Arc<Connections> {
    Arc::new(Connections::new(Limits { connections: 9, connections_per_peer: 9 }, Gauge::default()))
}

#[test]
fn an_authority_that_came_and_went_between_two_looks_is_cut() {
    let (all, now) = (nine(), OffsetDateTime::now_utc());
    let [before, between, after] = ["td"; 3].map(authority);
    let open = open_to(&all, &between);
    all.cut_revoked(&[before].into_iter().collect(), &[after].into_iter().collect(), now);
    assert!(open.check().is_err());
}

#[test]
fn an_authority_that_another_trust_domain_also_has_is_cut_in_its_own() {
    let (all, now) = (nine(), OffsetDateTime::now_utc());
    let own = authority("td");
    let federated = TrustBundle { trust_domain: TrustDomain::new("other").unwrap(), ..own.clone() };
    let (ours, theirs) = (open_to(&all, &own), open_to(&all, &federated));
    let before: BundleSet = [own, federated.clone()].into_iter().collect();
    let after: BundleSet = [authority("td"), federated].into_iter().collect();
    all.cut_revoked(&before, &after, now);
    assert!(ours.check().is_err() && theirs.check().is_ok());
}

#[test]
fn an_authority_that_has_ended_is_not_taken_for_revoked_by_a_later_look() {
    let (all, later) = (nine(), OffsetDateTime::now_utc() + Duration::from_secs(601));
    let old = authority("td");
    let open = open_to(&all, &old);
    let [second, third]: [BundleSet; 2] = ["td"; 2].map(|td| [authority(td)].into_iter().collect());
    all.cut_revoked(&[old].into_iter().collect(), &second, later);
    all.cut_revoked(&second, &third, later);
    assert!(open.check().is_ok());
}

#[test]
fn a_peer_that_was_left_takes_nothing_with_it_when_its_authority_is_revoked() {
    let (all, now) = (nine(), OffsetDateTime::now_utc());
    let (old, new) = (authority("td"), authority("td"));
    let (before, after): (BundleSet, BundleSet) =
        ([old.clone()].into_iter().collect(), [new.clone()].into_iter().collect());
    let (left_before, left_after) = (open_to(&all, &old), open_to(&all, &old));
    left_before.leave_peer();
    all.cut_revoked(&before, &after, now);
    left_after.leave_peer();
    assert!(left_before.check().is_ok() && left_after.check().is_ok());
    all.abort();
    left_after.leave_peer();
    let poll = |open: &Admitted| open.cut().poll(&std::task::Context::from_waker(std::task::Waker::noop()));
    assert_eq!(poll(&left_after), Some(crate::copy::End::Drained), "the drain is not taken back");
}
