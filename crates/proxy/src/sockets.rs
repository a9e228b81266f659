//! Sockets with the options that a sidecar needs: listeners that share a port between workers, connections with
//! keepalive, and the original destination of a redirected connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use countersign_api::transport::back_off_after;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};

use crate::refusal::Refused;

/// Most connections waiting to be accepted; roll-outs bring bursts.
const BACKLOG: i32 = 4_096;
/// Silence before a peer is probed. Shorter than conntrack's 60 s for half-closed connections, so that such a
/// connection lives for as long as both ends do.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 6;

/// Opens a listener whose port the other workers share (`SO_REUSEPORT`).
pub fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Listens on a port of every address: IPv4, and IPv6 if the host supports it.
pub fn listen_everywhere(port: u16) -> io::Result<Vec<std::net::TcpListener>> {
    let v4 = listen(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port));
    let v6 = listen(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port));
    let absent = |e: &io::Error| matches!(e.raw_os_error(), Some(nix::libc::EAFNOSUPPORT | nix::libc::EADDRNOTAVAIL));
    match (v4, v6) {
        (Ok(v4), Ok(v6)) => Ok(vec![v4, v6]),
        (Ok(only), Err(e)) | (Err(e), Ok(only)) if absent(&e) => Ok(vec![only]),
        (Err(e), _) | (_, Err(e)) => Err(e),
    }
}

/// Accepts one connection; an accept that fails waits a little and tries again. It is tuned as the listener is.
pub async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => return (stream, SocketAddr::new(peer.ip().to_canonical(), peer.port())),
            // A client that has left again is not our trouble.
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(e) => back_off_after(&e).await,
        }
    }
}

/// Dials an app at `to`, or at an address of `also` if it listens on the other IP version only. A direct client would
/// fall back the same way, but the sidecar has already accepted its connection.
pub async fn dial_app(to: SocketAddr, also: &[IpAddr], timeout: Duration) -> Result<TcpStream, Refused> {
    let mut last = match tokio::time::timeout(timeout, TcpStream::connect(to)).await {
        Ok(Ok(stream)) => {
            tune(&stream, &local_probes());
            return Ok(stream);
        }
        Ok(Err(e)) => e,
        Err(_) => io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {timeout:?}")),
    };
    if last.kind() == io::ErrorKind::ConnectionRefused {
        for ip in also.iter().filter(|ip| **ip != to.ip()) {
            match tokio::time::timeout(timeout, TcpStream::connect((*ip, to.port()))).await {
                Ok(Ok(stream)) => {
                    tune(&stream, &local_probes());
                    return Ok(stream);
                }
                Ok(Err(e)) => last = e,
                Err(_) => {}
            }
        }
    }
    Err(Refused::Connect { to, why: last.to_string() })
}

/// Dials within a time. `probes`: how a silent peer is probed.
pub async fn dial(to: SocketAddr, timeout: Duration, probes: &TcpKeepalive) -> Result<TcpStream, Refused> {
    check_scope(to)?;
    let failed = |why: String| Refused::Connect { to, why };
    match tokio::time::timeout(timeout, TcpStream::connect(to)).await {
        Ok(Ok(stream)) => {
            tune(&stream, probes);
            Ok(stream)
        }
        Ok(Err(e)) => Err(failed(e.to_string())),
        Err(_) => Err(failed(format!("no answer within {timeout:?}"))),
    }
}

/// No delay for small writes; probes for silent peers. Both are for the better; neither is worth a refusal. What is set at a
/// listener holds for all that it accepts (`inet_csk_clone_lock` copies it), which saves five calls for each of them.
pub fn tune<'a>(socket: impl Into<SockRef<'a>>, probes: &TcpKeepalive) {
    let socket = socket.into();
    let _ = socket.set_tcp_nodelay(true);
    let _ = socket.set_tcp_keepalive(probes);
}

/// For a peer on this machine, an app for the most part: it is there for as long as its process is.
pub fn local_probes() -> TcpKeepalive {
    TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_RETRIES)
}

/// The destination before the redirect. Errors: [`Refused::NoOriginalDestination`].
pub fn original_destination(stream: &TcpStream) -> Result<SocketAddr, Refused> {
    let socket = SockRef::from(stream);
    let v6 = stream.local_addr().is_ok_and(|a| a.is_ipv6());
    let found = if v6 { socket.original_dst_v6() } else { socket.original_dst_v4() };
    let found = found.map_err(|e| Refused::NoOriginalDestination(e.to_string()))?;
    let mut address = found.as_socket().ok_or_else(|| Refused::NoOriginalDestination("no IP address".into()))?;
    // A link-local address is meaningless without its interface, so the scope ID is kept.
    if is_link_local(address.ip()) {
        if let SocketAddr::V6(address) = &mut address {
            address.set_flowinfo(0);
        }
        return Ok(address);
    }
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// Whether an address is an IPv6 link-local one, which means another machine on each link (RFC 4291 2.5.6).
pub fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

/// Rejects a link-local address without an interface; the kernel would only say "invalid argument".
fn check_scope(to: SocketAddr) -> Result<(), Refused> {
    match to {
        SocketAddr::V6(v6) if is_link_local(to.ip()) && v6.scope_id() == 0 => Err(Refused::Connect {
            to,
            why: "a link-local address, and the redirect did not keep the interface that it belongs to".into(),
        }),
        _ => Ok(()),
    }
}

/// All addresses of this network namespace's interfaces.
pub fn own_addresses() -> Vec<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let addresses = interfaces.filter_map(|i| {
        let address = i.address?;
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    });
    addresses.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_listener_is_tuned_to_holds_for_what_it_accepts() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let probes = TcpKeepalive::new().with_time(Duration::from_secs(7)).with_interval(Duration::from_secs(3));
        tune(&listener, &probes.with_retries(2));
        let listener = TcpListener::from_std(listener).unwrap();
        let (dialled, (accepted, _)) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), accept(&listener));
        let socket = SockRef::from(&accepted);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        let probes = (socket.tcp_keepalive_time(), socket.tcp_keepalive_interval(), socket.tcp_keepalive_retries());
        assert_eq!((probes.0.unwrap(), probes.1.unwrap()), (Duration::from_secs(7), Duration::from_secs(3)));
        assert_eq!(probes.2.unwrap(), 2);
        drop(dialled);
    }
}
