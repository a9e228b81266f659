//! Trust bundles as documents: JSON Web Key sets with what SPIFFE adds (SPIFFE Trust Domain and Bundle 4).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use spiffe::TrustDomain;
use std::collections::HashSet;
use std::time::Duration;

use crate::bundle::{BundleError, TrustBundle, X509Authority};
use crate::jwt_authority::{JwtAuthority, JwtAuthorityError, PublicKey};
use crate::shown::shown;

/// Why a document is no bundle.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DocumentError {
    /// It is no JSON, or not of this form. Holds what is wrong.
    #[error("not a SPIFFE bundle: {0}")]
    Malformed(String),
    /// A key of it is of no use. Holds its place, counted from 1.
    #[error("key {0}: {1}")]
    Key(usize, String),
    /// It vouches for nobody.
    #[error("the bundle has no key of a kind that is known (x509-svid, jwt-svid)")]
    Empty,
}

/// Reads a document. Keys of unknown use are left out, as the standard asks; a known one that is malformed is an error.
pub fn read(trust_domain: TrustDomain, text: &[u8]) -> Result<TrustBundle, DocumentError> {
    let malformed = |why: &str| DocumentError::Malformed(why.to_owned());
    let document: Map<String, Value> =
        serde_json::from_slice(text).map_err(|e| DocumentError::Malformed(e.to_string()))?;
    let keys = document.get("keys").and_then(Value::as_array).ok_or_else(|| malformed("it has no list `keys`"))?;
    let mut bundle = TrustBundle::empty(trust_domain);
    let number = |key: &str| match document.get(key) {
        None => Ok(0),
        Some(value) => value.as_u64().ok_or_else(|| DocumentError::Malformed(format!("`{key}` is no whole number"))),
    };
    bundle.sequence = number("spiffe_sequence")?;
    bundle.refresh_hint = Duration::from_secs(number("spiffe_refresh_hint")?);
    let mut ids = HashSet::new();
    for (place, key) in keys.iter().enumerate() {
        let wrong = |why: String| DocumentError::Key(place + 1, why);
        match key["use"].as_str() {
            Some("x509-svid") => bundle.authorities.push(x509(key).map_err(wrong)?),
            // "An element with an unknown key type is ignored" (SPIFFE Trust Domain and Bundle 4.2.1).
            Some("jwt-svid") if PublicKey::is_known(key) => {
                let authority = jwt(key).map_err(wrong)?;
                if !ids.insert(authority.key_id().to_owned()) {
                    return Err(wrong(format!("another one has the ID `{}` too", shown(authority.key_id()))));
                }
                bundle.jwt_authorities.push(authority);
            }
            _ => {}
        }
    }
    if bundle.is_empty() { Err(DocumentError::Empty) } else { Ok(bundle) }
}

fn x509(key: &Value) -> Result<X509Authority, String> {
    let [one] = key["x5c"].as_array().map_or(&[][..], Vec::as_slice) else {
        return Err("`x5c` has not exactly one certificate".to_owned());
    };
    let der = one.as_str().and_then(|text| STANDARD.decode(text).ok()).ok_or("`x5c` is no Base64")?;
    let authority = X509Authority::from_der(der).map_err(|e: BundleError| e.to_string())?;
    // RFC 7517, 4.7: the key itself is the certificate's.
    if PublicKey::is_known(key) && PublicKey::from_jwk(key).is_ok_and(|own| own.to_der() != authority.public_key()) {
        return Err("the certificate in `x5c` has another key".to_owned());
    }
    Ok(authority)
}

fn jwt(key: &Value) -> Result<JwtAuthority, String> {
    if key.get("d").is_some() {
        return Err("it is a private key (`d`), which belongs to nobody else".to_owned());
    }
    let id = key["kid"].as_str().unwrap_or_default();
    let public = PublicKey::from_jwk(key)?;
    JwtAuthority::new(id, &public.to_der()).map_err(|e: JwtAuthorityError| e.to_string())
}

/// Writes a document with all authorities.
pub fn write(bundle: &TrustBundle) -> String {
    let x509 = bundle.authorities.iter().map(|authority| {
        let mut jwk = PublicKey::of_certificate(&authority.public_key());
        jwk.insert("use".into(), "x509-svid".into());
        jwk.insert("x5c".into(), json!([STANDARD.encode(authority.der())]));
        Value::Object(jwk)
    });
    let keys = x509.chain(bundle.jwt_authorities.iter().map(|authority| {
        let mut jwk = authority.jwk();
        jwk["use"] = "jwt-svid".into();
        jwk
    }));
    let keys: Vec<Value> = keys.collect();
    let mut document = json!({ "keys": keys, "spiffe_sequence": bundle.sequence });
    if !bundle.refresh_hint.is_zero() {
        document["spiffe_refresh_hint"] = bundle.refresh_hint.as_secs().into();
    }
    format!("{document:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::issue_root;
    use crate::{KeyType, PrivateKey};
    use time::OffsetDateTime;

    fn td() -> TrustDomain {
        TrustDomain::new("td").unwrap()
    }

    fn bundle() -> TrustBundle {
        let now = OffsetDateTime::now_utc();
        let key = |key_type| PrivateKey::generate(key_type).unwrap();
        let root = issue_root(&td(), &key(KeyType::EcP384), Duration::from_secs(60), now).unwrap();
        let public = |key_type| key(key_type).public_der().unwrap();
        TrustBundle {
            authorities: vec![X509Authority::from_der(root.to_vec()).unwrap()],
            jwt_authorities: [("a", KeyType::EcP256), ("b", KeyType::EcP384), ("c", KeyType::Rsa2048)]
                .map(|(id, key_type)| JwtAuthority::new(id, &public(key_type)).unwrap())
                .into(),
            sequence: 7,
            refresh_hint: Duration::from_secs(300),
            ..TrustBundle::empty(td())
        }
    }

    #[test]
    fn a_bundle_comes_back_from_its_document_as_it_went() {
        let bundle = bundle();
        let text = write(&bundle);
        assert_eq!(read(td(), text.as_bytes()), Ok(bundle));
        let document: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&document["keys"][0]["kty"], &document["keys"][0]["crv"]), (&json!("EC"), &json!("P-384")));
    }

    #[test]
    fn keys_of_unknown_use_are_left_out_and_known_ones_must_be_right() {
        let good: Value = serde_json::from_str(&write(&bundle())).unwrap();
        let with = |change: &dyn Fn(&mut Value)| {
            let mut document = good.clone();
            change(&mut document);
            read(td(), document.to_string().as_bytes())
        };
        let more =
            with(&|d| d["keys"].as_array_mut().unwrap().push(json!({ "use": "wit-svid", "kty": "OKP" }))).unwrap();
        assert_eq!(more, bundle_of(&good));
        type Change<'a> = &'a dyn Fn(&mut Value);
        let cases: [(&str, Change<'_>); 10] = [
            ("no list", &|d| d["keys"] = json!({})),
            ("no whole number", &|d| d["spiffe_sequence"] = json!(-1)),
            ("exactly one certificate", &|d| d["keys"][0]["x5c"] = json!([])),
            ("no Base64", &|d| d["keys"][0]["x5c"] = json!(["?"])),
            ("key ID", &|d| d["keys"][1]["kid"] = Value::Null),
            ("too", &|d| d["keys"][1]["kid"] = "b".into()),
            ("`x`", &|d| d["keys"][1]["x"] = "AA".into()),
            ("another key", &|d| d["keys"][0]["x"] = d["keys"][2]["x"].clone()),
            ("private key", &|d| d["keys"][1]["d"] = "AA".into()),
            ("no key of a kind", &|d| d["keys"] = json!([])),
        ];
        for (said, change) in cases {
            let why = with(change).unwrap_err().to_string();
            assert!(why.contains(said), "{said}: {why}");
        }
        assert!(read(td(), b"-----BEGIN CERTIFICATE-----").is_err());
    }

    fn bundle_of(document: &Value) -> TrustBundle {
        read(td(), document.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_json_web_key_of_the_standard_is_read() {
        // RFC 7517, A.1.
        let document = json!({ "keys": [
            { "use": "jwt-svid", "kid": "1", "kty": "EC", "crv": "P-256",
              "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM" },
        ] });
        let bundle = bundle_of(&document);
        assert_eq!(bundle.jwt_authorities[0].jwk()["y"], document["keys"][0]["y"]);
    }

    proptest::proptest! {
        #[test]
        fn whatever_a_good_document_becomes_it_is_read_right_or_refused(at in 0..4_000_usize, byte: u8, cut: bool) {
            static GOOD: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| write(&bundle()));
            let mut text = GOOD.clone().into_bytes();
            let at = at % text.len();
            if cut {
                text.truncate(at);
            } else {
                text[at] = byte;
            }
            if let Ok(bundle) = read(td(), &text) {
                assert!(!bundle.is_empty() && bundle.trust_domain == td());
            }
        }
    }
}
