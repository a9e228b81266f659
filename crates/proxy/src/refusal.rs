//! Why a connection was not let through: a code for metrics and `status`, a text for people.

use std::net::SocketAddr;

use countersign_api::tls::refusal_of;
use countersign_identity::shown::{sentence, shown};

/// Longest text of a failed handshake that is shown, in characters.
const MAX_TLS_TEXT: usize = 256;

/// Why a connection is refused or was cut.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// A peer's certificate or right to call.
    #[error(transparent)]
    Peer(#[from] countersign_identity::verify::Refusal),
    /// The other side's TLS was wrong, in a way that is not its certificate.
    #[error("TLS handshake failed: {0}")]
    Tls(String),
    /// The other side did not finish the handshake.
    #[error("the TLS handshake took longer than {0:?}")]
    HandshakeTimeout(std::time::Duration),
    /// It speaks TLS but not our protocol.
    #[error("the peer did not offer the protocol `countersign/1`")]
    Protocol,
    /// The preamble was malformed, too slow, or too long.
    #[error("bad preamble: {0}")]
    Preamble(String),
    /// The other sidecar said no.
    #[error("refused by the other sidecar ({code}): {text}")]
    ByPeer {
        /// Its code.
        code: String,
        /// Its reason.
        text: String,
    },
    /// A destination that is not this namespace's own, or the sidecar's own port.
    #[error("{0} is not this workload's own address and port; a sidecar is no relay")]
    NotOurs(SocketAddr),
    /// The sidecar would talk to itself.
    #[error("{0} is the sidecar's own port; forwarding to it would loop")]
    Loop(SocketAddr),
    /// The caller meant another run of this address.
    #[error("the caller expected workload `{}` here, this is `{found}`", shown(expected))]
    StaleWorkload {
        /// Whom it meant.
        expected: String,
        /// Who is here.
        found: String,
    },
    /// Nobody could say who is there.
    #[error("the directory does not know yet who is at {0}; is the agent connected to its server?")]
    DirectoryUnknown(SocketAddr),
    /// The own policy is not known yet.
    #[error("this workload's policy is not known yet; is the agent connected to its server?")]
    PolicyUnknown,
    /// Strict, and nobody of the mesh is there.
    #[error("{0} is not in the mesh, and this workload is strict; name it under `egress` to let it out")]
    NotMeshed(SocketAddr),
    /// Nothing stands behind a service.
    #[error("{service} has no endpoint for {to} that may be used{}", if *.strict { "; this workload is strict, so only endpoints in the mesh count" } else { "" })]
    NoEndpoint {
        /// The service's name.
        service: String,
        /// Where the app was going.
        to: SocketAddr,
        /// Whether only meshed endpoints count.
        strict: bool,
    },
    /// Strict, and it came in the clear.
    #[error("plaintext to port {0} is refused: this workload is strict")]
    Plaintext(u16),
    /// An allow-list, and it came in the clear.
    #[error("plaintext to port {0} is refused: the port has an allow-list, and plaintext proves nobody")]
    PlaintextUnproven(u16),
    /// No identity to show.
    #[error("this sidecar has no SVID yet; is the agent running, and is there an entry for this sidecar's uid?")]
    NoSvid,
    /// The identity is over.
    #[error("this sidecar's SVID expired at {0}; is the agent connected to its server?")]
    SvidExpired(time::OffsetDateTime),
    /// The destination did not answer.
    #[error("cannot connect to {to}: {why}")]
    Connect {
        /// Where.
        to: SocketAddr,
        /// Why not.
        why: String,
    },
    /// Too many at once.
    #[error("too many connections at once ({0})")]
    TooMany(&'static str),
    /// The kernel did not tell where it was going.
    #[error("no original destination: the connection did not come through the redirect ({0})")]
    NoOriginalDestination(String),
    /// The authority behind the peer is not trusted any more.
    #[error("the authority that vouched for the peer was revoked")]
    AuthorityRevoked,
}

impl Refused {
    /// Its name in metrics, logs, `status` and towards the other sidecar; never changes.
    pub fn code(&self) -> &str {
        match self {
            Self::Peer(refusal) => refusal.code(),
            Self::Tls(_) => "tls",
            Self::HandshakeTimeout(_) => "handshake_timeout",
            Self::Protocol => "protocol",
            Self::Preamble(_) => "preamble",
            Self::ByPeer { .. } => "refused_by_peer",
            Self::NotOurs(_) => "not_ours",
            Self::Loop(_) => "loop",
            Self::StaleWorkload { .. } => "stale_workload",
            Self::DirectoryUnknown(_) => "directory_unknown",
            Self::PolicyUnknown => "policy_unknown",
            Self::NotMeshed(_) => "not_meshed",
            Self::NoEndpoint { .. } => "no_endpoint",
            Self::Plaintext(_) => "plaintext",
            Self::PlaintextUnproven(_) => "plaintext_unproven",
            Self::NoSvid => "no_svid",
            Self::SvidExpired(_) => "svid_expired",
            Self::Connect { .. } => "connect",
            Self::TooMany(_) => "too_many",
            Self::NoOriginalDestination(_) => "no_original_destination",
            Self::AuthorityRevoked => "authority_revoked",
        }
    }

    /// Whether nothing has reached any app, so that another endpoint may be tried: nobody took the connection, or the other
    /// sidecar said before it dialled that its workload is not there (any more).
    pub fn may_go_elsewhere(&self) -> bool {
        match self {
            Self::Connect { .. } => true,
            Self::ByPeer { code, .. } => {
                ["connect", "stale_workload", "not_ours", "policy_unknown"].contains(&code.as_str())
            }
            _ => false,
        }
    }

    /// What a failed handshake was about.
    pub fn of_handshake(error: &std::io::Error) -> Self {
        let tls = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
        match tls.and_then(refusal_of) {
            Some(refusal) => Self::Peer(refusal),
            None => Self::Tls(sentence(&error.to_string(), MAX_TLS_TEXT).to_string()),
        }
    }
}
