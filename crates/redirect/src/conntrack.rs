//! What the kernel remembers of connections.
//!
//! NAT judges the first packet of a connection alone: one that is older than the rules goes on as it was.

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// `NFNL_SUBSYS_CTNETLINK` and its `IPCTNL_MSG_CT_DELETE` (`linux/netfilter/nfnetlink_conntrack.h`).
const DELETE: u16 = 1 << 8 | 2;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLMSG_ERROR: u16 = 2;

/// Forgets every connection of this network namespace. What is open goes on only if the rules let it through as if it were
/// new: they see its next packet as a first one, and one that they send to the sidecar is answered with a reset, for the sidecar
/// does not know it.
///
/// # Errors
/// The kernel's own, `EOPNOTSUPP` or `EPROTONOSUPPORT` where it has no conntrack over netlink.
pub fn forget_all() -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    // Length, type, flags, sequence and sender (netlink(7)), then nfnetlink's family (both), version and resource. Without a
    // tuple all of them are meant.
    let head = [20_u32.to_ne_bytes(), 1_u32.to_ne_bytes(), 0_u32.to_ne_bytes()];
    let flags = (NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes();
    let message = [&head[0][..], &DELETE.to_ne_bytes(), &flags, &head[1], &head[2], &[0; 4]].concat();
    socket.send(&message, 0)?;
    let mut buffer = Vec::with_capacity(4_096);
    socket.recv(&mut buffer, 0)?;
    let kind = buffer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    let code = buffer.get(16..20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "an answer that is none")),
    }
}
