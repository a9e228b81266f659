//! Secrets as an Envoy reads them.

use std::sync::Arc;

use aws_lc_rs::digest::{Context, SHA256};
use base64::Engine;
use countersign_api::sds::secret::Type;
use countersign_api::sds::spiffe_cert_validator_config::TrustDomain;
use countersign_api::sds::{
    CertificateValidationContext, DataSource, SECRET_TYPE, SPIFFE_VALIDATOR, SPIFFE_VALIDATOR_TYPE, Secret,
    SpiffeCertValidatorConfig, TlsCertificate, TypedExtensionConfig,
};
use countersign_identity::bundle::certificates_to_pem;
use countersign_identity::{PrivateKey, TrustBundle, X509Svid};
use prost::Message;
use prost_types::Any;
use zeroize::Zeroizing;

use super::asked::Validator;

/// What a secret is made of.
pub enum Material {
    /// A certificate and its key.
    Svid(Arc<X509Svid>),
    /// The roots of one trust domain.
    Bundle(Arc<TrustBundle>),
    /// The roots of several, each by its own; our own trust domain's first.
    AllBundles(Vec<Arc<TrustBundle>>),
}

impl Material {
    /// Equal for equal secrets, also after a restart. Made of certificates alone: a key is as its certificate is.
    pub fn version(&self, validator: Validator) -> Version {
        let mut version = Version::of();
        match self {
            Self::Svid(svid) => svid.chain().iter().for_each(|certificate| version.add(certificate)),
            Self::Bundle(bundle) => version.add_bundle(bundle, validator),
            Self::AllBundles(bundles) => bundles.iter().for_each(|bundle| version.add_bundle(bundle, validator)),
        }
        version.done()
    }

    /// The secret of this name.
    pub fn secret(&self, name: &str, validator: Validator) -> Any {
        let material = match self {
            Self::Svid(svid) => Type::TlsCertificate(certificate(svid)),
            Self::Bundle(bundle) => Type::ValidationContext(validation(std::slice::from_ref(bundle), validator)),
            Self::AllBundles(bundles) => Type::ValidationContext(validation(bundles, validator)),
        };
        let mut secret = Secret { name: name.to_owned(), r#type: Some(material) };
        let value = secret.encode_to_vec();
        wipe(&mut secret);
        Any { type_url: SECRET_TYPE.into(), value }
    }
}

fn certificate(svid: &X509Svid) -> TlsCertificate {
    let chain = certificates_to_pem(svid.chain().iter().map(AsRef::as_ref));
    TlsCertificate {
        certificate_chain: Some(inline(chain.into_bytes())),
        private_key: Some(inline(key_pem(svid.key()))),
    }
}

fn validation(bundles: &[Arc<TrustBundle>], validator: Validator) -> CertificateValidationContext {
    let pem = |bundle: &Arc<TrustBundle>| Some(inline(bundle.to_pem().into_bytes()));
    if validator == Validator::Chain {
        return CertificateValidationContext {
            trusted_ca: bundles.first().and_then(pem),
            custom_validator_config: None,
        };
    }
    let trust_domains =
        bundles.iter().map(|b| TrustDomain { name: b.trust_domain.to_string(), trust_bundle: pem(b) }).collect();
    let config = SpiffeCertValidatorConfig { trust_domains };
    let typed = Any { type_url: SPIFFE_VALIDATOR_TYPE.into(), value: config.encode_to_vec() };
    let validator = TypedExtensionConfig { name: SPIFFE_VALIDATOR.into(), typed_config: Some(typed) };
    CertificateValidationContext { trusted_ca: None, custom_validator_config: Some(validator) }
}

fn inline(bytes: Vec<u8>) -> DataSource {
    DataSource { inline_bytes: bytes }
}

/// The key as PEM. What is made on the way is zeroised, so that only what is sent holds it.
fn key_pem(key: &PrivateKey) -> Vec<u8> {
    const LINE: usize = 64;
    let body = Zeroizing::new(base64::engine::general_purpose::STANDARD.encode(key.as_pkcs8()));
    let (begin, end) = ("-----BEGIN PRIVATE KEY-----\n", "-----END PRIVATE KEY-----\n");
    // All of it at once: a buffer that grew would leave parts of the key behind.
    let mut pem = Vec::with_capacity(begin.len() + body.len() + body.len().div_ceil(LINE) + end.len());
    pem.extend_from_slice(begin.as_bytes());
    for line in body.as_bytes().chunks(LINE) {
        pem.extend_from_slice(line);
        pem.push(b'\n');
    }
    pem.extend_from_slice(end.as_bytes());
    pem
}

fn wipe(secret: &mut Secret) {
    if let Some(Type::TlsCertificate(TlsCertificate { private_key: Some(key), .. })) = &mut secret.r#type {
        zeroize::Zeroize::zeroize(&mut key.inline_bytes);
    }
}

/// A digest of what an Envoy holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version(String);

impl Version {
    /// A version to be made of parts.
    fn of() -> VersionOf {
        VersionOf(Context::new(&SHA256))
    }

    /// The version of several secrets together.
    pub fn of_all<'a>(secrets: impl Iterator<Item = (&'a str, Version)>) -> Self {
        let mut all = Self::of();
        for (name, version) in secrets {
            all.add(name.as_bytes());
            all.add(version.0.as_bytes());
        }
        all.done()
    }

    /// One that an Envoy says it holds.
    pub fn told(text: String) -> Self {
        Self(text)
    }

    /// As it is sent.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

struct VersionOf(Context);

impl VersionOf {
    fn add(&mut self, part: &[u8]) {
        self.0.update(&(part.len() as u64).to_be_bytes());
        self.0.update(part);
    }

    fn add_bundle(&mut self, bundle: &TrustBundle, validator: Validator) {
        self.add(&[u8::from(validator == Validator::Spiffe)]);
        self.add(bundle.trust_domain.as_ref().as_bytes());
        self.add(&bundle.concatenated_der());
    }

    fn done(self) -> Version {
        const BYTES: usize = 16;
        Version(hex::encode(&self.0.finish().as_ref()[..BYTES]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_identity::KeyType;
    use countersign_identity::bundle::pem_block;

    #[test]
    fn a_key_is_the_pem_that_others_write() {
        for key_type in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048] {
            let key = PrivateKey::generate(key_type).unwrap();
            let pem = key_pem(&key);
            assert_eq!(String::from_utf8(pem).unwrap(), pem_block("PRIVATE KEY", key.as_pkcs8()));
        }
    }
}
