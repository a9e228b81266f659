//! Accepts connections on Unix sockets, with the kernel's credentials for each caller and bounds per local user.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::transport::server::Connected;

use crate::accept::Door;
use crate::admission::{Admission, Limits, LocalSource, Seat};
use crate::grpc::{PREFACE, PREFACE_TIMEOUT, Watched};
use crate::peer::UnixPeer;
use crate::transport::{Incoming, bind_unix, peer_credentials};
use crate::unix_authority;

/// Most connections that have not sent the HTTP/2 preface yet, in total and per user.
const SILENT: usize = 256;
const SILENT_PER_USER: usize = 64;
/// Most connections that have sent it, if there are enough descriptors: 2,000 sidecars with two channels each.
const SPEAKING: usize = 4_096;
/// Most descriptors per connection: its socket, the caller's pidfd, and files in `/proc` that are read meanwhile.
const DESCRIPTORS_EACH: usize = 4;
/// Interval between two checks whether the socket's file is still ours.
const LOOK: Duration = Duration::from_secs(1);

/// An accepted Unix connection with its caller.
pub struct UnixIo {
    stream: UnixStream,
    peer: UnixPeer,
    filter: unix_authority::Filter,
    watched: Watched,
}

impl AsyncRead for UnixIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.watched.check(cx)?;
        let mut bytes = [0; 4096];
        while self.filter.out().is_empty() {
            let mut fresh = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut fresh))?;
            if fresh.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.filter.push(fresh.filled());
        }
        let out = self.filter.out();
        while buf.remaining() > 0 && !out.is_empty() {
            let (front, _) = out.as_slices();
            let count = front.len().min(buf.remaining());
            buf.put_slice(&front[..count]);
            out.drain(..count);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for UnixIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.watched.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for UnixIo {
    type ConnectInfo = UnixPeer;

    fn connect_info(&self) -> UnixPeer {
        self.peer.clone()
    }
}

/// Accepts connections on a Unix socket with the kernel's credentials for each caller. If the socket's file is deleted,
/// it is bound again. Runs until the returned stream is dropped, then removes the file.
pub fn accept_unix(listener: UnixListener, path: PathBuf, mode: u32) -> Incoming<UnixIo> {
    accept_bounded(listener, path, mode, descriptors())
}

/// [`accept_unix`] with an explicit number of descriptors.
fn accept_bounded(listener: UnixListener, path: PathBuf, mode: u32, descriptors: usize) -> Incoming<UnixIo> {
    let (tx, rx) = mpsc::channel(64);
    tokio::spawn(async move {
        let most = (descriptors / DESCRIPTORS_EACH).min(SPEAKING);
        let limits = |name, total: usize, per_group: usize| Limits { name, total, per_group };
        let silent = SILENT.min(most / 4);
        let silent = Admission::new(limits("silent connections", silent, SILENT_PER_USER.min(silent / 2)));
        let speaking = Admission::new(limits("local connections", most, most / 2));
        let mut door = Door::new(listener);
        let mut inode = inode_of(&path);
        let mut look = tokio::time::interval(LOOK);
        let mut openings = JoinSet::new();
        loop {
            while openings.try_join_next().is_some() {}
            tokio::select! {
                (stream, _) = door.next(|| silent.shed() || speaking.shed()) => {
                    // Read first, while the caller is most likely still alive.
                    match peer_credentials(&stream) {
                        Ok(peer) => {
                            let source = LocalSource { uid: peer.uid, pid: peer.pid };
                            let seat = silent.admit(source);
                            openings.spawn(open(stream, peer, seat, speaking.clone(), tx.clone()));
                        }
                        Err(error) => tracing::debug!(%error, "a caller that the kernel does not know; dropped"),
                    }
                },
                _ = look.tick() => if inode_of(&path) != inode {
                    match bind_unix(&path, mode) {
                        Ok(fresh) => {
                            tracing::warn!(path = %path.display(), "the socket's file was gone; bound it again");
                            door.replace(fresh);
                            inode = inode_of(&path);
                        }
                        Err(error) => tracing::error!(path = %path.display(), %error, "the socket's file is gone and cannot be bound again"),
                    }
                },
                () = tx.closed() => break,
            }
        }
        if inode_of(&path) == inode {
            // A file that stays is replaced by the next role that listens here.
            let _ = std::fs::remove_file(&path);
        }
    });
    Incoming::new(rx)
}

/// Waits for a caller's preface and passes the connection on. Until then it only holds a seat among the silent ones.
async fn open(
    stream: UnixStream,
    peer: UnixPeer,
    seat: Seat,
    speaking: Admission<LocalSource>,
    tx: mpsc::Sender<io::Result<UnixIo>>,
) {
    let (uid, pid) = (peer.uid, peer.pid);
    let mut filter = unix_authority::Filter::default();
    let first = tokio::select! {
        first = tokio::time::timeout(PREFACE_TIMEOUT, preface(&stream, &mut filter)) => first,
        () = seat.taken_away() => return,
    };
    match first {
        Ok(Ok(())) => {
            let watched = Watched::new(speaking.admit(LocalSource { uid, pid }), None);
            drop(seat);
            let _ = tx.send(Ok(UnixIo { stream, peer, filter, watched })).await;
        }
        Ok(Err(error)) => tracing::debug!(uid, pid, %error, "a caller left before it spoke HTTP/2"),
        Err(_) => tracing::debug!(uid, pid, "a caller was silent for {PREFACE_TIMEOUT:?}; dropped"),
    }
}

/// Reads the client's preface, and what arrives with it.
async fn preface(stream: &UnixStream, filter: &mut unix_authority::Filter) -> io::Result<()> {
    let mut bytes = [0; 512];
    while filter.out().len() < PREFACE.len() {
        stream.readable().await?;
        match stream.try_read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filter.push(&bytes[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if !filter.out().iter().zip(PREFACE).all(|(got, expected)| got == expected) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "this is not HTTP/2"));
        }
    }
    Ok(())
}

/// Number of descriptors that this process may open.
fn descriptors() -> usize {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1_024, 1_024));
    usize::try_from(soft).unwrap_or(usize::MAX)
}

fn inode_of(path: &Path) -> Option<u64> {
    std::fs::symlink_metadata(path).ok().map(|m| std::os::unix::fs::MetadataExt::ino(&m))
}

#[cfg(test)]
mod tests;
