//! Bytes both ways between two legs, and faithfulness at the end: FIN for FIN, reset for reset, and a TLS stream that is cut
//! in the middle never looks like a clean end.
//!
//! An idle connection holds no buffer: what is read goes through a buffer that the thread lends, and only one with bytes
//! that the other leg does not take at once is kept. Nothing more is read before they are gone.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::buffer::{Buffer, CHUNK};
use crate::cut::Cut;
use crate::tls::{Engine, TlsStream};

/// Chunks moved in one direction before others get their turn.
const TURN: usize = 16;

/// One side of a connection.
pub trait Leg: AsyncRead + AsyncWrite + Unpin {
    /// The socket below.
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
    /// Both sides finished.
    Closed,
    /// One side was reset, and so was the other.
    Reset,
    /// A TLS stream was cut without its end being announced; the other side was reset.
    Truncated,
    /// The authority behind the peer was revoked; both sides were reset.
    Revoked,
    /// Still open when the drain was over; both sides were reset.
    Drained,
}

impl End {
    /// Its name in the access log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Reset => "reset",
            Self::Truncated => "truncated",
            Self::Revoked => "revoked",
            Self::Drained => "drained",
        }
    }
}

/// Makes the close of this socket a reset, whoever closes it: us, or the kernel when this process is killed.
pub fn reset_on_close(tcp: &TcpStream) {
    // It cannot fail on a TCP socket, and if it did the close would only be gentler.
    let _ = socket2::SockRef::from(tcp).set_linger(Some(std::time::Duration::ZERO));
}

fn end_on_close(tcp: &TcpStream) {
    let _ = socket2::SockRef::from(tcp).set_linger(None);
}

/// One direction.
struct Flow<'a> {
    /// What was read and not taken yet.
    rest: Option<Buffer>,
    state: State,
    /// Something was written that may still be on its way through the TLS layer.
    unflushed: bool,
    bytes: u64,
    counter: &'a Counter,
}

#[derive(PartialEq)]
enum State {
    Open,
    Ending,
    Ended,
}

enum Failure {
    Reset,
    Truncated,
}

impl<'a> Flow<'a> {
    fn new(counter: &'a Counter, ended: bool) -> Self {
        let state = if ended { State::Ending } else { State::Open };
        Self { rest: None, state, unflushed: false, bytes: 0, counter }
    }

    /// Moves what can be moved. Ready when this direction has ended.
    fn poll(&mut self, cx: &mut Context<'_>, from: &mut impl Leg, to: &mut impl Leg) -> Poll<Result<(), Failure>> {
        for _ in 0..TURN {
            if let Some(mut rest) = self.rest.take() {
                while !rest.content().is_empty() {
                    match Pin::new(&mut *to).poll_write(cx, rest.content()) {
                        Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Err(Failure::Reset)),
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
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(Failure::Reset)),
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
                        // The other side has gone already: nothing is lost, for all was delivered.
                        Poll::Ready(Err(e)) if e.kind() == io::ErrorKind::NotConnected => {
                            self.state = State::Ended;
                            Poll::Ready(Ok(()))
                        }
                        Poll::Ready(Err(_)) => Poll::Ready(Err(Failure::Reset)),
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
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads once and passes on what the other leg takes.
    fn step(&mut self, cx: &mut Context<'_>, from: &mut impl Leg, to: &mut impl Leg) -> Poll<Result<(), Failure>> {
        let mut buffer = Buffer::lend();
        let mut read = ReadBuf::new(&mut buffer.room()[..CHUNK]);
        match Pin::new(&mut *from).poll_read(cx, &mut read) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Poll::Ready(Err(Failure::Truncated));
            }
            Poll::Ready(Err(_)) => return Poll::Ready(Err(Failure::Reset)),
            Poll::Ready(Ok(())) => {}
        }
        let n = read.filled().len();
        if n == 0 {
            self.state = State::Ending;
            return Poll::Ready(Ok(()));
        }
        buffer.extend(n);
        self.bytes += n as u64;
        self.counter.inc_by(n as u64);
        match Pin::new(&mut *to).poll_write(cx, buffer.content()) {
            Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Err(Failure::Reset)),
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

/// What was carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carried {
    /// How it ended.
    pub end: End,
    /// From the first leg to the second.
    pub forth: u64,
    /// From the second leg to the first.
    pub back: u64,
}

/// Carries bytes between two legs until both directions have ended, one fails, or `cut` says how to end it.
/// `first_ended`: the first leg has said its last byte already. Afterwards the legs only need to be dropped.
pub async fn carry(
    first: &mut impl Leg,
    second: &mut impl Leg,
    first_ended: bool,
    counters: (&Counter, &Counter),
    cut: &Cut,
) -> Carried {
    // Until both sides have finished, a close is a reset: a sidecar that dies must not look like a clean end.
    reset_on_close(first.tcp());
    reset_on_close(second.tcp());
    let mut forth = Flow::new(counters.0, first_ended);
    let mut back = Flow::new(counters.1, false);
    let end = std::future::poll_fn(|cx| {
        if let Some(end) = cut.poll(cx) {
            return Poll::Ready(end);
        }
        let a = if forth.state == State::Ended { Poll::Ready(Ok(())) } else { forth.poll(cx, first, second) };
        let b = if back.state == State::Ended { Poll::Ready(Ok(())) } else { back.poll(cx, second, first) };
        match (a, b) {
            (Poll::Ready(Err(Failure::Reset)), _) | (_, Poll::Ready(Err(Failure::Reset))) => Poll::Ready(End::Reset),
            (Poll::Ready(Err(Failure::Truncated)), _) | (_, Poll::Ready(Err(Failure::Truncated))) => {
                Poll::Ready(End::Truncated)
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(End::Closed),
            _ => Poll::Pending,
        }
    });
    let end = end.await;
    let carried = Carried { end, forth: forth.bytes, back: back.bytes };
    if end == End::Closed {
        end_on_close(first.tcp());
        end_on_close(second.tcp());
    }
    carried
}
