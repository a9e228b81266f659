//! From a name to a connection, without the C library's name service, which a static binary cannot load.

use std::io;
use std::net::{IpAddr, SocketAddr};

use hickory_resolver::TokioResolver;
use tokio::net::TcpStream;

/// Connects to `server`, `HOST:PORT`. Names are looked up in `/etc/hosts`, then at the name servers of `/etc/resolv.conf`;
/// both files are read anew, so a change is followed. The host's addresses are tried in turn.
///
/// # Errors
/// When `server` has no port, the name is unknown, or none of its addresses takes a connection.
pub async fn connect(server: &str) -> io::Result<TcpStream> {
    if let Ok(address) = server.parse::<SocketAddr>() {
        return TcpStream::connect(address).await;
    }
    let (host, port) = split(server)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("`{server}` is not HOST:PORT")))?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("`{host}` has no address"));
    for address in look_up(host).await? {
        match TcpStream::connect((address, port)).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = io::Error::new(error.kind(), format!("{host} ({address}): {error}")),
        }
    }
    Err(last)
}

/// Checks that `server` has the form `HOST:PORT`.
pub fn split(server: &str) -> Option<(&str, u16)> {
    let (host, port) = server.rsplit_once(':')?;
    let port = port.parse().ok().filter(|p| *p != 0)?;
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    (!bare.is_empty() && (bare == host) != bare.contains(':')).then_some((bare, port))
}

async fn look_up(host: &str) -> io::Result<Vec<IpAddr>> {
    let failed = |error: &dyn std::fmt::Display| {
        io::Error::new(io::ErrorKind::NotFound, format!("cannot find the address of `{host}`: {error}"))
    };
    if let Ok(address) = host.parse() {
        return Ok(vec![address]);
    }
    let resolver =
        TokioResolver::builder_tokio().and_then(hickory_resolver::ResolverBuilder::build).map_err(|e| failed(&e))?;
    Ok(resolver.lookup_ip(host).await.map_err(|e| failed(&e))?.iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_a_host_and_a_port() {
        assert_eq!(split("server.mesh.svc:8081"), Some(("server.mesh.svc", 8081)));
        assert_eq!(split("[::1]:8081"), Some(("::1", 8081)));
        for wrong in ["server", "server:", ":8081", "server:0", "server:99999", "::1:8081", "[server]:8081"] {
            assert_eq!(split(wrong), None, "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_name_of_the_hosts_file_is_reached() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(connect(&format!("localhost:{port}")).await.unwrap().peer_addr().unwrap().port(), port);
        let error = connect(&format!("no-such-host.invalid:{port}")).await.unwrap_err().to_string();
        assert!(error.starts_with("cannot find the address of `no-such-host.invalid`"), "{error}");
    }
}
