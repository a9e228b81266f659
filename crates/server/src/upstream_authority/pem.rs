//! Tolerant parsing of PEM files: certificates and keys in every common form, and a clear reason for everything else.

use std::path::Path;

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair};
use countersign_api::files::read_pem;
use countersign_identity::PrivateKey;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::{Error as PemError, SectionKind, from_buf};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::public_key::PublicKey;
use zeroize::Zeroizing;

use super::UpstreamError;

/// PEM blocks of one file that are looked at.
const MAX_SECTIONS: usize = 10_000;
/// Shortest RSA key, in bits.
const LEAST_RSA_BITS: usize = 2_048;
/// A byte order mark, which some editors put before the first line.
const BOM: &[u8] = b"\xef\xbb\xbf";

/// All certificates of a file, in order. Errors: unreadable, or no certificate.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, UpstreamError> {
    let wrong = |why: String| UpstreamError::in_file(path, why);
    let content = read(path)?;
    let sections =
        sections(&content, "a certificate", "`openssl x509 -inform der -in FILE -out FILE.pem`").map_err(wrong)?;
    let kinds: Vec<SectionKind> = sections.iter().map(|(kind, _)| *kind).collect();
    let certificates: Vec<_> = sections
        .into_iter()
        .filter(|(kind, _)| *kind == SectionKind::Certificate)
        .map(|(_, der)| CertificateDer::from(der.to_vec()))
        .collect();
    if certificates.is_empty() {
        let found = kinds.first().map_or("none", |k| name_of(*k));
        return Err(wrong(format!("expected a certificate (`-----BEGIN CERTIFICATE-----`), found {found}")));
    }
    Ok(certificates)
}

/// The private key of a file: PKCS#8, SEC1 (also after its EC PARAMETERS) or PKCS#1.
pub fn key(path: &Path) -> Result<PrivateKey, UpstreamError> {
    let wrong = |why: String| UpstreamError::in_file(path, why);
    let content = Zeroizing::new(read(path)?);
    if has(&content, b"ENCRYPTED") {
        return Err(wrong("the key is encrypted; decrypt it with `openssl pkey -in FILE -out PLAIN`".into()));
    }
    let sections =
        sections(&content, "a private key", "`openssl pkey -inform der -in FILE -out FILE.pem`").map_err(wrong)?;
    let secret = |kind: SectionKind| {
        matches!(kind, SectionKind::PrivateKey | SectionKind::EcPrivateKey | SectionKind::RsaPrivateKey)
    };
    let mut keys = sections.iter().filter(|(kind, _)| secret(*kind));
    let Some((kind, der)) = keys.next() else {
        let found = sections.first().map_or("none", |(kind, _)| name_of(*kind));
        return Err(wrong(format!("expected a private key (`-----BEGIN PRIVATE KEY-----`), found {found}")));
    };
    if keys.next().is_some() {
        return Err(wrong("expected one private key, found several".into()));
    }
    usable(*kind, der).map_err(wrong)
}

fn usable(kind: SectionKind, der: &[u8]) -> Result<PrivateKey, String> {
    let unusable = || "this key cannot be used; use EC P-256, EC P-384, or RSA of 2048 to 8192 bits".to_owned();
    let pkcs8 = match kind {
        SectionKind::PrivateKey => Zeroizing::new(der.to_vec()),
        SectionKind::RsaPrivateKey => {
            let pair = rsa::KeyPair::from_der(der).map_err(|_| unusable())?;
            let pkcs8: Pkcs8V1Der<'_> = pair.as_der().map_err(|_| unusable())?;
            Zeroizing::new(pkcs8.as_ref().to_vec())
        }
        _ => {
            let curves = [&ECDSA_P256_SHA256_ASN1_SIGNING, &ECDSA_P384_SHA384_ASN1_SIGNING];
            let pair = curves.into_iter().find_map(|curve| EcdsaKeyPair::from_private_key_der(curve, der).ok());
            let pkcs8 = pair.and_then(|pair| pair.to_pkcs8v1().ok()).ok_or_else(unusable)?;
            Zeroizing::new(pkcs8.as_ref().to_vec())
        }
    };
    PrivateKey::from_pkcs8(pkcs8.to_vec()).map_err(|_| unusable())
}

/// Checks a chain in file order: each certificate is issued by the next one, and no RSA key is too short.
pub fn check_order(chain: &[CertificateDer<'_>]) -> Result<(), String> {
    let parse = |der| {
        X509Certificate::from_der(der).map(|(_, cert)| cert).map_err(|e| format!("not an X.509 certificate: {e}"))
    };
    let certificates = chain.iter().map(|der| parse(der)).collect::<Result<Vec<_>, _>>()?;
    for cert in &certificates {
        if let Ok(PublicKey::RSA(key)) = cert.public_key().parsed()
            && key.key_size() < LEAST_RSA_BITS
        {
            return Err(format!(
                "the RSA key of `{}` has {} bits; expected at least {LEAST_RSA_BITS}",
                cert.subject(),
                key.key_size()
            ));
        }
    }
    for pair in certificates.windows(2) {
        let [cert, next] = pair else { continue };
        if cert.issuer() != next.subject() {
            return Err(format!(
                "the certificates are not in order: `{}` is followed by `{}`, which did not issue it; put the CA that signs for \
                 this mesh first, then each one's issuer",
                cert.subject(),
                next.subject()
            ));
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, UpstreamError> {
    read_pem(path).map_err(|source| UpstreamError::of_reading(path, &source))
}

type Section = (SectionKind, Zeroizing<Vec<u8>>);

fn sections(content: &[u8], expected: &str, convert: &str) -> Result<Vec<Section>, String> {
    let content = content.strip_prefix(BOM).unwrap_or(content);
    if content.iter().all(u8::is_ascii_whitespace) {
        return Err(format!("expected {expected} as PEM, found an empty file"));
    }
    let mut rest = content;
    let next = std::iter::from_fn(|| from_buf(&mut rest).transpose());
    // Bounded, because the library may not recover after a damaged block.
    let sections: Result<Vec<(SectionKind, Vec<u8>)>, PemError> = next.take(MAX_SECTIONS).collect();
    let sections = sections.map_err(|e| {
        let why = match e {
            PemError::MissingSectionEnd { .. } => "the file is cut off: a `-----END …-----` line is missing",
            PemError::IllegalSectionStart { .. } => "a `-----BEGIN …-----` line is damaged",
            PemError::Base64Decode(_) => "the text between BEGIN and END is damaged: it is not base64",
            _ => "the PEM text is damaged",
        };
        why.to_owned()
    })?;
    if sections.is_empty() {
        let found = match content {
            c if is_der(c) => {
                return Err(format!("expected {expected} as PEM, found DER; convert it with {convert}"));
            }
            c if has(c, b"-----BEGIN ") => "a block of another kind",
            _ => "no PEM block",
        };
        return Err(format!("expected {expected} as PEM, found {found}"));
    }
    Ok(sections.into_iter().map(|(kind, der)| (kind, Zeroizing::new(der))).collect())
}

/// Whether the content is exactly one DER SEQUENCE, as certificates and keys are: the length is in the second byte, or
/// in the one or two after it (X.690 8.1.3). Text may start with the same bytes, but does not have the matching length.
fn is_der(content: &[u8]) -> bool {
    match content {
        [0x30, 0x82, high, low, body @ ..] => body.len() == usize::from(u16::from_be_bytes([*high, *low])),
        [0x30, 0x81, length, body @ ..] => body.len() == usize::from(*length),
        [0x30, length, body @ ..] => *length < 0x80 && body.len() == usize::from(*length),
        _ => false,
    }
}

fn has(content: &[u8], needle: &[u8]) -> bool {
    content.windows(needle.len()).any(|w| w == needle)
}

fn name_of(kind: SectionKind) -> &'static str {
    match kind {
        SectionKind::Certificate => "a certificate",
        SectionKind::PublicKey => "a public key",
        SectionKind::RsaPrivateKey | SectionKind::PrivateKey | SectionKind::EcPrivateKey => "a private key",
        SectionKind::Crl => "a revocation list",
        SectionKind::Csr => "a signing request",
        _ => "a block of another kind",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same P-256 key as openssl writes it with `ecparam -genkey` (parameters first), and as PKCS#8.
    fn forms(key: &PrivateKey) -> (Vec<u8>, Vec<u8>) {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, key.as_pkcs8()).unwrap();
        let private = pair.private_key();
        let sec1: aws_lc_rs::encoding::EcPrivateKeyRfc5915Der<'_> = private.as_der().unwrap();
        let block = |label, der: &[u8]| countersign_identity::bundle::pem_block(label, der);
        // The object identifier of P-256 (RFC 5480 2.1.1.1).
        let curve = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
        let sec1 = block("EC PARAMETERS", &curve) + &block("EC PRIVATE KEY", sec1.as_ref());
        (sec1.into_bytes(), block("PRIVATE KEY", key.as_pkcs8()).into_bytes())
    }

    fn load(content: &[u8]) -> Result<PrivateKey, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        key(file.path()).map_err(|e| e.to_string().replace(&file.path().display().to_string(), "FILE"))
    }

    #[test]
    fn keys_are_read_in_every_common_form() {
        let made = PrivateKey::generate(countersign_identity::KeyType::EcP256).unwrap();
        let public = |k: &PrivateKey| rcgen_public(k);
        let (sec1, pkcs8) = forms(&made);
        for content in
            [sec1, [BOM, &pkcs8].concat(), String::from_utf8(pkcs8.clone()).unwrap().replace('\n', "\r\n").into()]
        {
            assert_eq!(public(&load(&content).unwrap()), public(&made));
        }
        let rsa = PrivateKey::generate(countersign_identity::KeyType::Rsa2048).unwrap();
        let (_, inner) = rsa.as_pkcs8().split_at(26);
        let pkcs1 = countersign_identity::bundle::pem_block("RSA PRIVATE KEY", inner);
        assert_eq!(public(&load(pkcs1.as_bytes()).unwrap()), public(&rsa));
        assert_eq!(
            load(&[pkcs8.clone(), pkcs8].concat()).unwrap_err(),
            "FILE: expected one private key, found several"
        );
        assert_eq!(load(b" \n").unwrap_err(), "FILE: expected a private key as PEM, found an empty file");
    }

    fn rcgen_public(key: &PrivateKey) -> Vec<u8> {
        rcgen::PublicKeyData::subject_public_key_info(&key.key_pair().unwrap())
    }
}
