//! A token and a bundle's document. No token passes, because nobody has the key; a document that is read is written to the same bundle.
#![no_main]

use std::sync::LazyLock;

use countersign_identity::trust_domain::parse_trust_domain;
use countersign_identity::{
    BundleSet, JwtAuthority, KeyType, PrivateKey, TrustBundle, TrustDomain, bundle_document, jwt_svid,
};
use libfuzzer_sys::fuzz_target;
use time::OffsetDateTime;

static BUNDLES: LazyLock<BundleSet> = LazyLock::new(|| {
    let public = |key_type| PrivateKey::generate(key_type).unwrap().public_der().unwrap();
    let keys = [("k1", KeyType::EcP256), ("k2", KeyType::Rsa2048)];
    let jwt_authorities = keys.map(|(id, key_type)| JwtAuthority::new(id, &public(key_type)).unwrap()).into();
    [TrustBundle { jwt_authorities, ..TrustBundle::empty(td()) }].into_iter().collect()
});

fn td() -> TrustDomain {
    parse_trust_domain("td").unwrap()
}

fuzz_target!(|data: &[u8]| {
    if let Ok(token) = std::str::from_utf8(data) {
        let now = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        assert!(jwt_svid::verify(token, "db", &BUNDLES, now).is_err());
    }
    if let Ok(bundle) = bundle_document::read(td(), data) {
        let text = bundle_document::write(&bundle);
        assert_eq!(bundle_document::read(td(), text.as_bytes()), Ok(bundle));
    }
});
