//! gRPC over TLS on TCP and over Unix sockets: bounded accept loops, handshakes with a deadline, channels.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
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
/// Longest gRPC message that is read, in bytes.
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
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens on this socket"));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// A channel to a gRPC service on a Unix socket. It connects at first use and again after a loss.
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
