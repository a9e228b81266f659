//! What we accept: the one verifier of peers' certificates.
//!
//! Rules: X509-SVID 5 (path, then the leaf again), RFC 5280. The peer's bundle is chosen by the leaf's own trust domain.

use rustls_pki_types::{CertificateDer, UnixTime};
use spiffe::SpiffeId;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::bundle::BundleSet;
use crate::svid::LeafFacts;

/// Why a peer is refused. [`Refusal::code`] is its name in metrics, logs and `status`.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// No certificate was shown.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// No X.509 at all.
    #[error("the peer's certificate cannot be read: {0}")]
    Malformed(String),
    /// Not exactly one URI SAN (X509-SVID 2, 5.2).
    #[error("the peer's certificate holds {0} URI names; an X509-SVID holds exactly one")]
    UriSans(usize),
    /// The URI SAN is no SPIFFE ID.
    #[error("the peer's URI name is not a SPIFFE ID: {0}")]
    BadId(String),
    /// The ID is a trust domain's own.
    #[error("the peer's SPIFFE ID `{0}` has no path")]
    NoPath(SpiffeId),
    /// A CA certificate as leaf (X509-SVID 4.1, 5.2).
    #[error("`{0}` showed a CA certificate; a CA certificate never authenticates")]
    CaAsLeaf(SpiffeId),
    /// Key usage of the leaf (X509-SVID 4.3, 5.2).
    #[error("the certificate of `{id}` has the wrong key usage: {why}")]
    KeyUsage {
        /// Whose.
        id: SpiffeId,
        /// What is wrong.
        why: &'static str,
    },
    /// Over.
    #[error("the SVID of `{id}` expired at {not_after}, and it is {now} here; check both clocks and the renewal")]
    Expired {
        /// Whose.
        id: SpiffeId,
        /// Its end.
        not_after: OffsetDateTime,
        /// Our time.
        now: OffsetDateTime,
    },
    /// Not begun.
    #[error("the SVID of `{id}` is not valid before {not_before}, and it is {now} here; check both clocks")]
    NotYetValid {
        /// Whose.
        id: SpiffeId,
        /// Its start.
        not_before: OffsetDateTime,
        /// Our time.
        now: OffsetDateTime,
    },
    /// A trust domain that we hold no bundle of.
    #[error("no trust bundle for the trust domain of `{0}`")]
    TrustDomain(SpiffeId),
    /// The chain does not end in the bundle.
    #[error("the certificate of `{id}` is not signed by an authority of its trust domain: {why}")]
    Untrusted {
        /// Whose.
        id: SpiffeId,
        /// What path validation said.
        why: String,
    },
    /// Somebody else than the directory expects at this address.
    #[error("expected {expected} there, found `{found}`")]
    WrongIdentity {
        /// Who may stand there.
        expected: String,
        /// Who does.
        found: SpiffeId,
    },
    /// Not on the allow-list.
    #[error("`{caller}` is not allowed to call port {port}")]
    NotAllowed {
        /// Who called.
        caller: SpiffeId,
        /// Which port.
        port: u16,
    },
}

impl Refusal {
    /// Its name in metrics, logs and `status`; never changes.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::Malformed(_) => "malformed_certificate",
            Self::UriSans(_) => "uri_sans",
            Self::BadId(_) => "bad_spiffe_id",
            Self::NoPath(_) => "no_path",
            Self::CaAsLeaf(_) => "ca_as_leaf",
            Self::KeyUsage { .. } => "key_usage",
            Self::Expired { .. } => "expired",
            Self::NotYetValid { .. } => "not_yet_valid",
            Self::TrustDomain(_) => "trust_domain",
            Self::Untrusted { .. } => "untrusted",
            Self::WrongIdentity { .. } => "wrong_identity",
            Self::NotAllowed { .. } => "not_allowed",
        }
    }
}

/// Which side of the handshake the peer is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerRole {
    /// It called us.
    Client,
    /// We called it.
    Server,
}

/// A peer whose chain and leaf passed every rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedPeer {
    /// Who it is.
    pub id: SpiffeId,
    /// Serial, validity, issuer.
    pub facts: LeafFacts,
    /// Subject key identifier of the authority at or below the trust root that the chain hangs from, lower-case hex.
    pub authority: String,
}

/// Verifies a chain (leaf first) against the bundle of the leaf's own trust domain.
pub fn verify_chain(
    chain: &[CertificateDer<'_>],
    bundles: &BundleSet,
    now: OffsetDateTime,
    role: PeerRole,
) -> Result<VerifiedPeer, Refusal> {
    let (leaf, intermediates) = chain.split_first().ok_or(Refusal::NoCertificate)?;
    let (rest, cert) = X509Certificate::from_der(leaf).map_err(|e| Refusal::Malformed(e.to_string()))?;
    if !rest.is_empty() {
        return Err(Refusal::Malformed("bytes behind the certificate".into()));
    }
    let id = leaf_id(&cert)?;
    let facts = LeafFacts::of(&cert);
    // Path validation looks at the time again, for the whole chain; these two name both clocks.
    if now > facts.not_after {
        return Err(Refusal::Expired { id, not_after: facts.not_after, now });
    }
    if now < facts.not_before {
        return Err(Refusal::NotYetValid { id, not_before: facts.not_before, now });
    }
    let bundle = bundles.get(id.trust_domain_name()).ok_or_else(|| Refusal::TrustDomain(id.clone()))?;
    let anchors: Vec<_> =
        bundle.authorities.iter().filter(|a| a.not_after() >= now).map(|a| a.anchor().clone()).collect();
    let untrusted = |why: webpki::Error| Refusal::Untrusted { id: id.clone(), why: why.to_string() };
    let since_epoch =
        now.unix_timestamp().try_into().map_or(UnixTime::since_unix_epoch(std::time::Duration::ZERO), |s| {
            UnixTime::since_unix_epoch(std::time::Duration::from_secs(s))
        });
    let usage = match role {
        PeerRole::Client => webpki::KeyUsage::client_auth(),
        PeerRole::Server => webpki::KeyUsage::server_auth(),
    };
    webpki::EndEntityCert::try_from(leaf)
        .map_err(untrusted)?
        .verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &anchors, intermediates, since_epoch, usage, None, None)
        .map_err(untrusted)?;
    let authority = match intermediates.last() {
        None => facts.authority_id.clone(),
        Some(top) => X509Certificate::from_der(top).map(|(_, c)| LeafFacts::of(&c).authority_id).unwrap_or_default(),
    };
    Ok(VerifiedPeer { id, facts, authority })
}

/// The SPIFFE ID of a leaf that obeys X509-SVID's rules for leaves.
pub fn leaf_id(cert: &X509Certificate<'_>) -> Result<SpiffeId, Refusal> {
    let malformed = |e: x509_parser::error::X509Error| Refusal::Malformed(e.to_string());
    let san = cert.subject_alternative_name().map_err(malformed)?;
    let uris: Vec<&str> = san
        .iter()
        .flat_map(|san| san.value.general_names.iter())
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let [uri] = uris[..] else { return Err(Refusal::UriSans(uris.len())) };
    let id = crate::trust_domain::parse_id(uri).map_err(|e| Refusal::BadId(e.to_string()))?;
    // CA before path: a CA's ID has no path, and "a CA certificate" is the truer reason.
    if cert.basic_constraints().map_err(malformed)?.is_some_and(|bc| bc.value.ca) {
        return Err(Refusal::CaAsLeaf(id));
    }
    if id.path().is_empty() {
        return Err(Refusal::NoPath(id));
    }
    let wrong = |why| Refusal::KeyUsage { id: id.clone(), why };
    let ku = cert.key_usage().map_err(malformed)?.ok_or_else(|| wrong("it is absent"))?;
    if !ku.critical {
        return Err(wrong("it is not critical"));
    }
    if !ku.value.digital_signature() {
        return Err(wrong("digitalSignature is not set"));
    }
    if ku.value.key_cert_sign() || ku.value.crl_sign() {
        return Err(wrong("keyCertSign or cRLSign is set on a leaf"));
    }
    if let Some(eku) = cert.extended_key_usage().map_err(malformed)?
        && !(eku.value.server_auth && eku.value.client_auth)
    {
        return Err(wrong("extended key usage lacks serverAuth or clientAuth"));
    }
    Ok(id)
}
