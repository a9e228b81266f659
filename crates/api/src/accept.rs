//! An accept loop that never stops, whatever error accepting a connection returns.

use std::fs::File;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use nix::libc::{EMFILE, ENFILE, ENOBUFS, ENOMEM};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::admission::count_dropped;

/// Pause after an accept that fails for a reason that a moment may mend.
const PAUSE: Duration = Duration::from_millis(100);
/// Shortest interval between two log lines about failed accepts.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// A listening socket, TCP or Unix.
pub trait Listener: Send + Sync {
    /// The type of an accepted connection.
    type Stream: Send;
    /// The type of the peer's address.
    type Address: Send;
    /// The next connection. Must be cancel safe.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Self::Address)>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;
    type Address = std::net::SocketAddr;

    fn accept(&self) -> impl Future<Output = io::Result<(TcpStream, Self::Address)>> + Send {
        self.accept()
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;
    type Address = tokio::net::unix::SocketAddr;

    fn accept(&self) -> impl Future<Output = io::Result<(UnixStream, Self::Address)>> + Send {
        self.accept()
    }
}

/// A listener with a spare descriptor. When descriptors run out, the spare is closed to accept the next connection and
/// close it: its client learns at once that there is no room, and the backlog does not fill with waiting clients.
pub struct Door<L> {
    listener: L,
    reserve: Option<File>,
    failed: u64,
    said: Option<Instant>,
}

impl<L: Listener> Door<L> {
    /// Opens the spare descriptor.
    pub fn new(listener: L) -> Self {
        Self { listener, reserve: spare(), failed: 0, said: None }
    }

    /// Switches to another listening socket.
    pub fn replace(&mut self, listener: L) {
        self.listener = listener;
    }

    /// The next connection. `shed` is called when descriptors or memory have run out, so that the caller may close
    /// something; it returns whether it did. Cancel safe.
    pub async fn next(&mut self, shed: impl Fn() -> bool) -> (L::Stream, L::Address) {
        loop {
            let error = match self.listener.accept().await {
                Ok(accepted) => {
                    if self.reserve.is_none() {
                        self.reserve = spare();
                    }
                    return accepted;
                }
                Err(error) => error,
            };
            match error.raw_os_error() {
                Some(EMFILE | ENFILE | ENOBUFS | ENOMEM) => {
                    self.say(&error);
                    let shed = shed();
                    if !self.turn_one_away() {
                        tokio::time::sleep(PAUSE).await;
                    } else if shed {
                        // The connection that was shed closes its descriptors in its own task.
                        tokio::task::yield_now().await;
                    }
                }
                // accept(2): a connection that was lost before it was accepted is not an error of the listener.
                _ if is_the_peers(&error) => {}
                _ => {
                    self.say(&error);
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Accepts one connection with the spare descriptor and closes it. `false`: no spare, or no connection waiting.
    fn turn_one_away(&mut self) -> bool {
        if self.reserve.take().is_none() {
            self.reserve = spare();
            return false;
        }
        let accepted = pin!(self.listener.accept()).poll(&mut Context::from_waker(Waker::noop()));
        let turned_away = matches!(accepted, std::task::Poll::Ready(Ok(_)));
        drop(accepted);
        if turned_away {
            count_dropped("accept", "descriptors");
        }
        self.reserve = spare();
        turned_away
    }

    fn say(&mut self, error: &io::Error) {
        self.failed += 1;
        if self.said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
            self.said = Some(Instant::now());
            let failed = std::mem::take(&mut self.failed);
            tracing::warn!(%error, failed, "cannot accept a connection; going on");
        }
    }
}

/// Whether an error of accept(2) concerns the connection and not the listener.
fn is_the_peers(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionReset, HostUnreachable, Interrupted, NetworkDown, NetworkUnreachable,
    };
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | Interrupted | HostUnreachable | NetworkDown | NetworkUnreachable
    ) || error.raw_os_error() == Some(nix::libc::EPROTO)
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}
