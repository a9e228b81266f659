//! JWT-SVIDs: what is accepted as one (SPIFFE JWT-SVID, RFC 7515, 7518, 7519).

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, EcdsaVerificationAlgorithm,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256,
    RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};
use spiffe::SpiffeId;
use time::{Duration, OffsetDateTime};

use crate::bundle::BundleSet;
use crate::jwt_authority::{Curve, JwtAuthority, PublicKey};
use crate::shown::shown;
use crate::trust_domain::parse_workload_id;

/// Longest token that is looked at, in bytes.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// How far ahead of ours the clock of whoever signed may be.
const CLOCK_SKEW: Duration = Duration::seconds(60);

/// Why a token is not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum JwtError {
    /// No audience was named that it has to be for.
    #[error("an audience must be named")]
    NoAudience,
    /// It is no JWT in compact form, or too long. Holds what is wrong.
    #[error("the token is no JWT: {0}")]
    Malformed(&'static str),
    /// Its header says what a JWT-SVID's may not.
    #[error("the token's header: {0}")]
    Header(String),
    /// A claim is missing or has a value that it may not have.
    #[error("the token's claim `{claim}` {why}")]
    Claim {
        /// The claim's name.
        claim: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// There is no bundle of its trust domain.
    #[error("there is no bundle of trust domain `{0}`")]
    NoBundle(String),
    /// Its trust domain has no key with this ID, or the key has ended.
    #[error("trust domain `{trust_domain}` has no JWT authority `{}`", shown(key_id))]
    UnknownKey {
        /// The token's trust domain.
        trust_domain: String,
        /// The key ID that the token names.
        key_id: String,
    },
    /// The signature is not by the key that it names.
    #[error("the token's signature is wrong")]
    Signature,
    /// It has ended.
    #[error("the token expired at {at}, and it is {now} here")]
    Expired {
        /// Its end.
        at: OffsetDateTime,
        /// The time here.
        now: OffsetDateTime,
    },
}

/// A token that was verified.
#[derive(Debug, Clone, PartialEq)]
pub struct JwtSvid {
    /// Whose it is.
    pub id: SpiffeId,
    /// All claims.
    pub claims: Map<String, Value>,
    /// Its end.
    pub expires_at: OffsetDateTime,
    /// ID of the JWT authority that signed it.
    pub key_id: String,
}

impl JwtSvid {
    /// Whether it is for this one among others.
    pub fn is_for(&self, audience: &str) -> bool {
        audiences(&self.claims).is_ok_and(|all| all.contains(&audience))
    }
}

/// How a token is signed (JWT-SVID 2.1). Neither `none` nor a shared secret is among them.
#[derive(Clone, Copy)]
enum Algorithm {
    Rsa(&'static RsaParameters),
    Ec(Curve, &'static EcdsaVerificationAlgorithm),
}

impl Algorithm {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rsa(&RSA_PKCS1_2048_8192_SHA256),
            "RS384" => Self::Rsa(&RSA_PKCS1_2048_8192_SHA384),
            "RS512" => Self::Rsa(&RSA_PKCS1_2048_8192_SHA512),
            "PS256" => Self::Rsa(&RSA_PSS_2048_8192_SHA256),
            "PS384" => Self::Rsa(&RSA_PSS_2048_8192_SHA384),
            "PS512" => Self::Rsa(&RSA_PSS_2048_8192_SHA512),
            "ES256" => Self::Ec(Curve::P256, &ECDSA_P256_SHA256_FIXED),
            "ES384" => Self::Ec(Curve::P384, &ECDSA_P384_SHA384_FIXED),
            "ES512" => Self::Ec(Curve::P521, &ECDSA_P521_SHA512_FIXED),
            _ => return None,
        })
    }

    fn is_signed_by(self, authority: &JwtAuthority, message: &[u8], signature: &[u8]) -> bool {
        match (self, authority.key()) {
            (Self::Rsa(how), PublicKey::Rsa { n, e }) => {
                RsaPublicKeyComponents { n, e }.verify(how, message, signature).is_ok()
            }
            (Self::Ec(curve, how), PublicKey::Ec { curve: of, point }) if curve == *of => {
                UnparsedPublicKey::new(how, point).verify(message, signature).is_ok()
            }
            _ => false,
        }
    }
}

/// Accepts a token that is for `audience` and signed by a JWT authority of its own trust domain's bundle.
pub fn verify(token: &str, audience: &str, bundles: &BundleSet, now: OffsetDateTime) -> Result<JwtSvid, JwtError> {
    if audience.is_empty() {
        return Err(JwtError::NoAudience);
    }
    if token.len() > MAX_TOKEN_BYTES {
        return Err(JwtError::Malformed("it is too long"));
    }
    let (message, signature) = token.rsplit_once('.').ok_or(JwtError::Malformed("it has no three parts"))?;
    let (header, payload) = message.split_once('.').ok_or(JwtError::Malformed("it has no three parts"))?;
    let (algorithm, key_id) = header_of(&object(header, "its header is no JSON object")?)?;
    let claims = object(payload, "its payload is no JSON object")?;
    let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| JwtError::Malformed("its signature is no Base64"))?;
    // Only whose bundle counts is taken from it before the signature is proved.
    let id = subject(&claims)?;
    let trust_domain = id.trust_domain_name();
    let bundle = bundles.get(trust_domain).ok_or_else(|| JwtError::NoBundle(trust_domain.to_owned()))?;
    let known = bundle.jwt_authorities.iter().find(|a| a.key_id() == key_id && !a.is_over(now));
    let authority =
        known.ok_or_else(|| JwtError::UnknownKey { trust_domain: trust_domain.to_owned(), key_id: key_id.clone() })?;
    if !algorithm.is_signed_by(authority, message.as_bytes(), &signature) {
        return Err(JwtError::Signature);
    }
    let expires_at = lifetime(&claims, now)?;
    if !audiences(&claims)?.contains(&audience) {
        return Err(wrong("aud", "does not have the audience that was asked for"));
    }
    Ok(JwtSvid { id, expires_at, claims, key_id })
}

/// The claims of a token, to be shown: nothing is verified. `None` if it has none.
pub fn unverified_claims(token: &str) -> Option<Map<String, Value>> {
    let payload = token.split('.').nth(1)?;
    object(payload, "").ok()
}

fn wrong(claim: &'static str, why: &str) -> JwtError {
    JwtError::Claim { claim, why: why.to_owned() }
}

fn object(part: &str, why: &'static str) -> Result<Map<String, Value>, JwtError> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| JwtError::Malformed(why))?;
    serde_json::from_slice(&bytes).map_err(|_| JwtError::Malformed(why))
}

/// Algorithm and key ID (JWT-SVID 2).
fn header_of(header: &Map<String, Value>) -> Result<(Algorithm, String), JwtError> {
    let named = |key: &str| header.get(key).and_then(Value::as_str).unwrap_or_default();
    let unknown = || JwtError::Header(format!("algorithm `{}` is none of JWT-SVIDs'", shown(named("alg"))));
    let algorithm = Algorithm::named(named("alg")).ok_or_else(unknown)?;
    if header.get("typ").is_some_and(|typ| typ != "JWT" && typ != "JOSE") {
        return Err(JwtError::Header("its type is neither JWT nor JOSE".into()));
    }
    // What it says is critical is to be understood (RFC 7515, 4.1.11), and we understand no extension.
    if header.contains_key("crit") {
        return Err(JwtError::Header("it has critical extensions".into()));
    }
    match named("kid") {
        "" => Err(JwtError::Header("it names no key (kid)".into())),
        key_id => Ok((algorithm, key_id.to_owned())),
    }
}

fn subject(claims: &Map<String, Value>) -> Result<SpiffeId, JwtError> {
    let text = claims.get("sub").and_then(Value::as_str).ok_or_else(|| wrong("sub", "is missing"))?;
    parse_workload_id(text).map_err(|e| wrong("sub", &format!("is no SPIFFE ID: {e}")))
}

/// A time in seconds since 1970, which may have a fraction (RFC 7519, 2); `None` if the claim is missing.
fn time(claims: &Map<String, Value>, claim: &'static str) -> Result<Option<OffsetDateTime>, JwtError> {
    let Some(value) = claims.get(claim) else { return Ok(None) };
    let no_time = || wrong(claim, "is no time");
    let seconds = value.as_f64().ok_or_else(no_time)?.floor();
    // Beyond, a float is no whole number of seconds any more.
    if !(0.0..=9_007_199_254_740_991.0).contains(&seconds) {
        return Err(no_time());
    }
    #[allow(clippy::cast_possible_truncation)] // within an i64, by the line above
    OffsetDateTime::from_unix_timestamp(seconds as i64).map(Some).map_err(|_| no_time())
}

/// Checks its beginning and end; its end.
fn lifetime(claims: &Map<String, Value>, now: OffsetDateTime) -> Result<OffsetDateTime, JwtError> {
    let expires_at = time(claims, "exp")?.ok_or_else(|| wrong("exp", "is missing"))?;
    if expires_at <= now {
        return Err(JwtError::Expired { at: expires_at, now });
    }
    for claim in ["nbf", "iat"] {
        if time(claims, claim)?.is_some_and(|from| from > now + CLOCK_SKEW) {
            return Err(wrong(claim, "is in the future"));
        }
    }
    Ok(expires_at)
}

/// For whom it is: one text, or a list (RFC 7519, 4.1.3).
fn audiences(claims: &Map<String, Value>) -> Result<Vec<&str>, JwtError> {
    let all = match claims.get("aud") {
        Some(Value::String(one)) => Some(vec![one.as_str()]),
        Some(Value::Array(all)) => all.iter().map(Value::as_str).collect(),
        _ => None,
    };
    all.filter(|all| !all.is_empty()).ok_or_else(|| wrong("aud", "is missing, or no text and no list of texts"))
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256,
        RSA_PSS_SHA512, RsaEncoding, RsaKeyPair,
    };
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::{KeyType, PrivateKey, TrustBundle, TrustDomain};

    const NOW: i64 = 1_800_000_000;

    fn now() -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(NOW).unwrap()
    }

    /// Signs as this algorithm does.
    enum Signer {
        Ec(EcdsaKeyPair),
        Rsa(RsaKeyPair, &'static dyn RsaEncoding),
    }

    impl Signer {
        fn sign(&self, message: &[u8]) -> Vec<u8> {
            match self {
                Self::Ec(pair) => pair.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec(),
                Self::Rsa(pair, how) => {
                    let mut signature = vec![0; pair.public_modulus_len()];
                    pair.sign(*how, &SystemRandom::new(), message, &mut signature).unwrap();
                    signature
                }
            }
        }
    }

    fn signer(algorithm: &str) -> (Signer, JwtAuthority) {
        let key_type = match algorithm {
            "ES256" => KeyType::EcP256,
            "ES384" => KeyType::EcP384,
            _ => KeyType::Rsa2048,
        };
        let key = PrivateKey::generate(key_type).unwrap();
        let der = key.as_pkcs8();
        let signer = match algorithm {
            "ES256" => Signer::Ec(EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der).unwrap()),
            "ES384" => Signer::Ec(EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, der).unwrap()),
            "RS256" => Signer::Rsa(RsaKeyPair::from_pkcs8(der).unwrap(), &RSA_PKCS1_SHA256),
            _ => Signer::Rsa(RsaKeyPair::from_pkcs8(der).unwrap(), &RSA_PSS_SHA512),
        };
        (signer, JwtAuthority::new("k1", &key.public_der().unwrap()).unwrap())
    }

    fn bundles(authorities: Vec<JwtAuthority>) -> BundleSet {
        let td = TrustDomain::new("td").unwrap();
        [TrustBundle { jwt_authorities: authorities, ..TrustBundle::empty(td) }].into_iter().collect()
    }

    fn token(signer: &Signer, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(header), part(claims));
        let signature = signer.sign(message.as_bytes());
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn header(algorithm: &str) -> Value {
        json!({ "alg": algorithm, "kid": "k1", "typ": "JWT" })
    }

    fn claims() -> Value {
        json!({ "sub": "spiffe://td/web", "aud": ["db"], "exp": NOW + 300, "iat": NOW })
    }

    #[test]
    fn tokens_by_each_kind_of_key_are_accepted_and_by_no_other() {
        let all = ["ES256", "ES384", "RS256", "PS512"].map(|algorithm| (algorithm, signer(algorithm)));
        for (algorithm, (key, authority)) in &all {
            let told = token(key, &header(algorithm), &claims());
            let svid = verify(&told, "db", &bundles(vec![authority.clone()]), now()).unwrap();
            assert_eq!(
                (svid.id.to_string().as_str(), svid.expires_at.unix_timestamp()),
                ("spiffe://td/web", NOW + 300)
            );
            assert_eq!(svid.claims["iat"], NOW);
            for (other, (_, foreign)) in &all {
                if other != algorithm {
                    let judged = verify(&told, "db", &bundles(vec![foreign.clone()]), now());
                    assert_eq!(judged, Err(JwtError::Signature), "{algorithm} by the key of {other}");
                }
            }
        }
    }

    #[test]
    fn a_token_that_is_wrong_in_one_way_is_refused_for_it() {
        let (key, authority) = signer("ES256");
        let known = bundles(vec![authority.clone()]);
        let with = |change: &dyn Fn(&mut Value, &mut Value)| {
            let (mut header, mut claims) = (header("ES256"), claims());
            change(&mut header, &mut claims);
            verify(&token(&key, &header, &claims), "db", &known, now()).map(|svid| svid.id.to_string())
        };
        assert!(with(&|_, _| {}).is_ok());
        assert!(with(&|h, _| drop(h.as_object_mut().unwrap().remove("typ"))).is_ok());
        assert!(with(&|h, _| h["typ"] = "JOSE".into()).is_ok());
        assert!(with(&|_, c| c["aud"] = "db".into()).is_ok());
        assert!(with(&|_, c| c["exp"] = json!(1_800_000_000.5 + 1.0)).is_ok());
        assert!(with(&|_, c| c["iat"] = json!(NOW + 59)).is_ok());
        let claim = |name: &'static str| move |error: &JwtError| matches!(error, JwtError::Claim { claim, .. } if *claim == name);
        let is_header = |error: &JwtError| matches!(error, JwtError::Header(_));
        type Change = Box<dyn Fn(&mut Value, &mut Value)>;
        type Expected = Box<dyn Fn(&JwtError) -> bool>;
        let cases: Vec<(&str, Change, Expected)> = vec![
            ("none", Box::new(|h, _| h["alg"] = "none".into()), Box::new(is_header)),
            ("a shared secret", Box::new(|h, _| h["alg"] = "HS256".into()), Box::new(is_header)),
            ("no algorithm", Box::new(|h, _| h["alg"] = Value::Null), Box::new(is_header)),
            ("another type", Box::new(|h, _| h["typ"] = "JWE".into()), Box::new(is_header)),
            ("critical", Box::new(|h, _| h["crit"] = json!(["exp"])), Box::new(is_header)),
            ("no key", Box::new(|h, _| drop(h.as_object_mut().unwrap().remove("kid"))), Box::new(is_header)),
            (
                "another key",
                Box::new(|h, _| h["kid"] = "k2".into()),
                Box::new(|e| matches!(e, JwtError::UnknownKey { key_id, .. } if key_id == "k2")),
            ),
            ("another algorithm", Box::new(|h, _| h["alg"] = "ES384".into()), Box::new(|e| *e == JwtError::Signature)),
            ("no subject", Box::new(|_, c| c["sub"] = Value::Null), Box::new(claim("sub"))),
            ("no SPIFFE ID", Box::new(|_, c| c["sub"] = "https://td/web".into()), Box::new(claim("sub"))),
            ("a trust domain", Box::new(|_, c| c["sub"] = "spiffe://td".into()), Box::new(claim("sub"))),
            (
                "a foreign subject",
                Box::new(|_, c| c["sub"] = "spiffe://other/web".into()),
                Box::new(|e| *e == JwtError::NoBundle("other".into())),
            ),
            ("another audience", Box::new(|_, c| c["aud"] = json!(["dbx", "xdb"])), Box::new(claim("aud"))),
            ("no audience", Box::new(|_, c| c["aud"] = json!([])), Box::new(claim("aud"))),
            ("an audience that is no text", Box::new(|_, c| c["aud"] = json!(["db", 1])), Box::new(claim("aud"))),
            ("no end", Box::new(|_, c| drop(c.as_object_mut().unwrap().remove("exp"))), Box::new(claim("exp"))),
            ("an end that is no time", Box::new(|_, c| c["exp"] = "never".into()), Box::new(claim("exp"))),
            ("an endless end", Box::new(|_, c| c["exp"] = json!(1e300)), Box::new(claim("exp"))),
            ("ended", Box::new(|_, c| c["exp"] = json!(NOW)), Box::new(|e| matches!(e, JwtError::Expired { .. }))),
            ("not begun", Box::new(|_, c| c["nbf"] = json!(NOW + 61)), Box::new(claim("nbf"))),
            ("of the future", Box::new(|_, c| c["iat"] = json!(NOW + 61)), Box::new(claim("iat"))),
        ];
        for (what, change, expected) in cases {
            let error = with(&*change).expect_err(what);
            assert!(expected(&error), "{what}: {error:?}");
        }
        let good = token(&key, &header("ES256"), &claims());
        assert_eq!(verify(&good, "", &known, now()), Err(JwtError::NoAudience));
        let mut over = authority;
        over.expires_at = Some(now());
        assert!(matches!(verify(&good, "db", &bundles(vec![over]), now()), Err(JwtError::UnknownKey { .. })));
        for cut in [&good[..good.len() - 2], &format!("{good}A"), &format!("{good}=="), &format!("{good}.x")] {
            assert!(verify(cut, "db", &known, now()).is_err(), "{cut}");
        }
        assert_eq!(
            verify(&"a".repeat(MAX_TOKEN_BYTES + 1), "db", &known, now()),
            Err(JwtError::Malformed("it is too long"))
        );
    }

    #[test]
    fn a_key_vouches_for_its_own_trust_domain_alone() {
        let ((key, own), (_, theirs)) = (signer("ES256"), signer("ES256"));
        let of = |name: &str, authority: JwtAuthority| {
            let td = TrustDomain::new(name).unwrap();
            TrustBundle { jwt_authorities: vec![authority], ..TrustBundle::empty(td) }
        };
        // Both call their key the same.
        let known: BundleSet = [of("td", own), of("other", theirs)].into_iter().collect();
        let told = |sub: &str| {
            let mut claims = claims();
            claims["sub"] = sub.into();
            verify(&token(&key, &header("ES256"), &claims), "db", &known, now())
        };
        assert!(told("spiffe://td/web").is_ok());
        assert_eq!(told("spiffe://other/web"), Err(JwtError::Signature));
    }

    #[test]
    fn a_message_shows_no_control_character_of_a_token() {
        let (key, authority) = signer("ES256");
        let told = token(&key, &json!({ "alg": "\u{1b}[31m", "kid": "k1" }), &claims());
        let error = verify(&told, "db", &bundles(vec![authority]), now()).unwrap_err().to_string();
        assert!(!error.contains('\u{1b}'), "{error}");
    }

    proptest! {
        #[test]
        fn no_text_is_accepted_that_nobody_signed(text in "[A-Za-z0-9_=.-]{0,200}") {
            prop_assert!(verify(&text, "db", &bundles(vec![]), now()).is_err());
        }
    }
}
