//! How long a message may be, and how many calls may be open, by who calls: a message is decoded before a service can ask.

use std::net::Ipv6Addr;
use std::sync::Arc;
use std::task::{Context, Poll};

use countersign_api::admission::{Limits, ProvenSource, Source};
use countersign_api::calls::{self, Answer, Calls, Judged, call};
use countersign_api::peer::TlsPeer;
use countersign_api::transport::MAX_MESSAGE_BYTES;
use tonic::body::Body;
use tonic::codegen::http::{Extensions, Request};
use tonic::service::Routes;
use tower::Service;

use super::routes;
use crate::caller::Caller;
use crate::core::Core;
use crate::node_attestor::MAX_PAYLOAD_BYTES;

/// Longest message of whoever is neither a local caller, nor an attested agent, nor an admin, in bytes: room for the evidence of
/// a node and its CSR.
const MAX_STRANGER_BYTES: usize = 2 * MAX_PAYLOAD_BYTES;

/// Methods with a stream of requests.
const STREAMS: [&str; 3] = [
    "/countersign.v1.Directory/Resolve",
    "/spire.api.server.agent.v1.Agent/AttestAgent",
    "/spire.api.server.entry.v1.Entry/SyncAuthorizedEntries",
];

/// The services twice, with either bound.
#[derive(Clone)]
pub struct ByCaller {
    core: Arc<Core>,
    known: Bounded,
    strangers: Bounded,
}

/// The services for callers of one kind. One that is not whole may take as much as its message may have.
#[derive(Clone)]
struct Bounded {
    calls: Calls<ProvenSource>,
    routes: Routes,
}

fn limits(name: &'static str, total: usize, per_group: usize) -> Limits {
    Limits { name, total, per_group }
}

/// Every service of the server.
pub async fn by_caller(core: &Arc<Core>) -> ByCaller {
    // All of them together leave half of the server's memory.
    let all = calls::that_fit(65_536 + 8_192);
    let (known, strangers) = (all / 9 * 8, all / 9);
    let open = |name, total: usize, per_group: usize| limits(name, total, per_group.min(total.div_ceil(2)));
    let known = Calls::new(open("open calls", known, 4_096), limits("unfinished requests", 256, 32));
    let strangers = Calls::new(
        open("open calls of strangers", strangers, 512),
        limits("unfinished requests of strangers", 512, 32),
    );
    ByCaller {
        core: core.clone(),
        known: Bounded { calls: known, routes: routes(core, MAX_MESSAGE_BYTES).await },
        strangers: Bounded { calls: strangers, routes: routes(core, MAX_STRANGER_BYTES).await },
    }
}

impl ByCaller {
    /// What a gRPC server is built from.
    pub fn routes(&self) -> Routes {
        self.known.routes.clone()
    }
}

/// As a layer it stands in place of the routes below it, which are its own.
impl tower::Layer<Routes> for ByCaller {
    type Service = Self;

    fn layer(&self, routes: Routes) -> Self {
        let known = Bounded { routes, ..self.known.clone() };
        Self { known, ..self.clone() }
    }
}

impl Service<Request<Body>> for ByCaller {
    type Response = <Routes as Service<Request<Body>>>::Response;
    type Error = <Routes as Service<Request<Body>>>::Error;
    type Future = Answer<Self::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        match Service::<Request<Body>>::poll_ready(&mut self.known.routes, cx) {
            Poll::Ready(Ok(())) => Service::<Request<Body>>::poll_ready(&mut self.strangers.routes, cx),
            other => other,
        }
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let known = Caller::is_known(&self.core, request.extensions());
        let Bounded { calls, routes } = if known { &mut self.known } else { &mut self.strangers };
        let judged = Judged {
            calls: calls.clone(),
            source: source(request.extensions()),
            streams: STREAMS.contains(&request.uri().path()),
        };
        call(routes, judged, request)
    }
}

/// Whose a call is: its identity's, or for whoever has none its address's.
fn source(connection: &Extensions) -> ProvenSource {
    let (id, address) = match connection.get::<TlsPeer>() {
        Some(TlsPeer { svid: Some(svid), address }) => (svid.id.to_string(), address.ip()),
        Some(TlsPeer { svid: None, address }) => (address.ip().group().to_string(), address.ip()),
        None => ("local".into(), Ipv6Addr::LOCALHOST.into()),
    };
    ProvenSource { id, address }
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

    /// Every `rpc NAME(stream …` below a folder of definitions, as a path of HTTP/2.
    fn streams_below(folder: &std::path::Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                streams_below(&path, found);
                continue;
            }
            let (mut package, mut service) = (String::new(), String::new());
            for line in std::fs::read_to_string(&path).unwrap().lines().map(str::trim) {
                match line.split([' ', '(', ';']).collect::<Vec<_>>()[..] {
                    ["package", name, ..] => package = name.to_owned(),
                    ["service", name, ..] => service = name.to_owned(),
                    ["rpc", name, "stream", ..] => found.push(format!("/{package}.{service}/{name}")),
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn every_method_with_a_stream_of_requests_may_pause() {
        let mut defined = vec![];
        streams_below(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../api/proto"), &mut defined);
        // Secrets for Envoys are the agent's.
        defined.retain(|method| !method.starts_with("/envoy."));
        defined.sort();
        assert_eq!(defined, STREAMS);
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
