//! Packet captures: `needle` checks whether given bytes were on the wire; `pcap` writes the file format of packet
//! tools; `countersign capture` (used by `verify` in a pod) prints each frame.

mod needle;
pub mod pcap;

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

pub use needle::Capture;

/// Longest frame, including offloads, in bytes.
pub const MAX_FRAME: usize = 256 * 1024;

/// Opens a socket that receives every frame of the current network namespace.
fn open() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?)
}

/// Passes each frame on a link, except loopback, to `seen` until `stop` returns true and nothing is left, or `seen`
/// fails.
fn frames(
    socket: &OwnedFd,
    mut stop: impl FnMut() -> bool,
    mut seen: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut frame = vec![0; MAX_FRAME];
    loop {
        // The last frames may still be in the socket, so it is read once more after the stop.
        let last = stop();
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        let wait: PollTimeout = 50u8.into();
        match poll(&mut fds, wait) {
            Ok(0) if last => return Ok(()),
            Ok(0) | Err(Errno::EINTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let Ok(n) = recv(socket.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT) else { continue };
        // Frames on loopback have zero addresses; no device on a real link has one.
        if !frame[..n].starts_with(&[0; 12]) {
            seen(&frame[..n])?;
        }
    }
}

/// Output of `countersign capture`: first `Listening`, then one line per frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// No frame is missed from here on.
    Listening,
    /// One frame of a link.
    Frame {
        /// Time of capture, microseconds since 1970.
        at_us: u64,
        /// Bytes of the frame, in base64.
        bytes: String,
    },
}

impl Line {
    fn print(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, self)?;
        out.write_all(b"\n")?;
        out.flush()
    }

    /// Parses printed lines and returns their frames.
    pub fn frames(text: &str) -> Vec<pcap::Frame> {
        let frame = |line: &str| match serde_json::from_str(line).ok()? {
            Self::Frame { at_us, bytes } => Some(pcap::Frame { at_us, bytes: STANDARD.decode(bytes).ok()? }),
            Self::Listening => None,
        };
        text.lines().filter_map(frame).collect()
    }
}

/// Prints every frame on the links of this network namespace until the process ends. Needs `CAP_NET_RAW`.
pub fn run() -> Result<()> {
    let socket = open().context("cannot capture packets; it needs CAP_NET_RAW")?;
    Line::Listening.print()?;
    let print = |frame: &[u8]| {
        let at_us = u64::try_from(OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000).unwrap_or(0);
        Line::Frame { at_us, bytes: STANDARD.encode(frame) }.print()
    };
    Ok(frames(&socket, || crate::stdout::wait(Duration::ZERO).is_err(), print)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printed_frames_are_read_back_and_anything_else_is_passed_over() {
        let line = Line::Frame { at_us: 7, bytes: STANDARD.encode([1, 2, 3]) };
        let text = format!(
            "{}\n\"listening\"\nnoise\n{{\"frame\":{{\"at_us\":1,\"bytes\":\"!\"}}}}\n",
            serde_json::to_string(&line).unwrap()
        );
        assert_eq!(Line::frames(&text), [pcap::Frame { at_us: 7, bytes: vec![1, 2, 3] }]);
        assert_eq!(serde_json::to_string(&Line::Listening).unwrap(), "\"listening\"");
    }
}
