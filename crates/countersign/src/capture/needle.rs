//! A packet capture on a workload's link that only answers one question: has anybody seen these bytes?

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
                // A capture that broke off has seen too few packets, and is judged by that.
                let _ = super::frames(&socket, || stop.load(Ordering::Relaxed), look);
            }
        });
        Ok(Self { stop, packets, hits, thread: Some(thread) })
    }

    /// Ends it.
    pub fn stop(mut self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        Seen { packets: self.packets.load(Ordering::Relaxed), hits: self.hits.load(Ordering::Relaxed) }
    }
}
