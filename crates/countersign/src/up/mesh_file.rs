//! The mesh file: parses YAML into a mesh that can be started.
//!
//! Every error is one line, `FILE:LINE: KEY: what was expected, what was found`. `mesh` reads the file, `workload` one
//! workload, `program` finds the program of a command.

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
use super::control_plane::{AGENT_LOG, SERVER_LOG};
use super::events;
use super::users;
use crate::settings::words::shown;
use crate::settings::yaml::Node;
use crate::settings::{Mistake, Ttl, load_tree};

pub use program::find_program;

/// Most workloads in one mesh.
pub const MAX_WORKLOADS: usize = 200;
/// TCP ports that sidecars use themselves.
const SIDECAR_PORTS: [u16; 4] = [15001, 15006, 15008, 15020];

/// A valid mesh.
#[derive(Debug, Clone)]
pub struct MeshSpec {
    /// Name of the mesh, unique on the machine.
    pub name: String,
    /// Trust domain of the mesh.
    pub trust_domain: TrustDomain,
    /// Mode of the mesh.
    pub mode: Mode,
    /// Lifetime of an authority.
    pub ca_ttl: Ttl,
    /// Lifetime of an SVID.
    pub svid_ttl: Ttl,
    /// Key type of authorities.
    pub ca_key_type: String,
    /// Files of the upstream CA: certificate, key, bundle; `None` for none.
    pub upstream: Option<(PathBuf, PathBuf, Option<PathBuf>)>,
    /// All workloads of the mesh.
    pub workloads: Vec<WorkloadSpec>,
}

/// A valid workload.
#[derive(Debug, Clone)]
pub struct WorkloadSpec {
    /// Name, also in the others' `/etc/hosts`.
    pub name: String,
    /// Namespace in its SPIFFE ID.
    pub namespace: String,
    /// Service account in its SPIFFE ID.
    pub service_account: String,
    /// User to run as; `None` for a user of its own.
    pub user: Option<Account>,
    /// Program and arguments; empty if `run` starts the program.
    pub command: Vec<String>,
    /// TCP ports that it serves.
    pub ports: BTreeSet<u16>,
    /// Working directory of the program; `None` for the folder that `up` was started in.
    pub workdir: Option<PathBuf>,
    /// What to do when the program ends.
    pub restart: Restart,
    /// Environment variables of the program.
    pub env: BTreeMap<String, String>,
    /// Policy of its sidecar, with SPIFFE IDs in the lists.
    pub policy: Policy,
    /// Outgoing TCP ports that are not redirected.
    pub exclude_outbound_ports: BTreeSet<u16>,
    /// Incoming TCP ports that are not redirected.
    pub exclude_inbound_ports: BTreeSet<u16>,
    /// Destination networks that are not redirected.
    pub exclude_outbound_cidrs: BTreeSet<IpNet>,
    /// Source networks that are not redirected.
    pub exclude_inbound_cidrs: BTreeSet<IpNet>,
    /// Served ports at which the program reads a PROXY protocol header before each connection's bytes.
    pub proxy_protocol: BTreeSet<u16>,
    /// UDP ports that strict lets pass, in both directions.
    pub allow_udp_ports: BTreeSet<u16>,
    /// Networks with which strict lets every protocol but TCP pass, in both directions.
    pub allow_other_cidrs: BTreeSet<IpNet>,
}

/// What to do when a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Restart {
    /// It is not restarted. The default.
    #[default]
    No,
    /// It is restarted unless its exit code was 0.
    OnFailure,
    /// It is always restarted.
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

/// Checks a name of a mesh or a workload: it must fit into host names and paths.
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

/// Checks a workload's name: as [`check_name`], and not that of another log in the mesh's folder of logs.
pub fn check_workload_name(text: &str) -> Result<(), String> {
    check_name(text)?;
    let log = format!("{text}.log");
    if [SERVER_LOG, AGENT_LOG, events::FILE].contains(&log.as_str()) {
        return Err(format!("`{text}` is not a workload's name: {log} is a log of the mesh itself; use another name"));
    }
    Ok(())
}

/// Checks a namespace or service account: one segment of a SPIFFE ID (SPIFFE-ID §2.2), so that `/ns/a/sa/b` is
/// unambiguous.
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

/// Checks a port that a workload serves: not 0, and not one of its sidecar's.
pub fn check_port(port: u16) -> Result<u16, String> {
    if port == 0 {
        return Err("expected a port from 1 to 65535, found 0".into());
    }
    if SIDECAR_PORTS.contains(&port) {
        return Err(format!("port {port} is the sidecar's own; let the program listen on another one"));
    }
    Ok(port)
}

/// Checks a user that a workload runs as: not a sidecar's, whose traffic is never redirected, and not one that has an
/// identity.
pub fn check_user(account: &Account) -> Result<(), String> {
    users::refused(account.uid).map_or(Ok(()), Err)
}

/// Reads a mesh file.
pub fn load(path: &Path) -> Result<MeshSpec, Mistake> {
    let (tree, _) = load_tree(path)?;
    read(path, &tree)
}

/// Reads the tree of a mesh file; `path` is used in errors.
pub fn read(path: &Path, tree: &Node) -> Result<MeshSpec, Mistake> {
    mesh::read(path, tree)
}

#[cfg(test)]
mod tests;
