//! Decides whether a failed call means that the server rejects this agent's identity.

use std::error::Error;
use std::io;

use countersign_api::denied::{Reason, reason_of};
use rustls::AlertDescription;
use tonic::{Code, Status};

use crate::link::describe;

/// What the server rejects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The agent itself, for this reason.
    Agent(Reason),
    /// Its SVID, because the authority that signed it was revoked.
    Svid,
}

impl Refusal {
    /// The refusal that a failed call reports; `None` if the failure is not about our identity.
    pub fn of(status: &Status) -> Option<Self> {
        if let Some(reason) = reason_of(status) {
            return Some(Self::Agent(reason));
        }
        (status.code() == Code::Unauthenticated || names_our_certificate(status)).then_some(Self::Svid)
    }
}

/// Whether an established connection was reset. A server that rejects our certificate also looks like this, if the
/// reset discards its alert.
pub fn was_cut(status: &Status) -> bool {
    let cut = |kind| {
        matches!(
            kind,
            io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::UnexpectedEof
        )
    };
    causes(status).any(|cause| {
        // HTTP/2 does not return its I/O error from `source()`.
        let of_http2 = cause.downcast_ref::<h2::Error>().and_then(h2::Error::get_io);
        let lost = cause.downcast_ref::<hyper::Error>().is_some_and(|e| e.is_canceled() || e.is_closed());
        lost || cause.downcast_ref().or(of_http2).is_some_and(|e: &io::Error| cut(e.kind()))
    })
}

fn causes(status: &Status) -> impl Iterator<Item = &(dyn Error + 'static)> {
    let mut next = status.source();
    std::iter::from_fn(move || {
        let cause = next?;
        next = cause.source();
        Some(cause)
    })
}

/// Alerts about a client's certificate (RFC 8446 6.2).
const ALERTS: [AlertDescription; 8] = [
    AlertDescription::BadCertificate,
    AlertDescription::UnsupportedCertificate,
    AlertDescription::CertificateRevoked,
    AlertDescription::CertificateExpired,
    AlertDescription::CertificateUnknown,
    AlertDescription::UnknownCA,
    AlertDescription::AccessDenied,
    AlertDescription::CertificateRequired,
];

/// Whether the connection ended with an alert about our certificate. HTTP/2 passes rustls' error on as text, so the
/// text is searched. Alerts arrive encrypted from a server that has authenticated itself, or in plaintext before that.
/// No alert makes us drop our identity, because otherwise anyone on the network path could take it away.
fn names_our_certificate(status: &Status) -> bool {
    let text = describe(status);
    ALERTS.iter().any(|alert| text.contains(&rustls::Error::AlertReceived(*alert).to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed_with(error: io::Error) -> Status {
        Status::from_error(Box::new(error))
    }

    #[test]
    fn alerts_about_our_certificate_are_refusals_and_outages_are_not() {
        let alert = |a| failed_with(io::Error::new(io::ErrorKind::InvalidData, rustls::Error::AlertReceived(a)));
        assert_eq!(Refusal::of(&alert(AlertDescription::UnknownCA)), Some(Refusal::Svid));
        assert_eq!(Refusal::of(&alert(AlertDescription::CertificateUnknown)), Some(Refusal::Svid));
        assert_eq!(Refusal::of(&alert(AlertDescription::InternalError)), None);
        assert_eq!(Refusal::of(&Status::unauthenticated("revoked")), Some(Refusal::Svid));
        assert_eq!(Refusal::of(&Status::unavailable("down")), None);
        let banned = countersign_api::denied::denied(Reason::AgentBanned, "banned".into());
        assert_eq!(Refusal::of(&banned), Some(Refusal::Agent(Reason::AgentBanned)));
    }

    #[test]
    fn a_cut_connection_is_told_from_one_that_was_never_made() {
        assert!(was_cut(&failed_with(io::ErrorKind::ConnectionReset.into())));
        assert!(!was_cut(&failed_with(io::ErrorKind::ConnectionRefused.into())));
        assert!(!was_cut(&Status::deadline_exceeded("no answer")));
    }
}
