//! Why a peer is rejected.
//!
//! A refusal names a SPIFFE ID only after the path behind it was verified: an unproven certificate says whatever its
//! maker likes, and refusals appear in logs.

use spiffe::{SpiffeId, TrustDomain};
use time::OffsetDateTime;

/// Why a peer is rejected. [`Refusal::code`] is its name in metrics, logs and `status`.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// The peer sent no certificate.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// The chain has more certificates, or longer ones, than the bounds of [`crate::path`] allow.
    #[error("the peer's {0}")]
    ChainTooLong(String),
    /// Not X.509, or a certificate that breaks a rule for all certificates.
    #[error("the peer's certificate cannot be used: {0}")]
    Malformed(String),
    /// Not exactly one URI SAN (X509-SVID 2, 5.2).
    #[error("the peer's certificate holds {0} URI names; an X509-SVID holds exactly one")]
    UriSans(usize),
    /// The URI SAN is not a SPIFFE ID. The text was escaped.
    #[error("the peer's URI name is not a SPIFFE ID: {0}")]
    BadId(String),
    /// The SPIFFE ID is a trust domain's own, without a path.
    #[error("the peer's SPIFFE ID `{0}` has no path")]
    NoPath(SpiffeId),
    /// A CA certificate in place of a leaf (X509-SVID 4.1, 5.2).
    #[error("the peer showed a CA certificate; a CA certificate never authenticates")]
    CaAsLeaf,
    /// The leaf's key usage breaks a rule (X509-SVID 4.3, 5.2).
    #[error("the peer's certificate has the wrong key usage: {0}")]
    KeyUsage(&'static str),
    /// The SVID has expired. Its path was verified at a time within its validity.
    #[error("the SVID of `{id}` expired at {not_after}, and it is {now} here; check both clocks and the renewal")]
    Expired {
        /// The peer's SPIFFE ID, from its verified certificate.
        id: SpiffeId,
        /// End of the SVID's validity.
        not_after: OffsetDateTime,
        /// The time on our clock when the peer was checked.
        now: OffsetDateTime,
    },
    /// The SVID is not valid yet. Its path was verified at a time within its validity.
    #[error("the SVID of `{id}` is not valid before {not_before}, and it is {now} here; check both clocks")]
    NotYetValid {
        /// The peer's SPIFFE ID, from its verified certificate.
        id: SpiffeId,
        /// Start of the SVID's validity.
        not_before: OffsetDateTime,
        /// The time on our clock when the peer was checked.
        now: OffsetDateTime,
    },
    /// We hold no bundle for the trust domain that the leaf claims.
    #[error("no trust bundle for the trust domain `{0}` that the peer claims")]
    TrustDomain(TrustDomain),
    /// The chain does not end in an authority of the bundle.
    #[error("the peer's certificate is not signed by an authority of its trust domain `{trust_domain}`: {why}")]
    Untrusted {
        /// The trust domain that the leaf claims.
        trust_domain: TrustDomain,
        /// The reason of path validation.
        why: String,
    },
    /// This many certificates of the chain are not part of the verified path.
    #[error("{0} of the certificates that the peer sent are not part of the path to its authority")]
    NotInPath(usize),
    /// The peer proved another identity than the directory expects at its address.
    #[error("expected {expected} there, found `{found}`")]
    WrongIdentity {
        /// The SPIFFE IDs that the directory expects there.
        expected: String,
        /// The SPIFFE ID that the peer proved.
        found: SpiffeId,
    },
    /// The caller is not on the allow-list of the port.
    #[error("`{caller}` is not allowed to call port {port}")]
    NotAllowed {
        /// The SPIFFE ID that the caller proved.
        caller: SpiffeId,
        /// The destination port of the connection.
        port: u16,
    },
}

impl Refusal {
    /// Stable name in metrics, logs and `status`; it never changes between releases.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::ChainTooLong(_) => "chain_too_long",
            Self::Malformed(_) => "malformed_certificate",
            Self::UriSans(_) => "uri_sans",
            Self::BadId(_) => "bad_spiffe_id",
            Self::NoPath(_) => "no_path",
            Self::CaAsLeaf => "ca_as_leaf",
            Self::KeyUsage(_) => "key_usage",
            Self::Expired { .. } => "expired",
            Self::NotYetValid { .. } => "not_yet_valid",
            Self::TrustDomain(_) => "trust_domain",
            Self::Untrusted { .. } => "untrusted",
            Self::NotInPath(_) => "not_in_path",
            Self::WrongIdentity { .. } => "wrong_identity",
            Self::NotAllowed { .. } => "not_allowed",
        }
    }
}
