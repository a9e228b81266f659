//! Copies bytes both ways between two legs and passes on each end faithfully: FIN for FIN, reset for reset, and a
//! truncated TLS stream never looks like a clean end. What a leg sent before it failed reaches the other one first: an
//! early answer to an upload is delivered, as it is without a sidecar.
//!
//! An idle connection holds no buffer: data is read into a buffer of the thread's pool, and a connection keeps a buffer
//! only while it holds bytes that the other leg does not accept yet. Nothing more is read until they are gone.

mod flow;

use std::pin::pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::copy::flow::{Failure, Flow};
use crate::cut::Cut;
use crate::kernel::{ended_by, standing};
use crate::silence::{Network, Side, Silence};
use crate::tls::{Engine, TlsStream};

/// How long the last words of a failed leg wait for a reader that takes none of them.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a flow that cannot write is asked whether the leg that it reads is still there. Nothing else would tell: while
/// it waits for room it does not read.
const STUCK: Duration = if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(5) };
/// Longest pause between two looks at whether they have arrived.
const LOOK: Duration = Duration::from_millis(50);

/// One side of a connection: the socket itself, or TLS over it.
pub trait Leg: AsyncRead + AsyncWrite + Unpin {
    /// The TCP socket underneath.
    fn tcp(&self) -> &TcpStream;
}

impl Leg for TcpStream {
    fn tcp(&self) -> &TcpStream {
        self
    }
}

impl<E: Engine> Leg for TlsStream<E> {
    fn tcp(&self) -> &TcpStream {
        self.tcp()
    }
}

/// How a pair of legs ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Both sides finished and closed.
    Closed,
    /// One side was reset, so the other was reset too.
    Reset,
    /// A TLS stream ended without `close_notify`, so the other side was reset.
    Truncated,
    /// The peer on the network acknowledged nothing for too long; the other side was reset.
    TimedOut,
    /// The authority behind the peer was revoked; both sides were reset.
    Revoked,
    /// Still open at the end of the drain; both sides were reset.
    Drained,
}

impl End {
    /// Its name in the access log, stable between releases.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Reset => "reset",
            Self::Truncated => "truncated",
            Self::TimedOut => "timed_out",
            Self::Revoked => "revoked",
            Self::Drained => "drained",
        }
    }
}

/// Makes the close of this socket a reset, whether we close it or the kernel does because this process was killed.
pub fn reset_on_close(tcp: &TcpStream) {
    // It cannot fail on a TCP socket, and without it a failure would only look like a clean end.
    let _ = socket2::SockRef::from(tcp).set_linger(Some(std::time::Duration::ZERO));
}

fn end_on_close(tcp: &TcpStream) {
    let _ = socket2::SockRef::from(tcp).set_linger(None);
}

/// What was carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carried {
    /// How the pair ended.
    pub end: End,
    /// Bytes from the first leg to the second.
    pub forth: u64,
    /// Bytes from the second leg to the first.
    pub back: u64,
}

/// Parameters of [`carry`].
pub struct Terms<'a> {
    /// Whether the first leg has already ended its direction.
    pub first_ended: bool,
    /// Byte counters, from the first leg to the second and back.
    pub counters: (&'a Counter, &'a Counter),
    /// Ends the connection from outside: revocation or end of the drain.
    pub cut: &'a Cut,
    /// Which leg leads to another machine, and how long that one may acknowledge nothing.
    pub network: Network,
    /// Something was written to that leg before, and perhaps not acknowledged.
    pub under_way: bool,
}

/// Why nothing more is carried.
enum Stop {
    /// Both directions have ended.
    Ended,
    /// From outside, or by the network's silence.
    Cut(End),
    /// The flow from the first leg to the second has failed.
    Forth(Failure),
    /// The flow from the second leg to the first has failed.
    Back(Failure),
}

fn poll(
    flow: &mut Flow<'_>,
    cx: &mut Context<'_>,
    from: &mut impl Leg,
    to: &mut impl Leg,
) -> Poll<Result<(), Failure>> {
    if flow.has_ended() { Poll::Ready(Ok(())) } else { flow.poll(cx, from, to) }
}

/// Carries bytes between two legs until both directions have ended, one fails, or `cut` is set. Afterwards the caller
/// only has to drop the legs.
pub async fn carry(first: &mut impl Leg, second: &mut impl Leg, terms: Terms<'_>) -> Carried {
    // Until both sides have finished, a close is a reset: a sidecar that dies must not look like a clean end.
    reset_on_close(first.tcp());
    reset_on_close(second.tcp());
    let Terms { first_ended, counters, cut, network, under_way } = terms;
    let mut forth = Flow::new(counters.0, first_ended);
    let mut back = Flow::new(counters.1, false);
    let mut silence = Silence::new(network, under_way);
    let mut tick = pin!(silence.tick());
    let mut look = pin!(tokio::time::sleep(STUCK));
    let stopped = std::future::poll_fn(|cx| {
        if let Some(end) = cut.poll(cx) {
            return Poll::Ready(Stop::Cut(end));
        }
        let forth_ended = match poll(&mut forth, cx, first, second) {
            Poll::Ready(Err(failure)) => return Poll::Ready(Stop::Forth(failure)),
            other => other.is_ready(),
        };
        // Not after a failure of the other flow: its write may have taken the only word of a reset, and an end that is read
        // then is none.
        let back_ended = match poll(&mut back, cx, second, first) {
            Poll::Ready(Err(failure)) => return Poll::Ready(Stop::Back(failure)),
            other => other.is_ready(),
        };
        if forth_ended && back_ended {
            return Poll::Ready(Stop::Ended);
        }
        while (forth.is_stuck() || back.is_stuck()) && look.as_mut().poll(cx).is_ready() {
            look.as_mut().reset(tokio::time::Instant::now() + STUCK);
            // As if the flow that writes to the leg had met the error: what the leg said before may still be in it.
            if forth.is_stuck()
                && let Some(error) = ended_by(first.tcp())
            {
                return Poll::Ready(Stop::Back(Failure::of_write(&error)));
            }
            if back.is_stuck()
                && let Some(error) = ended_by(second.tcp())
            {
                return Poll::Ready(Stop::Forth(Failure::of_write(&error)));
            }
        }
        let (tcp, sent) = match network.leg {
            Side::First => (first.tcp(), back.sent()),
            Side::Second => (second.tcp(), forth.sent()),
        };
        silence.poll_over(tick.as_mut(), cx, tcp, sent).map(|()| Stop::Cut(End::TimedOut))
    });
    let end = match stopped.await {
        Stop::Ended => End::Closed,
        Stop::Cut(end) => end,
        Stop::Forth(Failure::Read(end)) => last_words(&mut forth, None, first, second, cut).await.unwrap_or(end),
        Stop::Back(Failure::Read(end)) => last_words(&mut back, None, second, first, cut).await.unwrap_or(end),
        Stop::Forth(Failure::Write { had_ended }) => {
            last_words(&mut back, Some(had_ended), second, first, cut).await.unwrap_or(End::Reset)
        }
        Stop::Back(Failure::Write { had_ended }) => {
            last_words(&mut forth, Some(had_ended), first, second, cut).await.unwrap_or(End::Reset)
        }
    };
    if end == End::Closed {
        end_on_close(first.tcp());
        end_on_close(second.tcp());
    }
    Carried { end, forth: forth.bytes, back: back.bytes }
}

/// The leg `from` is over: what it said still goes to `to`, and has arrived there when this returns, for the reset that
/// follows would overtake it. `had_ended`: there may be more to read, and whether an end of it can be believed; `None`: all
/// was read. Gives the end if it was cut meanwhile. A reader that takes nothing for [`PATIENCE`] is not waited for; one that
/// takes something, however slowly, is.
async fn last_words(
    flow: &mut Flow<'_>,
    had_ended: Option<bool>,
    from: &mut impl Leg,
    to: &mut impl Leg,
    cut: &Cut,
) -> Option<End> {
    flow.no_end = had_ended == Some(false);
    let mut read = had_ended.is_none() || flow.has_ended();
    let (mut progress, mut at) = ((flow.bytes, usize::MAX), Instant::now());
    let mut pause = Duration::from_millis(1);
    while at.elapsed() < PATIENCE {
        let moved = std::future::poll_fn(|cx| match cut.poll(cx) {
            Some(end) => Poll::Ready(Err(end)),
            None if read => Poll::Pending,
            None => flow.poll(cx, from, to).map(Ok),
        });
        match tokio::time::timeout(pause, moved).await {
            Ok(Err(end)) => return Some(end),
            Ok(Ok(Err(Failure::Write { .. }))) => return None,
            Ok(Ok(Ok(()) | Err(Failure::Read(_)))) => read = true,
            Err(_) => pause = (pause * 2).min(LOOK),
        }
        let now = standing(to.tcp());
        if now.over || read && now.unacknowledged == 0 {
            return None;
        }
        if (flow.bytes, now.unacknowledged) != progress {
            (progress, at) = ((flow.bytes, now.unacknowledged), Instant::now());
        }
    }
    None
}

#[cfg(test)]
mod tests;
