//! An agent that holds the key passes; one that shows somebody's certificate without it does not.

use super::*;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};

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
