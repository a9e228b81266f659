//! PermissionDenied with the reason in the detail that SPIRE's agents read (`types.PermissionDeniedDetails`).

use prost::Message;
use tonic::{Code, Status};

use crate::spire::types::PermissionDeniedDetails;
pub use crate::spire::types::permission_denied_details::Reason;

const TYPE_URL: &str = "type.googleapis.com/spire.api.types.PermissionDeniedDetails";

/// `google.rpc.Status`, the envelope of error details.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

/// A PermissionDenied status with a reason for programs and a message for people.
pub fn denied(reason: Reason, message: String) -> Status {
    let detail = prost_types::Any {
        type_url: TYPE_URL.into(),
        value: PermissionDeniedDetails { reason: reason.into() }.encode_to_vec(),
    };
    let envelope = RpcStatus { code: Code::PermissionDenied.into(), message: message.clone(), details: vec![detail] };
    Status::with_details(Code::PermissionDenied, message, envelope.encode_to_vec().into())
}

/// The reason in a status; `None` if it has none.
pub fn reason_of(status: &Status) -> Option<Reason> {
    let envelope = RpcStatus::decode(status.details()).ok()?;
    let detail = envelope.details.iter().find(|d| d.type_url == TYPE_URL)?;
    Some(PermissionDeniedDetails::decode(&*detail.value).ok()?.reason())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_survives_the_wire_form() {
        let status = denied(Reason::AgentBanned, "banned".into());
        assert_eq!(reason_of(&status), Some(Reason::AgentBanned));
        assert_eq!(reason_of(&Status::permission_denied("no")), None);
    }
}
