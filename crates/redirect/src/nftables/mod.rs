//! The redirect as one `inet` table of nf_tables, written in one transaction over netlink.

mod wire;

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::rules::{Hook, Match, Rule, Verdict};
use crate::{InstalledRule, Redirect, RedirectError};
use wire::{Batch, Expressions, Message, attributes};

/// Our table's name.
const TABLE: &str = "countersign";
/// Priority of destination NAT (netfilter's `NF_IP_PRI_NAT_DST`).
const DSTNAT: i32 = -100;
/// Largest answer that is read at once, in bytes.
const RECEIVE: usize = 256 * 1024;

fn chain_of(hook: Hook) -> &'static str {
    match hook {
        Hook::Output => "output",
        Hook::Prerouting => "prerouting",
    }
}

/// Puts the table in place of an earlier one, all or nothing.
pub fn install(redirect: &Redirect) -> Result<(), RedirectError> {
    let mut batch = Batch::new();
    // Adding, deleting and adding again in one transaction replaces the table whether or not it was there.
    batch.new_table(TABLE).delete_table(TABLE).new_table(TABLE);
    for hook in [Hook::Output, Hook::Prerouting] {
        batch.new_nat_chain(TABLE, chain_of(hook), hook, DSTNAT);
    }
    for rule in redirect.rules() {
        batch.new_rule(TABLE, chain_of(rule.hook), expressions(&rule), &rule.comment());
    }
    transact(batch)
}

/// Removes the table; one that is not there is fine.
pub fn remove() -> Result<(), RedirectError> {
    let mut batch = Batch::new();
    batch.new_table(TABLE).delete_table(TABLE);
    transact(batch)
}

/// Our rules as the kernel has them.
pub fn installed() -> Result<Vec<InstalledRule>, RedirectError> {
    let socket = open().map_err(from_kernel)?;
    socket.send(&Message::dump_rules(TABLE), 0).map_err(from_kernel)?;
    let mut found = vec![];
    loop {
        let mut buffer = Vec::with_capacity(RECEIVE);
        socket.recv(&mut buffer, 0).map_err(from_kernel)?;
        for message in wire::messages(&buffer) {
            match message {
                wire::Answer::Done => return Ok(found),
                wire::Answer::Error(0) => {}
                // The table is not there.
                wire::Answer::Error(code) if code == nix::libc::ENOENT => return Ok(vec![]),
                wire::Answer::Error(code) => return Err(from_kernel(io::Error::from_raw_os_error(code))),
                wire::Answer::Rule(attributes) => found.extend(wire::read_rule(attributes)),
            }
        }
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Sends a transaction and reads one acknowledgement a message.
fn transact(batch: Batch) -> Result<(), RedirectError> {
    let socket = open().map_err(from_kernel)?;
    let (bytes, mut expected) = batch.finish();
    socket.send(&bytes, 0).map_err(from_kernel)?;
    let mut first_error = None;
    while expected > 0 {
        let mut buffer = Vec::with_capacity(RECEIVE);
        socket.recv(&mut buffer, 0).map_err(from_kernel)?;
        for message in wire::messages(&buffer) {
            if let wire::Answer::Error(code) = message {
                expected = expected.saturating_sub(1);
                if code != 0 {
                    first_error.get_or_insert(code);
                    // A transaction that is refused as a whole is not answered message by message.
                    expected = 0;
                }
            }
        }
    }
    match first_error {
        None => Ok(()),
        Some(code) => Err(from_kernel(io::Error::from_raw_os_error(code))),
    }
}

fn from_kernel(error: io::Error) -> RedirectError {
    match error.raw_os_error() {
        Some(nix::libc::EPERM | nix::libc::EACCES) => RedirectError::NotPermitted,
        Some(
            nix::libc::EOPNOTSUPP
            | nix::libc::EPROTONOSUPPORT
            | nix::libc::ENOENT
            | nix::libc::EAFNOSUPPORT
            | nix::libc::EINVAL,
        ) => RedirectError::NoNftables(error),
        _ => RedirectError::Kernel(error),
    }
}

/// A rule as nf_tables' little machine runs it: load, compare, decide.
fn expressions(rule: &Rule) -> Expressions {
    let mut e = Expressions::new();
    match rule.matches {
        Match::Uid(uid) => e.meta(attributes::META_SKUID).equals(&uid.to_ne_bytes()),
        Match::Loopback => {
            let key = if rule.hook == Hook::Output { attributes::META_OIFNAME } else { attributes::META_IIFNAME };
            e.meta(key).equals(b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0")
        }
        Match::Port(port) => e.tcp().transport_header(2, 2).equals(&port.to_be_bytes()),
        Match::Net(net) => {
            let destination = rule.hook == Hook::Output;
            // Where the address stands in the header: RFC 791 3.1, RFC 8200 3.
            match net {
                ipnet::IpNet::V4(net) => {
                    let offset = if destination { 16 } else { 12 };
                    e.family(attributes::NFPROTO_IPV4).network_header(offset, 4);
                    e.mask(&net.netmask().octets()).equals(&net.network().octets())
                }
                ipnet::IpNet::V6(net) => {
                    let offset = if destination { 24 } else { 8 };
                    e.family(attributes::NFPROTO_IPV6).network_header(offset, 16);
                    e.mask(&net.netmask().octets()).equals(&net.network().octets())
                }
            }
        }
        Match::Rest => e.tcp(),
    };
    e.counter();
    match rule.verdict {
        Verdict::Exempt => e.returns(),
        Verdict::To(port) => e.redirect_to(port),
    };
    e
}
