//! Bounds on calls: how many a caller has open, and how many of them have not said yet what they want.
//!
//! HTTP/2 bounds what one connection may do, not what somebody with many of them does. A call costs memory while it is open,
//! and its message from the first byte to the last, long before a service can ask who calls. Both are therefore counted per
//! caller and in all, by what is known of the connection; a message has to be whole in time.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body as HttpBody, Bytes, Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tower::Service;

use crate::admission::{Admission, Limits, LocalSource, Source};
use crate::grpc::Watched;
use crate::memory;

/// How long a message may take from when the server first waits for it.
const WHOLE_WITHIN: Duration = Duration::from_secs(20);

/// Memory that an open call takes, in bytes: its streams, buffers and tasks, measured with 10,000 calls of an agent (15 kB each).
const BYTES_OF_CALL: u64 = 16 * 1024;
/// Fewest calls that are allowed, however little memory there is.
const FEWEST: u64 = 256;

/// The most calls that may be open so that they take half of this process's memory, and never more than `most`.
pub fn that_fit(most: usize) -> usize {
    fitting(most, memory::limit())
}

fn fitting(most: usize, memory: Option<u64>) -> usize {
    let fit = memory.map(|bytes| (bytes / 2 / BYTES_OF_CALL).max(FEWEST));
    fit.and_then(|calls| usize::try_from(calls).ok()).map_or(most, |calls| calls.min(most))
}

/// The calls of callers of one kind. Clones share the tables.
#[derive(Clone)]
pub struct Calls<S: Source> {
    open: Admission<S>,
    unfinished: Admission<S>,
}

impl<S: Source> Calls<S> {
    /// Bounds on open calls, and on those of them whose request is not whole.
    pub fn new(open: Limits, unfinished: Limits) -> Self {
        Self { open: Admission::new(open), unfinished: Admission::new(unfinished) }
    }
}

/// What a call counts as.
pub struct Judged<S: Source> {
    /// Where it is counted.
    pub calls: Calls<S>,
    /// Whose it is.
    pub source: S,
    /// Whether its method takes a stream of messages, between which there may be any pause.
    pub streams: bool,
}

/// Bounds on the calls of a Unix socket's callers, none of whose methods takes a stream of messages.
pub fn of_local_callers(
    open: Limits,
    unfinished: Limits,
) -> impl Fn(&Request<Body>) -> Judged<LocalSource> + Clone + Send + 'static {
    let calls = Calls::new(open, unfinished);
    move |request| Judged { calls: calls.clone(), source: LocalSource::of(request), streams: false }
}

/// A layer that bounds calls. `judge` tells what each one counts as.
#[derive(Clone)]
pub struct CallLayer<J>(pub J);

impl<J: Clone, I> tower::Layer<I> for CallLayer<J> {
    type Service = Bounded<J, I>;

    fn layer(&self, inner: I) -> Self::Service {
        Bounded { judge: self.0.clone(), inner }
    }
}

/// A service whose calls are bounded.
#[derive(Clone)]
pub struct Bounded<J, I> {
    judge: J,
    inner: I,
}

impl<J, I, S> Service<Request<Body>> for Bounded<J, I>
where
    J: Fn(&Request<Body>) -> Judged<S>,
    S: Source + Unpin,
    I: Service<Request<Body>, Response = Response<Body>>,
    I::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = I::Error;
    type Future = Answer<I::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), I::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let judged = (self.judge)(&request);
        call(&mut self.inner, judged, request)
    }
}

/// The answer to a call that is being made.
pub type Answer<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>;

/// Makes one call within its bounds.
pub fn call<I, S>(service: &mut I, judged: Judged<S>, request: Request<Body>) -> Answer<I::Error>
where
    S: Source + Unpin,
    I: Service<Request<Body>, Response = Response<Body>>,
    I::Future: Send + 'static,
{
    let Judged { calls, source, streams } = judged;
    let mut open = Watched::new(calls.open.admit(source.clone()), None);
    let unfinished = calls.unfinished;
    let asked = |body| Asked { body, framing: Framing::default(), streams, source, unfinished, waiting: None };
    let answer = service.call(request.map(|body| Body::new(asked(body))));
    Box::pin(async move {
        let mut answer = pin!(answer);
        let answer = std::future::poll_fn(|cx| match open.check(cx) {
            Ok(()) => answer.as_mut().poll(cx),
            Err(error) => Poll::Ready(Ok(too_many(&error).into_http())),
        });
        Ok(answer.await?.map(|body| Body::new(Answered { body, open })))
    })
}

fn too_many(error: &std::io::Error) -> Status {
    match error.kind() {
        std::io::ErrorKind::TimedOut => {
            Status::deadline_exceeded(format!("the request was not whole within {WHOLE_WITHIN:?}"))
        }
        _ => Status::resource_exhausted("too many calls at once from this caller, or in all; this one was dropped"),
    }
}

/// What a caller sends. It has a seat while the rest of a message is waited for.
struct Asked<S: Source> {
    body: Body,
    framing: Framing,
    streams: bool,
    source: S,
    unfinished: Admission<S>,
    waiting: Option<Watched>,
}

impl<S: Source + Unpin> HttpBody for Asked<S> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    this.framing.pass(data);
                }
                if this.may_pause() {
                    this.waiting = None;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(end) => {
                this.waiting = None;
                Poll::Ready(end)
            }
            Poll::Pending if this.may_pause() => Poll::Pending,
            Poll::Pending => {
                let (unfinished, source) = (&this.unfinished, &this.source);
                let seat = || Watched::new(unfinished.admit(source.clone()), Some(WHOLE_WITHIN));
                match this.waiting.get_or_insert_with(seat).check(cx) {
                    Ok(()) => Poll::Pending,
                    Err(error) => Poll::Ready(Some(Err(too_many(&error)))),
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<S: Source> Asked<S> {
    /// Whether nothing is owed by the caller now. The request of a method that takes one message is whole when it has ended.
    fn may_pause(&self) -> bool {
        self.streams && self.framing.is_between()
    }
}

/// Where a body stands in its messages, each of which has a flag and its length before it (gRPC over HTTP/2,
/// Length-Prefixed-Message).
#[derive(Default)]
struct Framing {
    head: [u8; 5],
    have: usize,
    left: usize,
}

impl Framing {
    fn pass(&mut self, mut bytes: &[u8]) {
        while let Some((first, rest)) = bytes.split_first() {
            if self.left > 0 {
                let taken = self.left.min(bytes.len());
                (self.left, bytes) = (self.left - taken, &bytes[taken..]);
                continue;
            }
            self.head[self.have] = *first;
            self.have += 1;
            bytes = rest;
            if self.have == self.head.len() {
                let [_, length @ ..] = self.head;
                (self.have, self.left) = (0, u32::from_be_bytes(length) as usize);
            }
        }
    }

    fn is_between(&self) -> bool {
        (self.have, self.left) == (0, 0)
    }
}

/// What a caller is answered. The call is open until it ends.
struct Answered {
    body: Body,
    open: Watched,
}

impl HttpBody for Answered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        if let Err(error) = this.open.check(cx) {
            return Poll::Ready(Some(Err(too_many(&error))));
        }
        Pin::new(&mut this.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests;
