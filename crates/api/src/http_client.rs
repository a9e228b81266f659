//! The small HTTP/1.1 client of roles and commands: one request over a stream that is there already.

use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::task::AbortOnDropHandle;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The request itself cannot be written.
    #[error("the request cannot be written: {0}")]
    Request(http::Error),
    /// The stream ended, or what came is no HTTP.
    #[error("no answer: {0}")]
    NoAnswer(hyper::Error),
    /// The answer's body ended early, or is longer than the caller takes.
    #[error("the answer cannot be read up to its end, of at most {limit} bytes: {why}")]
    Body {
        /// The most that is read, in bytes.
        limit: usize,
        /// What stood in the way.
        why: String,
    },
}

/// An answer's head; its body has not been read. To drop it ends the exchange.
pub struct Answered {
    /// Its status.
    pub status: StatusCode,
    /// Where it redirects to, as it was written; `None` where it names no place, or one that is no text.
    pub location: Option<String>,
    body: Incoming,
    _driver: AbortOnDropHandle<()>,
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// Its body, whole.
    pub body: Bytes,
}

impl Answered {
    /// Reads the body, of at most `limit` bytes.
    pub async fn whole(self, limit: usize) -> Result<Reply, ClientError> {
        let body = Limited::new(self.body, limit).collect().await;
        let body = body.map_err(|e| ClientError::Body { limit, why: e.to_string() })?.to_bytes();
        Ok(Reply { status: self.status, body })
    }
}

/// Sends a request without a body, whose URI is a path. How long the answer may take is the caller's business: to drop the
/// future ends the exchange.
pub async fn send<S>(stream: S, request: Request<Empty<Bytes>>) -> Result<Answered, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(ClientError::NoAnswer)?;
    // What ends it, ends the exchange too, where it is told.
    let driver = tokio::spawn(async move { drop(connection.await) });
    let driver = AbortOnDropHandle::new(driver);
    let (head, body) = sender.send_request(request).await.map_err(ClientError::NoAnswer)?.into_parts();
    let location = head.headers.get(http::header::LOCATION).and_then(|l| l.to_str().ok()).map(str::to_owned);
    Ok(Answered { status: head.status, location, body, _driver: driver })
}

/// GETs a path, and does not read the answer's body yet.
pub async fn ask<S>(stream: S, host: &str, path: &str) -> Result<Answered, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let request = Request::get(path).header(http::header::HOST, host).body(Empty::new());
    send(stream, request.map_err(ClientError::Request)?).await
}

/// GETs a path; reads at most `limit` bytes of the answer's body.
pub async fn get<S>(stream: S, host: &str, path: &str, limit: usize) -> Result<Reply, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    ask(stream, host, path).await?.whole(limit).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// What comes of an answer, and the request that it was given to.
    async fn answered(answer: &str) -> (Result<Reply, ClientError>, String) {
        let (ours, mut theirs) = tokio::io::duplex(1_024);
        let serve = async move {
            let mut asked = vec![0; 1_024];
            let n = theirs.read(&mut asked).await.unwrap();
            theirs.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&asked[..n]).into_owned()
        };
        tokio::join!(get(ours, "pod", "/status", 8), serve)
    }

    #[tokio::test]
    async fn an_answer_is_read_whole_and_within_its_bound() {
        let (reply, asked) = answered("HTTP/1.1 404 No\r\ncontent-length: 4\r\n\r\nnone").await;
        let reply = reply.unwrap();
        assert_eq!((reply.status.as_u16(), &reply.body[..]), (404, &b"none"[..]));
        assert!(asked.starts_with("GET /status HTTP/1.1\r\nhost: pod\r\n"), "{asked}");
        for long in
            ["content-length: 9\r\n\r\n123456789", "transfer-encoding: chunked\r\n\r\n9\r\n123456789\r\n0\r\n\r\n"]
        {
            let (reply, _) = answered(&format!("HTTP/1.1 200 OK\r\n{long}")).await;
            assert!(matches!(reply, Err(ClientError::Body { limit: 8, .. })), "{reply:?}");
        }
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_is_none() {
        let (reply, _) = answered("HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf").await;
        assert!(matches!(reply, Err(ClientError::Body { .. })), "{reply:?}");
        for no_http in ["", "SSH-2.0-x\r\n\r\n"] {
            assert!(matches!(answered(no_http).await.0, Err(ClientError::NoAnswer(_))), "{no_http:?}");
        }
    }
}
