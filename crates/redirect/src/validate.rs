//! Proves without privileges that a redirect is in force: a connection that leaves the namespace arrives at the sidecar's port.
//!
//! Only a process with `CAP_NET_ADMIN` may read the rules. Any process, however, can listen on the sidecar's port and dial an
//! address that is nobody's: with the redirect the kernel delivers the first segment to the listener, and a peer outside the
//! namespace cannot cause that. The rule that keeps the sidecar's ports from other users drops the listener's answer, so the
//! connection stays half open; `/proc/net/tcp` shows it all the same. Where everything that could be dialled is exempt, or there is
//! no route, that rule proves the redirect by itself: nothing that this process sends from the sidecar's port arrives.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, SockaddrStorage, bind, connect,
    getsockname, recv, socket,
};

use crate::rules::Redirect;

/// Addresses for documentation (RFC 5737, RFC 3849), which no network routes.
const NOBODY: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)),
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
/// Ports that are dialled; the first that is not exempt: discard, echo, daytime.
const PORTS: [u16; 3] = [9, 7, 13];
/// How long one connection may take to arrive. Inside one namespace it takes microseconds.
const ARRIVAL: Duration = Duration::from_millis(200);
/// Pause between two looks at the listener.
const LOOK: Duration = Duration::from_millis(5);
/// Pause between two connections. NAT decides by the first packet, so each try is a new one.
const PAUSE: Duration = Duration::from_millis(50);
/// Largest part of `/proc/net/tcp` that is read, in bytes. Nothing else runs in the namespace yet.
const MAX_TABLE: u64 = 1024 * 1024;
/// The state of a half-open connection in `/proc/net/tcp` (`TCP_SYN_RECV`).
const HALF_OPEN: &str = "03";

/// Why a redirect could not be proved.
#[derive(Debug, thiserror::Error)]
pub enum NotProved {
    /// Connections leave the namespace as they are. Holds how long was waited.
    #[error("no redirect is in force in this network namespace after {} s", .0.as_secs())]
    NotInForce(Duration),
    /// This process is the sidecar's user, whose connections are never redirected.
    #[error(
        "this process has the sidecar's user ID {0}, whose connections are never redirected: run it as another user"
    )]
    SidecarsUser(u32),
    /// The sidecar's port cannot be listened on.
    #[error("cannot listen on {0}: {1}")]
    Listen(SocketAddr, io::Error),
    /// The kernel refused a socket, or its table of connections.
    #[error("cannot try a connection: {0}")]
    Try(#[from] io::Error),
}

/// Waits until a connection of this process is redirected. The sidecar must not run yet: its port is listened on.
///
/// # Errors
/// The redirect is not in force within `patience`, or it cannot be tried.
pub fn wait_until_in_force(redirect: &Redirect, patience: Duration) -> Result<(), NotProved> {
    if nix::unistd::geteuid().as_raw() == redirect.proxy_uid {
        return Err(NotProved::SidecarsUser(redirect.proxy_uid));
    }
    let targets = targets(redirect);
    let own = |ip| SocketAddr::new(ip, redirect.outbound_port);
    let v4 = own(Ipv4Addr::LOCALHOST.into());
    let listeners = Listeners { v4: listen(v4).map_err(|e| NotProved::Listen(v4, e))?, v6: listen_v6(own)? };
    let deadline = Instant::now() + patience;
    loop {
        let mut dialled = vec![];
        for target in &targets {
            dialled.extend(Dialled::to(*target)?);
        }
        let is_in_force = if dialled.is_empty() {
            listeners.are_cut_off(v4)?
        } else {
            dialled.iter().map(|dialled| listeners.hear(dialled)).collect::<io::Result<Vec<_>>>()?.contains(&true)
        };
        if is_in_force {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(NotProved::NotInForce(patience));
        }
        std::thread::sleep(PAUSE);
    }
}

/// One address of each family, on a port, that the redirect does not exempt.
fn targets(redirect: &Redirect) -> Vec<SocketAddr> {
    let exempt = |ip: &IpAddr| redirect.exempt_outbound_cidrs.iter().any(|net| net.contains(ip));
    let Some(port) = PORTS.into_iter().find(|port| !redirect.exempt_outbound_ports.contains(port)) else {
        return vec![];
    };
    let of_family = |v6| NOBODY.into_iter().find(|ip| ip.is_ipv6() == v6 && !exempt(ip));
    [false, true].into_iter().filter_map(of_family).map(|ip| SocketAddr::new(ip, port)).collect()
}

/// Listens without waiting in `accept`.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Without IPv6 there is nothing to listen on, and nothing to dial.
fn listen_v6(own: impl Fn(IpAddr) -> SocketAddr) -> Result<Option<TcpListener>, NotProved> {
    let address = own(Ipv6Addr::LOCALHOST.into());
    match listen(address) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => Err(NotProved::Listen(address, error)),
        opened => Ok(opened.ok()),
    }
}

/// The sidecar's port, which this process listens on.
struct Listeners {
    v4: TcpListener,
    v6: Option<TcpListener>,
}

impl Listeners {
    /// The other end of a connection of ours. A listener that fails has accepted nothing.
    fn accept(&self, dialled: &Dialled) -> Option<TcpStream> {
        let all = [Some(&self.v4), self.v6.as_ref()].into_iter().flatten();
        all.filter_map(|listener| listener.accept().ok()).find(|(_, peer)| peer.port() == dialled.port).map(|(s, _)| s)
    }

    fn port(&self) -> io::Result<u16> {
        Ok(self.v4.local_addr()?.port())
    }

    /// Whether a connection arrives here, in whole or in half.
    fn hear(&self, dialled: &Dialled) -> io::Result<bool> {
        within(ARRIVAL, || Ok(self.accept(dialled).is_some() || half_open(self.port()?, dialled.port)?))
    }

    /// Whether nothing that is sent from here arrives, not even next door. A handshake alone proves nothing: a kernel that always
    /// answers with SYN cookies sends its part without a socket.
    fn are_cut_off(&self, address: SocketAddr) -> io::Result<bool> {
        let Some(dialled) = Dialled::to(address)? else { return Ok(false) };
        let mut accepted = None;
        within(ARRIVAL, || {
            accepted = self.accept(&dialled);
            Ok(accepted.is_some())
        })?;
        let Some(mut accepted) = accepted else { return half_open(self.port()?, dialled.port) };
        accepted.write_all(b"?")?;
        let heard = within(ARRIVAL, || Ok(dialled.has_data()))?;
        Ok(!heard)
    }
}

/// Looks until something is true, or the time is over.
fn within(time: Duration, mut is_true: impl FnMut() -> io::Result<bool>) -> io::Result<bool> {
    let until = Instant::now() + time;
    loop {
        if is_true()? {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        std::thread::sleep(LOOK);
    }
}

/// A connection that was begun, and the port that it comes from. Dropped, it is given up.
struct Dialled {
    socket: OwnedFd,
    port: u16,
}

impl Dialled {
    /// Begins a connection; `None` without a route.
    fn to(target: SocketAddr) -> io::Result<Option<Self>> {
        let (family, any): (_, IpAddr) = match target {
            SocketAddr::V4(_) => (AddressFamily::Inet, Ipv4Addr::UNSPECIFIED.into()),
            SocketAddr::V6(_) => (AddressFamily::Inet6, Ipv6Addr::UNSPECIFIED.into()),
        };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = match socket(family, SockType::Stream, flags, SockProtocol::Tcp) {
            Err(Errno::EAFNOSUPPORT) => return Ok(None),
            other => other?,
        };
        match bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any, 0))) {
            Err(Errno::EADDRNOTAVAIL) => return Ok(None),
            other => other?,
        }
        match connect(socket.as_raw_fd(), &SockaddrStorage::from(target)) {
            // What is not answered at once, and what is refused, has been sent all the same. A filter may refuse it before the
            // redirect is there.
            Ok(()) | Err(Errno::EINPROGRESS | Errno::ECONNREFUSED | Errno::EPERM | Errno::EACCES) => {}
            Err(Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EADDRNOTAVAIL) => return Ok(None),
            Err(other) => return Err(other.into()),
        }
        let own: SockaddrStorage = getsockname(socket.as_raw_fd())?;
        let port = own.as_sockaddr_in().map(SockaddrIn::port).or(own.as_sockaddr_in6().map(SockaddrIn6::port));
        Ok(Some(Self { socket, port: port.unwrap_or_default() }))
    }

    /// Whether something has arrived. A connection that has failed has nothing.
    fn has_data(&self) -> bool {
        recv(self.socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT).is_ok_and(|n| n > 0)
    }
}

/// Whether this namespace has a half-open connection to a local port from a remote one.
fn half_open(local: u16, remote: u16) -> io::Result<bool> {
    let mut table = String::new();
    for file in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        match File::open(file) {
            Ok(opened) => opened.take(MAX_TABLE).read_to_string(&mut table)?,
            // A kernel without IPv6.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        // Each line stands for itself.
        let _ = writeln!(table);
    }
    Ok(lists_half_open(&table, local, remote))
}

/// Looks for it in the text of `/proc/net/tcp`, whose ports are hexadecimal (`proc_net_tcp` in the kernel's documentation).
fn lists_half_open(table: &str, local: u16, remote: u16) -> bool {
    let ends_with = |address: Option<&str>, port: u16| address.is_some_and(|a| a.ends_with(&format!(":{port:04X}")));
    table.lines().any(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        ends_with(words.next(), local) && ends_with(words.next(), remote) && words.next() == Some(HALF_OPEN)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_open_connections_are_found_by_ports_and_state() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 0100007F:3A99 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 9 1\n   \
                     1: 0100007F:3A99 0100630A:C350 03 00000000:00000000 01:00000063 00000000     0        0 0 1\n   \
                     2: 0100007F:3A99 0100630A:C351 01 00000000:00000000 01:00000063 00000000     0        0 0 1\n";
        assert!(lists_half_open(table, 15001, 50000));
        assert!(!lists_half_open(table, 15001, 50001), "established by somebody else's doing");
        assert!(!lists_half_open(table, 15006, 50000) && !lists_half_open("", 15001, 50000));
    }

    #[test]
    fn what_is_exempt_proves_nothing() {
        let mut redirect = Redirect::for_proxy(2102);
        let shown = |redirect: &Redirect| targets(redirect).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(shown(&redirect), ["192.0.2.1:9", "[2001:db8::1]:9"]);
        redirect.exempt_outbound_ports.insert(9);
        redirect.exempt_outbound_cidrs = ["192.0.2.0/24".parse().unwrap(), "::/0".parse().unwrap()].into();
        assert_eq!(shown(&redirect), ["198.51.100.1:7"]);
        redirect.exempt_outbound_cidrs.insert("0.0.0.0/0".parse().unwrap());
        assert!(shown(&redirect).is_empty());
        redirect = Redirect { exempt_outbound_ports: PORTS.into(), ..Redirect::for_proxy(2102) };
        assert!(shown(&redirect).is_empty());
        redirect.proxy_uid = nix::unistd::geteuid().as_raw();
        assert!(matches!(wait_until_in_force(&redirect, Duration::ZERO), Err(NotProved::SidecarsUser(_))));
    }
}
