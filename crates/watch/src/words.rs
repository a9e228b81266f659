//! Errors of the Kubernetes client in words: its own text repeats the API server's whole answer as Rust prints structures.

use std::error::Error;

use countersign_identity::shown::sentence;

/// Longest message that is repeated, in characters.
pub(crate) const MAX_MESSAGE: usize = 300;

/// An error as one line in words, escaped and at most some 300 characters long: what the API server says, or why it cannot
/// be asked.
pub fn in_words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.trim().is_empty() => shown(&status.message),
        kube::Error::Api(status) if !status.reason.is_empty() => shown(&status.reason),
        kube::Error::Api(status) => format!("the API server answers with status {}", status.code),
        other => last_cause(other),
    }
}

/// What an error ultimately comes from, in words.
pub(crate) fn last_cause(error: &dyn Error) -> String {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    shown(&last.to_string())
}

fn shown(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    sentence(&line, MAX_MESSAGE).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn api(status: serde_json::Value) -> String {
        in_words(&kube::Error::Api(serde_json::from_value(status).unwrap()))
    }

    #[test]
    fn an_answer_of_the_api_server_is_its_message_and_no_structure() {
        let status = json!({
            "status": "Failure", "message": "pods is forbidden:\n User \"eve\" cannot list\u{1b}", "reason": "Forbidden", "code": 403,
        });
        assert_eq!(api(status), "pods is forbidden: User \"eve\" cannot list\\u{1b}");
        assert_eq!(api(json!({ "reason": "NotFound", "message": "", "code": 404 })), "NotFound");
        assert_eq!(api(json!({ "reason": "", "message": " ", "code": 503 })), "the API server answers with status 503");
        assert!(api(json!({ "message": "x".repeat(9_000), "reason": "", "code": 500 })).chars().count() < 340);
    }

    #[test]
    fn whatever_else_is_said_by_its_last_cause() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        assert_eq!(in_words(&kube::Error::ReadEvents(refused)), "connection refused");
    }
}
