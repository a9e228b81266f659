//! Bytes both ways between two legs, and faithfulness at the end: FIN for FIN, reset for reset, and a TLS stream that is cut
//! in the middle never looks like a clean end.
//!
//! An idle connection holds no buffer: what is read goes through one buffer a thread, and only what the other leg does
//! not take at once is kept.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::cut::Cut;

/// Bytes moved at once: four TLS records.
const CHUNK: usize = 64 * 1024;
/// Chunks moved in one direction before others get their turn.
const TURN: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into_boxed_slice());
}

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

impl Leg for tokio_rustls::client::TlsStream<TcpStream> {
    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
    }
}

impl Leg for tokio_rustls::server::TlsStream<TcpStream> {
    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
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
    rest: Vec<u8>,
    taken: usize,
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
        Self { rest: Vec::new(), taken: 0, state, unflushed: false, bytes: 0, counter }
    }

    /// Moves what can be moved. Ready when this direction has ended.
    fn poll(&mut self, cx: &mut Context<'_>, from: &mut impl Leg, to: &mut impl Leg) -> Poll<Result<(), Failure>> {
        for _ in 0..TURN {
            while self.taken < self.rest.len() {
                let n = match Pin::new(&mut *to).poll_write(cx, &self.rest[self.taken..]) {
                    Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Err(Failure::Reset)),
                    Poll::Ready(Ok(n)) => n,
                    Poll::Pending => return Poll::Pending,
                };
                self.taken += n;
                self.unflushed = true;
            }
            if !self.rest.is_empty() {
                self.rest = Vec::new();
                self.taken = 0;
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
                Poll::Pending => {
                    if self.unflushed {
                        match Pin::new(&mut *to).poll_flush(cx) {
                            Poll::Ready(Ok(())) => self.unflushed = false,
                            Poll::Ready(Err(_)) => return Poll::Ready(Err(Failure::Reset)),
                            Poll::Pending => {}
                        }
                    }
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads once and passes on what the other leg takes.
    fn step(&mut self, cx: &mut Context<'_>, from: &mut impl Leg, to: &mut impl Leg) -> Poll<Result<(), Failure>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            match Pin::new(&mut *from).poll_read(cx, &mut buffer) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof => {
                    return Poll::Ready(Err(Failure::Truncated));
                }
                Poll::Ready(Err(_)) => return Poll::Ready(Err(Failure::Reset)),
                Poll::Ready(Ok(())) => {}
            }
            let read = buffer.filled();
            if read.is_empty() {
                self.state = State::Ending;
                return Poll::Ready(Ok(()));
            }
            self.bytes += read.len() as u64;
            self.counter.inc_by(read.len() as u64);
            let taken = match Pin::new(&mut *to).poll_write(cx, read) {
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Err(Failure::Reset)),
                Poll::Ready(Ok(n)) => n,
                Poll::Pending => 0,
            };
            self.unflushed |= taken > 0;
            if taken < read.len() {
                self.rest = read[taken..].to_vec();
            }
            Poll::Ready(Ok(()))
        })
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
