//! From a name to a connection, without the C library's name service, which a static binary cannot load.
//!
//! Addresses are tried as RFC 8305 ("Happy Eyeballs") says: both IP versions in turn, the next one 250 ms after the one
//! before or as soon as that has failed, and the first that answers wins. An address that swallows packets costs a quarter
//! of a second and not the connection.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Time that an address has to itself before the next one is tried (RFC 8305 5: "Connection Attempt Delay").
const STAGGER: Duration = Duration::from_millis(250);
/// Time that the slower of the two lookups is waited for once the other has answered (RFC 8305 3: "Resolution Delay").
const RESOLUTION_DELAY: Duration = Duration::from_millis(50);
/// Longest wait for a connection, the lookup included.
const DEADLINE: Duration = Duration::from_secs(10);
/// Addresses tried at most for one connection.
const MAX_ADDRESSES: usize = 32;

/// Connects to `server`, `HOST:PORT`. Names are looked up in `/etc/hosts`, then at the name servers of `/etc/resolv.conf`;
/// both files are read anew, so a change is followed.
///
/// # Errors
/// When `server` has no port, the name is unknown, or none of its addresses takes a connection within ten seconds.
pub async fn connect(server: &str) -> io::Result<TcpStream> {
    Dialer::new(server.to_owned()).connect().await.map(|dialled| dialled.stream)
}

/// Checks that `server` has the form `HOST:PORT`.
pub fn split(server: &str) -> Option<(&str, u16)> {
    let (host, port) = server.rsplit_once(':')?;
    let port = port.parse().ok().filter(|p| *p != 0)?;
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    (!bare.is_empty() && (bare == host) != bare.contains(':')).then_some((bare, port))
}

/// Connects to one server again and again, and learns which of its addresses are worth trying first.
pub struct Dialer {
    server: String,
    learned: Mutex<Learned>,
}

#[derive(Default)]
struct Learned {
    /// Served us last, up to the end of a handshake.
    good: Option<IpAddr>,
    /// Were tried since then and came to nothing, or have not come to a handshake's end yet.
    doubtful: HashSet<IpAddr>,
}

/// A connection, and which address it leads to.
pub struct Dialled {
    /// The connection.
    pub stream: TcpStream,
    /// The address of the server's that answered.
    pub address: IpAddr,
}

impl Dialer {
    /// A way to `server`, `HOST:PORT`. Nothing is looked up yet.
    pub fn new(server: String) -> Self {
        Self { server, learned: Mutex::default() }
    }

    /// Connects. An address that did not lead to [`Dialer::is_good`] the last time is tried after those that may.
    ///
    /// # Errors
    /// As those of [`connect`].
    pub async fn connect(&self) -> io::Result<Dialled> {
        let server = &self.server;
        let (host, port) = split(server)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("`{server}` is not HOST:PORT")))?;
        let dial = async {
            let addresses = self.in_order(look_up(host).await?);
            if addresses.is_empty() {
                return Err(io::Error::new(io::ErrorKind::NotFound, format!("`{host}` has no address")));
            }
            let mut tried = vec![];
            let dialled = race(&addresses, port, &mut tried).await;
            let mut learned = self.learned();
            // The winner too, until its handshake is over: a machine may take connections and serve nobody.
            learned.doubtful.extend(tried);
            learned.good = None;
            dialled.map_err(|(address, error)| io::Error::new(error.kind(), format!("{host} ({address}): {error}")))
        };
        let late =
            || io::Error::new(io::ErrorKind::TimedOut, format!("{server} takes no connection within {DEADLINE:?}"));
        let dialled = tokio::time::timeout(DEADLINE, dial).await;
        dialled.unwrap_or_else(|_| {
            // What was tried has come to nothing, all of it: nothing is known for the next time.
            *self.learned() = Learned::default();
            Err(late())
        })
    }

    /// A connection to this address has proven useful: it is the first to be tried again.
    pub fn is_good(&self, address: IpAddr) {
        let mut learned = self.learned();
        learned.doubtful.remove(&address);
        learned.good = Some(address);
    }

    /// The last good address, then those that nothing is known of, then those that came to nothing; in each part IPv6 and
    /// IPv4 in turn (RFC 8305 4).
    fn in_order(&self, addresses: Vec<IpAddr>) -> Vec<IpAddr> {
        let mut learned = self.learned();
        if addresses.iter().all(|a| learned.doubtful.contains(a)) {
            learned.doubtful.clear();
        }
        let (good, others): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|a| learned.good == Some(*a));
        let (doubtful, fresh): (Vec<_>, Vec<_>) = others.into_iter().partition(|a| learned.doubtful.contains(a));
        let all = good.into_iter().chain(in_turn(fresh)).chain(in_turn(doubtful));
        all.take(MAX_ADDRESSES).collect()
    }

    fn learned(&self) -> MutexGuard<'_, Learned> {
        self.learned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// IPv6 and IPv4 in turn, beginning with the version of the first address.
fn in_turn(addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let first_is_v6 = addresses.first().is_some_and(IpAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|a| a.is_ipv6() == first_is_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut all = vec![];
    loop {
        let pair = [first.next(), second.next()];
        if pair == [None, None] {
            return all;
        }
        all.extend(pair.into_iter().flatten());
    }
}

/// The first connection that comes about, or how the last one failed. `tried` gets each address that was begun with.
async fn race(addresses: &[IpAddr], port: u16, tried: &mut Vec<IpAddr>) -> Result<Dialled, (IpAddr, io::Error)> {
    let mut attempts = JoinSet::new();
    let mut waiting = addresses.iter().copied();
    let mut next = waiting.next();
    let nowhere = || (IpAddr::from([0; 4]), io::Error::new(io::ErrorKind::NotFound, "no address"));
    let mut last = nowhere();
    loop {
        if let Some(address) = next.take() {
            tried.push(address);
            attempts.spawn(async move { (address, TcpStream::connect(SocketAddr::new(address, port)).await) });
        }
        tokio::select! {
            ended = attempts.join_next() => match ended {
                Some(Ok((address, Ok(stream)))) => return Ok(Dialled { stream, address }),
                Some(Ok((address, Err(error)))) => {
                    last = (address, error);
                    // Nothing is gained by waiting for one that has failed.
                    next = waiting.next();
                }
                Some(Err(error)) => last.1 = io::Error::other(error),
                None => return Err(last),
            },
            () = tokio::time::sleep(STAGGER), if waiting.len() > 0 => next = waiting.next(),
        }
    }
}

async fn look_up(host: &str) -> io::Result<Vec<IpAddr>> {
    if let Ok(address) = host.parse() {
        return Ok(vec![address]);
    }
    let (v6, v4) = (look_up_one(host, LookupIpStrategy::Ipv6Only), look_up_one(host, LookupIpStrategy::Ipv4Only));
    let (mut v6, mut v4) = (std::pin::pin!(v6), std::pin::pin!(v4));
    // Whichever answers first with something gives the other a moment to add to it.
    let (first, second) = tokio::select! {
        v6 = &mut v6 => match v6 {
            Ok(found) => (Ok(found), tokio::time::timeout(RESOLUTION_DELAY, v4).await.unwrap_or(Ok(vec![]))),
            failed => (failed, v4.await),
        },
        v4 = &mut v4 => match v4 {
            Ok(found) => (tokio::time::timeout(RESOLUTION_DELAY, v6).await.unwrap_or(Ok(vec![])), Ok(found)),
            failed => (v6.await, failed),
        },
    };
    match (first, second) {
        (Ok(v6), Ok(v4)) => Ok([v6, v4].concat()),
        (Ok(only), Err(_)) | (Err(_), Ok(only)) => Ok(only),
        (Err(_), Err(error)) => {
            Err(io::Error::new(io::ErrorKind::NotFound, format!("cannot find the address of `{host}`: {error}")))
        }
    }
}

async fn look_up_one(host: &str, version: LookupIpStrategy) -> Result<Vec<IpAddr>, String> {
    let mut builder = TokioResolver::builder_tokio().map_err(|e| e.to_string())?;
    builder.options_mut().ip_strategy = version;
    let resolver = builder.build().map_err(|e| e.to_string())?;
    Ok(resolver.lookup_ip(host).await.map_err(|e| e.to_string())?.iter().collect())
}

#[cfg(test)]
mod tests;
