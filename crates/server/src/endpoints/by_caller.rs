//! How long a message may be, by who sends it: it is decoded before a service can ask who calls.

use std::sync::Arc;
use std::task::{Context, Poll};

use countersign_api::transport::MAX_MESSAGE_BYTES;
use tonic::body::Body;
use tonic::codegen::http::Request;
use tonic::service::Routes;
use tower::Service;

use super::routes;
use crate::caller::Caller;
use crate::core::Core;
use crate::node_attestor::MAX_PAYLOAD_BYTES;

/// Longest message of whoever is neither a local caller, nor an attested agent, nor an admin, in bytes: room for the evidence of
/// a node and its CSR.
const MAX_STRANGER_BYTES: usize = 2 * MAX_PAYLOAD_BYTES;

/// The services twice, with either bound.
#[derive(Clone)]
pub struct ByCaller {
    core: Arc<Core>,
    known: Routes,
    strangers: Routes,
}

/// Every service of the server.
pub async fn by_caller(core: &Arc<Core>) -> ByCaller {
    ByCaller {
        core: core.clone(),
        known: routes(core, MAX_MESSAGE_BYTES).await,
        strangers: routes(core, MAX_STRANGER_BYTES).await,
    }
}

impl ByCaller {
    /// What a gRPC server is built from.
    pub fn routes(&self) -> Routes {
        self.known.clone()
    }
}

/// As a layer it stands in place of the routes below it, which are its own.
impl tower::Layer<Routes> for ByCaller {
    type Service = Self;

    fn layer(&self, known: Routes) -> Self {
        Self { known, ..self.clone() }
    }
}

impl Service<Request<Body>> for ByCaller {
    type Response = <Routes as Service<Request<Body>>>::Response;
    type Error = <Routes as Service<Request<Body>>>::Error;
    type Future = <Routes as Service<Request<Body>>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        match Service::<Request<Body>>::poll_ready(&mut self.known, cx) {
            Poll::Ready(Ok(())) => Service::<Request<Body>>::poll_ready(&mut self.strangers, cx),
            other => other,
        }
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let known = Caller::is_known(&self.core, request.extensions());
        if known { self.known.call(request) } else { self.strangers.call(request) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::server;
    use countersign_api::peer::{TlsPeer, UnixPeer};
    use countersign_api::spire::entry::BatchCreateEntryRequest;
    use countersign_api::spire::types::Entry;
    use prost::Message;
    use tonic::Code;

    /// A call with a message of about so many bytes.
    fn call(bytes: usize) -> Request<Body> {
        let entry = Entry { hint: "x".repeat(bytes), ..Entry::default() };
        let message = BatchCreateEntryRequest { entries: vec![entry], output_mask: None }.encode_to_vec();
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        let frame = [&[0][..], &length, &message].concat();
        Request::post("http://server/spire.api.server.entry.v1.Entry/BatchCreateEntry")
            .header("content-type", "application/grpc")
            .body(Body::new(http_body_util::Full::new(frame.into())))
            .unwrap()
    }

    /// The code of an answer that is an error; an answer with a message has its code behind it.
    async fn code(service: &mut ByCaller, request: Request<Body>) -> Code {
        let answer = service.call(request).await.unwrap();
        answer.headers().get("grpc-status").map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
    }

    #[tokio::test]
    async fn a_stranger_may_not_send_more_than_its_evidence_takes() {
        let dir = tempfile::tempdir().unwrap();
        let mut service = by_caller(&server(&dir).await).await;
        let stranger = TlsPeer { address: "127.0.0.1:9".parse().unwrap(), svid: None };
        let local = UnixPeer { pid: 0, uid: 0, gid: 0, pidfd: None, started: None, at_accept: None };
        for (bytes, of_stranger) in [(100_000, Code::PermissionDenied), (200_000, Code::OutOfRange)] {
            let mut request = call(bytes);
            request.extensions_mut().insert(stranger.clone());
            assert_eq!(code(&mut service, request).await, of_stranger, "{bytes} bytes");
            let mut request = call(bytes);
            request.extensions_mut().insert(local.clone());
            assert_eq!(code(&mut service, request).await, Code::Ok, "{bytes} bytes");
        }
    }
}
