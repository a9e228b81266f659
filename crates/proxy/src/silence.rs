//! Detects a machine that is gone. Without a bound, Linux retransmits for a quarter of an hour before it gives up.
//!
//! `TCP_USER_TIMEOUT` is not used: with it Linux also ends a connection whose reader is alive and has no room (tcp(7)), which
//! is how a slow app behaves. Instead, a connection with bytes under way is looked at now and then, and is over when its peer
//! has acknowledged nothing, not even a probe of its window, for the whole time, and owes an answer. The latter is not the
//! same: the kernel's probes of a closed window are up to two minutes apart, and between them there is nothing to be answered.
//! Idle connections are probed by keepalive and need no look.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::TcpKeepalive;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use crate::kernel::{Standing, standing};

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
    /// Something was unanswered at the last look.
    unanswered: bool,
}

impl Silence {
    /// Nothing has been written by the one who looks. `under_way`: something was before.
    pub fn new(network: Network, under_way: bool) -> Self {
        // A number that no count of bytes is at first: what is under way is looked at from the first poll on.
        let seen = if under_way { u64::MAX } else { 0 };
        Self { network, since: None, seen, unanswered: false }
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
                (self.since, self.unanswered) = (None, false);
                return Poll::Pending;
            }
            if self.is_over(now, standing) {
                return Poll::Ready(());
            }
            tick.as_mut().reset(now + self.network.bound / LOOKS);
        }
        Poll::Pending
    }

    /// Whether the peer owes an answer that it had time enough to give. Twice in a row: what is unanswered at one look may have
    /// left in this very moment.
    fn is_over(&mut self, now: Instant, standing: Standing) -> bool {
        let again = std::mem::replace(&mut self.unanswered, standing.unanswered) && standing.unanswered;
        let waited = self.since.map_or(Duration::ZERO, |since| now - since);
        again && waited >= self.network.bound && standing.silent >= self.network.bound
    }
}

/// How the kernel probes a connection on which nothing moves, so that a peer that is gone is noticed within about `bound`.
pub fn probes_when_idle(bound: Duration) -> TcpKeepalive {
    // Whole seconds are what the kernel counts in: two fifths of silence, then a probe each fifth.
    let fifth = (bound / 5).max(Duration::from_secs(1));
    TcpKeepalive::new().with_time(fifth * 2).with_interval(fifth).with_retries(3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_peer_that_owes_an_answer_at_two_looks_is_gone() {
        let bound = Duration::from_secs(25);
        let now = Instant::now();
        let at = |unanswered| Standing { unacknowledged: 9, silent: bound * 2, unanswered, over: false };
        let mut silence = Silence::new(Network { leg: Side::First, bound }, false);
        silence.since = now.checked_sub(bound);
        let told = [false, true, false, true, true].map(|unanswered| silence.is_over(now, at(unanswered)));
        assert_eq!(told, [false, false, false, false, true]);
        let heard = Standing { silent: bound / 2, ..at(true) };
        assert!(!silence.is_over(now, heard), "it has acknowledged something meanwhile");
        silence.since = Some(now);
        assert!(!silence.is_over(now, at(true)), "bytes are under way since now");
    }

    #[tokio::test]
    async fn what_was_written_before_is_looked_at_though_nothing_follows() {
        let network = Network { leg: Side::First, bound: Duration::from_secs(25) };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        for under_way in [false, true] {
            let mut silence = Silence::new(network, under_way);
            let tick = std::pin::pin!(silence.tick());
            assert!(silence.poll_over(tick, &mut Context::from_waker(std::task::Waker::noop()), &tcp, 0).is_pending());
            assert_eq!(silence.since.is_some(), under_way);
        }
    }
}
