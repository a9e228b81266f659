//! What we issue as a JWT-SVID (SPIFFE JWT-SVID, RFC 7515, 7518, 7519).

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value, json};
use spiffe::SpiffeId;
use time::OffsetDateTime;
use x509_parser::der_parser::asn1_rs::{Any, FromDer, Integer};

use super::IssueError;
use crate::rotation::validity;
use crate::signature::SignatureAlgorithm;

/// Most audiences of one token.
pub const MAX_AUDIENCES: usize = 64;
/// Most bytes of all of a token's audiences: what we issue stays far below what verifiers look at.
pub const MAX_AUDIENCE_BYTES: usize = 4 * 1024;

/// For whom a token is: at least one name, each of them not empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Audience(Vec<String>);

/// Why a token cannot be for these.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AudienceError {
    /// No audience is named, or one without a name (JWT-SVID 3.2: at least one value).
    #[error("at least one audience is required, and none may be empty")]
    Missing,
    /// There are too many, or they are too long.
    #[error("more than {MAX_AUDIENCES} audiences, or more than {MAX_AUDIENCE_BYTES} bytes of them")]
    TooMuch,
    /// One has characters that nobody writes, each of which is six in a token.
    #[error("an audience has control characters")]
    Control,
}

impl Audience {
    /// Takes the names as they are asked for.
    pub fn new(names: Vec<String>) -> Result<Self, AudienceError> {
        if names.is_empty() || names.iter().any(String::is_empty) {
            return Err(AudienceError::Missing);
        }
        if names.len() > MAX_AUDIENCES || names.iter().map(String::len).sum::<usize>() > MAX_AUDIENCE_BYTES {
            return Err(AudienceError::TooMuch);
        }
        if names.iter().any(|name| name.contains(char::is_control)) {
            return Err(AudienceError::Control);
        }
        Ok(Self(names))
    }

    /// The names, as they were asked for.
    pub fn names(&self) -> &[String] {
        &self.0
    }
}

/// The content of a token.
pub struct TokenRequest<'a> {
    /// Whose it is.
    pub id: &'a SpiffeId,
    /// For whom it is.
    pub audience: &'a Audience,
    /// Lifetime from now on, shortened to the authority's own end.
    pub ttl: Duration,
    /// Who is named as its issuer (`iss`); `None` names nobody.
    pub issuer: Option<&'a str>,
    /// ID of the token (`jti`); `None` for none.
    pub token_id: Option<&'a str>,
}

/// The JWT authority that a token is made for: its key signs later.
pub struct TokenAuthority<'a> {
    /// The ID by which tokens name the key (`kid`).
    pub key_id: &'a str,
    /// How the key signs.
    pub algorithm: SignatureAlgorithm,
    /// End of the authority: no token is valid longer.
    pub not_after: OffsetDateTime,
}

/// A token without its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnsignedToken {
    message: String,
    algorithm: SignatureAlgorithm,
    /// When it was issued, whole seconds.
    pub issued_at: OffsetDateTime,
    /// Its end, whole seconds.
    pub expires_at: OffsetDateTime,
}

/// Makes a JWT-SVID. Errors: [`IssueError::AuthorityExpired`].
pub fn unsigned_token(
    req: &TokenRequest<'_>,
    authority: &TokenAuthority<'_>,
    now: OffsetDateTime,
) -> Result<UnsignedToken, IssueError> {
    let issued_at = now.replace_nanosecond(0).unwrap_or(now);
    let (_, expires_at) = validity(now, req.ttl, Some(authority.not_after));
    // Also where less than a second of the authority is left, or the lifetime is zero.
    if expires_at <= now {
        return Err(IssueError::AuthorityExpired(authority.not_after));
    }
    let mut claims = Map::new();
    claims.insert("sub".into(), req.id.to_string().into());
    // As SPIRE, always a list.
    claims.insert("aud".into(), req.audience.names().into());
    claims.insert("exp".into(), expires_at.unix_timestamp().into());
    claims.insert("iat".into(), issued_at.unix_timestamp().into());
    if let Some(issuer) = req.issuer {
        claims.insert("iss".into(), issuer.into());
    }
    if let Some(id) = req.token_id {
        claims.insert("jti".into(), id.into());
    }
    let header = json!({ "alg": jws_name(authority.algorithm), "kid": authority.key_id, "typ": "JWT" });
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", part(&header), part(&Value::Object(claims)));
    Ok(UnsignedToken { message, algorithm: authority.algorithm, issued_at, expires_at })
}

impl UnsignedToken {
    /// What is to be signed.
    pub fn content(&self) -> &[u8] {
        self.message.as_bytes()
    }

    /// The token in compact form, with the signature over [`UnsignedToken::content`] as [`crate::signature`] has it. Errors: it is no
    /// signature of this kind.
    pub fn signed(&self, signature: &[u8]) -> Result<String, IssueError> {
        let fixed = |bytes: usize| {
            fixed(signature, bytes).ok_or_else(|| IssueError::Sign("the signature is no pair of numbers".into()))
        };
        let signature = match self.algorithm {
            SignatureAlgorithm::EcdsaP256Sha256 => fixed(32)?,
            SignatureAlgorithm::EcdsaP384Sha384 => fixed(48)?,
            SignatureAlgorithm::RsaPkcs1Sha256 => signature.to_vec(),
        };
        Ok(format!("{}.{}", self.message, URL_SAFE_NO_PAD.encode(signature)))
    }
}

/// The algorithm's name in a token's header (RFC 7518, 3.1).
fn jws_name(algorithm: SignatureAlgorithm) -> &'static str {
    match algorithm {
        SignatureAlgorithm::EcdsaP256Sha256 => "ES256",
        SignatureAlgorithm::EcdsaP384Sha384 => "ES384",
        SignatureAlgorithm::RsaPkcs1Sha256 => "RS256",
    }
}

/// An ECDSA signature as tokens have it: both numbers with this many bytes each (RFC 7518, 3.4), from ASN.1.
fn fixed(signature: &[u8], bytes: usize) -> Option<Vec<u8>> {
    let (behind, pair) = Any::from_der(signature).ok()?;
    let (rest, r) = Integer::from_der(pair.data).ok()?;
    let (end, s) = Integer::from_der(rest).ok()?;
    if !behind.is_empty() || !end.is_empty() {
        return None;
    }
    let mut both = vec![];
    for number in [r, s] {
        let digits: Vec<u8> = number.as_ref().iter().copied().skip_while(|b| *b == 0).collect();
        both.extend(std::iter::repeat_n(0, bytes.checked_sub(digits.len())?));
        both.extend(digits);
    }
    Some(both)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jwt_svid::{JwtError, verify};
    use crate::{JwtAuthority, KeyType, LocalKey, PrivateKey, TrustBundle, TrustDomain};
    use proptest::prelude::*;

    const NOW: i64 = 1_800_000_000;

    fn at(seconds: i64) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(NOW + seconds).unwrap()
    }

    fn audience(names: &[&str]) -> Result<Audience, AudienceError> {
        Audience::new(names.iter().map(|&n| n.to_owned()).collect())
    }

    fn issue(key: &LocalKey, ttl: u64, issuer: Option<&str>) -> Result<(UnsignedToken, String), IssueError> {
        let id = SpiffeId::new("spiffe://td/web").unwrap();
        let audience = audience(&["db", "cache"]).unwrap();
        let req = TokenRequest { id: &id, audience: &audience, ttl: Duration::from_secs(ttl), issuer, token_id: None };
        let authority = TokenAuthority { key_id: "k1", algorithm: key.public_side().algorithm, not_after: at(600) };
        let unsigned = unsigned_token(&req, &authority, at(0))?;
        let token = unsigned.signed(&key.sign(unsigned.content()).unwrap())?;
        Ok((unsigned, token))
    }

    #[test]
    fn what_is_issued_with_a_key_of_each_type_is_accepted_for_its_audiences_until_its_end() {
        for key_type in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048] {
            let key = LocalKey::new(&PrivateKey::generate(key_type).unwrap()).unwrap();
            let authority = JwtAuthority::new("k1", key.public_side().key).unwrap();
            let td = TrustDomain::new("td").unwrap();
            let bundles =
                [TrustBundle { jwt_authorities: vec![authority], ..TrustBundle::empty(td) }].into_iter().collect();
            // ECDSA signatures differ in length: each of many has to fit.
            for _ in 0..20 {
                let (_, token) = issue(&key, 300, Some("https://issuer")).unwrap();
                let svid = verify(&token, "cache", &bundles, at(299)).unwrap();
                assert_eq!((svid.id.to_string().as_str(), svid.expires_at), ("spiffe://td/web", at(300)));
                let expected = json!({ "sub": "spiffe://td/web", "aud": ["db", "cache"], "iss": "https://issuer",
                    "iat": NOW, "exp": NOW + 300 });
                assert_eq!(Value::Object(svid.claims), expected);
                assert_eq!(
                    verify(&token, "db", &bundles, at(300)),
                    Err(JwtError::Expired { at: at(300), now: at(300) })
                );
                assert!(matches!(verify(&token, "web", &bundles, at(0)), Err(JwtError::Claim { claim: "aud", .. })));
            }
        }
    }

    #[test]
    fn a_token_never_outlives_its_authority_and_none_is_made_that_is_over_at_once() {
        let key = LocalKey::new(&PrivateKey::generate(KeyType::EcP256).unwrap()).unwrap();
        assert_eq!(issue(&key, 1_000_000, None).unwrap().0.expires_at, at(600));
        assert_eq!(issue(&key, u64::MAX, None).unwrap().0.expires_at, at(600));
        assert!(matches!(issue(&key, 0, None), Err(IssueError::AuthorityExpired(_))));
    }

    #[test]
    fn an_audience_is_at_least_one_name_and_bounded() {
        assert_eq!(audience(&[]), Err(AudienceError::Missing));
        assert_eq!(audience(&["db", ""]), Err(AudienceError::Missing));
        assert_eq!(audience(&["db", "a\nb"]), Err(AudienceError::Control));
        assert!(audience(&["x"; MAX_AUDIENCES]).is_ok());
        assert_eq!(audience(&["x"; MAX_AUDIENCES + 1]), Err(AudienceError::TooMuch));
        assert_eq!(Audience::new(vec!["x".repeat(MAX_AUDIENCE_BYTES + 1)]), Err(AudienceError::TooMuch));
    }

    proptest! {
        #[test]
        fn whatever_a_key_answers_is_a_pair_of_the_right_length_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            prop_assert!(fixed(&bytes, 32).is_none_or(|both| both.len() == 64));
        }
    }
}
