//! Why a connection was refused: a code for metrics and `status`, a text for people.

use std::net::SocketAddr;

use countersign_api::tls::refusal_of;
use countersign_identity::shown::{sentence, shown};

/// Longest text of a failed handshake in messages, in characters.
const MAX_TLS_TEXT: usize = 256;

/// Why a connection was refused or cut.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The peer's certificate was rejected, or the peer may not call.
    #[error(transparent)]
    Peer(#[from] countersign_identity::verify::Refusal),
    /// The handshake failed for a reason other than the peer's certificate.
    #[error("TLS handshake failed: {0}")]
    Tls(String),
    /// The other side did not finish the handshake within this time.
    #[error("the TLS handshake took longer than {0:?}")]
    HandshakeTimeout(std::time::Duration),
    /// The peer speaks TLS but did not offer our ALPN protocol.
    #[error("the peer did not offer the protocol `countersign/1`")]
    Protocol,
    /// The preamble was malformed, too late or too long.
    #[error("bad preamble: {0}")]
    Preamble(String),
    /// The other sidecar refused the connection.
    #[error("refused by the other sidecar ({code}): {text}")]
    ByPeer {
        /// The code that it sent: lower-case letters and `_`, or `unknown`.
        code: String,
        /// The reason that it sent, escaped.
        text: String,
    },
    /// The destination is not one of this namespace's own addresses.
    #[error("{0} is not this workload's own address and port; a sidecar is no relay")]
    NotOurs(SocketAddr),
    /// The destination is the sidecar's own port.
    #[error("{0} is the sidecar's own port; forwarding to it would loop")]
    Loop(SocketAddr),
    /// The caller's directory names another workload at this address, so it is outdated.
    #[error("the caller expected workload `{}` here, this is `{found}`", shown(expected))]
    StaleWorkload {
        /// UID of the workload that the caller expected.
        expected: String,
        /// UID of the workload that has the address now.
        found: String,
    },
    /// The directory has no answer about the destination yet.
    #[error("the directory does not know yet who is at {0}; is the agent connected to its server?")]
    DirectoryUnknown(SocketAddr),
    /// The policy of our own workload is not known yet.
    #[error("this workload's policy is not known yet; is the agent connected to its server?")]
    PolicyUnknown,
    /// Strict mode, and the destination is not in the mesh.
    #[error("{0} is not in the mesh, and this workload is strict; name it under `egress` to let it out")]
    NotMeshed(SocketAddr),
    /// A service has no usable endpoint.
    #[error("{service} has no endpoint for {to} that may be used{}", if *.strict { "; this workload is strict, so only endpoints in the mesh count" } else { "" })]
    NoEndpoint {
        /// Name of the service.
        service: String,
        /// Service address and port that the app dialled.
        to: SocketAddr,
        /// Whether only meshed endpoints count, because this workload is strict.
        strict: bool,
    },
    /// Plaintext to this port, and the workload is strict.
    #[error("plaintext to port {0} is refused: this workload is strict")]
    Plaintext(u16),
    /// Plaintext to this port, and the port has an allow-list.
    #[error("plaintext to port {0} is refused: the port has an allow-list, and plaintext proves nobody")]
    PlaintextUnproven(u16),
    /// The sidecar has no SVID yet.
    #[error("this sidecar has no SVID yet; is the agent running, and is there an entry for this sidecar's uid?")]
    NoSvid,
    /// The sidecar's own SVID expired at this time.
    #[error("this sidecar's SVID expired at {0}; is the agent connected to its server?")]
    SvidExpired(time::OffsetDateTime),
    /// The TCP connection to the destination failed.
    #[error("cannot connect to {to}: {why}")]
    Connect {
        /// IP address and port that was dialled.
        to: SocketAddr,
        /// Error of the operating system, or the timeout.
        why: String,
    },
    /// A bound on concurrent connections or handshakes is reached; the text says which.
    #[error("too many connections at once ({0})")]
    TooMany(&'static str),
    /// The kernel has no original destination for the connection; holds its error.
    #[error("no original destination: the connection did not come through the redirect ({0})")]
    NoOriginalDestination(String),
    /// The authority behind the peer is no longer trusted.
    #[error("the authority that vouched for the peer was revoked")]
    AuthorityRevoked,
}

impl Refused {
    /// Stable name in metrics, logs, `status` and the preamble's answer; it never changes between releases.
    pub fn code(&self) -> &'static str {
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

    /// Whether another endpoint may be tried, because no app has received anything: the connection failed, or the other
    /// sidecar refused before it dialled its app.
    pub fn may_go_elsewhere(&self) -> bool {
        match self {
            Self::Connect { .. } => true,
            Self::ByPeer { code, .. } => {
                ["connect", "stale_workload", "not_ours", "policy_unknown"].contains(&code.as_str())
            }
            _ => false,
        }
    }

    /// Classifies a failed handshake: the verifier's reason if there is one, otherwise [`Refused::Tls`].
    pub fn of_handshake(error: &std::io::Error) -> Self {
        let tls = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
        match tls.and_then(refusal_of) {
            Some(refusal) => Self::Peer(refusal),
            None => Self::Tls(sentence(&error.to_string(), MAX_TLS_TEXT).to_string()),
        }
    }
}
