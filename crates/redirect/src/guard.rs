//! Protocols other than TCP in strict mode: dropped in both directions, except for what an app cannot work without and
//! what is allowed by name.
//!
//! The sidecar protects TCP only. A workload whose UDP passed in plaintext would not be strict, so everything else is
//! dropped, counted and, if the kernel supports it, logged by sample. The exceptions are no channel for application
//! data between two workloads: loopback, ICMP, DNS to the resolvers of `resolv.conf`, and replies to allowed packets.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use ipnet::{IpNet, Ipv6Net};

use crate::rules::{Hook, Match, Rule, Verdict};

/// The port of DNS (RFC 1035 4.2).
pub const DNS: u16 = 53;
/// The file that names a namespace's resolvers (resolv.conf(5)).
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Largest `resolv.conf` that is read, in bytes.
const MAX_RESOLV_CONF: u64 = 64 * 1024;

/// What may pass in a strict workload's namespace apart from TCP.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Guard {
    /// Resolvers that DNS may go to, over UDP and TCP. Empty allows no DNS.
    pub resolvers: BTreeSet<IpAddr>,
    /// UDP ports that packets may be sent to and received on.
    pub udp_ports: BTreeSet<u16>,
    /// Networks that every protocol except TCP may be exchanged with.
    pub cidrs: BTreeSet<IpNet>,
}

/// IPv6 link-local addresses (RFC 4291 2.5.6). They are valid on one link only, which a redirect loses.
pub fn link_local() -> IpNet {
    // fe80::/10 is a valid network: ten bits of 128.
    Ipv6Net::new_assert(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10).into()
}

impl Guard {
    /// A guard that allows the resolvers of this file; an unreadable file names none.
    pub fn with_resolvers_of(path: &Path) -> Self {
        use std::io::Read;
        let mut text = String::new();
        let read = std::fs::File::open(path).and_then(|f| f.take(MAX_RESOLV_CONF).read_to_string(&mut text));
        if let Err(error) = read {
            tracing::warn!(path = %path.display(), %error, "no resolver is known, so DNS is dropped");
            text.clear();
        }
        Self { resolvers: resolvers(&text), ..Self::default() }
    }

    /// The rules in order, output first. `outbound` and `inbound` are networks whose traffic is not touched at all.
    pub(crate) fn rules(&self, outbound: &BTreeSet<IpNet>, inbound: &BTreeSet<IpNet>) -> Vec<Rule> {
        let mut rules = vec![];
        for (hook, nets) in [(Hook::GuardOutput, outbound), (Hook::GuardInput, inbound)] {
            let mut rule = |matches, verdict| rules.push(Rule { hook, matches, verdict });
            rule(Match::Loopback, Verdict::Exempt);
            for net in nets {
                rule(Match::Net(*net), Verdict::Exempt);
            }
            // Part of a connection that was allowed before: its first packet went the other way.
            rule(Match::Reply, Verdict::Exempt);
            if hook == Hook::GuardOutput {
                // The redirect does not catch it, which would bypass the sidecar. It is dropped instead of refused,
                // because the kernel delivers no reset and no ICMP error to a link-local source.
                rule(Match::TcpNet(link_local()), Verdict::Drop);
            }
            // What is left of TCP was redirected, or is exempt from that. Which it is was decided by a connection's first packet:
            // `install` lets the kernel forget connections that are older than the rules, and these belong to none.
            rule(Match::TcpInvalid, Verdict::Drop);
            rule(Match::Tcp, Verdict::Exempt);
            rule(Match::Icmp, Verdict::Exempt);
            rule(Match::Icmpv6, Verdict::Exempt);
            // Only these resolvers: UDP port 53 of any other host would be an unprotected channel between two
            // workloads.
            if hook == Hook::GuardOutput {
                for resolver in &self.resolvers {
                    rule(Match::Udp(DNS, Some(*resolver)), Verdict::Exempt);
                }
            }
            for port in &self.udp_ports {
                rule(Match::Udp(*port, None), Verdict::Exempt);
            }
            for net in &self.cidrs {
                rule(Match::Net(*net), Verdict::Exempt);
            }
            rule(Match::Rest, Verdict::Sample);
            rule(Match::Rest, Verdict::Drop);
        }
        rules
    }
}

/// The `nameserver` lines of a `resolv.conf`; everything else is ignored.
pub fn resolvers(text: &str) -> BTreeSet<IpAddr> {
    let named = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()).flatten()
    });
    // A link-local resolver has its interface after a `%`.
    named.filter_map(|address| address.split('%').next()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_the_addresses_behind_nameserver() {
        let text = "# nameserver 9.9.9.9\nsearch a b\nnameserver 10.96.0.10\n nameserver\tfd00::a # x\nnameserver fe80::1%eth0\nnameserver nonsense\nnameserver\noptions ndots:5\n";
        let found: Vec<String> = resolvers(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.96.0.10", "fd00::a", "fe80::1"]);
        assert_eq!(Guard::with_resolvers_of(Path::new("/nowhere")).resolvers, [].into(), "none, not all");
    }

    #[test]
    fn what_is_named_stands_before_the_drop_and_nothing_behind_it() {
        let guard = Guard {
            resolvers: ["10.96.0.10".parse().unwrap()].into(),
            udp_ports: [4433].into(),
            cidrs: ["10.8.0.0/16".parse().unwrap()].into(),
        };
        let rules = guard.rules(&BTreeSet::new(), &BTreeSet::new());
        let said: Vec<String> = rules.iter().map(Rule::comment).collect();
        assert_eq!(
            said,
            [
                "countersign others out: loopback exempt",
                "countersign others out: replies exempt",
                "countersign others out: TCP with net fe80::/10 dropped",
                "countersign others out: TCP of no connection dropped",
                "countersign others out: TCP exempt",
                "countersign others out: ICMP exempt",
                "countersign others out: ICMPv6 exempt",
                "countersign others out: UDP port 53 of 10.96.0.10 exempt",
                "countersign others out: UDP port 4433 exempt",
                "countersign others out: net 10.8.0.0/16 exempt",
                "countersign others out: rest logged by sample",
                "countersign others out: rest dropped",
                "countersign others in: loopback exempt",
                "countersign others in: replies exempt",
                "countersign others in: TCP of no connection dropped",
                "countersign others in: TCP exempt",
                "countersign others in: ICMP exempt",
                "countersign others in: ICMPv6 exempt",
                "countersign others in: UDP port 4433 exempt",
                "countersign others in: net 10.8.0.0/16 exempt",
                "countersign others in: rest logged by sample",
                "countersign others in: rest dropped",
            ]
        );
    }
}
