//! One direction of a pair: what is read from one leg is written to the other, and then its end.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use prometheus_client::metrics::counter::Counter;
use tokio::io::ReadBuf;

use crate::buffer::{self, Buffer};
use crate::copy::{End, Leg};

/// Chunks moved in one direction before others get their turn.
const TURN: usize = 16;

/// One direction.
pub struct Flow<'a> {
    /// What was read and not taken yet.
    rest: Option<Buffer>,
    state: State,
    /// Something was written that may still be on its way through the TLS layer.
    unflushed: bool,
    /// The leg that is read was reset while it was written to, before it had ended: an end that is read now is none.
    pub no_end: bool,
    /// What was read so far.
    pub bytes: u64,
    counter: &'a Counter,
}

#[derive(PartialEq)]
enum State {
    Open,
    Ending,
    Ended,
}

/// Why a flow stopped.
#[derive(Clone, Copy)]
pub enum Failure {
    /// The leg that is read is over without an end. All that came before was passed on.
    Read(End),
    /// The leg that is written to is over. What it said before may still be there to be read, and so may its end if it had
    /// ended before.
    Write { had_ended: bool },
}

impl Failure {
    /// Of an error that ended the leg that is written to. For a reset after the other side's FIN, Linux says EPIPE; for one
    /// without it ECONNRESET (`tcp_reset`).
    pub fn of_write(error: &io::Error) -> Self {
        Self::Write { had_ended: error.kind() == io::ErrorKind::BrokenPipe }
    }
}

impl<'a> Flow<'a> {
    /// Nothing has moved yet. `ended`: the leg that is read has said its last byte already.
    pub fn new(counter: &'a Counter, ended: bool) -> Self {
        let state = if ended { State::Ending } else { State::Open };
        Self { rest: None, state, unflushed: false, no_end: false, bytes: 0, counter }
    }

    /// What was sent, its end as one byte.
    pub fn sent(&self) -> u64 {
        self.bytes + u64::from(self.state == State::Ended)
    }

    /// Whether it has ended: the end was read, and passed on.
    pub fn has_ended(&self) -> bool {
        self.state == State::Ended
    }

    /// Whether something waits for room or for its turn: then it does not read, and hears nothing of the leg that it reads.
    pub fn is_stuck(&self) -> bool {
        self.rest.is_some() || self.unflushed
    }

    /// Bytes of memory that wait for room.
    #[cfg(test)]
    pub fn kept(&self) -> usize {
        self.rest.as_ref().map_or(0, Buffer::held)
    }

    /// Moves what can be moved. Ready when this direction has ended.
    pub fn poll(&mut self, cx: &mut Context<'_>, from: &mut impl Leg, to: &mut impl Leg) -> Poll<Result<(), Failure>> {
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
                        // The other side has gone already: nothing is lost, for all was delivered.
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
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads once and passes on what the other leg takes.
    fn step(&mut self, cx: &mut Context<'_>, from: &mut impl Leg, to: &mut impl Leg) -> Poll<Result<(), Failure>> {
        let mut buffer = Buffer::lend();
        let mut read = ReadBuf::new(&mut buffer.room()[..buffer::chunk()]);
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
            buffer.keep();
            self.rest = Some(buffer);
        }
        Poll::Ready(Ok(()))
    }
}
