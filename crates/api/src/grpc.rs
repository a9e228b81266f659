//! Common settings of all gRPC listeners: bounds per connection, keepalive, and closing a connection whose seat is
//! taken away.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use tokio::time::Sleep;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::transport::Server;

use crate::admission::Seat;

/// The first bytes of every HTTP/2 client (RFC 9113 3.4).
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest wait for the preface. Until it has arrived, a connection costs one descriptor and nothing else.
pub const PREFACE_TIMEOUT: Duration = Duration::from_secs(5);
/// Silence of a peer before it is sent a keepalive ping.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// Longest wait for the answer to a ping.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest header list, in bytes as counted by RFC 9113 6.5.2. gRPC's own default is 8 KiB.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Most unread bytes per connection, and per stream (flow-control windows).
const CONNECTION_WINDOW: u32 = 1024 * 1024;
const STREAM_WINDOW: u32 = 256 * 1024;

/// A gRPC server with bounds per connection: concurrent calls, headers, unread bytes, and a peer's silence. The last
/// one holds for Unix sockets too, where a stopped process would keep its streams forever.
pub fn server(calls_at_once: u32) -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(Some(calls_at_once))
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_stream_window_size(STREAM_WINDOW)
        // Most resets of streams that we have not processed yet, before the connection is closed (CVE-2023-44487).
        .http2_max_pending_accept_reset_streams(Some(20))
}

/// A seat that is held while its connection is served, and the time that is left to the connection.
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

    /// Fails once the connection has to be closed, and wakes its task at that time.
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
