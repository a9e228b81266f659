//! The mesh file: YAML in, a mesh that can be started out.
//!
//! Every mistake is one line, `FILE:LINE: KEY: what was expected, what was found`. `mesh` reads the file, `workload` one
//! workload, `program` finds what a command starts.

mod mesh;
mod program;
mod workload;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use countersign_identity::TrustDomain;
use countersign_identity::policy::{Mode, Policy};
use ipnet::IpNet;

use super::account::Account;
use super::users;
use crate::settings::words::shown;
use crate::settings::yaml::Node;
use crate::settings::{Mistake, Ttl, load_tree};

pub use program::find_program;

/// Workloads in one mesh at most.
pub const MAX_WORKLOADS: usize = 200;
/// Ports that sidecars need for themselves.
const SIDECAR_PORTS: [u16; 4] = [15001, 15006, 15008, 15020];

/// A mesh that can be started.
#[derive(Debug, Clone)]
pub struct MeshSpec {
    /// Tells several meshes of one machine apart.
    pub name: String,
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// The mesh's mode.
    pub mode: Mode,
    /// Life of an authority.
    pub ca_ttl: Ttl,
    /// Life of an SVID.
    pub svid_ttl: Ttl,
    /// Key type of authorities.
    pub ca_key_type: String,
    /// The PKI above, as files: certificate, key, bundle.
    pub upstream: Option<(PathBuf, PathBuf, Option<PathBuf>)>,
    /// What runs in it.
    pub workloads: Vec<WorkloadSpec>,
}

/// One workload.
#[derive(Debug, Clone)]
pub struct WorkloadSpec {
    /// Its name, for people and for the others' `/etc/hosts`.
    pub name: String,
    /// Half of its identity.
    pub namespace: String,
    /// The other half.
    pub service_account: String,
    /// As whom it runs; `None` takes a user of its own.
    pub user: Option<Account>,
    /// What runs; empty for one that `run` starts itself.
    pub command: Vec<String>,
    /// Ports that it serves.
    pub ports: BTreeSet<u16>,
    /// Where the program starts; `None` is the folder that `up` was started from.
    pub workdir: Option<PathBuf>,
    /// What happens when the program ends by itself.
    pub restart: Restart,
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// What its sidecar lets through; SPIFFE IDs in the lists.
    pub policy: Policy,
    /// Outgoing ports that are not caught.
    pub exclude_outbound_ports: BTreeSet<u16>,
    /// Incoming ports that are not caught.
    pub exclude_inbound_ports: BTreeSet<u16>,
    /// Destinations that are not caught.
    pub exclude_outbound_cidrs: BTreeSet<IpNet>,
    /// Sources that are not caught.
    pub exclude_inbound_cidrs: BTreeSet<IpNet>,
    /// Served ports at which the program reads a PROXY protocol header before each connection's bytes.
    pub proxy_protocol: BTreeSet<u16>,
    /// UDP ports that strict lets pass, in both directions.
    pub allow_udp_ports: BTreeSet<u16>,
    /// Networks with which strict lets every protocol but TCP pass, in both directions.
    pub allow_other_cidrs: BTreeSet<IpNet>,
}

/// What happens when a process ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Restart {
    /// It stays ended.
    #[default]
    No,
    /// It is started again unless its exit code was 0.
    OnFailure,
    /// It is started again.
    Always,
}

impl FromStr for Restart {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "no" => Ok(Self::No),
            "on-failure" => Ok(Self::OnFailure),
            "always" => Ok(Self::Always),
            _ => Err(format!("expected no, on-failure or always, found `{text}`")),
        }
    }
}

impl fmt::Display for Restart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::No => "no",
            Self::OnFailure => "on-failure",
            Self::Always => "always",
        })
    }
}

/// A name for meshes and workloads: what fits into host names and paths.
pub fn check_name(text: &str) -> Result<(), String> {
    let ok = (1..=40).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    if ok {
        Ok(())
    } else {
        Err(format!("`{}` is not a name: use 1 to 40 of a-z, 0-9 and `-`, not at the ends", shown(text)))
    }
}

/// A namespace or service account: one segment of a SPIFFE ID (SPIFFE-ID §2.2), so that `/ns/a/sa/b` is unambiguous.
pub fn check_segment(text: &str) -> Result<(), String> {
    let ok = (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && text != "."
        && text != "..";
    if ok {
        Ok(())
    } else {
        Err(format!(
            "`{}` is not one segment of a SPIFFE ID: use 1 to 63 of a-z, A-Z, 0-9, `.`, `_` and `-`",
            shown(text)
        ))
    }
}

/// A port that a workload may serve: not 0, and not one that its sidecar needs.
pub fn check_port(port: u16) -> Result<u16, String> {
    if port == 0 {
        return Err("expected a port from 1 to 65535, found 0".into());
    }
    if SIDECAR_PORTS.contains(&port) {
        return Err(format!("port {port} is the sidecar's own; let the program listen on another one"));
    }
    Ok(port)
}

/// A user that a workload may run as: no sidecar's, whose traffic is never caught, and nobody's who has an identity by it.
pub fn check_user(account: &Account) -> Result<(), String> {
    users::refused(account.uid).map_or(Ok(()), Err)
}

/// Reads a mesh file.
pub fn load(path: &Path) -> Result<MeshSpec, Mistake> {
    let (tree, _) = load_tree(path)?;
    read(path, &tree)
}

/// Reads the tree of a mesh file; `path` is for the mistakes in it.
pub fn read(path: &Path, tree: &Node) -> Result<MeshSpec, Mistake> {
    mesh::read(path, tree)
}

#[cfg(test)]
mod tests;
