//! gRPC over TLS on TCP and over Unix sockets: bounded accept loops, handshakes with a deadline, channels.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nix::sys::socket::{getsockopt, sockopt};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};

use crate::peer::{TlsPeer, UnixPeer, start_time};
use crate::tls::{ServerTls, explain};
use crate::unix_authority;

/// A handshake that takes longer is dropped.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes under way at once; more wait in the kernel's backlog.
const MAX_HANDSHAKES: usize = 256;
/// Longest wait for a connection to a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest gRPC message read, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 32 * 1024 * 1024;

/// A stream of accepted connections.
pub type Incoming<S> = tokio_stream::wrappers::ReceiverStream<io::Result<S>>;

/// An accepted TLS connection and who is on its other end.
pub struct TlsIo {
    stream: tokio_rustls::server::TlsStream<TcpStream>,
    peer: TlsPeer,
}

impl Connected for TlsIo {
    type ConnectInfo = TlsPeer;

    fn connect_info(&self) -> TlsPeer {
        self.peer.clone()
    }
}

/// An accepted Unix connection and who is on its other end.
pub struct UnixIo {
    stream: UnixStream,
    peer: UnixPeer,
    filter: unix_authority::Filter,
}

impl AsyncRead for UnixIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut bytes = [0; 4096];
        while self.filter.out().is_empty() {
            let mut fresh = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut fresh))?;
            if fresh.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.filter.push(fresh.filled());
        }
        let count = self.filter.out().len().min(buf.remaining());
        let out: Vec<u8> = self.filter.out().drain(..count).collect();
        buf.put_slice(&out);
        Poll::Ready(Ok(()))
    }
}

impl Connected for UnixIo {
    type ConnectInfo = UnixPeer;

    fn connect_info(&self) -> UnixPeer {
        self.peer.clone()
    }
}

impl AsyncRead for TlsIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

macro_rules! delegate_write {
    ($($io:ty),*) => {$(
        impl AsyncWrite for $io {
            fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.stream).poll_write(cx, buf)
            }
            fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.stream).poll_flush(cx)
            }
            fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.stream).poll_shutdown(cx)
            }
        }
    )*};
}
delegate_write!(TlsIo, UnixIo);

/// Waits a little when accepting fails (EMFILE and the like), so that the loop cannot spin.
pub async fn back_off_after(error: &io::Error) {
    tracing::warn!(%error, "accept failed; trying again in 100 ms");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Accepts TLS connections; `config` is asked anew for each, so that a rotated certificate takes effect at once.
/// Runs until the returned stream is dropped.
pub fn accept_tls(listener: TcpListener, config: impl Fn() -> Arc<ServerTls> + Send + 'static) -> Incoming<TlsIo> {
    let (tx, rx) = mpsc::channel(64);
    tokio::spawn(async move {
        let slots = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        let mut handshakes = tokio::task::JoinSet::new();
        loop {
            while handshakes.try_join_next().is_some() {}
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            let (tcp, address) = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(e) => {
                        back_off_after(&e).await;
                        continue;
                    }
                },
                () = tx.closed() => return,
            };
            let (tls, tx) = (config(), tx.clone());
            handshakes.spawn(async move {
                let _slot = slot;
                match tokio::time::timeout(HANDSHAKE_TIMEOUT, accept_one(&tls, tcp, address)).await {
                    Ok(Ok(io)) => drop(tx.send(Ok(io)).await),
                    Ok(Err(error)) => tracing::info!(%address, %error, "TLS handshake refused"),
                    Err(_) => tracing::info!(%address, "TLS handshake took longer than {HANDSHAKE_TIMEOUT:?}; dropped"),
                }
            });
        }
    });
    Incoming::new(rx)
}

async fn accept_one(tls: &ServerTls, tcp: TcpStream, address: SocketAddr) -> io::Result<TlsIo> {
    tcp.set_nodelay(true)?;
    let stream = TlsAcceptor::from(tls.config().clone()).accept(tcp).await.map_err(explain)?;
    let svid = tls.peer(stream.get_ref().1, time::OffsetDateTime::now_utc());
    let svid = svid.map_err(|refusal| io::Error::new(io::ErrorKind::PermissionDenied, refusal))?;
    Ok(TlsIo { stream, peer: TlsPeer { address, svid } })
}

/// Binds a Unix socket with this file mode. A socket that nobody listens on any more is replaced; one that is alive is an error.
pub fn bind_unix(path: &Path, mode: u32) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file here that is no socket"));
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens on this socket"));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Accepts connections on a Unix socket with the kernel's word on each caller. Should somebody delete the socket's file,
/// it is bound again. Runs until the returned stream is dropped, then removes the file.
pub fn accept_unix(listener: UnixListener, path: PathBuf, mode: u32) -> Incoming<UnixIo> {
    let (tx, rx) = mpsc::channel(64);
    tokio::spawn(async move {
        let mut listener = listener;
        let mut inode = inode_of(&path);
        let mut look = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted.and_then(|(s, _)| unix_io(s)) {
                    Ok(io) => drop(tx.send(Ok(io)).await),
                    Err(e) => back_off_after(&e).await,
                },
                _ = look.tick() => if inode_of(&path) != inode {
                    match bind_unix(&path, mode) {
                        Ok(fresh) => {
                            tracing::warn!(path = %path.display(), "the socket's file was gone; bound it again");
                            (listener, inode) = (fresh, inode_of(&path));
                        }
                        Err(error) => tracing::error!(path = %path.display(), %error, "the socket's file is gone and cannot be bound again"),
                    }
                },
                () = tx.closed() => break,
            }
        }
        if inode_of(&path) == inode {
            let _ = std::fs::remove_file(&path);
        }
    });
    Incoming::new(rx)
}

fn inode_of(path: &Path) -> Option<u64> {
    std::fs::symlink_metadata(path).ok().map(|m| std::os::unix::fs::MetadataExt::ino(&m))
}

fn unix_io(stream: UnixStream) -> io::Result<UnixIo> {
    let peer = peer_credentials(&stream)?;
    Ok(UnixIo { stream, peer, filter: unix_authority::Filter::default() })
}

/// Asks the kernel who connected: pid, uid and gid at connect time, and a pidfd where the kernel has it (Linux 6.5).
pub fn peer_credentials(stream: &UnixStream) -> io::Result<UnixPeer> {
    let cred = getsockopt(stream, sockopt::PeerCredentials)?;
    let pidfd = getsockopt(stream, sockopt::PeerPidfd).ok().map(Arc::new);
    Ok(UnixPeer { pid: cred.pid(), uid: cred.uid(), gid: cred.gid(), pidfd, started: start_time(cred.pid()) })
}

/// A channel to a gRPC service on a Unix socket. Connects when first used and again when the connection is lost.
pub fn unix_channel(path: impl Into<PathBuf>) -> Channel {
    let path: Arc<Path> = path.into().into();
    endpoint("http://localhost").connect_with_connector_lazy(tower::service_fn(move |_: http::Uri| {
        let path = path.clone();
        async move { UnixStream::connect(&*path).await.map(TokioIo::new) }
    }))
}

/// A channel to a gRPC service over TLS. `config` is asked anew for each connection.
pub fn tls_channel(server: String, config: impl Fn() -> Arc<ClientConfig> + Send + Sync + 'static) -> Channel {
    let config = Arc::new(config);
    let server: Arc<str> = server.into();
    endpoint("http://server").connect_with_connector_lazy(tower::service_fn(move |_: http::Uri| {
        let (config, server) = (config.clone(), server.clone());
        async move {
            let tcp = crate::names::connect(&server).await?;
            tcp.set_nodelay(true)?;
            // The name is never sent nor checked: identity is the SPIFFE ID alone.
            let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
            TlsConnector::from(config()).connect(name, tcp).await.map(TokioIo::new).map_err(explain)
        }
    }))
}

fn endpoint(uri: &'static str) -> Endpoint {
    Endpoint::from_static(uri)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(Duration::from_secs(15))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
}
