//! What the kernel knows about a TCP connection and no safe interface offers: how many bytes the peer has not
//! acknowledged, and how long it has been silent.

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
    /// Whether the connection is over in both directions: reset or timed out.
    pub over: bool,
}

/// Queries the state of a socket. A socket that cannot be queried counts as over.
pub fn standing(tcp: &TcpStream) -> Standing {
    let over = Standing { unacknowledged: 0, silent: Duration::ZERO, over: true };
    let (Some(unacknowledged), Some(info)) = (queued(tcp), info(tcp)) else { return over };
    Standing {
        unacknowledged,
        silent: Duration::from_millis(info.tcpi_last_ack_recv.into()),
        // 7 is TCP_CLOSE (include/net/tcp_states.h).
        over: info.tcpi_state == 7,
    }
}

/// Unacknowledged bytes by SIOCOUTQ, which has the same number as TIOCOUTQ (tcp(7)); `None` if the call fails.
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
        assert!(ours.read(&mut [0]).await.is_err());
        assert!(standing(&ours).over);
    }
}
