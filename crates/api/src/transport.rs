//! gRPC over TLS on TCP and over Unix sockets: bounded accept loops, handshakes with a deadline, channels.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::{UnixListener, UnixStream};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use crate::names::Dialer;
pub use crate::peer_credentials::{CredentialsError, peer_credentials};
use crate::tls::explain;
pub use crate::tls_accept::{TlsIo, accept_tls};
pub use crate::unix_accept::{UnixIo, accept_unix};

/// Longest TLS handshake; slower ones are dropped.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for a channel's connection: lookup and TCP, then the handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest wait for a sign that a socket is somebody's.
const ALIVE: Duration = Duration::from_secs(1);
/// Longest gRPC message read, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 32 * 1024 * 1024;

/// A stream of accepted connections.
pub type Incoming<S> = tokio_stream::wrappers::ReceiverStream<io::Result<S>>;

/// Waits a little after a failed accept (such as EMFILE), so that the loop does not spin.
pub async fn back_off_after(error: &io::Error) {
    tracing::warn!(%error, "accept failed; trying again in 100 ms");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Creates missing folders with mode 0755 regardless of the umask: roles run with 077, and sockets of several roles
/// share a folder. The mode of each socket says who may use it.
fn make_searchable(dir: &Path) -> io::Result<()> {
    if dir.as_os_str().is_empty() || dir.is_dir() {
        return Ok(());
    }
    if let Some(above) = dir.parent() {
        make_searchable(above)?;
    }
    match std::fs::create_dir(dir) {
        // Another role created it first.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
        Ok(()) => std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)),
    }
}

/// Binds a Unix socket with this file mode. A stale socket is replaced; a socket that another process listens on is an
/// error.
pub fn bind_unix(path: &Path, mode: u32) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        make_searchable(dir)?;
    }
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file here that is no socket"));
        }
        // Whoever listens and does not accept, a stopped process, is alive all the same.
        if connect_unix(path, ALIVE).map_or_else(|e| e.kind() == io::ErrorKind::TimedOut, |_| true) {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens on this socket"));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Connects to a Unix socket, blocking. `TimedOut` after `patience`, at least a microsecond: a listener whose queue is full, because
/// its process is stopped, would keep a plain connect(2) waiting for ever.
pub fn connect_unix(path: &Path, patience: Duration) -> io::Result<std::os::unix::net::UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let stream = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // It bounds connect(2) too (unix(7) sleeps for the send timeout).
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_write_timeout(Some(patience))?;
    socket::connect(stream.as_raw_fd(), &UnixAddr::new(path)?).map_err(|error| match error {
        Errno::EAGAIN => {
            io::Error::new(io::ErrorKind::TimedOut, format!("it does not accept connections, for {patience:?}"))
        }
        other => other.into(),
    })?;
    stream.set_write_timeout(None)?;
    Ok(stream)
}

/// A channel to a gRPC service on a Unix socket. Connects when first used and again when the connection is lost.
pub fn unix_channel(path: impl Into<PathBuf>) -> Channel {
    let path: Arc<Path> = path.into().into();
    endpoint("http://localhost").connect_with_connector_lazy(tower::service_fn(move |_: http::Uri| {
        let path = path.clone();
        async move { UnixStream::connect(&*path).await.map(TokioIo::new) }
    }))
}

/// A channel to a gRPC service over TLS. `config` is called for each connection, so a rotated certificate takes effect.
pub fn tls_channel(server: String, config: impl Fn() -> Arc<ClientConfig> + Send + Sync + 'static) -> Channel {
    let config = Arc::new(config);
    let dialer = Arc::new(Dialer::new(server));
    endpoint("http://server").connect_with_connector_lazy(tower::service_fn(move |_: http::Uri| {
        let (config, dialer) = (config.clone(), dialer.clone());
        async move {
            let dialled = dialer.connect().await?;
            dialled.stream.set_nodelay(true)?;
            // The server name is neither sent nor checked: identity is the SPIFFE ID alone.
            let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
            let handshake = TlsConnector::from(config()).connect(name, dialled.stream);
            let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the server does not answer the TLS handshake");
            let shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(late)?;
            let stream = shaken.map_err(explain)?;
            dialer.is_good(dialled.address);
            Ok::<_, io::Error>(TokioIo::new(stream))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_that_accepts_nothing_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("full.sock");
        let listener = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
        socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        socket::listen(&listener, socket::Backlog::new(0).unwrap()).unwrap();
        let patience = Duration::from_millis(20);
        let queued: Vec<_> = (0..10).map_while(|_| connect_unix(&path, patience).ok()).collect();
        assert!((1..10).contains(&queued.len()), "{}", queued.len());
        assert_eq!(connect_unix(&path, patience).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(bind_unix(&path, 0o600).unwrap_err().kind(), io::ErrorKind::AddrInUse, "it is somebody's");
        drop((listener, queued));
        assert_eq!(connect_unix(&path, patience).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
