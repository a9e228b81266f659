//! An API server of tests: answers by the request's path, or never.

use std::convert::Infallible;
use std::sync::Arc;

use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

/// What was asked.
pub struct Asked {
    pub path: String,
    /// The body; null if there is none.
    pub body: Value,
}

/// What becomes of a question.
pub enum Answer {
    /// Status and body.
    Now(u16, Value),
    Never,
}

/// A client of an API server that answers so.
pub fn client(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Client {
    let answer = Arc::new(answer);
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let answer = answer.clone();
        async move {
            let path = request.uri().path().to_owned();
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let asked = Asked { path, body: serde_json::from_slice(&body).unwrap_or_default() };
            let Answer::Now(status, body) = answer(&asked) else { return std::future::pending().await };
            let body = body.as_str().map_or_else(|| body.to_string(), ToOwned::to_owned);
            let body: BoxBody<_, Infallible> = Full::from(body).boxed();
            Ok::<_, Infallible>(http::Response::builder().status(status).body(body).unwrap())
        }
    });
    Client::new(service, "default")
}

/// A list of some objects.
pub fn list(kind: &str, items: Vec<Value>) -> Answer {
    Answer::Now(200, json!({ "apiVersion": "v1", "kind": kind, "metadata": {}, "items": items }))
}

/// A refusal.
pub fn refused(code: u16, message: &str) -> Answer {
    let reason = if code == 404 { "NotFound" } else { "Forbidden" };
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": message,
    });
    Answer::Now(code, status)
}
