//! A packet capture on a workload's links that answers one question: were these bytes on the wire?

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use countersign_redirect::netns::NetNs;

/// A running capture.
pub struct Capture {
    stop: Arc<AtomicBool>,
    packets: Arc<AtomicU64>,
    hits: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// Result of a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Number of packets on the links, except loopback.
    pub packets: u64,
    /// Number of packets that contained the bytes.
    pub hits: u64,
}

impl Capture {
    /// Starts looking for `needle` on every link of a namespace except its loopback.
    pub fn start(ns: &NetNs, needle: &[u8]) -> io::Result<Self> {
        let socket = ns.run(super::open)?;
        let (stop, packets, hits) =
            (Arc::new(AtomicBool::new(false)), Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let thread = std::thread::spawn({
            let (stop, packets, hits, needle) = (stop.clone(), packets.clone(), hits.clone(), needle.to_vec());
            move || {
                let look = |frame: &[u8]| {
                    packets.fetch_add(1, Ordering::Relaxed);
                    if frame.windows(needle.len()).any(|w| w == needle) {
                        hits.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                };
                // A capture that fails has seen too few packets, which its checks notice.
                let _ = super::frames(&socket, || stop.load(Ordering::Relaxed), look);
            }
        });
        Ok(Self { stop, packets, hits, thread: Some(thread) })
    }

    /// Stops the capture and returns its result.
    pub fn stop(mut self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        Seen { packets: self.packets.load(Ordering::Relaxed), hits: self.hits.load(Ordering::Relaxed) }
    }
}
