//! A peer's chain. The input says how a good chain is damaged (bytes exchanged, certificates repeated, dropped or made of
//! the input itself). Only the good leaf, byte for byte, may pass.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use countersign_identity::profile::{
    LeafRequest, RequestedKey, SigningAuthority, issue_intermediate, issue_leaf, issue_root, request,
    request_intermediate,
};
use countersign_identity::trust_domain::{parse_trust_domain, parse_workload_id};
use countersign_identity::verify::{PeerRole, verify_chain};
use countersign_identity::{BundleSet, KeyType, PrivateKey, TrustBundle, X509Authority};
use libfuzzer_sys::fuzz_target;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

struct World {
    bundles: BundleSet,
    good: Vec<CertificateDer<'static>>,
    now: OffsetDateTime,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let (now, hour) = (OffsetDateTime::now_utc(), Duration::from_secs(3600));
    let td = parse_trust_domain("fuzz.test").unwrap();
    let key = || PrivateKey::generate(KeyType::default()).unwrap();
    let (root_key, ca_key, leaf_key) = (key(), key(), key());
    let root = issue_root(&td, &root_key, hour * 3, now).unwrap();
    let upper = SigningAuthority::new(root.clone(), vec![], &root_key).unwrap();
    let ca_requested = RequestedKey::from_csr(&request_intermediate(&td, &ca_key).unwrap()).unwrap();
    let ca = issue_intermediate(&td, &ca_requested, hour * 2, now, &upper).unwrap();
    let authority = SigningAuthority::new(ca.clone(), vec![ca], &ca_key).unwrap();
    let id = parse_workload_id("spiffe://fuzz.test/ns/a/sa/b").unwrap();
    let csr = RequestedKey::from_csr(&request(&leaf_key, Some(&id)).unwrap()).unwrap();
    let leaf = LeafRequest { id: &id, dns_names: &[], key: &csr, ttl: hour };
    let good = issue_leaf(&leaf, &authority, now).unwrap().chain;
    let mut bundles = BundleSet::default();
    let authorities = vec![X509Authority::from_der(root.to_vec()).unwrap()];
    bundles.insert(TrustBundle { authorities, sequence: 1, ..TrustBundle::empty(td) });
    let world = World { bundles, good, now: now + Duration::from_secs(60) };
    assert!(verify_chain(&world.good, &world.bundles, world.now, PeerRole::Client).is_ok());
    world
});

fuzz_target!(|data: &[u8]| {
    let world = &*WORLD;
    let mut chain: Vec<Vec<u8>> = world.good.iter().map(|c| c.to_vec()).collect();
    let mut rest = data;
    while let Some((step, more)) = rest.split_first_chunk::<4>() {
        rest = more;
        let at = usize::from(step[1]) % chain.len().max(1);
        match step[0] % 6 {
            0 | 1 if !chain.is_empty() && !chain[at].is_empty() => {
                let place = usize::from(u16::from_be_bytes([step[2], step[3]])) % chain[at].len();
                chain[at][place] ^= step[0] | 1;
            }
            2 if !chain.is_empty() => drop(chain.remove(at)),
            3 if chain.len() < 12 && !chain.is_empty() => {
                let again = chain[at].clone();
                chain.push(again);
            }
            4 if !chain.is_empty() => {
                let length = chain[at].len();
                chain[at].truncate(usize::from(u16::from_be_bytes([step[2], step[3]])) % (length + 1));
            }
            5 => {
                chain.push(rest.to_vec());
                break;
            }
            _ => {}
        }
    }
    let shown: Vec<CertificateDer<'_>> = chain.iter().map(|c| CertificateDer::from(c.as_slice())).collect();
    for role in [PeerRole::Client, PeerRole::Server] {
        match verify_chain(&shown, &world.bundles, world.now, role) {
            Ok(peer) => {
                assert_eq!(peer.id.to_string(), "spiffe://fuzz.test/ns/a/sa/b");
                // An ECDSA signature has a twin, but the twin is another encoding: what was signed is the same.
                assert_eq!(chain[0].len(), world.good[0].len(), "another leaf passed");
            }
            Err(refusal) => {
                assert!(!refusal.to_string().chars().any(char::is_control), "a refusal repeats raw bytes: {refusal:?}");
            }
        }
    }
});
