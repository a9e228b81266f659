//! An agent that holds the key is accepted; one that shows another's certificate without its key is not, and no agent
//! gets more than the path of its certificate proves.

use super::*;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine;

struct Node {
    chain: Vec<Vec<u8>>,
    key: Vec<u8>,
}

fn node(dir: &Path, usage: rcgen::KeyUsagePurpose) -> (X509Pop, Node) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::default();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    ca.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let root = ca.self_signed(&ca_key).unwrap();
    let path = dir.join("ca.pem");
    std::fs::write(&path, root.pem()).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut leaf = rcgen::CertificateParams::new(vec!["node-1".into()]).unwrap();
    leaf.key_usages = vec![usage];
    leaf.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let leaf = leaf.signed_by(&key, &rcgen::Issuer::new(ca, ca_key)).unwrap();
    let attestor =
        X509Pop::new(&path, TrustDomain::new("td").unwrap(), countersign_api::clock::system_clock()).unwrap();
    (attestor, Node { chain: vec![leaf.der().to_vec()], key: key.serialize_der() })
}

struct Signer {
    key: Vec<u8>,
    flip: bool,
}

#[async_trait]
impl Challenger for Signer {
    async fn challenge(&mut self, challenge: Vec<u8>) -> Result<Vec<u8>, AttestError> {
        let challenge: serde_json::Value = serde_json::from_slice(&challenge).unwrap();
        let engine = base64::engine::general_purpose::STANDARD;
        let nonce = engine.decode(challenge["ecdsa_signature"]["nonce"].as_str().unwrap()).unwrap();
        let ours = [7u8; 32];
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &self.key).unwrap();
        assert_eq!(pair.public_key().as_ref().len(), 65);
        let random = aws_lc_rs::rand::SystemRandom::new();
        let mut signature = pair.sign(&random, &[&nonce[..], &ours].concat()).unwrap().as_ref().to_vec();
        signature[5] ^= u8::from(self.flip);
        let b64 = |b: &[u8]| engine.encode(b);
        Ok(serde_json::to_vec(&serde_json::json!({"ecdsa_signature": {"nonce": b64(&ours), "r": b64(&signature[..32]), "s": b64(&signature[32..])}})).unwrap())
    }
}

fn payload(node: &Node) -> Vec<u8> {
    let certificates: Vec<_> = node.chain.iter().map(|c| base64::engine::general_purpose::STANDARD.encode(c)).collect();
    serde_json::to_vec(&serde_json::json!({ "certificates": certificates })).unwrap()
}

#[tokio::test]
async fn the_holder_of_the_key_is_attested_under_its_certificates_fingerprint() {
    let dir = tempfile::tempdir().unwrap();
    let (attestor, node) = node(dir.path(), rcgen::KeyUsagePurpose::DigitalSignature);
    let attested = attestor.attest(&payload(&node), &mut Signer { key: node.key.clone(), flip: false }).await.unwrap();
    assert!(attested.id.path().starts_with("/spire/agent/x509pop/") && attested.id.path().len() == 21 + 40);
    assert!(
        attested.selectors.contains(&"x509pop:subject:cn:rcgen self signed cert".parse().unwrap())
            || !attested.selectors.is_empty()
    );
    assert!(attested.can_reattest);
}

#[tokio::test]
async fn a_wrong_signature_a_foreign_ca_a_wrong_usage_and_garbage_are_refused() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (attestor, good) = node(dir.path(), rcgen::KeyUsagePurpose::DigitalSignature);
    let why = |r: Result<AttestedNode, AttestError>| r.unwrap_err().to_string();
    let wrong = attestor.attest(&payload(&good), &mut Signer { key: good.key.clone(), flip: true }).await;
    assert!(why(wrong).contains("signature is wrong"));
    let (_, foreign) = node(other.path(), rcgen::KeyUsagePurpose::DigitalSignature);
    let refused = attestor.attest(&payload(&foreign), &mut Signer { key: foreign.key.clone(), flip: false }).await;
    assert!(why(refused).contains("does not chain"));
    let (attestor, unfit) = node(dir.path(), rcgen::KeyUsagePurpose::KeyAgreement);
    let refused = attestor.attest(&payload(&unfit), &mut Signer { key: unfit.key.clone(), flip: false }).await;
    assert!(why(refused).contains("digital signatures"));
    assert!(attestor.attest(b"{", &mut Signer { key: vec![], flip: false }).await.is_err());
    assert!(attestor.attest(b"{\"certificates\":[]}", &mut Signer { key: vec![], flip: false }).await.is_err());
}

/// A CA, and an attestor's PEM of several CAs.
struct Ca {
    params: rcgen::CertificateParams,
    key: rcgen::KeyPair,
    der: Vec<u8>,
    pem: String,
}

impl Ca {
    fn root(name: &str) -> Self {
        let (params, key) = Self::params(name);
        let cert = params.self_signed(&key).unwrap();
        Self { der: cert.der().to_vec(), pem: cert.pem(), params, key }
    }

    fn below(&self, name: &str) -> Self {
        let (params, key) = Self::params(name);
        let cert = params.signed_by(&key, &self.issuer()).unwrap();
        Self { der: cert.der().to_vec(), pem: cert.pem(), params, key }
    }

    fn params(name: &str) -> (rcgen::CertificateParams, rcgen::KeyPair) {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        (params, rcgen::KeyPair::generate().unwrap())
    }

    fn issuer(&self) -> rcgen::Issuer<'_, &rcgen::KeyPair> {
        rcgen::Issuer::from_params(&self.params, &self.key)
    }

    fn node(&self, serial: u64) -> (Vec<u8>, Vec<u8>) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut leaf = rcgen::CertificateParams::new(vec!["node".into()]).unwrap();
        leaf.serial_number = Some(serial.into());
        leaf.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        let leaf = leaf.signed_by(&key, &self.issuer()).unwrap();
        (leaf.der().to_vec(), key.serialize_der())
    }

    fn selector(&self) -> Selector {
        format!("x509pop:ca:fingerprint:{}", fingerprint(&self.der)).parse().unwrap()
    }
}

fn attestor_of(roots: &[&Ca]) -> X509Pop {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cas.pem");
    std::fs::write(&path, roots.iter().map(|ca| ca.pem.as_str()).collect::<String>()).unwrap();
    X509Pop::new(&path, TrustDomain::new("td").unwrap(), countersign_api::clock::system_clock()).unwrap()
}

async fn attest(attestor: &X509Pop, chain: &[&[u8]], key: &[u8]) -> Result<AttestedNode, AttestError> {
    let node = Node { chain: chain.iter().map(|c| c.to_vec()).collect(), key: key.to_vec() };
    attestor.attest(&payload(&node), &mut Signer { key: node.key.clone(), flip: false }).await
}

#[tokio::test]
async fn a_node_has_the_cas_of_its_verified_path_and_cannot_borrow_anothers() {
    let (dev, prod) = (Ca::root("dev"), Ca::root("prod"));
    let issuing = dev.below("dev issuing");
    let attestor = attestor_of(&[&dev, &prod]);
    let (leaf, key) = issuing.node(1);
    let attested = attest(&attestor, &[&leaf, &issuing.der], &key).await.unwrap();
    assert!(attested.selectors.contains(&issuing.selector()) && attested.selectors.contains(&dev.selector()));
    assert!(!attested.selectors.contains(&prod.selector()));
    // The same chain with the public certificate of the other CA, in any position.
    for chain in [[&leaf, &issuing.der, &prod.der], [&leaf, &prod.der, &issuing.der]] {
        let refused = attest(&attestor, &chain.map(Vec::as_slice), &key).await.unwrap_err().to_string();
        assert!(refused.contains("not part of the path"), "{refused}");
    }
    let (leaf, key) = dev.node(1);
    assert!(attest(&attestor, &[&leaf, &prod.der], &key).await.is_err());
    // A root that is sent along is part of the path.
    let attested = attest(&attestor, &[&leaf, &dev.der], &key).await.unwrap();
    assert!(attested.selectors.contains(&dev.selector()) && !attested.selectors.contains(&prod.selector()));
}

#[tokio::test]
async fn the_evidence_is_named_by_the_key_however_the_certificate_is_written() {
    let ca = Ca::root("ca");
    let attestor = attestor_of(&[&ca]);
    let (leaf, key) = ca.node(1);
    let first = attest(&attestor, &[&leaf], &key).await.unwrap();
    let again = attest(&attestor, &[&other_signature(&leaf)], &key).await.unwrap();
    assert_ne!(first.id, again.id, "the ID follows the bytes of the certificate, as SPIRE's does");
    assert_eq!(first.evidence, again.evidence);
    assert!(first.evidence.unwrap().as_str().starts_with("x509pop:sha256:"));
    let (other, key) = ca.node(1);
    assert_ne!(attest(&attestor, &[&other], &key).await.unwrap().evidence, again.evidence);
}

/// The same certificate with its ECDSA signature (r, s) written as (r, n - s), which is equally valid (SEC 1, 4.1.4).
fn other_signature(leaf: &[u8]) -> Vec<u8> {
    /// The order of P-256 in hex.
    const N: &str = "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551";
    let (_, cert) = X509Certificate::from_der(leaf).unwrap();
    let old = &cert.signature_value.data;
    let r_length = usize::from(old[3]);
    let (r, s) = (&old[4..4 + r_length], &old[6 + r_length..]);
    let order = hex::decode(N).unwrap();
    let padded: Vec<u8> = std::iter::repeat_n(0, 32).chain(s.iter().copied()).collect();
    let s = &padded[padded.len() - 32..];
    let mut borrow = false;
    let mut difference = vec![0; 32];
    for n in (0..32).rev() {
        let (a, first) = order[n].overflowing_sub(s[n]);
        let (b, second) = a.overflowing_sub(u8::from(borrow));
        (difference[n], borrow) = (b, first || second);
    }
    let signature = challenge::der_signature(r, &difference);
    let body = [
        cert.tbs_certificate.as_ref(),
        &cert_algorithm(),
        &[3, u8::try_from(signature.len() + 1).unwrap(), 0],
        &signature,
    ]
    .concat();
    [&[0x30, 0x82][..], &u16::try_from(body.len()).unwrap().to_be_bytes(), &body].concat()
}

/// The algorithm identifier of ecdsa-with-SHA256 in DER.
fn cert_algorithm() -> Vec<u8> {
    vec![0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2]
}

#[tokio::test]
async fn serial_numbers_have_whole_bytes_as_spire_writes_them() {
    let ca = Ca::root("ca");
    let attestor = attestor_of(&[&ca]);
    for (serial, text) in [(0x0abc, "0abc"), (0x7, "07"), (0x00ab_cdef, "abcdef")] {
        let (leaf, key) = ca.node(serial);
        let selectors = attest(&attestor, &[&leaf], &key).await.unwrap().selectors;
        let expected = format!("x509pop:serialnumber:{text}").parse().unwrap();
        assert!(selectors.contains(&expected), "{selectors:?}");
    }
}

#[tokio::test]
async fn long_chains_are_refused_before_they_are_read() {
    let ca = Ca::root("ca");
    let attestor = attestor_of(&[&ca]);
    let (leaf, key) = ca.node(1);
    let many: Vec<&[u8]> = std::iter::once(leaf.as_slice()).chain(std::iter::repeat_n(&[0x30, 0][..], 8)).collect();
    let refused = attest(&attestor, &many, &key).await.unwrap_err().to_string();
    assert!(refused.contains("9 certificates, at most 8 are read"), "{refused}");
    let big = vec![0x30; 17 * 1024];
    assert!(
        attest(&attestor, &[&leaf, &big], &key).await.unwrap_err().to_string().contains("a certificate of 17408 bytes")
    );
}
