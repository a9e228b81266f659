//! Accepts TLS connections. All are accepted, and authenticated peers have a bound of their own.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tonic::transport::server::Connected;

use crate::accept::Door;
use crate::admission::{Admission, Limits, ProvenSource, Seat, Source};
use crate::grpc::{PREFACE, PREFACE_TIMEOUT, Watched};
use crate::peer::TlsPeer;
use crate::sampled::Sampled;
use crate::tls::{ServerTls, explain};
use crate::transport::{HANDSHAKE_TIMEOUT, Incoming};

/// Bounds on connections without an identity: handshakes in progress, and nodes before attestation.
const UNPROVEN: Limits = Limits { name: "TLS connections without an identity", total: 1_024, per_group: 256 };
/// Bounds on connections with an identity. An agent has three; a restarting one may have many for a while.
const PROVEN: Limits = Limits { name: "TLS connections with an identity", total: 32_768, per_group: 64 };
/// Life of a connection without an identity. Attestation and fetching a bundle take less.
const UNPROVEN_LIFE: Duration = Duration::from_secs(60);
/// Most bytes read before the handshake has finished: five times the size of a `ClientHello` with a post-quantum key
/// share and a chain of certificates.
const MAX_HANDSHAKE_BYTES: usize = 32 * 1024;

/// Most bytes read from a peer without an identity. Attestation takes a few kilobytes, and the data of all
/// unauthenticated peers together must fit into memory.
const MAX_UNPROVEN_BYTES: usize = 128 * 1024;

/// An accepted TLS connection with its peer.
pub struct TlsIo {
    stream: tokio_rustls::server::TlsStream<Metered>,
    /// Bytes that were already read after the handshake: the HTTP/2 preface.
    head: io::Cursor<[u8; PREFACE.len()]>,
    watched: Watched,
    peer: TlsPeer,
}

impl Connected for TlsIo {
    type ConnectInfo = TlsPeer;

    fn connect_info(&self) -> TlsPeer {
        self.peer.clone()
    }
}

impl AsyncRead for TlsIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.watched.check(cx)?;
        if self.head.position() < PREFACE.len() as u64 {
            return Pin::new(&mut self.head).poll_read(cx, buf);
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.watched.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.watched.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.watched.check(cx)?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Accepts TLS connections. `config` is called for each one, so that a rotated certificate takes effect at once. Runs
/// until the returned stream is dropped.
pub fn accept_tls(listener: TcpListener, config: impl Fn() -> Arc<ServerTls> + Send + 'static) -> Incoming<TlsIo> {
    let (tx, rx) = mpsc::channel(64);
    tokio::spawn(async move {
        let mut door = Door::new(listener);
        let (unproven, proven) = (Admission::<IpAddr>::new(UNPROVEN), Admission::new(PROVEN));
        let mut handshakes = tokio::task::JoinSet::new();
        let refusals = Arc::new(Sampled::default());
        loop {
            while handshakes.try_join_next().is_some() {}
            let (tcp, address) = tokio::select! {
                accepted = door.next(|| unproven.shed()) => accepted,
                () = tx.closed() => return,
            };
            let address = SocketAddr::new(address.ip().to_canonical(), address.port());
            let seat = unproven.admit(address.ip());
            let (tls, tx, proven, refusals) = (config(), tx.clone(), proven.clone(), refusals.clone());
            handshakes.spawn(async move {
                let taken_away = seat.taken_away();
                let accepted = tokio::select! {
                    accepted = accept_one(&tls, tcp, address, seat, &proven) => accepted,
                    () = taken_away => return,
                };
                match accepted {
                    Ok(io) => drop(tx.send(Ok(io)).await),
                    Err(error) => say_refused(&refusals, address, &error),
                }
            });
        }
    });
    Incoming::new(rx)
}

/// Logs a refused connection, within the rate limit of its source.
fn say_refused(refusals: &Sampled<IpAddr>, address: SocketAddr, error: &io::Error) {
    if let Some(unsaid) = refusals.next(address.ip().group(), "TLS connection refused", Instant::now()) {
        tracing::info!(%address, %error, unsaid, "TLS connection refused");
    }
}

async fn accept_one(
    tls: &ServerTls,
    tcp: TcpStream,
    address: SocketAddr,
    seat: Seat,
    proven: &Admission<ProvenSource>,
) -> io::Result<TlsIo> {
    let late = |what: &str, limit: Duration| {
        io::Error::new(io::ErrorKind::TimedOut, format!("{what} took longer than {limit:?}"))
    };
    tcp.set_nodelay(true)?;
    let handshake = TlsAcceptor::from(tls.config().clone()).accept(Metered { tcp, left: Some(MAX_HANDSHAKE_BYTES) });
    let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await;
    let mut stream = handshake.map_err(|_| late("the handshake", HANDSHAKE_TIMEOUT))?.map_err(explain)?;
    let svid = tls.peer(stream.get_ref().1, time::OffsetDateTime::now_utc());
    let svid = svid.map_err(|refusal| io::Error::new(io::ErrorKind::PermissionDenied, refusal))?;
    stream.get_mut().0.left = svid.is_none().then_some(MAX_UNPROVEN_BYTES);
    // The unauthenticated seat is kept until the other one is taken, so a connection always has a seat.
    let watched = match &svid {
        Some(peer) => {
            let source = ProvenSource { id: peer.id.to_string(), address: address.ip() };
            Watched::new(proven.admit(source), None)
        }
        None => Watched::new(seat, Some(UNPROVEN_LIFE)),
    };
    let mut head = [0; PREFACE.len()];
    let read = tokio::time::timeout(PREFACE_TIMEOUT, stream.read_exact(&mut head)).await;
    read.map_err(|_| late("the HTTP/2 preface", PREFACE_TIMEOUT))??;
    if head != *PREFACE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the peer does not speak HTTP/2"));
    }
    Ok(TlsIo { stream, head: io::Cursor::new(head), watched, peer: TlsPeer { address, svid } })
}

/// A stream that stops with an error after a number of bytes read.
struct Metered {
    tcp: TcpStream,
    /// Bytes that may still be read; `None` means any number.
    left: Option<usize>,
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Some(left) = self.left else { return Pin::new(&mut self.tcp).poll_read(cx, buf) };
        if left == 0 {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "more bytes than are read of a peer without an identity",
            )));
        }
        // One read may exceed the bound by at most what rustls reads at once, 4 KiB.
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.tcp).poll_read(cx, buf))?;
        self.left = Some(left.saturating_sub(buf.filled().len() - before));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
