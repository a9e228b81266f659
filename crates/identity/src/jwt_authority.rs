//! Public keys that a trust domain signs JWT-SVIDs with.

use std::fmt;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, EcdsaVerificationAlgorithm,
    ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};
use time::OffsetDateTime;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey as Parsed;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::bundle::AuthorityKey;
use crate::der::{bit_string, integer, sequence};
use crate::shown::shown;

/// Longest key ID, in bytes. SPIRE's have 32 characters.
pub const MAX_KEY_ID_BYTES: usize = 256;
/// Longest public key, in bytes of DER: RSA with 8192 bits.
const MAX_KEY_BYTES: usize = 1_200;

/// rsaEncryption with NULL, in DER (RFC 3279, 2.3.1).
const RSA_ENCRYPTION: &[u8] = &[0x30, 13, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1, 5, 0];

/// Why a key cannot be a JWT authority.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum JwtAuthorityError {
    /// The key ID is empty, too long, or has control characters.
    #[error("the key ID `{}` is not 1 to {MAX_KEY_ID_BYTES} bytes of text", shown(_0))]
    KeyId(String),
    /// The bytes are not a PKIX public key.
    #[error("the key `{}` is not a PKIX public key: {why}", shown(key_id))]
    Malformed {
        /// Its key ID.
        key_id: String,
        /// The parser's reason.
        why: String,
    },
    /// The key is of no kind that signs JWT-SVIDs (JWT-SVID 2.1).
    #[error("the key `{}` is neither RSA of 2048 to 8192 bits nor of curve P-256, P-384 or P-521", shown(key_id))]
    Kind {
        /// Its key ID.
        key_id: String,
    },
}

/// The kind of a key, with what a JSON Web Key says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublicKey {
    /// Modulus and exponent, big-endian without leading zeros.
    Rsa {
        /// The modulus.
        n: Vec<u8>,
        /// The public exponent.
        e: Vec<u8>,
    },
    /// A point of a curve, uncompressed (SEC 1, 2.3.3).
    Ec {
        /// The curve.
        curve: Curve,
        /// `04`, x, y.
        point: Vec<u8>,
    },
}

/// Why bytes are no key that signs JWT-SVIDs.
#[derive(Debug, PartialEq, Eq)]
pub enum Unfit {
    /// They are not a PKIX public key. Holds the reason.
    Malformed(String),
    /// The key is of another kind.
    Kind,
}

impl PublicKey {
    /// Reads a PKIX public key in DER (RFC 5280, 4.1.2.7).
    pub fn from_der(der: &[u8]) -> Result<Self, Unfit> {
        let malformed = |why: &str| Unfit::Malformed(why.to_owned());
        if der.len() > MAX_KEY_BYTES {
            return Err(malformed("it is too long"));
        }
        let (rest, info) = SubjectPublicKeyInfo::from_der(der).map_err(|e| malformed(&e.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed("bytes behind it"));
        }
        let key = match info.parsed().map_err(|e| malformed(&e.to_string()))? {
            Parsed::RSA(rsa) if (2_048..=8_192).contains(&rsa.key_size()) => {
                Self::Rsa { n: unsigned(rsa.modulus), e: unsigned(rsa.exponent) }
            }
            Parsed::EC(point) => {
                let oid = info.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok()).ok_or(Unfit::Kind)?;
                let named = Curve::ALL.iter().find(|(_, _, id, ..)| oid.to_id_string() == *id);
                let (curve, .., bytes, _) = named.copied().ok_or(Unfit::Kind)?;
                let point = point.data().to_vec();
                if point.len() != 1 + 2 * bytes || point[0] != 4 {
                    return Err(malformed("its point is compressed, or not of its curve"));
                }
                Self::Ec { curve, point }
            }
            _ => return Err(Unfit::Kind),
        };
        if key.is_sound() && key.to_der() == der {
            Ok(key)
        } else {
            Err(malformed("its numbers are no key: a point that is not on its curve, or no RSA key"))
        }
    }

    /// Whether the numbers are a key, and not only written like one: what verifies with it refuses the others, some clients with the
    /// whole bundle that they are in.
    fn is_sound(&self) -> bool {
        match self {
            Self::Rsa { n, e } => {
                let der = sequence(&[integer(n), integer(e)].concat());
                let is_exponent = matches!(e.as_slice(), [one] if *one >= 3) || (2..=8).contains(&e.len());
                let is_odd = e.last().is_some_and(|last| last % 2 == 1);
                is_exponent && is_odd && ParsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, der).is_ok()
            }
            Self::Ec { curve, point } => {
                let how: &EcdsaVerificationAlgorithm = match curve {
                    Curve::P256 => &ECDSA_P256_SHA256_FIXED,
                    Curve::P384 => &ECDSA_P384_SHA384_FIXED,
                    Curve::P521 => &ECDSA_P521_SHA512_FIXED,
                };
                ParsedPublicKey::new(how, point).is_ok()
            }
        }
    }

    /// Whether a JSON Web Key is of a kind that is known here.
    pub fn is_known(jwk: &Value) -> bool {
        let is_curve = || Curve::ALL.iter().any(|(_, name, ..)| jwk["crv"] == *name);
        jwk["kty"] == "RSA" || (jwk["kty"] == "EC" && is_curve())
    }

    /// The fields of a JSON Web Key for a certificate's key (PKIX DER). Of one that signs no JWT-SVID it has the type alone: it is known
    /// by the certificate.
    pub fn of_certificate(der: &[u8]) -> Map<String, Value> {
        if let Ok(key) = Self::from_der(der) {
            return key.jwk();
        }
        let algorithm = SubjectPublicKeyInfo::from_der(der).map(|(_, info)| info.algorithm.algorithm.to_id_string());
        let kty = match algorithm.as_deref() {
            Ok("1.2.840.113549.1.1.1") => "RSA",
            Ok("1.2.840.10045.2.1") => "EC",
            _ => "OKP",
        };
        std::iter::once(("kty".to_owned(), kty.into())).collect()
    }

    /// Reads a JSON Web Key (RFC 7518, 6). Errors: what is wrong with it.
    pub fn from_jwk(jwk: &Value) -> Result<Self, String> {
        let number = |name: &str| {
            let bytes = jwk[name].as_str().and_then(|text| URL_SAFE_NO_PAD.decode(text).ok());
            bytes.filter(|bytes| !bytes.is_empty()).ok_or_else(|| format!("`{name}` is no number in Base64"))
        };
        match jwk["kty"].as_str() {
            Some("RSA") => Ok(Self::Rsa { n: unsigned(&number("n")?), e: unsigned(&number("e")?) }),
            Some("EC") => {
                let name = jwk["crv"].as_str().unwrap_or_default();
                let (curve, .., bytes, _) = *Curve::ALL
                    .iter()
                    .find(|(_, known, ..)| *known == name)
                    .ok_or_else(|| format!("curve `{}` is none of P-256, P-384 and P-521", shown(name)))?;
                let mut point = vec![4];
                for name in ["x", "y"] {
                    let coordinate = number(name)?;
                    if coordinate.len() != bytes {
                        return Err(format!("`{name}` has not the {bytes} bytes of its curve"));
                    }
                    point.extend(coordinate);
                }
                Ok(Self::Ec { curve, point })
            }
            _ => Err("its type (kty) is neither RSA nor EC".to_owned()),
        }
    }

    /// The key as PKIX DER. [`JwtAuthority::new`] judges it.
    pub fn to_der(&self) -> Vec<u8> {
        match self {
            Self::Ec { curve, point } => [curve.header(), point].concat(),
            Self::Rsa { n, e } => {
                let numbers = sequence(&[integer(n), integer(e)].concat());
                sequence(&[RSA_ENCRYPTION, &bit_string(&numbers)].concat())
            }
        }
    }

    /// The fields of a JSON Web Key that are the key itself (RFC 7518, 6).
    pub fn jwk(&self) -> Map<String, Value> {
        let text = |bytes: &[u8]| Value::from(URL_SAFE_NO_PAD.encode(bytes));
        let fields = match self {
            Self::Rsa { n, e } => vec![("kty", "RSA".into()), ("n", text(n)), ("e", text(e))],
            Self::Ec { curve, point } => {
                let (x, y) = point.get(1..).and_then(|xy| xy.split_at_checked(curve.bytes())).unwrap_or_default();
                vec![("kty", "EC".into()), ("crv", curve.to_string().into()), ("x", text(x)), ("y", text(y))]
            }
        };
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Curves of JWT-SVIDs' keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    /// NIST P-256.
    P256,
    /// NIST P-384.
    P384,
    /// NIST P-521.
    P521,
}

impl Curve {
    /// Each curve with its name, its object identifier, the length of a coordinate in bytes, and what is before a point in PKIX DER
    /// (RFC 5480, 2.1.1).
    const ALL: [(Self, &'static str, &'static str, usize, &'static [u8]); 3] = [
        (
            Self::P256,
            "P-256",
            "1.2.840.10045.3.1.7",
            32,
            &[
                0x30, 0x59, 0x30, 0x13, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d,
                3, 1, 7, 3, 0x42, 0,
            ],
        ),
        (
            Self::P384,
            "P-384",
            "1.3.132.0.34",
            48,
            &[
                0x30, 0x76, 0x30, 0x10, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 5, 0x2b, 0x81, 4, 0, 0x22, 3,
                0x62, 0,
            ],
        ),
        (
            Self::P521,
            "P-521",
            "1.3.132.0.35",
            66,
            &[
                0x30, 0x81, 0x9b, 0x30, 0x10, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 5, 0x2b, 0x81, 4, 0, 0x23,
                3, 0x81, 0x86, 0,
            ],
        ),
    ];

    /// Length of a coordinate, in bytes.
    fn bytes(self) -> usize {
        Self::ALL.iter().find(|(curve, ..)| *curve == self).map_or(0, |(.., bytes, _)| *bytes)
    }

    fn header(self) -> &'static [u8] {
        Self::ALL.iter().find(|(curve, ..)| *curve == self).map_or(&[], |(.., header)| header)
    }
}

/// The name in JSON Web Keys (RFC 7518, 6.2.1.1).
impl fmt::Display for Curve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(curve, ..)| curve == self).map_or("", |(_, name, ..)| name))
    }
}

/// One JWT authority: a public key with the ID by which JWT-SVIDs name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtAuthority {
    key_id: String,
    der: Vec<u8>,
    key: PublicKey,
    /// When it ends; `None` if nobody said.
    pub expires_at: Option<OffsetDateTime>,
    /// Still trusted, but no longer used for signing: JWT-SVIDs under it are fetched anew.
    pub tainted: bool,
}

impl JwtAuthority {
    /// Takes a PKIX public key in DER (RFC 5280, 4.1.2.7). It is neither tainted nor does it end.
    pub fn new(key_id: &str, der: &[u8]) -> Result<Self, JwtAuthorityError> {
        if key_id.is_empty() || key_id.len() > MAX_KEY_ID_BYTES || key_id.chars().any(char::is_control) {
            return Err(JwtAuthorityError::KeyId(key_id.to_owned()));
        }
        let key = PublicKey::from_der(der).map_err(|unfit| match unfit {
            Unfit::Malformed(why) => JwtAuthorityError::Malformed { key_id: key_id.to_owned(), why },
            Unfit::Kind => JwtAuthorityError::Kind { key_id: key_id.to_owned() },
        })?;
        Ok(Self { key_id: key_id.to_owned(), der: der.to_vec(), key, expires_at: None, tainted: false })
    }

    /// The ID by which JWT-SVIDs name it (`kid`).
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    /// The PKIX public key in DER.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The key itself.
    pub fn key(&self) -> &PublicKey {
        &self.key
    }

    /// The digest of the key, whatever ID it is under.
    pub fn digest(&self) -> AuthorityKey {
        AuthorityKey::of_public_key(&self.der)
    }

    /// Whether it has ended.
    pub fn is_over(&self, now: OffsetDateTime) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }

    /// The key as a JSON Web Key (RFC 7517), which does not say what it is used for.
    pub fn jwk(&self) -> Value {
        let mut jwk = self.key.jwk();
        jwk.insert("kid".into(), self.key_id.clone().into());
        Value::Object(jwk)
    }
}

/// A big-endian number without the zero that DER puts before a set high bit.
fn unsigned(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().skip_while(|b| *b == 0).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{KeyType, PrivateKey};

    fn public(key_type: KeyType) -> Vec<u8> {
        PrivateKey::generate(key_type).unwrap().public_der().unwrap()
    }

    #[test]
    fn keys_of_each_kind_are_taken_and_written_as_json_web_keys() {
        for (key_type, kind, field, length) in
            [(KeyType::EcP256, "EC", "y", 43), (KeyType::EcP384, "EC", "x", 64), (KeyType::Rsa2048, "RSA", "n", 342)]
        {
            let jwk = JwtAuthority::new("k1", &public(key_type)).unwrap().jwk();
            assert_eq!((&jwk["kty"], &jwk["kid"], &jwk["use"]), (&json!(kind), &json!("k1"), &Value::Null));
            assert_eq!(jwk[field].as_str().unwrap().len(), length, "{jwk}");
        }
        // RFC 7517, A.1: the exponent 65537.
        assert_eq!(JwtAuthority::new("k", &public(KeyType::Rsa2048)).unwrap().jwk()["e"], "AQAB");
    }

    #[test]
    fn a_key_comes_back_from_its_json_web_key_as_it_went() {
        for key_type in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048, KeyType::Rsa4096] {
            let der = public(key_type);
            let authority = JwtAuthority::new("k", &der).unwrap();
            let again = PublicKey::from_jwk(&authority.jwk()).unwrap();
            assert_eq!((&again, again.to_der()), (authority.key(), der), "{key_type}");
        }
    }

    #[test]
    fn numbers_that_are_no_key_are_refused() {
        let refused = |key: PublicKey| matches!(PublicKey::from_der(&key.to_der()), Err(Unfit::Malformed(_)));
        for (curve, bytes) in [(Curve::P256, 32), (Curve::P384, 48), (Curve::P521, 66)] {
            assert!(refused(PublicKey::Ec { curve, point: [&[4][..], &vec![1; 2 * bytes]].concat() }), "{curve}");
        }
        for e in [vec![0], vec![], vec![1], vec![2], vec![1; 9]] {
            assert!(refused(PublicKey::Rsa { n: vec![0xff; 256], e: e.clone() }), "{e:?}");
        }
    }

    #[test]
    fn what_is_no_key_and_what_is_no_key_id_is_refused() {
        let key = public(KeyType::EcP256);
        for id in ["", "a\nb", &"x".repeat(257)] {
            assert!(matches!(JwtAuthority::new(id, &key), Err(JwtAuthorityError::KeyId(_))), "{id}");
        }
        let longer = [&key[..], &[0]].concat();
        for der in [&key[..50], &longer, &[][..], &[0x30; 2_000]] {
            assert!(matches!(JwtAuthority::new("k", der), Err(JwtAuthorityError::Malformed { .. })));
        }
        // Ed25519 (RFC 8410, 10.1) signs no JWT-SVID.
        let ed25519 = [&hex::decode("302a300506032b6570032100").unwrap()[..], &[7; 32]].concat();
        assert_eq!(JwtAuthority::new("k", &ed25519), Err(JwtAuthorityError::Kind { key_id: "k".into() }));
    }

    #[test]
    fn an_authority_ends_when_it_says_and_not_before() {
        let mut authority = JwtAuthority::new("k", &public(KeyType::EcP256)).unwrap();
        let at = |s: i64| OffsetDateTime::from_unix_timestamp(s).unwrap();
        assert!(!authority.is_over(at(i64::from(u32::MAX))));
        authority.expires_at = Some(at(100));
        assert!(!authority.is_over(at(99)) && authority.is_over(at(100)));
    }
}
