//! Whether a failed call says that the server does not accept this agent as who it is.

use std::error::Error;
use std::io;

use countersign_api::denied::{Reason, reason_of};
use rustls::AlertDescription;
use tonic::{Code, Status};

use crate::link::describe;

/// What the server does not accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The agent, for this reason.
    Agent(Reason),
    /// Its SVID: the authority that signed it was revoked.
    Svid,
}

impl Refusal {
    /// What a failed call says; `None` where it says nothing of who we are.
    pub fn of(status: &Status) -> Option<Self> {
        if let Some(reason) = reason_of(status) {
            return Some(Self::Agent(reason));
        }
        (status.code() == Code::Unauthenticated || names_our_certificate(status)).then_some(Self::Svid)
    }
}

/// Whether a connection that stood was cut. A server that refuses our certificate does this too, when its alert is lost behind
/// the reset.
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
        // HTTP/2 keeps what the connection failed with out of `source()`.
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

/// Whether the connection ended with an alert about our certificate. HTTP/2 hands the engine's error on as text, so it is that
/// text which is looked for. Alerts come over the encrypted connection of a server that has proven itself, or in the clear
/// before that; so that nobody on the way can take an identity from us, no alert makes us forget it.
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
