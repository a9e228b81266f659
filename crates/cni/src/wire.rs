//! What the plugin and the node's component say to each other over the component's Unix socket: one request, a JSON
//! object with the network namespace as a descriptor, and one answer. Both come from the same binary, but during an
//! update they may be of two versions: members that are not known are ignored.

use std::collections::BTreeSet;
use std::io::{self, IoSlice, Read, Write};
use std::net::{IpAddr, Shutdown};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;

use crate::kernel;
use crate::plugin::PodName;

/// Largest request and answer, in bytes.
const MAX_BYTES: usize = 16 * 1024;

/// What is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// Install the redirect.
    Add,
    /// Look whether it is in force.
    Check,
}

/// A request about one pod. Which rules its redirect has is not in it: that is what the API server says of the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// What is wanted.
    pub operation: Operation,
    /// The pod, as the runtime names it.
    pub pod: PodName,
    /// ID of its sandbox.
    pub container: String,
    /// Its resolvers, if the runtime says which.
    pub resolvers: Option<BTreeSet<IpAddr>>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// The pod is no business of ours.
    Nothing,
    /// The redirect is in force.
    InForce,
    /// Nothing was done, because the pod cannot be looked up.
    Unknown {
        /// The reason, escaped.
        why: String,
    },
    /// The pod's redirect is not in force.
    Failed {
        /// The reason, escaped.
        why: String,
    },
}

/// Sends a request and waits for the answer until `end`.
pub fn ask(mut stream: UnixStream, request: &Request, netns: BorrowedFd<'_>, end: Instant) -> io::Result<Answer> {
    let left = || {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::Error::from(io::ErrorKind::TimedOut)) } else { Ok(left) }
    };
    let text = serde_json::to_vec(request)?;
    stream.set_write_timeout(Some(left()?))?;
    let rights = [netns.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&rights)];
    let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&text)], &control, MsgFlags::MSG_NOSIGNAL, None)?;
    stream.write_all(text.get(sent..).unwrap_or_default())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = vec![];
    let mut buffer = [0; 4_096];
    loop {
        stream.set_read_timeout(Some(left()?))?;
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(buffer.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if answer.len() > MAX_BYTES {
            return Err(io::Error::other("the answer is too long"));
        }
    }
    Ok(serde_json::from_slice(&answer)?)
}

/// Receives a request, whole, with its network namespace. Bounded in size, not in time.
pub async fn receive(stream: &tokio::net::UnixStream) -> io::Result<(Request, OwnedFd)> {
    let (mut text, mut netns) = (vec![], None);
    let mut buffer = [0; 4_096];
    loop {
        stream.readable().await?;
        let received = stream.try_io(Interest::READABLE, || kernel::receive(stream.as_fd(), &mut buffer));
        let (n, descriptors) = match received {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            received => received?,
        };
        // The first counts; others are closed.
        netns = netns.or(descriptors.into_iter().next());
        if n == 0 {
            break;
        }
        text.extend_from_slice(buffer.get(..n).unwrap_or_default());
        if text.len() > MAX_BYTES {
            return Err(io::Error::other(format!("the request is longer than {MAX_BYTES} bytes")));
        }
    }
    let request = serde_json::from_slice(&text)?;
    netns.map(|netns| (request, netns)).ok_or_else(|| io::Error::other("the request has no network namespace"))
}

/// For fuzzing: parses a request and an answer.
#[cfg(fuzzing)]
pub fn parse(data: &[u8]) {
    let _ = serde_json::from_slice::<Request>(data);
    let _ = serde_json::from_slice::<Answer>(data);
}
