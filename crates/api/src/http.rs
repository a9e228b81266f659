//! The small HTTP/1.1 server behind `/metrics`, `/ready` and `/live` of every role.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::transport::back_off_after;

/// Connections served at once; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 64;
/// Longest wait for a request's head, and for the next request of a connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// An answer: status, content type, text.
pub struct Answer {
    /// HTTP status code.
    pub status: u16,
    /// Content type.
    pub kind: &'static str,
    /// Body.
    pub text: String,
}

impl Answer {
    /// Plain text.
    pub fn text(status: u16, text: impl Into<String>) -> Self {
        Self { status, kind: "text/plain; charset=utf-8", text: text.into() }
    }

    /// A page of metrics (OpenMetrics 1.0).
    pub fn metrics(registry: &prometheus_client::registry::Registry) -> Self {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, registry) {
            Ok(()) => Self { status: 200, kind: "application/openmetrics-text; version=1.0.0; charset=utf-8", text },
            Err(e) => Self::text(500, format!("cannot write the metrics: {e}\n")),
        }
    }

    /// `/ready`: 200, or 503 with what is still missing.
    pub fn ready(missing: Option<String>) -> Self {
        match missing {
            None => Self::text(200, "ready\n"),
            Some(why) => Self::text(503, format!("not ready: {why}\n")),
        }
    }
}

/// A GET that came in.
pub struct Asked {
    /// Its path.
    pub path: String,
    /// The address that it came to.
    pub local: SocketAddr,
}

/// An answer on its way.
pub type Answering = Pin<Box<dyn Future<Output = Option<Answer>> + Send>>;

/// Answers a GET; `None` is 404.
pub type Handler = dyn Fn(Asked) -> Answering + Send + Sync;

/// A handler of pages that are there at once.
pub fn pages(at_once: impl Fn(&str) -> Option<Answer> + Send + Sync + 'static) -> Arc<Handler> {
    Arc::new(move |asked| Box::pin(std::future::ready(at_once(&asked.path))))
}

/// Serves until `shutdown`.
pub async fn serve(listener: TcpListener, handler: Arc<Handler>, shutdown: CancellationToken) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let stream = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(e) => {
                    back_off_after(&e).await;
                    continue;
                }
            },
        };
        let Ok(local) = stream.local_addr() else { continue };
        let handler = handler.clone();
        connections.spawn(async move {
            let _slot = slot;
            let service = service_fn(move |request: Request<Incoming>| {
                let answering = (request.method() == hyper::Method::GET)
                    .then(|| handler(Asked { path: request.uri().path().to_owned(), local }));
                async move { Ok::<_, Infallible>(respond(answering).await) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = served.await {
                tracing::debug!(%error, "HTTP connection ended");
            }
        });
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
