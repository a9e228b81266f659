//! What every gRPC listener has in common: bounds of a connection, keepalive, and the connection's end when its seat goes.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use tokio::time::Sleep;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::transport::Server;

use crate::admission::Seat;

/// What an HTTP/2 client sends first (RFC 9113 3.4).
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest wait for it. Until it is there, a connection costs us a descriptor and no more.
pub const PREFACE_TIMEOUT: Duration = Duration::from_secs(5);
/// Silence of a peer after which it is asked whether it is still there.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// Longest wait for its answer.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest list of headers, in bytes as RFC 9113 6.5.2 counts them. gRPC's own default is 8 KiB.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Bytes that a peer may send on one connection, and on one stream of it, before we have read them.
const CONNECTION_WINDOW: u32 = 1024 * 1024;
const STREAM_WINDOW: u32 = 256 * 1024;

/// A gRPC server whose connections have bounds: calls at once, headers, unread bytes, and the silence of a peer, on Unix
/// sockets too, where a stopped process would hold its streams for ever.
pub fn server(calls_at_once: u32) -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(Some(calls_at_once))
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_stream_window_size(STREAM_WINDOW)
        // Resets of streams that we have not looked at yet, before the connection is given up (CVE-2023-44487).
        .http2_max_pending_accept_reset_streams(Some(20))
}

/// A seat that is held while its connection is served, and the time that is left to it.
pub(crate) struct Watched {
    _seat: Seat,
    taken_away: Pin<Box<WaitForCancellationFutureOwned>>,
    life: Option<Pin<Box<Sleep>>>,
}

impl Watched {
    pub(crate) fn new(seat: Seat, life: Option<Duration>) -> Self {
        let taken_away = Box::pin(seat.taken_away());
        Self { _seat: seat, taken_away, life: life.map(|life| Box::pin(tokio::time::sleep(life))) }
    }

    /// Fails once the connection is to end, and wakes its task then.
    pub(crate) fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.taken_away.as_mut().poll(cx).is_ready() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "too many connections; this one was dropped"));
        }
        if let Some(life) = &mut self.life
            && life.as_mut().poll(cx).is_ready()
        {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "a connection without an identity may not live longer",
            ));
        }
        Ok(())
    }
}
