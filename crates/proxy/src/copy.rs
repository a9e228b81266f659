//! Copies bytes both ways between two legs and passes on each end faithfully: FIN for FIN, reset for reset, and a
//! truncated TLS stream never looks like a clean end. What a leg sent before it failed reaches the other one first: an
//! early answer to an upload is delivered, as it is without a sidecar.
//!
//! An idle connection holds no buffer: data is read into a buffer of the thread's pool, and a connection keeps a buffer
//! only while it holds bytes that the other leg does not accept yet. Nothing more is read until they are gone.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::buffer::{Buffer, CHUNK};
use crate::cut::Cut;
use crate::kernel::standing;
use crate::silence::{Network, Side, Silence};
use crate::tls::{Engine, TlsStream};

/// Most chunks moved in one direction before other tasks get their turn.
const TURN: usize = 16;
/// How long the last bytes of a failed leg wait for a reader that accepts none of them.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long they may take in total.
const LAST_WORDS: Duration = Duration::from_secs(60);
/// How often a flow that cannot write checks whether the leg that it reads from still exists. Nothing else would
/// notice, because it does not read while it waits for room.
const STUCK: Duration = Duration::from_secs(5);
/// Longest pause between two checks whether they were acknowledged.
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

/// One direction of a connection.
struct Flow<'a> {
    /// Bytes that were read and that the other leg has not accepted yet.
    rest: Option<Buffer>,
    state: State,
    /// Whether bytes were written that may still be in the TLS layer.
    unflushed: bool,
    /// Whether the source leg was reset while it was written to, before it had ended: an end that is read now is not
    /// genuine.
    no_end: bool,
    bytes: u64,
    counter: &'a Counter,
}

#[derive(PartialEq)]
enum State {
    Open,
    Ending,
    Ended,
}

/// Why a flow stopped before its end.
#[derive(Clone, Copy)]
enum Failure {
    /// The source leg failed without an end. Everything before it was passed on.
    Read(End),
    /// The target leg failed. Bytes from it may still be readable, and so may its end if it had ended before.
    Write { had_ended: bool },
}

impl Failure {
    /// From a failed write. Linux reports EPIPE for a reset after the other side's FIN, and ECONNRESET for one without
    /// it (`tcp_reset`).
    fn of_write(error: &io::Error) -> Self {
        Self::Write { had_ended: error.kind() == io::ErrorKind::BrokenPipe }
    }
}

impl<'a> Flow<'a> {
    fn new(counter: &'a Counter, ended: bool) -> Self {
        let state = if ended { State::Ending } else { State::Open };
        Self { rest: None, state, unflushed: false, no_end: false, bytes: 0, counter }
    }

    /// Bytes that were sent, counting the end as one byte.
    fn sent(&self) -> u64 {
        self.bytes + u64::from(self.state == State::Ended)
    }

    /// Moves as much as possible. Ready when this direction has ended.
    fn poll(&mut self, cx: &mut Context<'_>, from: &mut impl Leg, to: &mut impl Leg) -> Poll<Result<(), Failure>> {
        for _ in 0..TURN {
            if let Some(mut rest) = self.rest.take() {
                while !rest.content().is_empty() {
                    match Pin::new(&mut *to).poll_write(cx, rest.content()) {
                        Poll::Ready(Ok(0)) => return Poll::Ready(Err(Failure::Write { had_ended: false })),
                        Poll::Ready(Err(e)) => return Poll::Ready(Err(Failure::of_write(&e))),
                        Poll::Ready(Ok(n)) => rest.consume(n),
                        Poll::Pending => {
                            self.rest = Some(rest);
                            return Poll::Pending;
                        }
                    }
                    self.unflushed = true;
                }
            }
            if self.unflushed {
                match Pin::new(&mut *to).poll_flush(cx) {
                    Poll::Ready(Ok(())) => self.unflushed = false,
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(Failure::of_write(&e))),
                    Poll::Pending => return Poll::Pending,
                }
            }
            match self.state {
                State::Ended => return Poll::Ready(Ok(())),
                State::Ending => {
                    return match Pin::new(&mut *to).poll_shutdown(cx) {
                        Poll::Ready(Ok(())) => {
                            self.state = State::Ended;
                            Poll::Ready(Ok(()))
                        }
                        // The other side is already gone. Nothing is lost, because everything was delivered.
                        Poll::Ready(Err(e)) if e.kind() == io::ErrorKind::NotConnected => {
                            self.state = State::Ended;
                            Poll::Ready(Ok(()))
                        }
                        Poll::Ready(Err(e)) => Poll::Ready(Err(Failure::of_write(&e))),
                        Poll::Pending => Poll::Pending,
                    };
                }
                State::Open => {}
            }
            match self.step(cx, from, to) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(failure)) => return Poll::Ready(Err(failure)),
                Poll::Pending => return Poll::Pending,
            }
        }
        // Some bytes may be left: run again after other connections had their turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads once and passes on what the other leg accepts.
    fn step(&mut self, cx: &mut Context<'_>, from: &mut impl Leg, to: &mut impl Leg) -> Poll<Result<(), Failure>> {
        let mut buffer = Buffer::lend();
        let mut read = ReadBuf::new(&mut buffer.room()[..CHUNK]);
        match Pin::new(&mut *from).poll_read(cx, &mut read) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Poll::Ready(Err(Failure::Read(End::Truncated)));
            }
            Poll::Ready(Err(_)) => return Poll::Ready(Err(Failure::Read(End::Reset))),
            Poll::Ready(Ok(())) => {}
        }
        let n = read.filled().len();
        if n == 0 && self.no_end {
            return Poll::Ready(Err(Failure::Read(End::Reset)));
        }
        if n == 0 {
            self.state = State::Ending;
            return Poll::Ready(Ok(()));
        }
        buffer.extend(n);
        self.bytes += n as u64;
        self.counter.inc_by(n as u64);
        match Pin::new(&mut *to).poll_write(cx, buffer.content()) {
            Poll::Ready(Ok(0)) => return Poll::Ready(Err(Failure::Write { had_ended: false })),
            Poll::Ready(Err(e)) => return Poll::Ready(Err(Failure::of_write(&e))),
            Poll::Ready(Ok(taken)) => {
                buffer.consume(taken);
                self.unflushed = true;
            }
            Poll::Pending => {}
        }
        if !buffer.content().is_empty() {
            self.rest = Some(buffer);
        }
        Poll::Ready(Ok(()))
    }
}

/// Result of [`carry`].
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
}

/// Carries bytes between two legs until both directions have ended, one fails, or `cut` is set. Afterwards the caller
/// only has to drop the legs.
pub async fn carry(first: &mut impl Leg, second: &mut impl Leg, terms: Terms<'_>) -> Carried {
    // Until both sides have finished, a close is a reset: a sidecar that dies must not look like a clean end.
    reset_on_close(first.tcp());
    reset_on_close(second.tcp());
    let Terms { first_ended, counters, cut, network } = terms;
    let mut forth = Flow::new(counters.0, first_ended);
    let mut back = Flow::new(counters.1, false);
    let mut silence = Silence::new(network);
    let mut tick = pin!(silence.tick());
    let mut look = pin!(tokio::time::sleep(STUCK));
    let stopped = std::future::poll_fn(|cx| {
        if let Some(end) = cut.poll(cx) {
            return Poll::Ready(Err(end));
        }
        let a = if forth.state == State::Ended { Poll::Ready(Ok(())) } else { forth.poll(cx, first, second) };
        let b = if back.state == State::Ended { Poll::Ready(Ok(())) } else { back.poll(cx, second, first) };
        match (a, b) {
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(Ok((None, None))),
            (Poll::Ready(Err(a)), Poll::Ready(Err(b))) => Poll::Ready(Ok((Some(a), Some(b)))),
            (Poll::Ready(Err(a)), _) => Poll::Ready(Ok((Some(a), None))),
            (_, Poll::Ready(Err(b))) => Poll::Ready(Ok((None, Some(b)))),
            _ => {
                let stuck = forth.rest.is_some() || back.rest.is_some();
                while stuck && look.as_mut().poll(cx).is_ready() {
                    look.as_mut().reset(tokio::time::Instant::now() + STUCK);
                    if forth.rest.is_some() && standing(first.tcp()).over {
                        return Poll::Ready(Ok((Some(Failure::Read(End::Reset)), None)));
                    }
                    if back.rest.is_some() && standing(second.tcp()).over {
                        return Poll::Ready(Ok((None, Some(Failure::Read(End::Reset)))));
                    }
                }
                let (tcp, sent) = match network.leg {
                    Side::First => (first.tcp(), back.sent()),
                    Side::Second => (second.tcp(), forth.sent()),
                };
                silence.poll_over(tick.as_mut(), cx, tcp, sent).map(|()| Err(End::TimedOut))
            }
        }
    });
    let end = match stopped.await {
        Err(end) => end,
        Ok((None, None)) => End::Closed,
        // Neither leg exists any more.
        Ok((Some(Failure::Write { .. }), Some(Failure::Write { .. }))) => End::Reset,
        Ok((Some(Failure::Read(end)), _)) => last_words(&mut forth, None, first, second, cut).await.unwrap_or(end),
        Ok((_, Some(Failure::Read(end)))) => last_words(&mut back, None, second, first, cut).await.unwrap_or(end),
        Ok((Some(Failure::Write { had_ended }), None)) => {
            last_words(&mut back, Some(had_ended), second, first, cut).await.unwrap_or(End::Reset)
        }
        Ok((None, Some(Failure::Write { had_ended }))) => {
            last_words(&mut forth, Some(had_ended), first, second, cut).await.unwrap_or(End::Reset)
        }
    };
    if end == End::Closed {
        end_on_close(first.tcp());
        end_on_close(second.tcp());
    }
    Carried { end, forth: forth.bytes, back: back.bytes }
}

/// Delivers to `to` what the failed leg `from` had sent, and waits until it was acknowledged, because the reset that
/// follows would discard it. `had_ended`: whether an end that is still read is genuine; `None`: everything was read
/// already. Returns how the connection ended if it was cut meanwhile. Gives up after [`PATIENCE`] on a reader that
/// accepts nothing.
async fn last_words(
    flow: &mut Flow<'_>,
    had_ended: Option<bool>,
    from: &mut impl Leg,
    to: &mut impl Leg,
    cut: &Cut,
) -> Option<End> {
    flow.no_end = had_ended == Some(false);
    let mut read = had_ended.is_none() || flow.state == State::Ended;
    let begun = Instant::now();
    let (mut progress, mut at) = ((flow.bytes, usize::MAX), begun);
    let mut pause = Duration::from_millis(1);
    while at.elapsed() < PATIENCE && begun.elapsed() < LAST_WORDS {
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
