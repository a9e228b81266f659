//! Upstreams whose SVIDs no peer would accept are rejected at start.

use std::path::Path;

use super::*;
use crate::key_manager::Signer;
use rcgen::{BasicConstraints, CertificateParams, CustomExtension, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use std::sync::Arc;

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

    async fn load(&self, bundle: &str) -> Result<Disk, String> {
        let at = |name: &str| self.dir.path().join(name);
        let files = UpstreamDisk { certificate: at("issuing.pem"), key: at("issuing.key"), bundle: Some(at(bundle)) };
        let td = TrustDomain::new("example.org").unwrap();
        Disk::new(files, &td, OffsetDateTime::now_utc()).await.map_err(|e| e.to_string())
    }
}

/// Another root with the name of the first, which ends in a day.
fn successor() -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "Corp Root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = OffsetDateTime::now_utc() - Duration::from_secs(60);
    params.not_after = OffsetDateTime::now_utc() + Duration::from_secs(86_400);
    params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()
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
    let disk = pki.load("root.pem").await.unwrap_or_else(|e| panic!("{e}"));
    let key = ephemeral(KeyType::EcP256).unwrap();
    let td = TrustDomain::new("example.org").unwrap();
    let csr = request_intermediate(&td, &*key).await.unwrap();
    let signed = disk.sign_intermediate(&td, &csr, Duration::from_secs(60), OffsetDateTime::now_utc()).await.unwrap();
    assert_eq!(signed.chain.len(), 2, "our CA and the issuing one");
    // The issuing CA is a trusted root itself: nothing above our CA is sent.
    let both = ["issuing.pem", "root.pem"].map(|n| std::fs::read_to_string(pki.dir.path().join(n)).unwrap());
    pki.write("both.pem", &both.concat());
    let disk = pki.load("both.pem").await.unwrap_or_else(|e| panic!("{e}"));
    let signed = disk.sign_intermediate(&td, &csr, Duration::from_secs(60), OffsetDateTime::now_utc()).await.unwrap();
    assert_eq!(signed.chain.len(), 1);
}

#[tokio::test]
async fn our_ca_ends_with_the_first_certificate_above_it_the_root_included() {
    // The root ends in an hour; the issuing CA would be valid for a day.
    let pki = Pki::new(|ca| ca.not_after = OffsetDateTime::now_utc() + Duration::from_secs(86_400));
    let td = TrustDomain::new("example.org").unwrap();
    let key = ephemeral(KeyType::EcP256).unwrap();
    let csr = request_intermediate(&td, &*key).await.unwrap();
    let end = async |bundle: &str| {
        let disk = pki.load(bundle).await.unwrap_or_else(|e| panic!("{e}"));
        let (ttl, now) = (Duration::from_secs(7_200), OffsetDateTime::now_utc());
        let signed = disk.sign_intermediate(&td, &csr, ttl, now).await.unwrap();
        (X509Authority::from_der(signed.chain[0].to_vec()).unwrap().not_after() - now).whole_minutes()
    };
    assert!((58..=60).contains(&end("root.pem").await));
    // The next root has the same name, and ends later.
    pki.write("next.pem", &[std::fs::read_to_string(pki.dir.path().join("root.pem")).unwrap(), successor()].concat());
    assert!((58..=60).contains(&end("next.pem").await));
    // Where peers trust the issuing CA itself, the root does not matter.
    let issuing = std::fs::read_to_string(pki.dir.path().join("issuing.pem")).unwrap();
    pki.write("both.pem", &[issuing, std::fs::read_to_string(pki.dir.path().join("root.pem")).unwrap()].concat());
    assert!((118..=120).contains(&end("both.pem").await));
}

#[tokio::test]
async fn roots_are_those_of_the_files_as_they_are_now() {
    let pki = Pki::new(|_| {});
    let disk = pki.load("root.pem").await.unwrap_or_else(|e| panic!("{e}"));
    let read = |name: &str| std::fs::read_to_string(pki.dir.path().join(name)).unwrap();
    assert_eq!(disk.bundle().await.unwrap().roots.len(), 1);
    pki.write("root.pem", &[read("root.pem"), read("stranger.pem")].concat());
    assert_eq!(disk.bundle().await.unwrap().roots.len(), 2);
    // One that is being written.
    let whole = read("root.pem");
    pki.write("root.pem", &whole[..whole.len() / 3]);
    let torn = disk.bundle().await.unwrap_err();
    assert!(matches!(&torn, UpstreamError::Malformed { upstream, .. } if upstream.ends_with("root.pem")), "{torn}");
    std::fs::remove_file(pki.dir.path().join("root.pem")).unwrap();
    assert!(matches!(disk.bundle().await, Err(UpstreamError::Unreachable { .. })));
}

#[tokio::test]
async fn a_bundle_without_the_upstreams_root_is_refused_at_start() {
    let why = Pki::new(|_| {}).load("stranger.pem").await.err().unwrap();
    assert!(why.contains("issuing.pem") && why.contains("every peer would refuse the SVIDs of `example.org`"), "{why}");
}

#[tokio::test]
async fn name_constraints_that_leave_our_trust_domain_out_are_refused_at_start() {
    for (subtrees, host) in [(1, "example.org"), (0, "elsewhere.org")] {
        let pki = Pki::new(|ca| ca.custom_extensions.push(uri_constraint(subtrees, host)));
        let why = pki.load("root.pem").await.err().unwrap();
        assert!(why.contains("name constraints must leave room for `spiffe://example.org`"), "{why}");
    }
}

#[tokio::test]
async fn an_issuing_ca_that_may_not_sign_is_refused_at_start() {
    let why =
        Pki::new(|ca| ca.key_usages = vec![KeyUsagePurpose::DigitalSignature]).load("root.pem").await.err().unwrap();
    assert!(why.contains("keyUsage lacks keyCertSign"), "{why}");
}

/// A disk upstream that works, and a request for it.
async fn ready() -> (Pki, Disk, TrustDomain, Arc<dyn Signer>, Vec<u8>) {
    let pki = Pki::new(|_| {});
    let disk = pki.load("root.pem").await.unwrap_or_else(|e| panic!("{e}"));
    let (td, key) = (TrustDomain::new("example.org").unwrap(), ephemeral(KeyType::EcP256).unwrap());
    let csr = request_intermediate(&td, &*key).await.unwrap();
    (pki, disk, td, key, csr)
}

#[tokio::test]
async fn a_chain_for_another_key_is_refused_whichever_upstream_gave_it() {
    let (_pki, disk, td, key, csr) = ready().await;
    let now = OffsetDateTime::now_utc();
    let signed = disk.sign(&td, &csr, Duration::from_secs(60), now).unwrap();
    assert!(signed.clone().checked("ca.pem", &td, &key, now).await.is_ok());
    let another = ephemeral(KeyType::EcP256).unwrap();
    let refused = signed.clone().checked("ca.pem", &td, &another, now).await.unwrap_err();
    assert!(matches!(&refused, UpstreamError::Malformed { .. }), "{refused}");
    assert!(refused.to_string().starts_with("ca.pem: "), "it is named: {refused}");
    assert!(refused.to_string().contains("the private key does not belong to the certificate"), "{refused}");
    let nothing = UpstreamSigned { chain: vec![], roots: signed.roots };
    assert!(matches!(nothing.checked("ca.pem", &td, &key, now).await, Err(UpstreamError::Malformed { .. })));
}

#[tokio::test]
async fn a_request_without_proof_of_its_key_is_refused() {
    let (_pki, disk, td, _, mut csr) = ready().await;
    *csr.last_mut().unwrap() ^= 1;
    let refused = disk.sign(&td, &csr, Duration::from_secs(60), OffsetDateTime::now_utc()).unwrap_err();
    assert!(matches!(&refused, UpstreamError::Refused { why, .. } if why.contains("malformed CSR")), "{refused}");
}

#[tokio::test]
async fn a_file_that_is_gone_and_one_that_is_damaged_are_told_apart() {
    let (pki, disk, td, _, csr) = ready().await;
    let sign = || disk.sign(&td, &csr, Duration::from_secs(60), OffsetDateTime::now_utc()).unwrap_err();
    pki.write("issuing.key", "damaged");
    assert!(matches!(sign(), UpstreamError::Malformed { .. }));
    std::fs::remove_file(pki.dir.path().join("issuing.key")).unwrap();
    assert!(matches!(sign(), UpstreamError::Unreachable { upstream, .. } if upstream.ends_with("issuing.key")));
    let denied = UpstreamError::of_reading(Path::new("ca.key"), &std::io::ErrorKind::PermissionDenied.into());
    assert!(denied.to_string().ends_with("give the server's user access to it"), "{denied}");
}
