//! Modes and allow-lists: which traffic a sidecar accepts and forwards.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use ipnet::IpNet;
use spiffe::SpiffeId;

use crate::shown::shown;
use crate::verify::Refusal;

/// How strict the mesh is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub enum Mode {
    /// The sidecar forwards plaintext, without mTLS.
    Off,
    /// mTLS between meshed workloads; plaintext from others is accepted and reported. The default.
    #[default]
    Permissive,
    /// Only authenticated mesh traffic is accepted.
    Strict,
}

/// The text is not the name of a mode.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{}` is not a mode: use off, permissive or strict", shown(_0))]
pub struct ModeError(String);

impl FromStr for Mode {
    type Err = ModeError;

    fn from_str(text: &str) -> Result<Self, ModeError> {
        match text {
            "off" => Ok(Self::Off),
            "permissive" => Ok(Self::Permissive),
            "strict" => Ok(Self::Strict),
            other => Err(ModeError(other.to_owned())),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Permissive => "permissive",
            Self::Strict => "strict",
        })
    }
}

impl Mode {
    /// This mode, overridden by a more specific one; strict cannot be weakened.
    #[must_use]
    pub fn narrowed_by(self, nearer: Option<Self>) -> Self {
        match (self, nearer) {
            (Self::Strict, _) | (_, None) => self,
            (_, Some(nearer)) => nearer,
        }
    }
}

/// A destination outside the mesh that strict mode allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Egress {
    /// Network of the destination.
    pub net: IpNet,
    /// TCP port of the destination; `None` allows every port.
    pub port: Option<u16>,
}

impl Egress {
    /// Whether a destination is this one.
    pub fn covers(&self, destination: SocketAddr) -> bool {
        self.net.contains(&destination.ip().to_canonical()) && self.port.is_none_or(|port| port == destination.port())
    }
}

impl From<IpNet> for Egress {
    /// Every port of a network.
    fn from(net: IpNet) -> Self {
        Self { net, port: None }
    }
}

impl From<SocketAddr> for Egress {
    /// One port of one address.
    fn from(at: SocketAddr) -> Self {
        Self { net: at.ip().to_canonical().into(), port: Some(at.port()) }
    }
}

/// The policy of one workload's sidecar.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// The workload's mode, with the mesh's mode already applied.
    pub mode: Mode,
    /// Modes of single ports; they override `mode` by [`Mode::narrowed_by`].
    pub port_modes: BTreeMap<u16, Mode>,
    /// Modes of single ports that hold even where `mode` is strict: exceptions that the mesh's administrator allowed. They
    /// replace every other mode of the port.
    pub port_exceptions: BTreeMap<u16, Mode>,
    /// SPIFFE IDs that may call. `None`: no list is set, and every ID of the own trust domain may. An empty list admits
    /// none.
    pub allow: Option<BTreeSet<String>>,
    /// SPIFFE IDs that may call a single port; replaces `allow` for that port. An empty list admits none.
    pub port_allow: BTreeMap<u16, BTreeSet<String>>,
    /// Destinations outside the mesh that strict mode allows.
    pub egress: Vec<Egress>,
}

impl Policy {
    /// The mode that applies to a port.
    pub fn mode_of(&self, port: u16) -> Mode {
        let excepted = self.port_exceptions.get(&port).copied();
        excepted.unwrap_or_else(|| self.mode.narrowed_by(self.port_modes.get(&port).copied()))
    }

    /// Ports whose mode is another one than the workload's.
    pub fn other_ports(&self) -> BTreeMap<u16, Mode> {
        let named = self.port_modes.keys().chain(self.port_exceptions.keys());
        named.map(|port| (*port, self.mode_of(*port))).filter(|(_, mode)| *mode != self.mode).collect()
    }

    /// Whether plaintext may reach a port. It proves no identity: strict mode rejects it, and so does a list.
    pub fn admits_plaintext(&self, port: u16) -> bool {
        match self.mode_of(port) {
            Mode::Strict => false,
            Mode::Permissive => !self.has_allow_list(port),
            Mode::Off => true,
        }
    }

    /// Checks whether an authenticated caller may call a port. Errors: [`Refusal::NotAllowed`].
    pub fn admits(&self, caller: &SpiffeId, own_trust_domain: &str, port: u16) -> Result<(), Refusal> {
        let allowed = match self.list_of(port) {
            // Federated bundles authenticate foreign callers as well. Without a list, they are authenticated but not
            // authorised.
            None => caller.trust_domain_name() == own_trust_domain,
            Some(list) => list.contains(&caller.to_string()),
        };
        if allowed { Ok(()) } else { Err(Refusal::NotAllowed { caller: caller.clone(), port }) }
    }

    /// Whether an allow-list applies to a port, its own or the workload's.
    pub fn has_allow_list(&self, port: u16) -> bool {
        self.list_of(port).is_some()
    }

    /// The allow-list that applies to a port; `None` if there is none.
    fn list_of(&self, port: u16) -> Option<&BTreeSet<String>> {
        self.port_allow.get(&port).or(self.allow.as_ref())
    }

    /// Whether strict mode allows traffic to this destination outside the mesh.
    pub fn lets_out(&self, destination: SocketAddr) -> bool {
        self.egress.iter().any(|egress| egress.covers(destination))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_mode_wins_but_strict_is_never_weakened() {
        use Mode::{Off, Permissive, Strict};
        assert_eq!(Permissive.narrowed_by(Some(Off)), Off);
        assert_eq!(Permissive.narrowed_by(Some(Strict)), Strict);
        assert_eq!(Strict.narrowed_by(Some(Off)), Strict);
        assert_eq!(Off.narrowed_by(None), Off);
        let p = Policy { mode: Permissive, port_modes: [(80, Strict), (81, Off)].into(), ..Policy::default() };
        assert_eq!((p.mode_of(80), p.mode_of(81), p.mode_of(82)), (Strict, Off, Permissive));
        assert_eq!(p.other_ports(), [(80, Strict), (81, Off)].into());
    }

    #[test]
    fn an_allowed_exception_opens_its_port_under_strict_and_no_other() {
        let excepted = [(9443, Mode::Permissive)].into();
        let policy = Policy { mode: Mode::Strict, port_exceptions: excepted, ..Policy::default() };
        assert_eq!((policy.mode_of(9443), policy.mode_of(9444)), (Mode::Permissive, Mode::Strict));
        assert_eq!(policy.other_ports(), [(9443, Mode::Permissive)].into());
        assert!(policy.admits_plaintext(9443) && !policy.admits_plaintext(9444));
        let listed = Policy { allow: Some(list(&["spiffe://td/a"])), ..policy };
        assert!(!listed.admits_plaintext(9443), "who must be on a list has to prove it");
        let alone = Policy { mode: Mode::Strict, port_modes: [(9443, Mode::Off)].into(), ..Policy::default() };
        assert!(!alone.admits_plaintext(9443), "what nobody allowed weakens nothing");
        assert!(alone.other_ports().is_empty());
    }

    fn id(text: &str) -> SpiffeId {
        SpiffeId::new(text).unwrap()
    }

    fn list(ids: &[&str]) -> BTreeSet<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    #[test]
    fn without_a_list_the_own_trust_domain_is_admitted_and_no_other() {
        let p = Policy::default();
        assert!(p.admits(&id("spiffe://td/a"), "td", 1).is_ok());
        assert_eq!(p.admits(&id("spiffe://other/a"), "td", 1).unwrap_err().code(), "not_allowed");
        assert!(!p.has_allow_list(1));
    }

    #[test]
    fn an_empty_list_admits_nobody_and_is_a_list() {
        let all = Policy { allow: Some(list(&[])), ..Policy::default() };
        let one = Policy { port_allow: [(9001, list(&[]))].into(), ..Policy::default() };
        let a = id("spiffe://td/a");
        assert!(all.admits(&a, "td", 80).is_err() && one.admits(&a, "td", 9001).is_err());
        assert!(one.admits(&a, "td", 80).is_ok(), "another port has no list");
        assert!(all.has_allow_list(80) && one.has_allow_list(9001) && !one.has_allow_list(80));
    }

    #[test]
    fn a_ports_list_stands_instead_of_the_workloads() {
        let p = Policy {
            allow: Some(list(&["spiffe://td/a"])),
            port_allow: [(81, list(&["spiffe://td/b"]))].into(),
            ..Policy::default()
        };
        assert!(p.admits(&id("spiffe://td/a"), "td", 80).is_ok());
        assert!(p.admits(&id("spiffe://td/b"), "td", 80).is_err());
        assert!(p.admits(&id("spiffe://td/b"), "td", 81).is_ok());
        assert!(p.admits(&id("spiffe://td/a"), "td", 81).is_err());
    }

    #[test]
    fn an_exception_for_one_port_lets_out_to_no_other_port_of_the_machine() {
        let api_server: SocketAddr = "192.0.2.7:6443".parse().unwrap();
        let net: IpNet = "10.0.0.0/8".parse().unwrap();
        let policy = Policy { egress: vec![api_server.into(), net.into()], ..Policy::default() };
        for (to, out) in [
            ("192.0.2.7:6443", true),
            ("[::ffff:192.0.2.7]:6443", true),
            ("192.0.2.7:10250", false),
            ("192.0.2.7:80", false),
            ("192.0.2.8:6443", false),
            ("10.1.2.3:1", true),
        ] {
            assert_eq!(policy.lets_out(to.parse().unwrap()), out, "{to}");
        }
    }

    proptest::proptest! {
        /// Compares with the rule in words: the port's list decides, or else the workload's, or else the trust domain.
        #[test]
        fn a_caller_is_admitted_exactly_when_the_rule_says_so(
            allow in proptest::option::of(proptest::collection::btree_set(0u8..5, 0..4)),
            ports in proptest::collection::btree_map(1u16..4, proptest::collection::btree_set(0u8..5, 0..4), 0..3),
            caller in 0u8..5, port in 1u16..4, foreign: bool,
        ) {
            let name = |n: u8| format!("spiffe://td/{n}");
            let names = |set: &BTreeSet<u8>| set.iter().map(|n| name(*n)).collect::<BTreeSet<_>>();
            let policy = Policy {
                allow: allow.as_ref().map(names),
                port_allow: ports.iter().map(|(p, set)| (*p, names(set))).collect(),
                ..Policy::default()
            };
            let caller_id = if foreign { id(&format!("spiffe://other/{caller}")) } else { id(&name(caller)) };
            let expected = match (ports.get(&port), &allow) {
                (Some(list), _) | (None, Some(list)) => !foreign && list.contains(&caller),
                (None, None) => !foreign,
            };
            assert_eq!(policy.admits(&caller_id, "td", port).is_ok(), expected);
            assert_eq!(policy.has_allow_list(port), ports.contains_key(&port) || allow.is_some());
        }

        #[test]
        fn strict_is_never_weakened_by_a_port(own in 0usize..3, nearer in 0usize..3) {
            let modes = [Mode::Off, Mode::Permissive, Mode::Strict];
            let policy = Policy { mode: modes[own], port_modes: [(80, modes[nearer])].into(), ..Policy::default() };
            let expected = if modes[own] == Mode::Strict { Mode::Strict } else { modes[nearer] };
            assert_eq!((policy.mode_of(80), policy.mode_of(81)), (expected, modes[own]));
        }
    }
}
