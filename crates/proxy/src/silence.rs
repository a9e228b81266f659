//! Detects a machine that is gone. Without a bound, Linux retransmits for a quarter of an hour before it gives up.
//!
//! `TCP_USER_TIMEOUT` is not used, because it also ends a connection whose reader is alive but has no room (tcp(7)), as
//! a slow app does. Instead, a connection with unacknowledged bytes is checked now and then, and it is over once its
//! peer has acknowledged nothing, not even a window probe, for the whole time. Idle connections are probed by keepalive
//! and need no check.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use crate::kernel::standing;

/// Number of checks per bound.
const LOOKS: u32 = 5;

/// One of a pair's two legs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The leg that was passed first to [`crate::copy::carry`].
    First,
    /// The leg that was passed second.
    Second,
}

/// The leg that leads to another machine.
#[derive(Debug, Clone, Copy)]
pub struct Network {
    /// Which of the two legs.
    pub leg: Side,
    /// How long its peer may acknowledge nothing.
    pub bound: Duration,
}

/// Watches the network leg of one connection.
pub struct Silence {
    network: Network,
    /// When bytes were first seen unacknowledged; `None` while nothing is known to be.
    since: Option<Instant>,
    /// Bytes that had been written at the last check.
    seen: u64,
}

impl Silence {
    /// Nothing unacknowledged yet.
    pub fn new(network: Network) -> Self {
        Self { network, since: None, seen: 0 }
    }

    /// The timer that wakes [`Self::poll_over`]. It is registered only once needed.
    pub fn tick(&self) -> Sleep {
        sleep(self.network.bound / LOOKS)
    }

    /// Ready once the peer counts as gone. `sent`: bytes written to it so far.
    pub fn poll_over(
        &mut self,
        mut tick: Pin<&mut Sleep>,
        cx: &mut Context<'_>,
        tcp: &TcpStream,
        sent: u64,
    ) -> Poll<()> {
        if self.since.is_none() {
            if sent == self.seen {
                return Poll::Pending;
            }
            let now = Instant::now();
            self.since = Some(now);
            tick.as_mut().reset(now + self.network.bound / LOOKS);
        }
        while tick.as_mut().poll(cx).is_ready() {
            let (now, standing) = (Instant::now(), standing(tcp));
            self.seen = sent;
            if standing.unacknowledged == 0 {
                self.since = None;
                return Poll::Pending;
            }
            let waited = self.since.map_or(Duration::ZERO, |since| now - since);
            if waited >= self.network.bound && standing.silent >= self.network.bound {
                return Poll::Ready(());
            }
            tick.as_mut().reset(now + self.network.bound / LOOKS);
        }
        Poll::Pending
    }
}

/// Enables keepalive, so that a peer that is gone is noticed within about `bound` on an idle connection. It cannot fail
/// on a TCP socket, and a failure would only make the connection live longer.
pub fn probe_when_idle(tcp: &TcpStream, bound: Duration) {
    // The kernel counts whole seconds: two fifths of silence, then a probe each fifth.
    let fifth = (bound / 5).max(Duration::from_secs(1));
    let keepalive = TcpKeepalive::new().with_time(fifth * 2).with_interval(fifth).with_retries(3);
    // Neither is it worth a refusal: without it the system's own, slower, probes end the connection.
    let _ = SockRef::from(tcp).set_tcp_keepalive(&keepalive);
}
