use std::convert::Infallible;
use std::net::IpAddr;

use futures::FutureExt;
use http_body_util::{BodyExt, StreamBody};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::*;

type Piece = Result<Frame<Bytes>, Status>;

/// Reads a request to its end and answers, or passes on why it did not come whole; to `/watch` it answers with a body that
/// has no end.
#[derive(Clone)]
struct Reader;

impl Service<Request<Body>> for Reader {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(async move {
            if request.uri().path() == "/watch" {
                return Ok(Response::new(Body::new(StreamBody::new(tokio_stream::pending::<Piece>()))));
            }
            Ok(match request.into_body().collect().await {
                Ok(_) => Response::new(Body::empty()),
                Err(status) => status.into_http(),
            })
        })
    }
}

fn limits(total: usize, per_group: usize) -> Limits {
    Limits { name: "calls", total, per_group }
}

fn service(open: usize, unfinished: usize) -> Bounded<impl Fn(&Request<Body>) -> Judged<IpAddr> + Clone, Reader> {
    let calls = Calls::new(limits(100, open), limits(100, unfinished));
    let judge = move |request: &Request<Body>| Judged {
        calls: calls.clone(),
        source: request.headers()["from"].to_str().unwrap().parse().unwrap(),
        streams: request.uri().path() == "/stream",
    };
    tower::Layer::layer(&CallLayer(judge), Reader)
}

/// A request whose body comes piece by piece.
fn request(path: &str, from: &str) -> (mpsc::Sender<Piece>, Request<Body>) {
    let (sender, pieces) = mpsc::channel(8);
    let body = Body::new(StreamBody::new(ReceiverStream::new(pieces)));
    let request = Request::post(format!("http://here{path}")).header("from", from).body(body).unwrap();
    (sender, request)
}

#[allow(clippy::unnecessary_wraps)] // what a body yields
fn piece(bytes: &[u8]) -> Piece {
    Ok(Frame::data(Bytes::copy_from_slice(bytes)))
}

/// Lets a call run until it waits for something.
async fn run<T>(call: &mut Pin<Box<dyn Future<Output = T> + Send>>) -> Option<T> {
    for _ in 0..20 {
        if let Some(done) = call.as_mut().now_or_never() {
            return Some(done);
        }
        tokio::task::yield_now().await;
    }
    None
}

fn code(response: &Response<Body>) -> Code {
    response.headers().get("grpc-status").map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

#[tokio::test(start_paused = true)]
async fn requests_that_do_not_come_whole_are_few_per_caller_and_have_a_deadline() {
    let mut service = service(100, 2);
    let mut begun = vec![];
    for _ in 0..3 {
        let (sender, request) = request("/one", "10.0.0.1");
        let mut call = service.call(request);
        sender.send(piece(&[0, 0, 0, 0, 9, 1, 2])).await.unwrap();
        assert!(run(&mut call).await.is_none());
        begun.push((sender, call));
    }
    let (_, oldest) = &mut begun[0];
    assert_eq!(run(oldest).await.map(|r| code(&r.unwrap())), Some(Code::ResourceExhausted));
    let (other, asked) = request("/one", "10.0.0.2");
    let mut call = service.call(asked);
    assert!(run(&mut call).await.is_none());
    other.send(piece(&[0, 0, 0, 0, 1, 7])).await.unwrap();
    assert!(run(&mut call).await.is_none(), "it is whole when it has ended");
    drop(other);
    assert_eq!(run(&mut call).await.map(|r| code(&r.unwrap())), Some(Code::Ok), "somebody else is served");
    tokio::time::advance(WHOLE_WITHIN).await;
    for (_, call) in &mut begun[1..] {
        assert_eq!(run(call).await.map(|r| code(&r.unwrap())), Some(Code::DeadlineExceeded));
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_messages_may_pause_between_two_and_not_within_one() {
    let mut service = service(100, 1);
    let (sender, asked) = request("/stream", "10.0.0.1");
    let mut call = service.call(asked);
    for bytes in [&[][..], &[0, 0, 0, 0, 2, 1], &[2, 0, 0, 0, 0, 0]] {
        sender.send(piece(bytes)).await.unwrap();
        assert!(run(&mut call).await.is_none());
    }
    tokio::time::advance(WHOLE_WITHIN * 9).await;
    assert!(run(&mut call).await.is_none(), "nothing is owed");
    sender.send(piece(&[0])).await.unwrap();
    assert!(run(&mut call).await.is_none());
    tokio::time::advance(WHOLE_WITHIN).await;
    assert_eq!(run(&mut call).await.map(|r| code(&r.unwrap())), Some(Code::DeadlineExceeded));
}

#[tokio::test]
async fn open_calls_are_bounded_per_caller_and_the_oldest_ends() {
    let mut service = service(2, 100);
    let mut open = vec![];
    for from in ["10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.1"] {
        open.push(service.call(request("/watch", from).1).await.unwrap().into_body());
    }
    let mut ended = vec![];
    for body in &mut open {
        let frame = body.frame().now_or_never();
        ended.push(frame.map(|frame| frame.unwrap().unwrap_err().code()));
    }
    assert_eq!(ended, [Some(Code::ResourceExhausted), None, None, None]);
}

#[test]
fn the_bound_on_calls_follows_the_memory() {
    assert_eq!(fitting(24_576, None), 24_576);
    assert_eq!(fitting(24_576, Some(256 * 1024 * 1024)), 8_192, "half of an agent's limit, 16 KiB each");
    assert_eq!(fitting(24_576, Some(1 << 40)), 24_576);
    assert_eq!(fitting(24_576, Some(1)), 256);
    assert_eq!(fitting(64, Some(1)), 64);
}
