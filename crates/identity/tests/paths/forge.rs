//! Certificates by hand: each field and each byte is the test's, so that each can be wrong by itself.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};

/// Test time: 2027-01-15, in seconds since 1970.
pub const NOW: i64 = 1_800_000_000;

pub const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
pub const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
pub const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x25];
pub const ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];
pub const NAME_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x1e];
pub const SUBJECT_KEY_ID: &[u8] = &[0x55, 0x1d, 0x0e];
pub const AUTHORITY_KEY_ID: &[u8] = &[0x55, 0x1d, 0x23];
pub const POLICY_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x24];
/// 1.2.3.4: nobody's.
pub const UNKNOWN: &[u8] = &[0x2a, 0x03, 0x04];

const ECDSA_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
const ECDSA_SHA1: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01];

/// DER of one value.
pub fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let n = content.len();
    let length = match n {
        0..=0x7f => vec![u8::try_from(n).unwrap()],
        0x80..=0xff => vec![0x81, u8::try_from(n).unwrap()],
        _ => [&[0x82][..], &u16::try_from(n).unwrap().to_be_bytes()].concat(),
    };
    [&[tag][..], &length, content].concat()
}

pub fn seq(parts: &[Vec<u8>]) -> Vec<u8> {
    tlv(0x30, &parts.concat())
}

/// A key pair on P-256.
pub struct Key(EcdsaKeyPair);

impl Key {
    pub fn new() -> Self {
        Self(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap())
    }

    fn spki(&self) -> Vec<u8> {
        let algorithm = seq(&[
            tlv(6, &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01]),
            tlv(6, &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07]),
        ]);
        seq(&[algorithm, tlv(3, &[&[0], self.0.public_key().as_ref()].concat())])
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.0.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec()
    }
}

/// A certificate to be.
#[derive(Clone)]
pub struct Plan {
    /// 0 is X.509 v1, 2 is v3.
    pub version: u8,
    pub serial: Vec<u8>,
    pub issuer: String,
    pub subject: String,
    pub not_before: i64,
    pub not_after: i64,
    /// OID, critical, content.
    pub extensions: Vec<(Vec<u8>, bool, Vec<u8>)>,
    /// The algorithm that the outer part names is another one than the signed part does.
    pub mismatched_algorithm: bool,
    /// Signed with SHA-1, by name.
    pub sha1: bool,
    /// A bit of the signature is wrong.
    pub forged: bool,
    /// Bytes behind the certificate.
    pub trailing: Vec<u8>,
}

impl Plan {
    fn named(subject: &str, issuer: &str) -> Self {
        Self {
            version: 2,
            serial: vec![0x47, 0x11],
            issuer: issuer.into(),
            subject: subject.into(),
            not_before: NOW - 3_600,
            not_after: NOW + 3_600,
            extensions: vec![],
            mismatched_algorithm: false,
            sha1: false,
            forged: false,
            trailing: vec![],
        }
    }

    /// A CA certificate that is right.
    pub fn ca(subject: &str, issuer: &str) -> Self {
        let mut plan = Self::named(subject, issuer);
        plan.set(BASIC_CONSTRAINTS, true, ca_constraints(None));
        plan.set(KEY_USAGE, true, key_usage(&[5, 6]));
        plan
    }

    /// A leaf that is right.
    pub fn leaf(issuer: &str) -> Self {
        let mut plan = Self::named("leaf", issuer);
        plan.set(BASIC_CONSTRAINTS, true, seq(&[]));
        plan.set(KEY_USAGE, true, key_usage(&[0]));
        plan.set(EXTENDED_KEY_USAGE, false, extended_usage(&[1, 2]));
        plan.set(ALT_NAME, false, uris(&["spiffe://example.org/a"]));
        plan
    }

    /// Replaces an extension, or adds it.
    pub fn set(&mut self, oid: &[u8], critical: bool, content: Vec<u8>) {
        self.drop(oid);
        self.add(oid, critical, content);
    }

    /// Adds an extension, be it there or not.
    pub fn add(&mut self, oid: &[u8], critical: bool, content: Vec<u8>) {
        self.extensions.push((oid.to_vec(), critical, content));
    }

    pub fn drop(&mut self, oid: &[u8]) {
        self.extensions.retain(|(o, ..)| o != oid);
    }

    /// The certificate.
    pub fn sign(&self, key: &Key, signer: &Key) -> Vec<u8> {
        let algorithm = |sha1: bool| seq(&[tlv(6, if sha1 { ECDSA_SHA1 } else { ECDSA_SHA256 })]);
        let mut tbs = vec![];
        if self.version != 0 {
            tbs.push(tlv(0xa0, &tlv(2, &[self.version])));
        }
        tbs.extend([
            tlv(2, &self.serial),
            algorithm(self.sha1),
            name(&self.issuer),
            seq(&[time(self.not_before), time(self.not_after)]),
            name(&self.subject),
            key.spki(),
        ]);
        if !self.extensions.is_empty() {
            let all = self.extensions.iter().map(|(oid, critical, content)| {
                let critical = if *critical { tlv(1, &[0xff]) } else { vec![] };
                seq(&[tlv(6, oid), critical, tlv(4, content)])
            });
            tbs.push(tlv(0xa3, &seq(&all.collect::<Vec<_>>())));
        }
        let tbs = seq(&tbs);
        let mut signature = signer.sign(&tbs);
        if self.forged {
            *signature.last_mut().unwrap() ^= 1;
        }
        let whole =
            seq(&[tbs, algorithm(self.sha1 != self.mismatched_algorithm), tlv(3, &[&[0], &signature[..]].concat())]);
        [whole, self.trailing.clone()].concat()
    }
}

fn name(common: &str) -> Vec<u8> {
    seq(&[tlv(0x31, &seq(&[tlv(6, &[0x55, 4, 3]), tlv(0x0c, common.as_bytes())]))])
}

/// `UTCTime`: every time of these tests lies before 2050 (RFC 5280 4.1.2.5.1).
fn time(seconds: i64) -> Vec<u8> {
    let t = time::OffsetDateTime::from_unix_timestamp(seconds).unwrap();
    let text = format!(
        "{:02}{:02}{:02}{:02}{:02}{:02}Z",
        t.year() % 100,
        u8::from(t.month()),
        t.day(),
        t.hour(),
        t.minute(),
        t.second()
    );
    tlv(0x17, text.as_bytes())
}

pub fn ca_constraints(path_length: Option<u8>) -> Vec<u8> {
    let length = path_length.map_or(vec![], |n| tlv(2, &[n]));
    seq(&[tlv(1, &[0xff]), length])
}

/// Bits of RFC 5280 4.2.1.3: 0 digitalSignature, 2 keyEncipherment, 4 keyAgreement, 5 keyCertSign, 6 cRLSign.
pub fn key_usage(bits: &[u8]) -> Vec<u8> {
    let byte = bits.iter().fold(0u8, |b, bit| b | 0x80 >> bit);
    tlv(3, &[u8::try_from(byte.trailing_zeros().min(7)).unwrap(), byte])
}

/// Purposes of id-kp: 1 serverAuth, 2 clientAuth, 3 codeSigning.
pub fn extended_usage(purposes: &[u8]) -> Vec<u8> {
    seq(&purposes.iter().map(|p| tlv(6, &[0x2b, 6, 1, 5, 5, 7, 3, *p])).collect::<Vec<_>>())
}

/// A subjectAltName of URIs.
pub fn uris(uris: &[&str]) -> Vec<u8> {
    seq(&uris.iter().map(|u| tlv(0x86, u.as_bytes())).collect::<Vec<_>>())
}

/// A name for constraints: tag 0x82 DNS, 0x86 URI, 0x87 address.
pub fn subtree(tag: u8, name: &[u8]) -> Vec<u8> {
    seq(&[tlv(tag, name)])
}

/// nameConstraints of permitted and excluded subtrees; those that are empty are left out.
pub fn constraints(permitted: &[Vec<u8>], excluded: &[Vec<u8>]) -> Vec<u8> {
    let part = |tag: u8, all: &[Vec<u8>]| if all.is_empty() { vec![] } else { tlv(tag, &all.concat()) };
    seq(&[part(0xa0, permitted), part(0xa1, excluded)])
}
