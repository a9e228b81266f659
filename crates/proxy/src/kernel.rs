//! What the kernel knows about a TCP connection and no safe interface offers: how many bytes the peer has not
//! acknowledged, and how long it has been silent.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::libc;
use tokio::net::TcpStream;

/// State of a TCP connection at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Bytes that the peer has not acknowledged, including our FIN as one.
    pub unacknowledged: usize,
    /// Time since the peer last acknowledged anything, including probes.
    pub silent: Duration,
    /// Something was sent, data or probes of a closed window, that the peer has not answered yet.
    pub unanswered: bool,
    /// The connection is over in both directions: by an error, or because each side has ended and heard of the other's end.
    /// What was received before may still be there to be read.
    pub over: bool,
}

/// Queries the state of a socket. A socket that cannot be queried counts as over.
pub fn standing(tcp: &TcpStream) -> Standing {
    let over = Standing { unacknowledged: 0, silent: Duration::ZERO, unanswered: false, over: true };
    let (Some(unacknowledged), Some(info)) = (queued(tcp), info(tcp)) else { return over };
    Standing {
        unacknowledged,
        silent: Duration::from_millis(info.tcpi_last_ack_recv.into()),
        // Data counts if it was sent, perhaps again, after the peer was last heard: one that has no room answers with what it
        // has acknowledged before. The number of probes goes back to 0 with each answer. One may be lost, or remain without an
        // answer because it came within half a second of another (tcp_invalid_ratelimit), so one proves nothing.
        unanswered: info.tcpi_probes > 1 || info.tcpi_unacked > 0 && info.tcpi_last_data_sent < info.tcpi_last_ack_recv,
        // 7 is TCP_CLOSE (include/net/tcp_states.h).
        over: info.tcpi_state == 7,
    }
}

/// The error by which a connection has ended, if it has. The kernel tells it once: a read or write that comes later does not
/// meet it, and a read that finds nothing more looks as if the peer had ended.
pub fn ended_by(tcp: &TcpStream) -> Option<io::Error> {
    // The state is asked first: a connection that lives may have an error too, of a router that could not pass a packet on.
    if standing(tcp).over { tcp.take_error().ok().flatten() } else { None }
}

/// SIOCOUTQ, which has TIOCOUTQ's number (tcp(7)).
#[allow(unsafe_code)]
fn queued(tcp: &TcpStream) -> Option<usize> {
    let mut queued: libc::c_int = 0;
    // SAFETY: the descriptor is open for as long as `tcp` is borrowed, and the request writes one int, which is ours.
    let done = unsafe { libc::ioctl(tcp.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) };
    (done == 0).then(|| usize::try_from(queued).unwrap_or(0))
}

#[allow(unsafe_code)]
fn info(tcp: &TcpStream) -> Option<libc::tcp_info> {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).ok()?;
    // SAFETY: the descriptor is open for as long as `tcp` is borrowed; the kernel writes at most `length` bytes, which is the
    // size of `info`. All its fields are integers, for which the zeros of what the kernel leaves out are values.
    unsafe {
        let done = libc::getsockopt(
            tcp.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        );
        (done == 0).then(|| info.assume_init())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn what_is_not_acknowledged_is_seen_and_so_is_a_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (mut ours, theirs) =
            tokio::join!(async { TcpStream::connect(listener.local_addr().unwrap()).await.unwrap() }, async {
                listener.accept().await.unwrap().0
            });
        assert!(!standing(&ours).over && standing(&ours).unacknowledged == 0);
        // More than both buffers hold, because the peer reads nothing.
        while let Ok(Ok(())) = tokio::time::timeout(Duration::from_millis(200), ours.write_all(&vec![0; 1 << 20])).await
        {
        }
        assert!(standing(&ours).unacknowledged > 0);
        crate::copy::reset_on_close(&theirs);
        drop(theirs);
        // Asked without a read, as a flow does that has no room for what it would read.
        let error = loop {
            match ended_by(&ours) {
                Some(error) => break error,
                None => tokio::task::yield_now().await,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(standing(&ours).over && ended_by(&ours).is_none());
    }

    #[tokio::test]
    async fn what_both_sides_have_ended_is_over_and_has_not_failed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (ours, theirs) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (mut ours, mut theirs) = (ours.unwrap(), theirs.unwrap().0);
        theirs.write_all(b"unread").await.unwrap();
        ours.shutdown().await.unwrap();
        assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0);
        theirs.shutdown().await.unwrap();
        while !standing(&ours).over {
            tokio::task::yield_now().await;
        }
        assert!(ended_by(&ours).is_none());
        let mut heard = vec![];
        ours.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"unread");
    }
}
