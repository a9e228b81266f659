//! A packet capture on a workload's link that only answers one question: has anybody seen these bytes?

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use countersign_redirect::netns::NetNs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket};
use std::os::fd::AsFd;

/// Longest frame, offloads included, in bytes.
const MAX_FRAME: usize = 256 * 1024;

/// A running capture.
pub struct Capture {
    stop: Arc<AtomicBool>,
    packets: Arc<AtomicU64>,
    hits: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// What it saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Packets on the link, loopback not among them.
    pub packets: u64,
    /// Packets that held the bytes.
    pub hits: u64,
}

impl Capture {
    /// Begins to look for `needle` on every link of a namespace but its loopback.
    pub fn start(ns: &NetNs, needle: &[u8]) -> io::Result<Self> {
        let socket = ns.run(|| {
            let all = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
            Ok(all)
        })?;
        let (stop, packets, hits) =
            (Arc::new(AtomicBool::new(false)), Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let thread = std::thread::spawn({
            let (stop, packets, hits, needle) = (stop.clone(), packets.clone(), hits.clone(), needle.to_vec());
            move || look(&socket, &needle, &stop, &packets, &hits)
        });
        Ok(Self { stop, packets, hits, thread: Some(thread) })
    }

    /// Ends it.
    pub fn stop(mut self) -> Seen {
        // What was sent last may still be on its way through the socket: one more look after the stop.
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        Seen { packets: self.packets.load(Ordering::Relaxed), hits: self.hits.load(Ordering::Relaxed) }
    }
}

fn look(socket: &OwnedFd, needle: &[u8], stop: &AtomicBool, packets: &AtomicU64, hits: &AtomicU64) {
    let mut frame = vec![0; MAX_FRAME];
    loop {
        let last = stop.load(Ordering::Relaxed);
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        let wait: PollTimeout = 50u8.into();
        match poll(&mut fds, wait) {
            Ok(0) if last => return,
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(_) => return,
        }
        let Ok(n) = recv(socket.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT) else { continue };
        let frame = &frame[..n];
        // The loopback's frames have no addresses; on a real link nobody has the address zero.
        if frame.starts_with(&[0; 12]) {
            continue;
        }
        packets.fetch_add(1, Ordering::Relaxed);
        if frame.windows(needle.len()).any(|w| w == needle) {
            hits.fetch_add(1, Ordering::Relaxed);
        }
    }
}
