//! Modes and allow-lists: what a sidecar lets through.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use spiffe::SpiffeId;

use crate::verify::Refusal;

/// How strict the mesh is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub enum Mode {
    /// The sidecar forwards in the clear.
    Off,
    /// mTLS between meshed workloads; plaintext from others is accepted and reported.
    #[default]
    Permissive,
    /// Only authenticated mesh traffic.
    Strict,
}

/// A word that is no mode.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not a mode: use off, permissive or strict")]
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
    /// The nearest mode wins, but nothing nearer weakens a strict one.
    #[must_use]
    pub fn narrowed_by(self, nearer: Option<Self>) -> Self {
        match (self, nearer) {
            (Self::Strict, _) | (_, None) => self,
            (_, Some(nearer)) => nearer,
        }
    }
}

/// What one workload's sidecar lets through.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// The workload's mode, the mesh's already taken into account.
    pub mode: Mode,
    /// Modes of single ports.
    pub port_modes: BTreeMap<u16, Mode>,
    /// Who may call; empty: anyone in the trust domain.
    pub allow: BTreeSet<String>,
    /// Who may call a single port; stands instead of `allow` for that port.
    pub port_allow: BTreeMap<u16, BTreeSet<String>>,
    /// Destinations outside the mesh that strict lets out.
    pub egress: Vec<IpNet>,
}

impl Policy {
    /// The mode that holds for a port.
    pub fn mode_of(&self, port: u16) -> Mode {
        self.mode.narrowed_by(self.port_modes.get(&port).copied())
    }

    /// Whether an authenticated caller of our trust domain may call a port.
    pub fn admits(&self, caller: &SpiffeId, own_trust_domain: &str, port: u16) -> Result<(), Refusal> {
        let list = self.port_allow.get(&port).unwrap_or(&self.allow);
        let allowed = if list.is_empty() {
            caller.trust_domain_name() == own_trust_domain
        } else {
            list.contains(&caller.to_string())
        };
        if allowed { Ok(()) } else { Err(Refusal::NotAllowed { caller: caller.clone(), port }) }
    }

    /// Whether a port names who may call it.
    pub fn has_allow_list(&self, port: u16) -> bool {
        !self.port_allow.get(&port).unwrap_or(&self.allow).is_empty()
    }

    /// Whether strict lets traffic out to an address that is not meshed.
    pub fn lets_out(&self, destination: IpAddr) -> bool {
        self.egress.iter().any(|net| net.contains(&destination))
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
    }

    #[test]
    fn an_empty_list_admits_the_own_trust_domain_alone() {
        let id = |s: &str| SpiffeId::new(s).unwrap();
        let p = Policy::default();
        assert!(p.admits(&id("spiffe://td/a"), "td", 1).is_ok());
        assert_eq!(p.admits(&id("spiffe://other/a"), "td", 1).unwrap_err().code(), "not_allowed");
    }

    #[test]
    fn a_ports_list_stands_instead_of_the_workloads() {
        let id = |s: &str| SpiffeId::new(s).unwrap();
        let p = Policy {
            allow: ["spiffe://td/a".to_owned()].into(),
            port_allow: [(81, ["spiffe://td/b".to_owned()].into())].into(),
            ..Policy::default()
        };
        assert!(p.admits(&id("spiffe://td/a"), "td", 80).is_ok());
        assert!(p.admits(&id("spiffe://td/b"), "td", 80).is_err());
        assert!(p.admits(&id("spiffe://td/b"), "td", 81).is_ok());
        assert!(p.admits(&id("spiffe://td/a"), "td", 81).is_err());
    }
}
