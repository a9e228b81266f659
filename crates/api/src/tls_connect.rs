//! Connects to a server by name, over TLS that proves the name or an SVID.

use std::io;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::names;
use crate::tls::explain;
use crate::transport::HANDSHAKE_TIMEOUT;

/// A TLS connection to a server.
pub type TlsStream = tokio_rustls::client::TlsStream<TcpStream>;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// None over TCP.
    #[error("cannot connect: {0}")]
    Unreachable(io::Error),
    /// The server has not proved who it is, or speaks no TLS.
    #[error("the TLS handshake failed: {0}")]
    Handshake(io::Error),
}

impl ConnectError {
    /// Whether it is the server's certificate that was not believed, of which no verifier of ours says why.
    pub fn is_certificate(&self) -> bool {
        let Self::Handshake(error) = self else { return false };
        let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
        matches!(inner, Some(rustls::Error::InvalidCertificate(_)))
    }
}

/// Connects to `server`, `HOST:PORT`, as a client of `host`. Errors: within ten seconds there is no connection, or within ten more no
/// handshake.
pub async fn connect_tls(server: &str, host: &str, config: Arc<ClientConfig>) -> Result<TlsStream, ConnectError> {
    let name = ServerName::try_from(host.to_owned())
        .map_err(|e| ConnectError::Handshake(io::Error::new(io::ErrorKind::InvalidInput, e)))?;
    let tcp = names::connect(server).await.map_err(ConnectError::Unreachable)?;
    let shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, TlsConnector::from(config).connect(name, tcp)).await;
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the server does not answer it");
    shaken.map_err(late).and_then(|shaken| shaken.map_err(explain)).map_err(ConnectError::Handshake)
}

/// The certificate authorities of this machine, or of the PEM file that the variable `SSL_CERT_FILE` names. Errors: there are none;
/// says why.
pub async fn web_roots() -> Result<RootCertStore, String> {
    let loaded = tokio::task::spawn_blocking(rustls_native_certs::load_native_certs).await;
    let loaded = loaded.map_err(|e| e.to_string())?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(loaded.certs);
    if roots.is_empty() {
        return Err(loaded.errors.first().map_or_else(|| "no file with them was found".into(), ToString::to_string));
    }
    Ok(roots)
}
