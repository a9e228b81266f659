//! The small HTTP/1.1 server behind `/metrics`, `/ready` and `/live` of every role, and behind a bundle endpoint over TLS.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::accept::Door;
use crate::admission::{Admission, Limits, Seat};
use crate::near::Near;
use crate::transport::HANDSHAKE_TIMEOUT;

/// Connections served at once. Those of the node itself, its probes, keep their seats; any other is answered within the time
/// that it takes so many others to connect after it.
const LIMITS: Limits = Limits { name: "HTTP connections", total: 256, per_group: 64 };

/// The same for what is served over TLS.
const TLS_LIMITS: Limits = Limits { name: "HTTPS connections", total: 256, per_group: 64 };

/// Bounds on the time of a connection.
#[derive(Clone, Copy)]
struct Deadlines {
    /// Longest TLS handshake, where there is one.
    handshake: Duration,
    /// Longest wait for a request's head, from the start of the connection or from the previous answer on: also the
    /// idle time of a kept-alive connection.
    head: Duration,
    /// Age of a connection after which no further request is read.
    life: Duration,
    /// Time for the answer in progress when the connection reaches that age.
    last_answer: Duration,
}

const DEADLINES: Deadlines = Deadlines {
    handshake: HANDSHAKE_TIMEOUT,
    head: Duration::from_secs(10),
    life: Duration::from_secs(120),
    last_answer: Duration::from_secs(10),
};

/// An HTTP response: status, content type and body.
pub struct Answer {
    /// HTTP status code.
    pub status: u16,
    /// Value of the `content-type` header.
    pub kind: &'static str,
    /// Response body in UTF-8.
    pub text: String,
}

impl Answer {
    /// A response in plain text.
    pub fn text(status: u16, text: impl Into<String>) -> Self {
        Self { status, kind: "text/plain; charset=utf-8", text: text.into() }
    }

    /// A JSON document.
    pub fn json(text: impl Into<String>) -> Self {
        Self { status: 200, kind: "application/json", text: text.into() }
    }

    /// A metrics page (OpenMetrics 1.0).
    pub fn metrics(registry: &prometheus_client::registry::Registry) -> Self {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, registry) {
            Ok(()) => Self { status: 200, kind: "application/openmetrics-text; version=1.0.0; charset=utf-8", text },
            Err(e) => Self::text(500, format!("cannot write the metrics: {e}\n")),
        }
    }

    /// The response for `/ready`: 200, or 503 with what is still missing.
    pub fn ready(missing: Option<String>) -> Self {
        match missing {
            None => Self::text(200, "ready\n"),
            Some(why) => Self::text(503, format!("not ready: {why}\n")),
        }
    }
}

/// An incoming GET request.
pub struct Asked {
    /// Path of the request, without the query.
    pub path: String,
    /// Query of the request, without the question mark; empty if there is none.
    pub query: String,
    /// Local address and port that the client connected to.
    pub local: SocketAddr,
    /// Whether the client is this node itself, as its kubelet is ([`Near`]).
    pub near: bool,
}

impl Asked {
    /// Value of a parameter of the query, as it is written there.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.query.split('&').filter_map(|pair| pair.split_once('=')).find_map(|(k, v)| (k == name).then_some(v))
    }
}

/// A response in preparation; `None` gives 404.
pub type Answering = Pin<Box<dyn Future<Output = Option<Answer>> + Send>>;

/// Answers GET requests; `None` gives 404.
pub type Handler = dyn Fn(Asked) -> Answering + Send + Sync;

/// A handler for pages that are available without waiting, by path.
pub fn pages(at_once: impl Fn(&str) -> Option<Answer> + Send + Sync + 'static) -> Arc<Handler> {
    Arc::new(move |asked| Box::pin(std::future::ready(at_once(&asked.path))))
}

/// Serves on `listener` until `shutdown`.
pub async fn serve(listener: TcpListener, handler: Arc<Handler>, shutdown: CancellationToken) {
    serve_within(DEADLINES, listener, handler, shutdown).await;
}

/// Serves over TLS on `listener` until `shutdown`. `config` is called for each connection, so that a rotated certificate takes
/// effect at once.
pub async fn serve_tls(
    listener: TcpListener,
    config: impl Fn() -> Arc<ServerConfig>,
    handler: Arc<Handler>,
    shutdown: CancellationToken,
) {
    let open = |stream| TlsAcceptor::from(config()).accept(stream);
    serve_opened(DEADLINES, TLS_LIMITS, open, listener, handler, shutdown).await;
}

async fn serve_within(deadlines: Deadlines, listener: TcpListener, handler: Arc<Handler>, shutdown: CancellationToken) {
    let open = |stream| std::future::ready(Ok(stream));
    serve_opened(deadlines, LIMITS, open, listener, handler, shutdown).await;
}

/// Serves on what `open` makes of each connection.
async fn serve_opened<S, F>(
    deadlines: Deadlines,
    limits: Limits,
    open: impl Fn(TcpStream) -> F,
    listener: TcpListener,
    handler: Arc<Handler>,
    shutdown: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = std::io::Result<S>> + Send + 'static,
{
    let mut door = Door::new(listener);
    let seats = Admission::<IpAddr>::new(limits);
    let near = Near::of_this_process();
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let (stream, peer) = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = door.next(|| seats.shed()) => accepted,
        };
        // A connection that has no address of ours any more is over already.
        let Ok(local) = stream.local_addr() else { continue };
        let source = peer.ip().to_canonical();
        let near = near.holds(source, local.ip());
        let seat = if near { seats.admit_near(source) } else { seats.admit(source) };
        let handler = handler.clone();
        let handler: Arc<OneUri> = Arc::new(move |uri| {
            let (path, query) = (uri.path().to_owned(), uri.query().unwrap_or_default().to_owned());
            handler(Asked { path, query, local, near })
        });
        connections.spawn(serve_one(deadlines, open(stream), seat, handler));
    }
}

/// Answers a request on one connection, whose ends are known.
type OneUri = dyn Fn(&hyper::Uri) -> Answering + Send + Sync;

async fn serve_one<S>(
    deadlines: Deadlines,
    opening: impl Future<Output = std::io::Result<S>>,
    seat: Seat,
    handler: Arc<OneUri>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let taken_away = seat.taken_away();
    let served = async {
        match tokio::time::timeout(deadlines.handshake, opening).await {
            Ok(Ok(stream)) => serve_stream(deadlines, stream, &seat, handler).await,
            Ok(Err(error)) => tracing::debug!(%error, "TLS handshake failed"),
            Err(_) => tracing::debug!("the TLS handshake took too long"),
        }
    };
    tokio::select! {
        () = served => {}
        () = taken_away => {}
    }
}

async fn serve_stream<S>(deadlines: Deadlines, stream: S, seat: &Seat, handler: Arc<OneUri>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let answering = (request.method() == hyper::Method::GET).then(|| handler(request.uri()));
        let busy = seat.busy();
        async move {
            let response = respond(answering).await;
            // From here on we wait for the peer to read.
            drop(busy);
            Ok::<_, Infallible>(response)
        }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(deadlines.head)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    let mut served = std::pin::pin!(served);
    let ended = if let Ok(ended) = tokio::time::timeout(deadlines.life, served.as_mut()).await {
        ended
    } else {
        served.as_mut().graceful_shutdown();
        tokio::time::timeout(deadlines.last_answer, served).await.unwrap_or(Ok(()))
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "HTTP connection ended");
    }
}

async fn respond(answering: Option<Answering>) -> Response<String> {
    let answer = match answering {
        Some(answering) => answering.await.unwrap_or_else(|| Answer::text(404, "not found\n")),
        None => Answer::text(405, "only GET is served here\n"),
    };
    let mut response = Response::new(answer.text);
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert("content-type", http::HeaderValue::from_static(answer.kind));
    response
}

#[cfg(test)]
mod tests;
