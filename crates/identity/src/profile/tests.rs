//! Each extension of what we issue, and how the verifier rejects what we would never issue.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use super::*;
use crate::bundle::{BundleSet, TrustBundle, X509Authority, authority_key_id, subject_key_id};
use crate::key::KeyType;
use crate::verify::{PeerRole, Refusal, verify_chain};
use x509_parser::prelude::GeneralName;

const TD: &str = "example.org";

fn td() -> TrustDomain {
    TrustDomain::new(TD).unwrap()
}

fn now() -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap()
}

fn root(ttl: u64) -> (SigningAuthority, BundleSet) {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let cert = issue_root(&td(), &key, Duration::from_secs(ttl), now()).unwrap();
    let authority = X509Authority::from_der(cert.to_vec()).unwrap();
    let bundle = TrustBundle { authorities: vec![authority], sequence: 1, ..TrustBundle::empty(td()) };
    (SigningAuthority::new(cert, vec![], &key).unwrap(), [bundle].into_iter().collect())
}

fn leaf(authority: &SigningAuthority, id: &str, ttl: u64) -> Issued {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let csr = request(&key, None).unwrap();
    let id = SpiffeId::new(id).unwrap();
    let req = LeafRequest {
        id: &id,
        dns_names: &["web.default.svc".into(), "web".into()],
        key: &RequestedKey::from_csr(&csr).unwrap(),
        ttl: Duration::from_secs(ttl),
    };
    issue_leaf(&req, authority, now()).unwrap()
}

#[test]
fn a_leaf_has_every_extension_of_the_profile() {
    let (ca, _) = root(3600);
    let issued = leaf(&ca, "spiffe://example.org/ns/default/sa/web", 60);
    let (_, cert) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    let (_, issuer) = X509Certificate::from_der(ca.certificate()).unwrap();
    assert_eq!(cert.version().0, 2, "version 3 is written as 2");
    assert!(cert.raw_serial().len() >= 9 && cert.raw_serial()[0] < 0x80, "64 bits of entropy and positive");
    let san = cert.subject_alternative_name().unwrap().unwrap();
    assert_eq!(
        san.value.general_names,
        [
            GeneralName::URI("spiffe://example.org/ns/default/sa/web"),
            GeneralName::DNSName("web.default.svc"),
            GeneralName::DNSName("web")
        ]
    );
    assert_eq!(cert.subject().to_string(), "C=US, O=Countersign, CN=web.default.svc");
    assert_eq!(authority_key_id(&cert), subject_key_id(&issuer));
    assert!(subject_key_id(&cert).is_some());
    let bc = cert.basic_constraints().unwrap().expect("basicConstraints is there");
    assert!(!bc.value.ca);
    let ku = cert.key_usage().unwrap().unwrap();
    assert!(ku.critical);
    assert_eq!(ku.value.flags, 0b1_0101, "digitalSignature, keyEncipherment, keyAgreement and nothing else");
    let eku = cert.extended_key_usage().unwrap().unwrap().value;
    assert!(eku.server_auth && eku.client_auth && !eku.any && eku.other.is_empty());
    assert_eq!(cert.validity().not_before.to_datetime(), now() - Duration::from_secs(10));
    assert_eq!(cert.validity().not_after.to_datetime(), now() + Duration::from_secs(60));
    assert_eq!(cert.extensions().len(), 6, "nothing else");
}

#[test]
fn a_root_has_every_extension_of_the_profile() {
    let (ca, _) = root(3600);
    let (_, cert) = X509Certificate::from_der(ca.certificate()).unwrap();
    let san = cert.subject_alternative_name().unwrap().unwrap();
    assert_eq!(san.value.general_names, [GeneralName::URI("spiffe://example.org")]);
    let bc = cert.basic_constraints().unwrap().unwrap();
    assert!(bc.critical && bc.value.ca);
    let ku = cert.key_usage().unwrap().unwrap();
    assert!(ku.critical);
    assert_eq!(ku.value.flags, 0b110_0000, "keyCertSign and cRLSign");
    let serial = cert.subject().iter_by_oid(&x509_parser::oid_registry::OID_X509_SERIALNUMBER).next().unwrap();
    assert_eq!(serial.as_str().unwrap(), cert.tbs_certificate.serial.to_string());
}

#[test]
fn a_leaf_never_outlives_its_authority() {
    let (ca, _) = root(30);
    let issued = leaf(&ca, "spiffe://example.org/a", 3600);
    assert_eq!(issued.facts.not_after, ca.not_after());
}

#[test]
fn the_verifier_accepts_what_we_issue_in_its_time_and_nothing_before_or_after() {
    let (ca, bundles) = root(3600);
    let chain = leaf(&ca, "spiffe://example.org/a", 60).chain;
    let at = |s: i64| verify_chain(&chain, &bundles, now() + time::Duration::seconds(s), PeerRole::Client);
    assert_eq!(at(0).unwrap().id.path(), "/a");
    assert!(at(-10).is_ok(), "ten seconds of skew are tolerated");
    assert_eq!(at(-11).unwrap_err().code(), "not_yet_valid");
    assert!(at(60).is_ok());
    let late = at(61).unwrap_err();
    assert_eq!(late.code(), "expired");
    assert!(
        late.to_string().contains("8:01:00") && late.to_string().contains("8:01:01"),
        "both times are named: {late}"
    );
}

#[test]
fn another_authority_or_trust_domain_is_refused() {
    let (ca, bundles) = root(3600);
    let (other, _) = root(3600);
    let code =
        |chain: &[CertificateDer<'_>]| verify_chain(chain, &bundles, now(), PeerRole::Server).unwrap_err().code();
    assert_eq!(code(&leaf(&other, "spiffe://example.org/a", 60).chain), "untrusted");
    assert_eq!(code(&leaf(&ca, "spiffe://elsewhere.org/a", 60).chain), "trust_domain");
    assert_eq!(code(&[]), "no_certificate");
    assert_eq!(code(&[ca.certificate().clone()]), "ca_as_leaf");
    assert_eq!(code(&[CertificateDer::from(vec![0x30, 0])]), "malformed_certificate");
}

/// A certificate that breaks one rule and is otherwise like ours.
fn crafted(authority: &SigningAuthority, change: impl FnOnce(&mut CertificateParams)) -> Vec<CertificateDer<'static>> {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.not_before = now() - Duration::from_secs(10);
    params.not_after = now() + Duration::from_secs(60);
    params.subject_alt_names = vec![SanType::URI("spiffe://example.org/a".try_into().unwrap())];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.is_ca = IsCa::ExplicitNoCa;
    change(&mut params);
    let unsigned = Unsigned::from_der(params.signed_by(&key, &authority.ca().issuer).unwrap().der()).unwrap();
    vec![authority.sign(&unsigned).unwrap().into()]
}

#[test]
fn leaves_that_break_one_rule_are_refused_for_that_rule() {
    let (ca, bundles) = root(3600);
    let uri = |s: &str| SanType::URI(s.try_into().unwrap());
    let code = |change: &dyn Fn(&mut CertificateParams)| {
        verify_chain(&crafted(&ca, change), &bundles, now(), PeerRole::Client).map_err(|e| e.code())
    };
    assert!(code(&|_| {}).is_ok(), "the untouched one passes, so each refusal below is for its own rule");
    assert_eq!(code(&|p| p.subject_alt_names.push(uri("spiffe://example.org/b"))), Err("uri_sans"));
    assert_eq!(code(&|p| p.subject_alt_names.clear()), Err("uri_sans"));
    assert_eq!(code(&|p| p.subject_alt_names = vec![uri("spiffe://example.org/a/../b")]), Err("bad_spiffe_id"));
    assert_eq!(code(&|p| p.subject_alt_names = vec![uri("https://example.org/a")]), Err("bad_spiffe_id"));
    assert_eq!(code(&|p| p.subject_alt_names = vec![uri("spiffe://example.org")]), Err("no_path"));
    assert_eq!(code(&|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)), Err("ca_as_leaf"));
    assert_eq!(code(&|p| p.key_usages.clear()), Err("key_usage"));
    assert_eq!(code(&|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)), Err("key_usage"));
    assert_eq!(code(&|p| p.key_usages.push(KeyUsagePurpose::CrlSign)), Err("key_usage"));
    assert_eq!(code(&|p| p.key_usages = vec![KeyUsagePurpose::KeyAgreement]), Err("key_usage"));
    assert_eq!(code(&|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]), Err("key_usage"));
}

#[test]
fn what_a_key_of_each_type_signs_later_verifies_and_a_wrong_signature_does_not() {
    for key_type in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048] {
        let key = LocalKey::new(&PrivateKey::generate(key_type).unwrap()).unwrap();
        let root = unsigned_root(&td(), key.public_side(), Duration::from_secs(3600), now()).unwrap();
        let root = CertificateDer::from(root.signed(&key.sign(root.content()).unwrap()));
        let authority = X509Authority::from_der(root.to_vec()).unwrap();
        let bundles = [TrustBundle { authorities: vec![authority], ..TrustBundle::empty(td()) }].into_iter().collect();
        let ca = CaCertificate::new(root, vec![], key.public_side()).unwrap();
        let csr = unsigned_intermediate_request(&td(), key.public_side()).unwrap();
        let requested = RequestedKey::from_csr(&csr.signed(&key.sign(csr.content()).unwrap())).unwrap();
        assert_eq!(requested.uri(), Some("spiffe://example.org"));
        let id = SpiffeId::new("spiffe://example.org/a").unwrap();
        let req = LeafRequest { id: &id, dns_names: &[], key: &requested, ttl: Duration::from_secs(60) };
        let leaf = unsigned_leaf(&req, &ca, now()).unwrap();
        let judged = |signature: &[u8]| {
            let issued = ca.issued(leaf.signed(signature)).unwrap();
            verify_chain(&issued.chain, &bundles, now(), PeerRole::Client).map(|peer| peer.id)
        };
        assert_eq!(judged(&key.sign(leaf.content()).unwrap()).unwrap(), id);
        assert!(judged(&key.sign(b"something else").unwrap()).is_err() && judged(&[]).is_err());
    }
}

#[test]
fn an_intermediates_leaf_verifies_up_to_the_upstream_root() {
    let (upstream, bundles) = root(3600);
    let key = PrivateKey::generate(KeyType::EcP384).unwrap();
    let requested = RequestedKey::from_csr(&request_intermediate(&td(), &key).unwrap()).unwrap();
    let cert = issue_intermediate(&td(), &requested, Duration::from_secs(7200), now(), &upstream).unwrap();
    let ca = SigningAuthority::new(cert.clone(), vec![cert], &key).unwrap();
    assert_eq!(ca.not_after(), upstream.not_after(), "it never outlives its upstream");
    let chain = leaf(&ca, "spiffe://example.org/a", 60).chain;
    assert_eq!(chain.len(), 2);
    assert!(verify_chain(&chain, &bundles, now(), PeerRole::Client).is_ok());
    let alone = verify_chain(&chain[..1], &bundles, now(), PeerRole::Client);
    assert!(matches!(alone, Err(Refusal::Untrusted { .. })));
}

#[test]
fn an_intermediate_is_issued_only_to_a_request_for_the_same_trust_domain() {
    let (upstream, _) = root(3600);
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let elsewhere = request_intermediate(&TrustDomain::new("elsewhere.org").unwrap(), &key).unwrap();
    for (csr, found) in [(elsewhere, "`spiffe://elsewhere.org`"), (request(&key, None).unwrap(), "no URI name")] {
        let requested = RequestedKey::from_csr(&csr).unwrap();
        let refused = issue_intermediate(&td(), &requested, Duration::from_secs(60), now(), &upstream).unwrap_err();
        assert!(refused.to_string().ends_with(&format!("for `spiffe://example.org`, found {found}")), "{refused}");
    }
}

#[test]
fn a_request_that_is_garbage_or_forged_is_refused() {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let mut csr = request(&key, None).unwrap();
    assert!(RequestedKey::from_csr(&csr).is_ok());
    *csr.last_mut().unwrap() ^= 1;
    assert!(RequestedKey::from_csr(&csr).is_err(), "its signature is wrong");
    assert!(RequestedKey::from_csr(b"x").is_err());
    assert!(RequestedKey::from_csr(&vec![0x30; MAX_CSR_BYTES + 1]).is_err());
}
