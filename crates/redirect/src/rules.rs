//! What is caught and what is not, independent of who enforces it.

use std::collections::BTreeSet;

use ipnet::IpNet;

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
}

/// What a rule looks for. Every rule is about TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// Sent by this user.
    Uid(u32),
    /// Over the loopback interface.
    Loopback,
    /// To this port.
    Port(u16),
    /// To (output) or from (prerouting) this network.
    Net(IpNet),
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
        };
        let what = match self.matches {
            Match::Uid(uid) => format!("sidecar uid {uid}"),
            Match::Loopback => "loopback".into(),
            Match::Port(port) => format!("port {port}"),
            Match::Net(net) => format!("net {net}"),
            Match::Rest => "rest".into(),
        };
        match self.verdict {
            Verdict::Exempt => format!("countersign {way}: {what} exempt"),
            Verdict::To(port) => format!("countersign {way}: {what} to {port}"),
        }
    }
}

impl Redirect {
    /// Its rules in order: the exemptions, then the rest.
    pub fn rules(&self) -> Vec<Rule> {
        let exempt = |hook, matches| Rule { hook, matches, verdict: Verdict::Exempt };
        let ports =
            |hook, ports: &BTreeSet<u16>| ports.iter().map(|p| exempt(hook, Match::Port(*p))).collect::<Vec<_>>();
        let nets = |hook, nets: &BTreeSet<IpNet>| nets.iter().map(|n| exempt(hook, Match::Net(*n))).collect::<Vec<_>>();
        let rest = |hook, port| Rule { hook, matches: Match::Rest, verdict: Verdict::To(port) };
        let mut rules = vec![exempt(Hook::Output, Match::Uid(self.proxy_uid)), exempt(Hook::Output, Match::Loopback)];
        rules.extend(ports(Hook::Output, &self.exempt_outbound_ports));
        rules.extend(nets(Hook::Output, &self.exempt_outbound_cidrs));
        rules.push(rest(Hook::Output, self.outbound_port));
        rules.push(exempt(Hook::Prerouting, Match::Loopback));
        rules.extend(ports(Hook::Prerouting, &self.exempt_inbound_ports));
        rules.extend(nets(Hook::Prerouting, &self.exempt_inbound_cidrs));
        rules.push(rest(Hook::Prerouting, self.inbound_port));
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
}
