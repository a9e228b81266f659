//! Why a peer is refused.
//!
//! A refusal names a SPIFFE ID only when the path behind it was verified: an unproven certificate says whatever its maker
//! likes, and refusals are read in logs.

use spiffe::{SpiffeId, TrustDomain};
use time::OffsetDateTime;

/// Why a peer is refused. [`Refusal::code`] is its name in metrics, logs and `status`.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// No certificate was shown.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// More certificates, or longer ones, than are read.
    #[error("the peer's {0}")]
    ChainTooLong(String),
    /// Not X.509, or a certificate that breaks a rule for every certificate.
    #[error("the peer's certificate cannot be used: {0}")]
    Malformed(String),
    /// Not exactly one URI SAN (X509-SVID 2, 5.2).
    #[error("the peer's certificate holds {0} URI names; an X509-SVID holds exactly one")]
    UriSans(usize),
    /// The URI SAN is not a SPIFFE ID. The text was escaped.
    #[error("the peer's URI name is not a SPIFFE ID: {0}")]
    BadId(String),
    /// The ID is a trust domain's own.
    #[error("the peer's SPIFFE ID `{0}` has no path")]
    NoPath(SpiffeId),
    /// A CA certificate as leaf (X509-SVID 4.1, 5.2).
    #[error("the peer showed a CA certificate; a CA certificate never authenticates")]
    CaAsLeaf,
    /// Key usage of the leaf (X509-SVID 4.3, 5.2).
    #[error("the peer's certificate has the wrong key usage: {0}")]
    KeyUsage(&'static str),
    /// The SVID's validity is over.
    #[error("the SVID of `{id}` expired at {not_after}, and it is {now} here; check both clocks and the renewal")]
    Expired {
        /// The peer, as its verified certificate says.
        id: SpiffeId,
        /// End of the SVID's validity.
        not_after: OffsetDateTime,
        /// Our time.
        now: OffsetDateTime,
    },
    /// The SVID's validity has not begun.
    #[error("the SVID of `{id}` is not valid before {not_before}, and it is {now} here; check both clocks")]
    NotYetValid {
        /// The peer, as its verified certificate says.
        id: SpiffeId,
        /// Start of the SVID's validity.
        not_before: OffsetDateTime,
        /// Our time.
        now: OffsetDateTime,
    },
    /// A trust domain that we hold no bundle of.
    #[error("no trust bundle for the trust domain `{0}` that the peer claims")]
    TrustDomain(TrustDomain),
    /// The chain does not end in the bundle.
    #[error("the peer's certificate is not signed by an authority of its trust domain `{trust_domain}`: {why}")]
    Untrusted {
        /// The trust domain that the certificate claims.
        trust_domain: TrustDomain,
        /// What path validation said.
        why: String,
    },
    /// Certificates were sent that are not in the verified path.
    #[error("{0} of the certificates that the peer sent are not part of the path to its authority")]
    NotInPath(usize),
    /// Another identity than the directory expects at this address.
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
        /// The port that was called.
        port: u16,
    },
}

impl Refusal {
    /// Its name in metrics, logs and `status`; never changes.
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
