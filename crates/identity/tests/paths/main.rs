//! Hostile and merely wrong certificates, each wrong in one way, against the one verifier, in both directions of TLS.
//!
//! The kinds are those of x509-limbo and of NIST's PKITS as far as they apply to X509-SVIDs: paths, key usages, basic
//! constraints and path lengths, name constraints, validity, signatures, extensions, and the rules of SPIFFE on top.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

mod forge;

use countersign_identity::verify::{PeerRole, VerifiedPeer, verify_chain};
use countersign_identity::{BundleSet, TrustBundle, TrustDomain, X509Authority};
use forge::{
    ALT_NAME, AUTHORITY_KEY_ID, BASIC_CONSTRAINTS, EXTENDED_KEY_USAGE, KEY_USAGE, Key, NAME_CONSTRAINTS, NOW,
    POLICY_CONSTRAINTS, Plan, SUBJECT_KEY_ID, UNKNOWN, ca_constraints, constraints, extended_usage, key_usage, seq,
    subtree, tlv, uris,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

/// A root, intermediates below it, and a leaf: all right until a case has its way with them.
struct Pki {
    root: Plan,
    inters: Vec<Plan>,
    leaf: Plan,
    keys: Vec<Key>,
    /// The key that signs the leaf, instead of its issuer's.
    leaf_signer: Option<Key>,
}

impl Pki {
    /// `depth` intermediates.
    fn new(depth: usize) -> Self {
        let name = |n: usize| if n == 0 { "root".to_owned() } else { format!("inter {n}") };
        Self {
            root: Plan::ca("root", "root"),
            inters: (1..=depth).map(|n| Plan::ca(&name(n), &name(n - 1))).collect(),
            leaf: Plan::leaf(&name(depth)),
            keys: (0..depth + 2).map(|_| Key::new()).collect(),
            leaf_signer: None,
        }
    }

    fn root(&self) -> Vec<u8> {
        self.root.sign(&self.keys[0], &self.keys[0])
    }

    /// Leaf first, without the root.
    fn chain(&self) -> Vec<Vec<u8>> {
        let (top, last) = (&self.keys, self.keys.len() - 1);
        let signer = self.leaf_signer.as_ref().unwrap_or(&top[last - 1]);
        let leaf = self.leaf.sign(&top[last], signer);
        let inters = self.inters.iter().enumerate().map(|(n, plan)| plan.sign(&top[n + 1], &top[n]));
        let mut chain: Vec<_> = inters.collect();
        chain.reverse();
        chain.insert(0, leaf);
        chain
    }
}

fn trusting(roots: &[Vec<u8>]) -> BundleSet {
    let authorities = roots.iter().map(|r| X509Authority::from_der(r.clone()).unwrap()).collect();
    let trust_domain = TrustDomain::new("example.org").unwrap();
    [TrustBundle { authorities, sequence: 1, ..TrustBundle::empty(trust_domain) }].into_iter().collect()
}

fn verify(chain: &[Vec<u8>], bundles: &BundleSet, role: PeerRole) -> Result<VerifiedPeer, (&'static str, String)> {
    let chain: Vec<_> = chain.iter().map(|c| CertificateDer::from(c.clone())).collect();
    let now = OffsetDateTime::from_unix_timestamp(NOW).unwrap();
    verify_chain(&chain, bundles, now, role).map_err(|e| (e.code(), e.to_string()))
}

/// What both directions say; they must agree.
fn verdict(chain: &[Vec<u8>], bundles: &BundleSet) -> &'static str {
    let code = |role| verify(chain, bundles, role).map_or_else(|(code, _)| code, |_| "ok");
    let (client, server) = (code(PeerRole::Client), code(PeerRole::Server));
    assert_eq!(client, server, "the two directions of TLS differ");
    client
}

type Change = fn(&mut Pki);

/// Name, what is wrong with a root, whether it can be an authority all the same.
type RootCase = (&'static str, fn(&mut Plan), bool);

/// Name, intermediates, what is wrong, verdict.
const CASES: &[(&str, usize, Change, &str)] = &[
    // Paths.
    ("leaf directly below the root", 0, |_| {}, "ok"),
    ("one intermediate", 1, |_| {}, "ok"),
    ("six intermediates", 6, |_| {}, "ok"),
    ("seven intermediates", 7, |_| {}, "untrusted"),
    ("eight intermediates", 8, |_| {}, "chain_too_long"),
    ("leaf names another issuer", 1, |p| p.leaf.issuer = "somebody".into(), "untrusted"),
    ("intermediate names another issuer", 1, |p| p.inters[0].issuer = "somebody".into(), "untrusted"),
    ("leaf issued by itself", 0, |p| p.leaf.issuer = "leaf".into(), "untrusted"),
    ("leaf signed by a stranger in the issuer's name", 0, |p| p.leaf_signer = Some(Key::new()), "untrusted"),
    ("leaf's signature has a wrong bit", 0, |p| p.leaf.forged = true, "untrusted"),
    ("intermediate's signature has a wrong bit", 1, |p| p.inters[0].forged = true, "untrusted"),
    ("leaf signed with SHA-1", 0, |p| p.leaf.sha1 = true, "untrusted"),
    ("intermediate signed with SHA-1", 1, |p| p.inters[0].sha1 = true, "untrusted"),
    ("leaf names two signature algorithms", 0, |p| p.leaf.mismatched_algorithm = true, "untrusted"),
    ("intermediate names two signature algorithms", 1, |p| p.inters[0].mismatched_algorithm = true, "untrusted"),
    // Validity.
    ("leaf expired", 0, |p| p.leaf.not_after = NOW - 1, "expired"),
    ("leaf ends now", 0, |p| p.leaf.not_after = NOW, "ok"),
    ("leaf begins later", 0, |p| p.leaf.not_before = NOW + 1, "not_yet_valid"),
    ("leaf begins now", 0, |p| p.leaf.not_before = NOW, "ok"),
    ("leaf ends before it begins", 0, |p| (p.leaf.not_before, p.leaf.not_after) = (NOW - 10, NOW - 20), "untrusted"),
    ("leaf expired and forged", 0, |p| (p.leaf.not_after, p.leaf.forged) = (NOW - 1, true), "untrusted"),
    ("leaf early and forged", 0, |p| (p.leaf.not_before, p.leaf.forged) = (NOW + 1, true), "untrusted"),
    ("intermediate expired", 1, |p| p.inters[0].not_after = NOW - 1, "untrusted"),
    ("intermediate begins later", 1, |p| p.inters[0].not_before = NOW + 1, "untrusted"),
    ("root expired", 1, |p| p.root.not_after = NOW - 1, "untrusted"),
    ("root begins later", 1, |p| p.root.not_before = NOW + 1, "untrusted"),
    // Key usage of CAs.
    ("intermediate without keyUsage", 1, |p| p.inters[0].drop(KEY_USAGE), "ok"),
    ("intermediate that may sign bytes alone", 1, |p| p.inters[0].set(KEY_USAGE, true, key_usage(&[0])), "untrusted"),
    ("intermediate that may sign CRLs alone", 1, |p| p.inters[0].set(KEY_USAGE, true, key_usage(&[6])), "untrusted"),
    ("that usage, not critical", 1, |p| p.inters[0].set(KEY_USAGE, false, key_usage(&[0])), "untrusted"),
    ("upper of two may not sign", 2, |p| p.inters[0].set(KEY_USAGE, true, key_usage(&[0])), "untrusted"),
    ("lower of two may not sign", 2, |p| p.inters[1].set(KEY_USAGE, true, key_usage(&[0])), "untrusted"),
    ("intermediate's keyUsage is no bit string", 1, |p| p.inters[0].set(KEY_USAGE, true, tlv(4, &[4])), "untrusted"),
    // Basic constraints and path lengths.
    ("intermediate without basicConstraints", 1, |p| p.inters[0].drop(BASIC_CONSTRAINTS), "untrusted"),
    ("intermediate that is no CA", 1, |p| p.inters[0].set(BASIC_CONSTRAINTS, true, seq(&[])), "untrusted"),
    ("path length 0 above the leaf", 1, |p| p.inters[0].set(BASIC_CONSTRAINTS, true, ca_constraints(Some(0))), "ok"),
    ("path length 0 above a CA", 2, |p| p.inters[0].set(BASIC_CONSTRAINTS, true, ca_constraints(Some(0))), "untrusted"),
    ("path length 1 above one CA", 2, |p| p.inters[0].set(BASIC_CONSTRAINTS, true, ca_constraints(Some(1))), "ok"),
    (
        "path length 1 above two CAs",
        3,
        |p| p.inters[0].set(BASIC_CONSTRAINTS, true, ca_constraints(Some(1))),
        "untrusted",
    ),
    ("leaf is a CA", 0, |p| p.leaf.set(BASIC_CONSTRAINTS, true, ca_constraints(None)), "ca_as_leaf"),
    ("leaf without basicConstraints", 0, |p| p.leaf.drop(BASIC_CONSTRAINTS), "ok"),
    // Key usage of leaves (X509-SVID 4.3, 4.4).
    ("leaf without keyUsage", 0, |p| p.leaf.drop(KEY_USAGE), "key_usage"),
    ("leaf's keyUsage is not critical", 0, |p| p.leaf.set(KEY_USAGE, false, key_usage(&[0])), "key_usage"),
    ("leaf that may not sign", 0, |p| p.leaf.set(KEY_USAGE, true, key_usage(&[4])), "key_usage"),
    ("leaf with keyCertSign", 0, |p| p.leaf.set(KEY_USAGE, true, key_usage(&[0, 5])), "key_usage"),
    ("leaf with cRLSign", 0, |p| p.leaf.set(KEY_USAGE, true, key_usage(&[0, 6])), "key_usage"),
    ("leaf for servers alone", 0, |p| p.leaf.set(EXTENDED_KEY_USAGE, false, extended_usage(&[1])), "key_usage"),
    ("leaf for clients alone", 0, |p| p.leaf.set(EXTENDED_KEY_USAGE, false, extended_usage(&[2])), "key_usage"),
    ("leaf for code", 0, |p| p.leaf.set(EXTENDED_KEY_USAGE, false, extended_usage(&[3])), "key_usage"),
    ("leaf without extended usages", 0, |p| p.leaf.drop(EXTENDED_KEY_USAGE), "ok"),
    ("leaf with empty extended usages", 0, |p| p.leaf.set(EXTENDED_KEY_USAGE, false, seq(&[])), "key_usage"),
    ("intermediate for code", 1, |p| p.inters[0].set(EXTENDED_KEY_USAGE, false, extended_usage(&[3])), "untrusted"),
    ("intermediate for both", 1, |p| p.inters[0].set(EXTENDED_KEY_USAGE, false, extended_usage(&[1, 2])), "ok"),
    // Name constraints.
    (
        "leaf has name constraints",
        0,
        |p| p.leaf.set(NAME_CONSTRAINTS, true, constraints(&[subtree(0x82, b"a.org")], &[])),
        "malformed_certificate",
    ),
    (
        "URIs of another host permitted",
        1,
        |p| p.inters[0].set(NAME_CONSTRAINTS, true, constraints(&[subtree(0x86, b"elsewhere.org")], &[])),
        "untrusted",
    ),
    (
        "our URIs excluded",
        1,
        |p| p.inters[0].set(NAME_CONSTRAINTS, true, constraints(&[], &[subtree(0x86, b"example.org")])),
        "untrusted",
    ),
    (
        "DNS permitted, and the leaf has none",
        1,
        |p| p.inters[0].set(NAME_CONSTRAINTS, true, constraints(&[subtree(0x82, b"example.org")], &[])),
        "ok",
    ),
    (
        "DNS permitted, and the leaf has another",
        1,
        |p| {
            p.inters[0].set(NAME_CONSTRAINTS, true, constraints(&[subtree(0x82, b"example.org")], &[]));
            p.leaf.set(ALT_NAME, false, seq(&[tlv(0x86, b"spiffe://example.org/a"), tlv(0x82, b"a.elsewhere.org")]));
        },
        "untrusted",
    ),
    (
        "DNS permitted, and the leaf has it",
        1,
        |p| {
            p.inters[0].set(NAME_CONSTRAINTS, true, constraints(&[subtree(0x82, b"example.org")], &[]));
            p.leaf.set(ALT_NAME, false, seq(&[tlv(0x86, b"spiffe://example.org/a"), tlv(0x82, b"a.example.org")]));
        },
        "ok",
    ),
    (
        "DNS excluded, and the leaf has it",
        1,
        |p| {
            p.inters[0].set(NAME_CONSTRAINTS, true, constraints(&[], &[subtree(0x82, b"example.org")]));
            p.leaf.set(ALT_NAME, false, seq(&[tlv(0x86, b"spiffe://example.org/a"), tlv(0x82, b"a.example.org")]));
        },
        "untrusted",
    ),
    (
        "constraints of the upper CA hold below the lower",
        2,
        |p| p.inters[0].set(NAME_CONSTRAINTS, true, constraints(&[], &[subtree(0x86, b"example.org")])),
        "untrusted",
    ),
    ("constraints with nothing in them", 1, |p| p.inters[0].set(NAME_CONSTRAINTS, true, seq(&[])), "untrusted"),
    (
        "constraints with empty subtrees",
        1,
        |p| p.inters[0].set(NAME_CONSTRAINTS, true, seq(&[tlv(0xa0, &[])])),
        "untrusted",
    ),
    (
        "malformed DNS constraint",
        1,
        |p| p.inters[0].set(NAME_CONSTRAINTS, true, constraints(&[subtree(0x82, b"a..b")], &[])),
        "untrusted",
    ),
    (
        "wildcard as DNS constraint",
        1,
        |p| p.inters[0].set(NAME_CONSTRAINTS, true, constraints(&[], &[subtree(0x82, b"*.a.org")])),
        "untrusted",
    ),
    (
        "address constraint without a mask",
        1,
        |p| p.inters[0].set(NAME_CONSTRAINTS, true, constraints(&[subtree(0x87, &[10, 0, 0, 1])], &[])),
        "untrusted",
    ),
    ("constraints that are no sequence", 1, |p| p.inters[0].set(NAME_CONSTRAINTS, true, tlv(4, b"x")), "untrusted"),
    // Extensions.
    ("leaf with an unknown critical extension", 0, |p| p.leaf.add(UNKNOWN, true, tlv(5, &[])), "untrusted"),
    ("leaf with an unknown extension", 0, |p| p.leaf.add(UNKNOWN, false, tlv(5, &[])), "ok"),
    (
        "intermediate with an unknown critical extension",
        1,
        |p| p.inters[0].add(UNKNOWN, true, tlv(5, &[])),
        "untrusted",
    ),
    (
        "intermediate with policy constraints",
        1,
        |p| p.inters[0].add(POLICY_CONSTRAINTS, true, seq(&[tlv(0x80, &[0])])),
        "untrusted",
    ),
    ("leaf with two keyUsages", 0, |p| p.leaf.add(KEY_USAGE, true, key_usage(&[0])), "malformed_certificate"),
    (
        "leaf with two alternative names",
        0,
        |p| p.leaf.add(ALT_NAME, false, uris(&["spiffe://example.org/b"])),
        "malformed_certificate",
    ),
    (
        "leaf with an unknown extension twice",
        0,
        |p| (0..2).for_each(|_| p.leaf.add(UNKNOWN, false, tlv(5, &[]))),
        "malformed_certificate",
    ),
    ("intermediate with two keyUsages", 1, |p| p.inters[0].add(KEY_USAGE, true, key_usage(&[5])), "untrusted"),
    (
        "intermediate with an unknown extension twice",
        1,
        |p| (0..2).for_each(|_| p.inters[0].add(UNKNOWN, false, tlv(5, &[]))),
        "untrusted",
    ),
    // Forms.
    ("leaf of version 1", 0, |p| (p.leaf.version, p.leaf.extensions) = (0, vec![]), "uri_sans"),
    ("leaf of version 2", 0, |p| p.leaf.version = 1, "untrusted"),
    ("intermediate of version 1", 1, |p| (p.inters[0].version, p.inters[0].extensions) = (0, vec![]), "untrusted"),
    ("bytes behind the leaf", 0, |p| p.leaf.trailing = vec![0], "malformed_certificate"),
    ("bytes behind the intermediate", 1, |p| p.inters[0].trailing = vec![0], "untrusted"),
    ("a leaf of 20 kB", 0, |p| p.leaf.add(UNKNOWN, false, tlv(4, &vec![0; 20_000])), "chain_too_long"),
    ("an intermediate of 20 kB", 1, |p| p.inters[0].add(UNKNOWN, false, tlv(4, &vec![0; 20_000])), "chain_too_long"),
    (
        "four certificates of 13 kB",
        3,
        |p| {
            let Pki { inters, leaf, .. } = p;
            inters.iter_mut().chain([leaf]).for_each(|c| c.add(UNKNOWN, false, tlv(4, &vec![0; 13_000])));
        },
        "chain_too_long",
    ),
    // SPIFFE (X509-SVID 2, 4, 5).
    ("no alternative name", 0, |p| p.leaf.drop(ALT_NAME), "uri_sans"),
    ("a DNS name alone", 0, |p| p.leaf.set(ALT_NAME, false, seq(&[tlv(0x82, b"example.org")])), "uri_sans"),
    (
        "two URIs",
        0,
        |p| p.leaf.set(ALT_NAME, false, uris(&["spiffe://example.org/a", "spiffe://example.org/b"])),
        "uri_sans",
    ),
    ("one URI twice", 0, |p| p.leaf.set(ALT_NAME, false, uris(&["spiffe://example.org/a"; 2])), "uri_sans"),
    ("another scheme", 0, |p| p.leaf.set(ALT_NAME, false, uris(&["https://example.org/a"])), "bad_spiffe_id"),
    ("dots in the path", 0, |p| p.leaf.set(ALT_NAME, false, uris(&["spiffe://example.org/a/../b"])), "bad_spiffe_id"),
    ("an escape in the path", 0, |p| p.leaf.set(ALT_NAME, false, uris(&["spiffe://example.org/%61"])), "bad_spiffe_id"),
    ("a port", 0, |p| p.leaf.set(ALT_NAME, false, uris(&["spiffe://example.org:1/a"])), "bad_spiffe_id"),
    ("upper case", 0, |p| p.leaf.set(ALT_NAME, false, uris(&["spiffe://Example.org/a"])), "bad_spiffe_id"),
    ("a zero byte", 0, |p| p.leaf.set(ALT_NAME, false, uris(&["spiffe://example.org/a\0"])), "bad_spiffe_id"),
    (
        "a long ID",
        0,
        |p| p.leaf.set(ALT_NAME, false, uris(&[&format!("spiffe://example.org/{}", "x".repeat(2_048))])),
        "bad_spiffe_id",
    ),
    ("no path", 0, |p| p.leaf.set(ALT_NAME, false, uris(&["spiffe://example.org"])), "no_path"),
    ("another trust domain", 0, |p| p.leaf.set(ALT_NAME, false, uris(&["spiffe://elsewhere.org/a"])), "trust_domain"),
    (
        "alternative names that are no sequence",
        0,
        |p| p.leaf.set(ALT_NAME, false, tlv(4, b"x")),
        "malformed_certificate",
    ),
];

#[test]
fn certificates_that_are_wrong_in_one_way_are_refused_for_it_in_both_directions() {
    assert!(CASES.len() >= 90, "{} cases", CASES.len());
    let mut wrong = vec![];
    for (name, depth, change, expected) in CASES {
        let mut pki = Pki::new(*depth);
        change(&mut pki);
        let found = verdict(&pki.chain(), &trusting(&[pki.root()]));
        if found != *expected {
            wrong.push(format!("{name}: expected {expected}, found {found}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn certificates_that_cannot_be_roots_are_no_authorities() {
    let cases: &[RootCase] = &[
        ("right", |_| {}, true),
        ("without keyUsage", |r| r.drop(KEY_USAGE), true),
        ("with an unknown extension", |r| r.add(UNKNOWN, false, tlv(5, &[])), true),
        ("with an unknown critical extension", |r| r.add(UNKNOWN, true, tlv(5, &[])), false),
        ("with policy constraints", |r| r.add(POLICY_CONSTRAINTS, true, seq(&[tlv(0x80, &[0])])), false),
        ("not a CA", |r| r.set(BASIC_CONSTRAINTS, true, seq(&[])), false),
        ("without basicConstraints", |r| r.drop(BASIC_CONSTRAINTS), false),
        ("without keyCertSign", |r| r.set(KEY_USAGE, true, key_usage(&[0, 6])), false),
        ("two keyUsages", |r| r.add(KEY_USAGE, true, key_usage(&[5])), false),
        ("version 1", |r| (r.version, r.extensions) = (0, vec![]), false),
        ("empty constraints", |r| r.set(NAME_CONSTRAINTS, true, seq(&[])), false),
        ("malformed constraint", |r| r.set(NAME_CONSTRAINTS, true, constraints(&[subtree(0x82, b"a b")], &[])), false),
        ("bytes behind it", |r| r.trailing = vec![0], false),
        ("20 kB", |r| r.add(UNKNOWN, false, tlv(4, &vec![0; 20_000])), false),
    ];
    for (name, change, good) in cases {
        let mut pki = Pki::new(0);
        change(&mut pki.root);
        assert_eq!(X509Authority::from_der(pki.root()).is_ok(), *good, "{name}");
    }
    let mut pki = Pki::new(0);
    pki.root.set(NAME_CONSTRAINTS, true, constraints(&[], &[subtree(0x86, b"example.org")]));
    assert_eq!(verdict(&pki.chain(), &trusting(&[pki.root()])), "untrusted", "a root's constraints hold as well");
}

#[test]
fn the_authority_of_a_peer_is_the_one_that_its_path_ends_in_whatever_else_it_sends() {
    let (pki, stranger) = (Pki::new(1), Pki::new(0));
    // Signed once: an ECDSA signature is another one each time, and so are the certificate's bytes.
    let (root, strange_root) = (pki.root(), stranger.root());
    let bundles = trusting(&[root.clone(), strange_root.clone()]);
    let own = X509Authority::from_der(root.clone()).unwrap();
    let peer = verify(&pki.chain(), &bundles, PeerRole::Client).unwrap();
    assert_eq!((peer.anchor, peer.authority.as_str()), (own.key(), own.id()));
    // A certificate that claims any authority it likes, another root, a certificate sent twice, bytes that are none.
    let mut junk = Plan::ca("junk", "junk");
    junk.add(AUTHORITY_KEY_ID, false, seq(&[tlv(0x80, &[7; 9_000])]));
    let junk = junk.sign(&Key::new(), &Key::new());
    for more in [junk, strange_root, pki.chain()[1].clone(), pki.chain()[0].clone(), vec![0x30, 0]] {
        for at in [1, 2] {
            let mut chain = pki.chain();
            chain.insert(at, more.clone());
            let found = verdict(&chain, &bundles);
            assert!(["not_in_path", "untrusted"].contains(&found), "{found}");
        }
    }
    // The root itself is in the path, and tools append it.
    let chain = [pki.chain(), vec![root.clone()]].concat();
    assert_eq!(verify(&chain, &bundles, PeerRole::Client).unwrap().anchor, own.key());
    let twice = [chain, vec![root]].concat();
    assert_eq!(verdict(&twice, &bundles), "not_in_path");
}

#[test]
fn an_unfit_intermediate_does_not_hide_a_fit_one_of_the_same_name_and_key() {
    let pki = Pki::new(1);
    let mut unfit = pki.inters[0].clone();
    unfit.set(KEY_USAGE, true, key_usage(&[0]));
    let unfit = unfit.sign(&pki.keys[1], &pki.keys[0]);
    let chain = pki.chain();
    let bundles = trusting(&[pki.root()]);
    assert_eq!(verdict(&[chain[0].clone(), unfit.clone()], &bundles), "untrusted");
    // Sent together the fit one is found; the other is beyond the path.
    for both in [[&unfit, &chain[1]], [&chain[1], &unfit]] {
        assert_eq!(verdict(&[chain[0].clone(), both[0].clone(), both[1].clone()], &bundles), "not_in_path");
    }
}

#[test]
fn a_cross_signed_intermediate_ends_in_whichever_root_is_trusted() {
    let (pki, other) = (Pki::new(1), Pki::new(0));
    let mut crossed = pki.inters[0].clone();
    crossed.issuer = "other".into();
    let crossed = crossed.sign(&pki.keys[1], &other.keys[0]);
    let mut other_root = Plan::ca("other", "other");
    other_root.set(SUBJECT_KEY_ID, false, tlv(4, &[9; 20]));
    let other_root = other_root.sign(&other.keys[0], &other.keys[0]);
    let leaf = pki.chain()[0].clone();
    let anchor = |roots: &[Vec<u8>]| verify(&[leaf.clone(), crossed.clone()], &trusting(roots), PeerRole::Server);
    assert_eq!(anchor(std::slice::from_ref(&other_root)).unwrap().authority, "09".repeat(20));
    assert_eq!(anchor(&[pki.root()]).unwrap_err().0, "untrusted");
    assert_eq!(anchor(&[pki.root(), other_root]).unwrap().authority, "09".repeat(20));
}

#[test]
fn authorities_without_a_usable_key_identifier_are_named_by_their_key_in_bundle_and_path_alike() {
    for identifier in [None, Some(vec![]), Some(vec![1; 9_000])] {
        let mut pki = Pki::new(0);
        identifier.into_iter().for_each(|id| pki.root.set(SUBJECT_KEY_ID, false, tlv(4, &id)));
        let authority = X509Authority::from_der(pki.root()).unwrap();
        assert_eq!(authority.id().len(), 40, "{}", authority.id());
        let peer = verify(&pki.chain(), &trusting(&[pki.root()]), PeerRole::Client).unwrap();
        assert_eq!(peer.authority, authority.id());
    }
    let ids: Vec<_> = (0..2).map(|_| X509Authority::from_der(Pki::new(0).root()).unwrap().id().to_owned()).collect();
    assert_ne!(ids[0], ids[1]);
}

#[test]
fn no_error_about_an_unproven_certificate_repeats_its_name_or_its_bytes_raw() {
    let victim = "spiffe://example.org/admin";
    let breaks: &[Change] = &[
        |p| p.leaf.forged = true,
        |p| (p.leaf.not_after, p.leaf.forged) = (NOW - 1, true),
        |p| p.leaf.drop(KEY_USAGE),
        |p| p.leaf.set(BASIC_CONSTRAINTS, true, ca_constraints(None)),
        |p| p.leaf.set(EXTENDED_KEY_USAGE, false, extended_usage(&[1])),
    ];
    for change in breaks {
        let mut pki = Pki::new(0);
        pki.leaf.set(ALT_NAME, false, uris(&[victim]));
        change(&mut pki);
        let (code, text) = verify(&pki.chain(), &trusting(&[pki.root()]), PeerRole::Client).unwrap_err();
        assert!(!text.contains("admin"), "{code}: {text}");
    }
    let mut pki = Pki::new(0);
    pki.leaf.set(ALT_NAME, false, uris(&[&format!("x y\n2026-11-26 WARN all is well\u{1b}[31m{}", "z".repeat(5_000))]));
    let (code, text) = verify(&pki.chain(), &trusting(&[pki.root()]), PeerRole::Client).unwrap_err();
    assert_eq!(code, "bad_spiffe_id");
    assert!(text.chars().all(|c| !c.is_control()) && text.len() < 500, "{text}");
    // A proven one is told by name: its owner's clock or renewal is to be looked at.
    let mut pki = Pki::new(0);
    pki.leaf.not_after = NOW - 1;
    let (_, text) = verify(&pki.chain(), &trusting(&[pki.root()]), PeerRole::Client).unwrap_err();
    assert!(text.contains("`spiffe://example.org/a` expired at"), "{text}");
}
