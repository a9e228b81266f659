//! What a failed call says.

use tonic::{Code, Status};

/// What the other side says. One that does not know the call at all says nothing.
pub fn message_of(status: &Status) -> &str {
    match (status.code(), status.message()) {
        (Code::Unimplemented, "") => "whoever listens there does not know this call: is it the socket of another role?",
        (_, "") => "the call failed without a reason",
        (_, said) => said,
    }
}
