//! What is caught and what is not, independent of who enforces it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::guard::{DNS, Guard, link_local};

/// The redirect of one network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// The sidecar's user, whose own connections are never caught.
    pub proxy_uid: u32,
    /// Where outgoing connections go.
    pub outbound_port: u16,
    /// Where incoming connections go.
    pub inbound_port: u16,
    /// Incoming ports that are left alone: the mesh port, the probe port.
    pub exempt_inbound_ports: BTreeSet<u16>,
    /// Outgoing ports that are left alone, DNS among them by default.
    pub exempt_outbound_ports: BTreeSet<u16>,
    /// Destinations that are left alone.
    pub exempt_outbound_cidrs: BTreeSet<IpNet>,
    /// Sources that are left alone.
    pub exempt_inbound_cidrs: BTreeSet<IpNet>,
    /// What else than TCP may pass (strict); `None`: all of it (permissive, off).
    ///
    /// With a guard an exempt outgoing port 53 is exempt towards the guard's resolvers alone: TCP to the port 53 of somebody
    /// else goes to the sidecar as any TCP does.
    pub guard: Option<Guard>,
}

impl Redirect {
    /// The defaults of the design for a sidecar of this user.
    pub fn for_proxy(proxy_uid: u32) -> Self {
        Self {
            proxy_uid,
            outbound_port: 15001,
            inbound_port: 15006,
            exempt_inbound_ports: [15008, 15020].into(),
            exempt_outbound_ports: [53].into(),
            exempt_outbound_cidrs: BTreeSet::new(),
            exempt_inbound_cidrs: BTreeSet::new(),
            guard: None,
        }
    }
}

/// Where a rule stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// What this namespace's processes send.
    Output,
    /// What comes in.
    Prerouting,
    /// What this namespace's processes send, once the redirect has looked at it.
    GuardOutput,
    /// What is delivered to this namespace's processes.
    GuardInput,
}

impl Hook {
    /// Every hook in the order of [`Redirect::rules`].
    pub const ALL: [Self; 4] = [Self::Output, Self::Prerouting, Self::GuardOutput, Self::GuardInput];

    /// Whether its rules are about what is sent; the others' are about what comes.
    pub fn is_out(self) -> bool {
        matches!(self, Self::Output | Self::GuardOutput)
    }

    /// Whether its rules decide what is dropped; the others' decide what is caught.
    pub fn is_guard(self) -> bool {
        matches!(self, Self::GuardOutput | Self::GuardInput)
    }
}

/// What a rule looks for. The redirect's rules (`Output`, `Prerouting`) are about TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// Sent by this user.
    Uid(u32),
    /// Over the loopback interface.
    Loopback,
    /// TCP to this port.
    Port(u16),
    /// TCP to this port of this address.
    PortAt(u16, IpAddr),
    /// To (output) or from (input) this network.
    Net(IpNet),
    /// TCP to (output) or from (input) this network.
    TcpNet(IpNet),
    /// TCP.
    Tcp,
    /// TCP that belongs to no connection that the kernel follows: NAT leaves it as it is.
    TcpInvalid,
    /// ICMP over IPv4.
    Icmp,
    /// `ICMPv6` over IPv6, neighbour discovery in it.
    Icmpv6,
    /// Of a connection whose first packet went the other way.
    Reply,
    /// UDP to this port, of this address where there is one.
    Udp(u16, Option<IpAddr>),
    /// Whatever is left.
    Rest,
}

/// What happens to what it finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes its way.
    Exempt,
    /// It goes to this port of the sidecar.
    To(u16),
    /// One of many is written into the kernel's log, and the next rule decides.
    Sample,
    /// It is dropped.
    Drop,
}

/// One rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Where.
    pub hook: Hook,
    /// What.
    pub matches: Match,
    /// And then.
    pub verdict: Verdict,
}

impl Rule {
    /// Says what the rule is for; shown by `nft list ruleset`, `iptables -S` and `--check`.
    pub fn comment(&self) -> String {
        let way = match self.hook {
            Hook::Output => "out",
            Hook::Prerouting => "in",
            Hook::GuardOutput => "others out",
            Hook::GuardInput => "others in",
        };
        let what = match self.matches {
            Match::Uid(uid) => format!("sidecar uid {uid}"),
            Match::Loopback => "loopback".into(),
            Match::Port(port) => format!("port {port}"),
            Match::PortAt(port, address) => format!("port {port} of {address}"),
            Match::Net(net) => format!("net {net}"),
            Match::TcpNet(net) => format!("TCP with net {net}"),
            Match::Tcp => "TCP".into(),
            Match::TcpInvalid => "TCP of no connection".into(),
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
            Verdict::Sample => format!("countersign {way}: {what} logged by sample"),
            Verdict::Drop => format!("countersign {way}: {what} dropped"),
        }
    }
}

impl Redirect {
    /// Its rules in order: the exemptions, then the rest; behind the redirect's the guard's.
    pub fn rules(&self) -> Vec<Rule> {
        let exempt = |hook, matches| Rule { hook, matches, verdict: Verdict::Exempt };
        let nets = |hook, nets: &BTreeSet<IpNet>| nets.iter().map(|n| exempt(hook, Match::Net(*n))).collect::<Vec<_>>();
        let rest = |hook, port| Rule { hook, matches: Match::Rest, verdict: Verdict::To(port) };
        let mut rules = vec![exempt(Hook::Output, Match::Uid(self.proxy_uid)), exempt(Hook::Output, Match::Loopback)];
        // An answer of the sidecar's from the loopback interface does not reach a link-local source, and the sidecar could not dial
        // such a destination, for it is told it without its interface. Left alone it works; under a guard it is dropped later.
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
