//! What is redirected and what is not, independent of the backend.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::guard::{DNS, Guard, link_local};
use crate::sidecar::Cgroup;

/// The redirect of one network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// User ID of the sidecar, whose own connections are never redirected.
    pub proxy_uid: u32,
    /// Whether the sidecar is told from others of its user ID by its cgroup, see [`crate::sidecar`]. Until that is known,
    /// nothing of this user leaves the namespace.
    pub by_cgroup: bool,
    /// Port of the sidecar for outgoing connections.
    pub outbound_port: u16,
    /// Port of the sidecar for incoming connections.
    pub inbound_port: u16,
    /// Further ports that the sidecar listens on: the mesh port and the port of its pages.
    pub sidecar_ports: BTreeSet<u16>,
    /// Incoming TCP ports that are not redirected: the mesh port and the probe port.
    pub exempt_inbound_ports: BTreeSet<u16>,
    /// Outgoing TCP ports that are not redirected, by default DNS.
    pub exempt_outbound_ports: BTreeSet<u16>,
    /// Destination networks that are not redirected.
    pub exempt_outbound_cidrs: BTreeSet<IpNet>,
    /// Source networks that are not redirected.
    pub exempt_inbound_cidrs: BTreeSet<IpNet>,
    /// What may pass apart from TCP (strict); `None` allows everything (permissive, off).
    ///
    /// With a guard, an exempt outgoing port 53 is exempt only for the guard's resolvers: TCP to port 53 of other hosts
    /// goes to the sidecar like any other.
    pub guard: Option<Guard>,
}

impl Redirect {
    /// The default redirect for a sidecar with this user ID.
    pub fn for_proxy(proxy_uid: u32) -> Self {
        Self {
            proxy_uid,
            by_cgroup: false,
            outbound_port: 15001,
            inbound_port: 15006,
            sidecar_ports: [15008, 15020].into(),
            exempt_inbound_ports: [15008, 15020].into(),
            exempt_outbound_ports: [53].into(),
            exempt_outbound_cidrs: BTreeSet::new(),
            exempt_inbound_cidrs: BTreeSet::new(),
            guard: None,
        }
    }
}

/// The point in the kernel's packet processing where a rule applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Packets of the sidecar's user that another rule asks about ([`Verdict::IfSidecar`]).
    Sidecar,
    /// Packets that this namespace's processes send.
    Output,
    /// Packets that come in.
    Prerouting,
    /// Packets that this namespace's processes send over the loopback interface.
    Loopback,
    /// TCP packets that this namespace's processes send from the sidecar's ports.
    OwnPorts,
    /// TCP packets that come in to the sidecar's ports, after the redirect.
    OwnInput,
    /// Packets that this namespace's processes send, after the redirect.
    GuardOutput,
    /// Packets that are delivered to this namespace's processes.
    GuardInput,
}

impl Hook {
    /// All places where the kernel itself calls our rules, in the order of [`Redirect::rules`].
    pub const ALL: [Self; 7] = [
        Self::Output,
        Self::Prerouting,
        Self::Loopback,
        Self::OwnPorts,
        Self::OwnInput,
        Self::GuardOutput,
        Self::GuardInput,
    ];

    /// Whether its rules concern outgoing packets; otherwise incoming ones.
    pub fn is_out(self) -> bool {
        !matches!(self, Self::Prerouting | Self::OwnInput | Self::GuardInput)
    }

    /// Whether its rules decide what is dropped; otherwise what is redirected.
    pub fn is_filter(self) -> bool {
        !matches!(self, Self::Sidecar | Self::Output | Self::Prerouting)
    }
}

/// The condition of a rule. The redirect's rules (`Output`, `Prerouting`) match TCP only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// Sent by a process of this user ID.
    Uid(u32),
    /// Sent or received over the loopback interface.
    Loopback,
    /// Sent over the loopback interface to an address of another machine.
    LoopbackToOthers,
    /// Sent over the loopback interface from an address of another machine.
    LoopbackFromOthers,
    /// TCP to this port.
    Port(u16),
    /// TCP to this port of this address.
    PortAt(u16, IpAddr),
    /// To (output) or from (input) this network.
    Net(IpNet),
    /// TCP to (output) or from (input) this network.
    TcpNet(IpNet),
    /// Any TCP packet.
    Tcp,
    /// TCP that belongs to no connection that the kernel follows: NAT leaves it as it is.
    TcpInvalid,
    /// TCP from this source port in a connection that somebody else opened, sent by a socket of another user ID than this.
    ForeignFrom(u16, u32),
    /// As before, but sent by a socket of any user that was opened in any cgroup but the root. The kernel keeps a socket's cgroup
    /// after it is closed, unlike its user. A handshake's answer has none.
    CgroupFrom(u16),
    /// TCP that opens a connection to this port, where a socket of any cgroup but the root listens.
    CgroupAt(u16),
    /// Sent by a socket that was opened in this cgroup.
    Cgroup(Cgroup),
    /// ICMP over IPv4.
    Icmp,
    /// `ICMPv6` over IPv6, including neighbour discovery.
    Icmpv6,
    /// Part of a connection whose first packet went the other way.
    Reply,
    /// UDP to this port, of this address if given.
    Udp(u16, Option<IpAddr>),
    /// Every packet that no earlier rule matched.
    Rest,
}

/// What happens to a packet that matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Passes unchanged; no further rule of the hook applies.
    Exempt,
    /// Redirected to this port of the sidecar.
    To(u16),
    /// Passes unchanged if the sidecar sent it; otherwise the next rule decides.
    IfSidecar,
    /// Some of the packets are written to the kernel's log, and the next rule decides.
    Sample,
    /// Dropped without an answer.
    Drop,
}

/// How the comment of a rule ends that asks for the sidecar's cgroup.
pub(crate) const IF_SIDECAR: &str = " in the sidecar's cgroup exempt";

/// One rule of the redirect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// The hook that it belongs to.
    pub hook: Hook,
    /// The packets that it applies to.
    pub matches: Match,
    /// The action on those packets.
    pub verdict: Verdict,
}

impl Rule {
    /// The purpose of the rule, as shown by `nft list ruleset`, `iptables -S` and `--check`.
    pub fn comment(&self) -> String {
        let way = match self.hook {
            Hook::Sidecar => "sidecar",
            Hook::Output => "out",
            Hook::Prerouting => "in",
            Hook::Loopback => "inside",
            Hook::OwnPorts => "own ports",
            Hook::OwnInput => "own ports in",
            Hook::GuardOutput => "others out",
            Hook::GuardInput => "others in",
        };
        let what = match self.matches {
            Match::Uid(uid) => format!("sidecar uid {uid}"),
            Match::Loopback => "loopback".into(),
            Match::LoopbackToOthers => "loopback to another machine".into(),
            Match::LoopbackFromOthers => "loopback from another machine".into(),
            Match::Port(port) => format!("port {port}"),
            Match::PortAt(port, address) => format!("port {port} of {address}"),
            Match::Net(net) => format!("net {net}"),
            Match::TcpNet(net) => format!("TCP with net {net}"),
            Match::Tcp => "TCP".into(),
            Match::TcpInvalid => "TCP of no connection".into(),
            Match::ForeignFrom(port, _) => format!("port {port} of another user"),
            Match::CgroupFrom(port) | Match::CgroupAt(port) => format!("port {port} of a cgroup"),
            Match::Cgroup(Cgroup { id, level }) => format!("cgroup {id} at level {level}"),
            Match::Icmp => "ICMP".into(),
            Match::Icmpv6 => "ICMPv6".into(),
            Match::Reply => "replies".into(),
            Match::Udp(port, None) => format!("UDP port {port}"),
            Match::Udp(port, Some(address)) => format!("UDP port {port} of {address}"),
            Match::Rest => "rest".into(),
        };
        match self.verdict {
            Verdict::Exempt => format!("countersign {way}: {what} exempt"),
            Verdict::To(port) => format!("countersign {way}: {what} to {port}"),
            Verdict::IfSidecar => format!("countersign {way}: {what}{IF_SIDECAR}"),
            Verdict::Sample => format!("countersign {way}: {what} logged by sample"),
            Verdict::Drop => format!("countersign {way}: {what} dropped"),
        }
    }
}

impl Redirect {
    /// The ports that nobody but the sidecar can serve in this namespace.
    fn own_ports(&self) -> BTreeSet<u16> {
        [self.outbound_port, self.inbound_port].into_iter().chain(self.sidecar_ports.iter().copied()).collect()
    }

    /// The rules in order: exemptions, then everything else; the guard's rules after the redirect's.
    pub fn rules(&self) -> Vec<Rule> {
        let exempt = |hook, matches| Rule { hook, matches, verdict: Verdict::Exempt };
        let nets = |hook, nets: &BTreeSet<IpNet>| nets.iter().map(|n| exempt(hook, Match::Net(*n))).collect::<Vec<_>>();
        let rest = |hook, port| Rule { hook, matches: Match::Rest, verdict: Verdict::To(port) };
        // The sidecar's own connections first: redirected, they would come back to it without end.
        let mut rules = if self.by_cgroup {
            let of_user = |verdict| Rule { hook: Hook::Output, matches: Match::Uid(self.proxy_uid), verdict };
            // Loopback before: what stays in this namespace is nobody's way out.
            vec![exempt(Hook::Output, Match::Loopback), of_user(Verdict::IfSidecar), of_user(Verdict::Drop)]
        } else {
            vec![exempt(Hook::Output, Match::Uid(self.proxy_uid)), exempt(Hook::Output, Match::Loopback)]
        };
        // The sidecar's answer from the loopback interface would not reach a link-local source, and the sidecar could
        // not dial such a destination, because it learns it without its interface. Not redirected it works; with a
        // guard it is dropped later.
        rules.push(exempt(Hook::Output, Match::Net(link_local())));
        for port in &self.exempt_outbound_ports {
            match &self.guard {
                Some(guard) if *port == DNS => {
                    rules.extend(guard.resolvers.iter().map(|r| exempt(Hook::Output, Match::PortAt(DNS, *r))));
                }
                _ => rules.push(exempt(Hook::Output, Match::Port(*port))),
            }
        }
        rules.extend(nets(Hook::Output, &self.exempt_outbound_cidrs));
        rules.push(rest(Hook::Output, self.outbound_port));
        // Link-local sources are caught as all others are: a policy that asks who is calling holds on one link too, and the mode may
        // change while these rules stay.
        rules.push(exempt(Hook::Prerouting, Match::Loopback));
        rules.extend(self.exempt_inbound_ports.iter().map(|p| exempt(Hook::Prerouting, Match::Port(*p))));
        rules.extend(nets(Hook::Prerouting, &self.exempt_inbound_cidrs));
        rules.push(rest(Hook::Prerouting, self.inbound_port));
        // Everybody may bind a socket to this interface, and then to an address of another machine (IPV6_FREEBIND). Nothing comes of
        // it but the kernel's memory of a connection that was exempt, and packets that really leave would be part of it.
        let inside = |matches| Rule { hook: Hook::Loopback, matches, verdict: Verdict::Drop };
        rules.extend([Match::LoopbackToOthers, Match::LoopbackFromOthers].map(inside));
        // Any user may listen on these ports while the sidecar is away, and would get what is redirected to it, in plaintext.
        // What no socket sends passes: resets, and SYN cookies, without which a flood of SYN would keep callers out. A
        // connection that comes about by a cookie is silent: no segment of its socket passes.
        let foreign = |port| Rule {
            hook: Hook::OwnPorts,
            matches: Match::ForeignFrom(port, self.proxy_uid),
            verdict: Verdict::Drop,
        };
        rules.extend(self.own_ports().into_iter().map(foreign));
        if self.by_cgroup {
            let of = |port, verdict| Rule { hook: Hook::OwnPorts, matches: Match::CgroupFrom(port), verdict };
            let both = |port| [of(port, Verdict::IfSidecar), of(port, Verdict::Drop)];
            rules.extend(self.own_ports().into_iter().flat_map(both));
            // A caller's first words come with or right after a handshake: whoever is not to answer is not to hear either.
            let heard = |matches, verdict| Rule { hook: Hook::OwnInput, matches, verdict };
            rules.push(heard(Match::Loopback, Verdict::Exempt));
            for port in self.own_ports() {
                rules.push(heard(Match::CgroupAt(port), Verdict::IfSidecar));
                rules.push(heard(Match::CgroupAt(port), Verdict::Drop));
            }
        }
        if let Some(guard) = &self.guard {
            rules.extend(guard.rules(&self.exempt_outbound_cidrs, &self.exempt_inbound_cidrs));
        }
        rules
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exemptions_stand_before_the_rest_and_the_sidecar_before_all() {
        let mut redirect = Redirect::for_proxy(2102);
        redirect.exempt_outbound_cidrs.insert("10.0.0.0/8".parse().unwrap());
        let comments: Vec<String> = redirect.rules().iter().map(Rule::comment).collect();
        assert_eq!(
            comments,
            [
                "countersign out: sidecar uid 2102 exempt",
                "countersign out: loopback exempt",
                "countersign out: net fe80::/10 exempt",
                "countersign out: port 53 exempt",
                "countersign out: net 10.0.0.0/8 exempt",
                "countersign out: rest to 15001",
                "countersign in: loopback exempt",
                "countersign in: port 15008 exempt",
                "countersign in: port 15020 exempt",
                "countersign in: rest to 15006",
                "countersign inside: loopback to another machine dropped",
                "countersign inside: loopback from another machine dropped",
                "countersign own ports: port 15001 of another user dropped",
                "countersign own ports: port 15006 of another user dropped",
                "countersign own ports: port 15008 of another user dropped",
                "countersign own ports: port 15020 of another user dropped",
            ]
        );
    }

    #[test]
    fn by_its_cgroup_the_sidecar_passes_and_nobody_else_of_its_user() {
        let redirect = Redirect { by_cgroup: true, ..Redirect::for_proxy(2102) };
        let comments: Vec<String> = redirect.rules().iter().map(Rule::comment).collect();
        assert_eq!(
            comments[..3],
            [
                "countersign out: loopback exempt",
                "countersign out: sidecar uid 2102 in the sidecar's cgroup exempt",
                "countersign out: sidecar uid 2102 dropped",
            ]
        );
        let own: Vec<&String> = comments.iter().filter(|c| c.contains("own ports: port 15006 of a cgroup")).collect();
        assert_eq!(
            own,
            [
                "countersign own ports: port 15006 of a cgroup in the sidecar's cgroup exempt",
                "countersign own ports: port 15006 of a cgroup dropped",
            ]
        );
    }

    #[test]
    fn with_a_guard_dns_goes_to_the_resolvers_alone() {
        let mut redirect = Redirect::for_proxy(2102);
        let guard = Guard { resolvers: ["10.96.0.10".parse().unwrap()].into(), ..Guard::default() };
        redirect.guard = Some(guard);
        redirect.exempt_outbound_ports.insert(443);
        let comments: Vec<String> = redirect.rules().iter().map(Rule::comment).collect();
        assert!(comments.contains(&"countersign out: port 53 of 10.96.0.10 exempt".to_owned()), "{comments:?}");
        assert!(!comments.contains(&"countersign out: port 53 exempt".to_owned()), "{comments:?}");
        assert!(comments.contains(&"countersign out: port 443 exempt".to_owned()), "{comments:?}");
        assert_eq!(comments.last().unwrap(), "countersign others in: rest dropped");
    }
}
