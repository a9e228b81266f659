//! Upstreams whose SVIDs no peer would accept are rejected at start.

use super::*;
use rcgen::{BasicConstraints, CertificateParams, CustomExtension, IsCa, Issuer, KeyPair, KeyUsagePurpose};

struct Pki {
    dir: tempfile::TempDir,
}

impl Pki {
    /// A root, and an issuing CA below it that `change` modifies.
    fn new(change: impl FnOnce(&mut CertificateParams)) -> Self {
        let ca = |name: &str| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params.not_before = OffsetDateTime::now_utc() - Duration::from_secs(60);
            params.not_after = OffsetDateTime::now_utc() + Duration::from_secs(3600);
            params
        };
        let pki = Self { dir: tempfile::tempdir().unwrap() };
        let (root_key, stranger_key, key) =
            (KeyPair::generate().unwrap(), KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let root = ca("Corp Root");
        pki.write("root.pem", &root.self_signed(&root_key).unwrap().pem());
        pki.write("stranger.pem", &ca("Another Root").self_signed(&stranger_key).unwrap().pem());
        let mut issuing = ca("Corp Issuing");
        change(&mut issuing);
        let issuing = issuing.signed_by(&key, &Issuer::new(root, root_key)).unwrap();
        pki.write("issuing.pem", &issuing.pem());
        pki.write("issuing.key", &key.serialize_pem());
        pki
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn load(&self, bundle: &str) -> Result<Disk, String> {
        let at = |name: &str| self.dir.path().join(name);
        let files = UpstreamDisk { certificate: at("issuing.pem"), key: at("issuing.key"), bundle: Some(at(bundle)) };
        let td = TrustDomain::new("example.org").unwrap();
        Disk::new(files, &td, OffsetDateTime::now_utc()).map_err(|e| e.to_string())
    }
}

/// Name constraints (2.5.29.30) on URIs of one host: `subtrees` 0 permits, 1 excludes.
fn uri_constraint(subtrees: u8, host: &str) -> CustomExtension {
    let tlv = |tag: u8, content: &[u8]| [&[tag, u8::try_from(content.len()).unwrap()], content].concat();
    let subtree = tlv(0x30, &tlv(0x86, host.as_bytes()));
    let mut extension = CustomExtension::from_oid_content(&[2, 5, 29, 30], tlv(0x30, &tlv(0xa0 | subtrees, &subtree)));
    extension.set_criticality(true);
    extension
}

#[tokio::test]
async fn an_upstream_that_peers_would_believe_is_taken_and_sends_nothing_beyond_the_path() {
    let pki = Pki::new(|_| {});
    let disk = pki.load("root.pem").unwrap_or_else(|e| panic!("{e}"));
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let td = TrustDomain::new("example.org").unwrap();
    let signed = disk.sign_intermediate(&td, &key, Duration::from_secs(60), OffsetDateTime::now_utc()).await.unwrap();
    assert_eq!(signed.chain.len(), 2, "our CA and the issuing one");
    // The issuing CA is a trusted root itself: nothing above our CA is sent.
    let both = ["issuing.pem", "root.pem"].map(|n| std::fs::read_to_string(pki.dir.path().join(n)).unwrap());
    pki.write("both.pem", &both.concat());
    let disk = pki.load("both.pem").unwrap_or_else(|e| panic!("{e}"));
    let signed = disk.sign_intermediate(&td, &key, Duration::from_secs(60), OffsetDateTime::now_utc()).await.unwrap();
    assert_eq!(signed.chain.len(), 1);
}

#[test]
fn a_bundle_without_the_upstreams_root_is_refused_at_start() {
    let why = Pki::new(|_| {}).load("stranger.pem").err().unwrap();
    assert!(why.contains("issuing.pem") && why.contains("every peer would refuse the SVIDs of `example.org`"), "{why}");
}

#[test]
fn name_constraints_that_leave_our_trust_domain_out_are_refused_at_start() {
    for (subtrees, host) in [(1, "example.org"), (0, "elsewhere.org")] {
        let pki = Pki::new(|ca| ca.custom_extensions.push(uri_constraint(subtrees, host)));
        let why = pki.load("root.pem").err().unwrap();
        assert!(why.contains("name constraints must leave room for `spiffe://example.org`"), "{why}");
    }
}

#[test]
fn an_issuing_ca_that_may_not_sign_is_refused_at_start() {
    let why = Pki::new(|ca| ca.key_usages = vec![KeyUsagePurpose::DigitalSignature]).load("root.pem").err().unwrap();
    assert!(why.contains("keyUsage lacks keyCertSign"), "{why}");
}
