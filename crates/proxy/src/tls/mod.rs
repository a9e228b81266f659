//! TLS over a socket for many mostly idle connections: rustls without buffers of its own.
//!
//! Input is read in chunks into a buffer of the thread's pool and decrypted in place; output is encrypted into another
//! buffer and sent with one call. A connection keeps only what could not be finished: the beginning of a record, or
//! bytes that the socket did not accept. Records, keys and the handshake are rustls' part ([`rustls::unbuffered`]).

mod engine;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::WriteTraffic;
use rustls::{ClientConfig, CommonState, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use crate::buffer::{self, Buffer, CHUNK};
use crate::tls::engine::{MAX_FLIGHT, digest, fill, invalid};

pub use engine::Engine;

/// Bytes that a peer may send in a whole handshake. What comes with its end is not counted.
const MAX_HANDSHAKE: usize = 64 * 1024;
/// Bytes by which the room for an unfinished flight grows: a `ClientHello` or a flight with a usual chain fits at once.
const FLIGHT_STEP: usize = 8 * 1024;
/// How long a peer whose handshake has failed may take to hear why.
const PARTING: Duration = Duration::from_secs(1);
/// Most bytes that are read from it meanwhile.
const PARTING_BYTES: usize = 64 * 1024;
/// Most unsent bytes that the next write may still be appended to.
const JOIN: usize = 4 * 1024;

/// The end that dials.
pub type ClientStream = TlsStream<UnbufferedClientConnection>;
/// The end that accepts.
pub type ServerStream = TlsStream<UnbufferedServerConnection>;

/// A TLS connection. Its end is authenticated: an end without `close_notify` is [`io::ErrorKind::UnexpectedEof`].
pub struct TlsStream<E> {
    tcp: TcpStream,
    engine: E,
    /// The beginning of a record or handshake message that is not complete yet.
    incoming: Vec<u8>,
    /// Decrypted bytes that were not read yet.
    plain: Vec<u8>,
    taken: usize,
    /// Bytes received during the handshake.
    received: usize,
    /// Encrypted bytes that were not sent yet.
    outgoing: Option<Buffer>,
    /// Whether the peer has sent `close_notify`.
    ended: bool,
    /// Whether we have sent `close_notify` or can no longer write.
    closing: bool,
    /// Whether rustls has returned an error; it must not be called again.
    failed: bool,
}

/// Does the handshake as the client. Our last flight waits for the first write and leaves with it.
///
/// # Errors
/// rustls' errors as [`io::ErrorKind::InvalidData`], holding a [`rustls::Error`]; the socket's errors as they are.
pub async fn connect(config: Arc<ClientConfig>, name: ServerName<'static>, tcp: TcpStream) -> io::Result<ClientStream> {
    let engine = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
    TlsStream::new(tcp, engine).shake_hands().await
}

/// Does the handshake as the server.
///
/// # Errors
/// See [`connect`].
pub async fn accept(config: Arc<ServerConfig>, tcp: TcpStream) -> io::Result<ServerStream> {
    let engine = UnbufferedServerConnection::new(config).map_err(invalid)?;
    TlsStream::new(tcp, engine).shake_hands().await
}

impl<E: Engine> TlsStream<E> {
    fn new(tcp: TcpStream, engine: E) -> Self {
        Self {
            tcp,
            engine,
            incoming: vec![],
            plain: vec![],
            taken: 0,
            received: 0,
            outgoing: None,
            ended: false,
            closing: false,
            failed: false,
        }
    }

    /// The negotiated parameters and the peer's certificates.
    pub fn state(&self) -> &CommonState {
        self.engine.state()
    }

    /// The TCP socket underneath.
    pub fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    async fn shake_hands(mut self) -> io::Result<Self> {
        let shaken = std::future::poll_fn(|cx| self.poll_shake_hands(cx)).await;
        if shaken.is_err() && self.failed {
            self.part().await;
        }
        shaken.map(|()| self)
    }

    /// Closes after an alert. Closing a socket with unread data sends a reset, which may discard the alert: what the
    /// peer still sends is read and dropped, within bounds.
    async fn part(&mut self) {
        let tcp = &mut self.tcp;
        let heard = async {
            tcp.shutdown().await?;
            // On the heap: in the handshake's future it would be part of every connection for as long as that lives.
            let (mut rest, mut left) = (vec![0; 1024], PARTING_BYTES);
            while left > 0 {
                match tcp.read(&mut rest).await? {
                    0 => break,
                    n => left = left.saturating_sub(n),
                }
            }
            io::Result::Ok(())
        };
        let _ = tokio::time::timeout(PARTING, heard).await;
    }

    fn poll_shake_hands(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let begun = self.queue(|_, _| Ok(()));
        begun.map_err(|error| self.last_gasp(cx, error))?;
        while self.engine.state().is_handshaking() {
            ready!(self.poll_drain(cx))?;
            // The peer is not authenticated yet: what it makes us hold is checked before each read.
            self.check_bounds().map_err(|error| self.last_gasp(cx, error))?;
            let got = self.poll_receive_flight(cx);
            self.received += ready!(got).map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => {
                    io::Error::new(e.kind(), "the connection ended during the TLS handshake")
                }
                _ => e,
            })?;
        }
        Poll::Ready(Ok(()))
    }

    /// Checks that an unfinished handshake holds no more than allowed.
    fn check_bounds(&self) -> io::Result<()> {
        // Until the first flight was parsed, no protocol version is negotiated.
        let bound = if self.engine.state().protocol_version().is_none() { E::MAX_FIRST } else { MAX_FLIGHT };
        if self.incoming.len() > bound {
            return Err(invalid(rustls::Error::General(format!("a handshake message of more than {bound} bytes"))));
        }
        if self.received > MAX_HANDSHAKE {
            return Err(invalid(rustls::Error::General(format!("a handshake of more than {MAX_HANDSHAKE} bytes"))));
        }
        Ok(())
    }

    /// Receives once during the handshake. What has come so far is kept in place and not copied each time: a peer that is not
    /// proven yet may send a long message byte by byte. Gives the bytes received.
    fn poll_receive_flight(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let received = loop {
            ready!(self.tcp.poll_read_ready(cx))?;
            if self.incoming.len() == self.incoming.capacity() {
                // Not doubled, so that it holds little more than it may.
                self.incoming.reserve_exact(FLIGHT_STEP);
            }
            match self.tcp.try_read_buf(&mut self.incoming) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(received) => break received,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        };
        self.queue(|_, _| Ok(())).map_err(|error| self.last_gasp(cx, error))?;
        if self.incoming.is_empty() {
            self.incoming = vec![];
        }
        Poll::Ready(Ok(received))
    }

    /// Receives once, and hands on what can be decrypted now. Gives the bytes received.
    fn poll_receive(&mut self, cx: &mut Context<'_>, plain: impl FnMut(&[u8])) -> Poll<io::Result<usize>> {
        if self.failed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let mut incoming = Buffer::lend();
        incoming.put(&self.incoming);
        let room = incoming.room();
        let most = room.len().min(buffer::receive());
        let mut buffer = ReadBuf::new(&mut room[..most]);
        if buffer.remaining() == 0 {
            let error = rustls::Error::General(format!("a message of more than {} bytes", self.incoming.len()));
            return Poll::Ready(Err(self.last_gasp(cx, invalid(error))));
        }
        ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut buffer))?;
        let received = buffer.filled().len();
        if received == 0 {
            return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        incoming.extend(received);
        let whole = incoming.content_mut();
        match digest(&mut self.engine, whole, &mut self.outgoing, &mut self.ended, plain, |_, _| Ok(())) {
            Ok(used) if used == whole.len() => self.incoming = vec![],
            Ok(used) => self.incoming = whole[used..].to_vec(),
            Err(error) => return Poll::Ready(Err(self.last_gasp(cx, error))),
        }
        Poll::Ready(Ok(received))
    }

    /// Lets rustls queue what it has to send, and then, if it may write, runs `write`. The output waits in `outgoing`.
    fn queue(
        &mut self,
        write: impl FnOnce(&mut WriteTraffic<'_, E::Data>, &mut Option<Buffer>) -> io::Result<()>,
    ) -> io::Result<()> {
        let plain = &mut self.plain;
        let plain = |bytes: &[u8]| plain.extend_from_slice(bytes);
        let used = digest(&mut self.engine, &mut self.incoming, &mut self.outgoing, &mut self.ended, plain, write)?;
        self.incoming.drain(..used);
        Ok(())
    }

    /// After an error of rustls: sends its alert if the socket accepts it, and returns the error.
    fn last_gasp(&mut self, cx: &mut Context<'_>, error: io::Error) -> io::Error {
        self.failed = true;
        let _ = self.poll_drain(cx);
        error
    }

    /// Sends the unsent bytes.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(outgoing) = &mut self.outgoing {
            while !outgoing.content().is_empty() {
                match Pin::new(&mut self.tcp).poll_write(cx, outgoing.content()) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Poll::Ready(Ok(n)) => outgoing.consume(n),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => {
                        outgoing.keep();
                        return Poll::Pending;
                    }
                }
            }
            self.outgoing = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl<E: Engine> AsyncRead for TlsStream<E> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.taken < this.plain.len() {
                let n = buf.remaining().min(this.plain.len() - this.taken);
                buf.put_slice(&this.plain[this.taken..this.taken + n]);
                this.taken += n;
                if this.taken == this.plain.len() {
                    this.plain = vec![];
                    this.taken = 0;
                }
                return Poll::Ready(Ok(()));
            }
            if this.ended {
                return Poll::Ready(Ok(()));
            }
            // rustls may have an answer of its own, such as to a key update; reading does not wait for it. A peer that
            // makes us answer and never reads runs into the bound of the buffer. A socket that no longer accepts bytes
            // may still hold what the peer sent before.
            if let Poll::Ready(Err(_)) = this.poll_drain(cx) {
                this.outgoing = None;
                this.closing = true;
            }
            let before = buf.filled().len();
            let mut more = vec![];
            let received = this.poll_receive(cx, |bytes| {
                let (now, later) = bytes.split_at(bytes.len().min(buf.remaining()));
                buf.put_slice(now);
                more.extend_from_slice(later);
            });
            this.plain = more;
            ready!(received)?;
            if buf.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<E: Engine> AsyncWrite for TlsStream<E> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.closing || this.failed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if this.outgoing.as_ref().is_some_and(|o| o.content().len() > JOIN) {
            ready!(this.poll_drain(cx))?;
        }
        let bytes = &bytes[..bytes.len().min(CHUNK)];
        let mut written = false;
        let queued = this.queue(|traffic, out| {
            written = true;
            fill(out, |room| traffic.encrypt(bytes, room))
        });
        queued.map_err(|error| this.last_gasp(cx, error))?;
        if !written {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        }
        // What the socket does not accept now is sent by a flush or the next write; the task is woken for it.
        match this.poll_drain(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(bytes.len())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_drain(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.closing {
            this.closing = true;
            if !this.failed {
                let goodbye = this.queue(|traffic, out| fill(out, |room| traffic.queue_close_notify(room)));
                goodbye.map_err(|error| this.last_gasp(cx, error))?;
            }
        }
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
