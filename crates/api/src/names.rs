//! Connects to a host name without the C library's name service, which a static binary cannot load.
//!
//! Addresses are tried by RFC 8305 ("Happy Eyeballs"): both IP versions in turn, each one 250 ms after the previous one
//! or as soon as that has failed; the first that answers wins. An address that drops packets costs a quarter of a
//! second instead of the connection.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Time that each address has alone before the next one is tried (RFC 8305 5, "Connection Attempt Delay").
const STAGGER: Duration = Duration::from_millis(250);
/// How long the slower lookup is awaited once the other has answered (RFC 8305 3, "Resolution Delay").
const RESOLUTION_DELAY: Duration = Duration::from_millis(50);
/// Longest wait for a connection, including the lookup.
const DEADLINE: Duration = Duration::from_secs(10);
/// Most addresses tried per connection.
const MAX_ADDRESSES: usize = 32;

/// Connects to `server`, `HOST:PORT`. Names are looked up in `/etc/hosts`, then at the name servers of
/// `/etc/resolv.conf`; both files are read at each call, so changes take effect.
///
/// # Errors
/// If `server` has no port, the name is unknown, or none of its addresses accepts a connection within ten seconds.
pub async fn connect(server: &str) -> io::Result<TcpStream> {
    Dialer::new(server.to_owned()).connect().await.map(|dialled| dialled.stream)
}

/// Splits `HOST:PORT`, an IPv6 address in brackets; `None` if the text has another form.
pub fn split(server: &str) -> Option<(&str, u16)> {
    let (host, port) = server.rsplit_once(':')?;
    let port = port.parse().ok().filter(|p| *p != 0)?;
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    (!bare.is_empty() && (bare == host) != bare.contains(':')).then_some((bare, port))
}

/// Connects to one server repeatedly and remembers which of its addresses to try first.
pub struct Dialer {
    server: String,
    learned: Mutex<Learned>,
}

#[derive(Default)]
struct Learned {
    /// The address of the last connection that finished its handshake.
    good: Option<IpAddr>,
    /// Addresses that were tried since then and did not finish a handshake, or have not yet.
    doubtful: HashSet<IpAddr>,
}

/// A connection and the address that it leads to.
pub struct Dialled {
    /// The open TCP connection.
    pub stream: TcpStream,
    /// The server's address that answered.
    pub address: IpAddr,
}

impl Dialer {
    /// A dialer for `server`, `HOST:PORT`. Does no lookup yet.
    pub fn new(server: String) -> Self {
        Self { server, learned: Mutex::default() }
    }

    /// Connects. Addresses whose last connection did not reach [`Dialer::is_good`] are tried last.
    ///
    /// # Errors
    /// See [`connect`].
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
            // This includes the winner until its handshake has finished: a machine may accept connections and serve
            // none.
            learned.doubtful.extend(tried);
            learned.good = None;
            dialled.map_err(|(address, error)| io::Error::new(error.kind(), format!("{host} ({address}): {error}")))
        };
        let late =
            || io::Error::new(io::ErrorKind::TimedOut, format!("{server} takes no connection within {DEADLINE:?}"));
        let dialled = tokio::time::timeout(DEADLINE, dial).await;
        dialled.unwrap_or_else(|_| {
            // None of the addresses worked, so nothing is known for the next time.
            *self.learned() = Learned::default();
            Err(late())
        })
    }

    /// Reports that a connection to this address was useful. It is tried first next time.
    pub fn is_good(&self, address: IpAddr) {
        let mut learned = self.learned();
        learned.doubtful.remove(&address);
        learned.good = Some(address);
    }

    /// The order to try: the last good address, then unknown ones, then doubtful ones; in each group IPv6 and IPv4
    /// alternate (RFC 8305 4).
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

/// Alternates IPv6 and IPv4, starting with the version of the first address.
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

/// The first connection that succeeds, or the last error with its address. `tried` receives each address that was
/// started.
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
                    // After a failure, waiting for the next attempt gains nothing.
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
    // Once one lookup has found something, the other gets a moment to add to it.
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
