//! The redirect as one `inet` table of nf_tables, written in one transaction over netlink.

mod wire;

/// Entry points for the fuzz targets in `fuzz/`.
#[cfg(fuzzing)]
pub mod fuzzing {
    use super::wire::{Answer, messages, read_rule};

    /// Parses the input as messages from the kernel.
    pub fn answers(data: &[u8]) {
        for answer in messages(data) {
            if let Answer::Rule(rule) = answer {
                let _ = read_rule(rule);
            }
        }
        let _ = read_rule(data);
    }
}

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::rules::{Hook, Match, Rule, Verdict};
use crate::sidecar::Cgroup;
use crate::{InstalledRule, Redirect, RedirectError};
use wire::{Batch, Expressions, Message, attributes};

/// Name of our table.
const TABLE: &str = "countersign";
/// Name of the chain with the sidecar's cgroup, which other chains jump to.
const SIDECAR: &str = "sidecar";
/// Priority of destination NAT (netfilter's `NF_IP_PRI_NAT_DST`).
const DSTNAT: i32 = -100;
/// Priority of filters (netfilter's `NF_IP_PRI_FILTER`): they see connections after NAT.
const FILTER: i32 = 0;
const IPPROTO_ICMP: u8 = 1;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const IPPROTO_ICMPV6: u8 = 58;
/// Where the flags are in a TCP header, and those of a handshake (RFC 9293 3.1).
const TCP_FLAGS: u32 = 13;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// Largest answer that is received at once, in bytes.
const RECEIVE: usize = 256 * 1024;
/// Most dumps until one is whole.
const DUMPS: usize = 50;
/// Most rules of a table of ours. A guard has some hundred.
const MAX_RULES: usize = 10_000;

fn chain_of(hook: Hook) -> &'static str {
    match hook {
        Hook::Sidecar => SIDECAR,
        Hook::Output => "output",
        Hook::Prerouting => "prerouting",
        Hook::Loopback => "inside",
        Hook::OwnPorts => "own-ports",
        Hook::OwnInput => "own-ports-input",
        Hook::GuardOutput => "others-output",
        Hook::GuardInput => "others-input",
    }
}

/// Replaces the table in one transaction, all or nothing. A kernel that cannot log still drops.
pub fn install(redirect: &Redirect) -> Result<(), RedirectError> {
    let rules = redirect.rules();
    match transact(batch(&rules)) {
        Err(RedirectError::NoNftables(_)) if rules.iter().any(|r| r.verdict == Verdict::Sample) => {
            let rules: Vec<Rule> = rules.into_iter().filter(|r| r.verdict != Verdict::Sample).collect();
            transact(batch(&rules))
        }
        done => done,
    }
}

fn batch(rules: &[Rule]) -> Batch {
    let mut batch = Batch::new();
    // Add, delete and add again in one transaction replaces the table, whether or not it existed: at no moment is there
    // no redirect.
    batch.new_table(TABLE).delete_table(TABLE).new_table(TABLE);
    if rules.iter().any(|r| r.verdict == Verdict::IfSidecar) {
        batch.new_chain(TABLE, SIDECAR);
    }
    for hook in Hook::ALL {
        let rules: Vec<&Rule> = rules.iter().filter(|r| r.hook == hook).collect();
        if rules.is_empty() {
            continue;
        }
        let (kind, priority) = if hook.is_filter() { ("filter", FILTER) } else { ("nat", DSTNAT) };
        batch.new_base_chain(TABLE, chain_of(hook), kind, hook, priority);
        for rule in rules {
            batch.new_rule(TABLE, chain_of(hook), expressions(rule), &rule.comment());
        }
    }
    batch
}

/// Replaces what passes for the sidecar in a redirect that tells it by its cgroup.
///
/// # Errors
/// There is none, or the kernel cannot match cgroups ([`RedirectError::NoNftables`]).
pub fn admit(rules: &[Rule]) -> Result<(), RedirectError> {
    let mut batch = Batch::new();
    batch.delete_rules(TABLE, SIDECAR);
    for rule in rules {
        batch.new_rule(TABLE, SIDECAR, expressions(rule), &rule.comment());
    }
    transact(batch)
}

/// Removes the table. It need not exist.
pub fn remove() -> Result<(), RedirectError> {
    let mut batch = Batch::new();
    batch.new_table(TABLE).delete_table(TABLE);
    transact(batch)
}

/// Our rules as the kernel has them; empty if there is no table.
pub fn installed() -> Result<Vec<InstalledRule>, RedirectError> {
    for _ in 0..DUMPS {
        if let Some(found) = dumped()? {
            return Ok(found);
        }
    }
    Err(from_kernel(io::Error::other("the rules change all the time")))
}

/// The rules of one dump; `None` if they were changed meanwhile, so that it may have some of before and some of after.
fn dumped() -> Result<Option<Vec<InstalledRule>>, RedirectError> {
    let socket = open().map_err(from_kernel)?;
    socket.send(&Message::dump_rules(TABLE), 0).map_err(from_kernel)?;
    let (mut found, mut whole) = (vec![], true);
    loop {
        let mut buffer = Vec::with_capacity(RECEIVE);
        socket.recv(&mut buffer, 0).map_err(from_kernel)?;
        whole &= !wire::was_interrupted(&buffer);
        for message in wire::messages(&buffer) {
            match message {
                wire::Answer::Done => return Ok(whole.then_some(found)),
                wire::Answer::Error(0) => {}
                // The table does not exist.
                wire::Answer::Error(code) if code == nix::libc::ENOENT => return Ok(Some(vec![])),
                wire::Answer::Error(code) => return Err(from_kernel(io::Error::from_raw_os_error(code))),
                wire::Answer::Rule(attributes) => found.extend(wire::read_rule(attributes)),
            }
        }
        if found.len() > MAX_RULES {
            return Err(from_kernel(io::Error::other("the table has more rules than any redirect")));
        }
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Sends a transaction and reads what came of it.
fn transact(batch: Batch) -> Result<(), RedirectError> {
    let socket = open().map_err(from_kernel)?;
    socket.send(&batch.finish(), 0).map_err(from_kernel)?;
    loop {
        let mut buffer = Vec::with_capacity(RECEIVE);
        socket.recv(&mut buffer, 0).map_err(from_kernel)?;
        // The first one decides: refusals stand before the acknowledgement of the last message.
        let answer =
            wire::messages(&buffer).find_map(|m| if let wire::Answer::Error(code) = m { Some(code) } else { None });
        match answer {
            None => {}
            Some(0) => return Ok(()),
            Some(code) => return Err(from_kernel(io::Error::from_raw_os_error(code))),
        }
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

/// A rule as a program of nf_tables' virtual machine: load, compare, decide.
fn expressions(rule: &Rule) -> Expressions {
    let mut all = Expressions::new();
    let (e, out) = (&mut all, rule.hook.is_out());
    match rule.matches {
        Match::Uid(uid) => {
            e.meta(attributes::META_SKUID).equals(&uid.to_ne_bytes());
        }
        Match::Loopback => loopback(e, out),
        Match::LoopbackToOthers => {
            loopback(e, out);
            e.address_type(attributes::FIB_DESTINATION).equals(&attributes::UNICAST.to_ne_bytes());
        }
        Match::LoopbackFromOthers => {
            loopback(e, out);
            e.address_type(attributes::FIB_SOURCE).equals(&attributes::UNICAST.to_ne_bytes());
        }
        Match::Port(port) => port_of(e, IPPROTO_TCP, port),
        Match::PortAt(port, address) => {
            net(e, address.into(), out);
            port_of(e, IPPROTO_TCP, port);
        }
        Match::Net(of) => net(e, of, out),
        Match::TcpNet(of) => {
            e.protocol(IPPROTO_TCP);
            net(e, of, out);
        }
        Match::TcpInvalid => {
            e.protocol(IPPROTO_TCP).invalid();
        }
        Match::ForeignFrom(port, uid) => {
            // The last expression ends the rule where there is no socket.
            let from = e.protocol(IPPROTO_TCP).transport_header(0, 2).equals(&port.to_be_bytes());
            from.reply().meta(attributes::META_SKUID).differs(&uid.to_ne_bytes());
        }
        Match::CgroupFrom(port) => {
            let from = e.protocol(IPPROTO_TCP).transport_header(0, 2).equals(&port.to_be_bytes());
            let from = from.reply().transport_header(TCP_FLAGS, 1).mask(&[SYN | ACK]).differs(&[SYN | ACK]);
            // Ends the rule where there is no socket, or one of the kernel's own, which is in the root.
            from.cgroup(1);
        }
        Match::CgroupAt(port) => {
            let to = e.protocol(IPPROTO_TCP).transport_header(2, 2).equals(&port.to_be_bytes());
            let to = to.transport_header(TCP_FLAGS, 1).mask(&[SYN | ACK]).equals(&[SYN]);
            // The listener's, which the kernel looks up for it.
            to.cgroup(1);
        }
        Match::Cgroup(Cgroup { id, level }) => {
            e.cgroup(level).equals(&id.to_ne_bytes());
        }
        Match::Icmp => {
            e.family(attributes::NFPROTO_IPV4).protocol(IPPROTO_ICMP);
        }
        Match::Icmpv6 => {
            e.family(attributes::NFPROTO_IPV6).protocol(IPPROTO_ICMPV6);
        }
        Match::Reply => {
            e.reply();
        }
        Match::Udp(port, address) => {
            if let Some(address) = address {
                net(e, address.into(), out);
            }
            port_of(e, IPPROTO_UDP, port);
        }
        Match::Rest if rule.hook.is_filter() => {}
        Match::Rest | Match::Tcp => {
            e.protocol(IPPROTO_TCP);
        }
    }
    e.counter();
    match rule.verdict {
        // Its chain is called from others, whose further rules do not apply either.
        Verdict::Exempt if rule.hook == Hook::Sidecar => e.accepts(),
        Verdict::Exempt => e.returns(),
        Verdict::IfSidecar => e.jumps(SIDECAR),
        Verdict::To(port) => e.redirect_to(port),
        Verdict::Sample => e.samples(if out { "countersign dropped out: " } else { "countersign dropped in: " }),
        Verdict::Drop => e.drops(),
    };
    all
}

/// Continues for packets over the loopback interface.
fn loopback(e: &mut Expressions, out: bool) {
    let key = if out { attributes::META_OIFNAME } else { attributes::META_IIFNAME };
    e.meta(key).equals(b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

/// Continues for this destination port, which is at the same place in TCP and UDP.
fn port_of(e: &mut Expressions, protocol: u8, port: u16) {
    e.protocol(protocol).transport_header(2, 2).equals(&port.to_be_bytes());
}

/// Continues for a destination (`out`) or source in this network. Offsets: RFC 791 3.1, RFC 8200 3.
fn net(e: &mut Expressions, net: ipnet::IpNet, out: bool) {
    match net {
        ipnet::IpNet::V4(net) => {
            let offset = if out { 16 } else { 12 };
            e.family(attributes::NFPROTO_IPV4).network_header(offset, 4);
            e.mask(&net.netmask().octets()).equals(&net.network().octets());
        }
        ipnet::IpNet::V6(net) => {
            let offset = if out { 24 } else { 8 };
            e.family(attributes::NFPROTO_IPV6).network_header(offset, 16);
            e.mask(&net.netmask().octets()).equals(&net.network().octets());
        }
    }
}
