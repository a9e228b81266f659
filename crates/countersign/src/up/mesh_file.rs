//! The mesh file: YAML in, a mesh that can be started out. Every mistake names file, line, key and mend.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use countersign_identity::policy::{Mode, Policy};
use countersign_identity::trust_domain::{parse_trust_domain, parse_workload_id, service_account_id};
use countersign_identity::{SpiffeId, TrustDomain};
use ipnet::IpNet;
use serde::Deserialize;
use serde_saphyr::Spanned;

use super::account::Account;
use crate::settings::{Mistake, Ttl, load as load_file, located, parse_mode};

/// First user of sidecars; one more for each.
pub const FIRST_PROXY_UID: u32 = 2102;
/// The server's own user.
pub const SERVER_UID: u32 = 2100;
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
}

/// A name for meshes and workloads: what fits into host names and paths.
pub fn check_name(text: &str) -> Result<(), String> {
    let ok = (1..=40).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    if ok { Ok(()) } else { Err(format!("`{text}` is no name: use 1 to 40 of a-z, 0-9 and `-`, not at the ends")) }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MeshYaml {
    name: Option<Spanned<String>>,
    trust_domain: Option<Spanned<String>>,
    mode: Option<Spanned<String>>,
    ca_ttl: Option<Spanned<String>>,
    svid_ttl: Option<Spanned<String>>,
    ca_key_type: Option<Spanned<String>>,
    upstream: Option<Spanned<UpstreamYaml>>,
    workloads: Spanned<Vec<WorkloadYaml>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UpstreamYaml {
    certificate: Spanned<PathBuf>,
    key: Spanned<PathBuf>,
    bundle: Option<Spanned<PathBuf>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WorkloadYaml {
    name: Spanned<String>,
    namespace: Option<Spanned<String>>,
    service_account: Option<Spanned<String>>,
    user: Option<Spanned<String>>,
    command: Spanned<Vec<String>>,
    #[serde(default)]
    ports: Vec<Spanned<u32>>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    allow: Vec<Spanned<String>>,
    mode: Option<Spanned<String>>,
    #[serde(default)]
    port_modes: BTreeMap<String, Spanned<String>>,
    #[serde(default)]
    port_allow: BTreeMap<String, Vec<Spanned<String>>>,
    #[serde(default)]
    egress: Vec<Spanned<String>>,
    #[serde(default)]
    exclude_outbound_ports: Vec<Spanned<u32>>,
    #[serde(default)]
    exclude_inbound_ports: Vec<Spanned<u32>>,
    #[serde(default)]
    exclude_outbound_cidrs: Vec<Spanned<String>>,
    #[serde(default)]
    exclude_inbound_cidrs: Vec<Spanned<String>>,
}

/// Reads a mesh file.
pub fn load(path: &Path) -> Result<MeshSpec, Mistake> {
    let (yaml, text): (MeshYaml, String) = load_file(path)?;
    Reader { path, text: &text }.mesh(yaml)
}

struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Reader<'_> {
    fn wrong<T>(&self, at: &Spanned<T>, why: &str) -> Mistake {
        located(self.path, self.text, at.referenced, why)
    }

    fn parse<T, U, E: std::fmt::Display>(
        &self,
        at: &Spanned<T>,
        parse: impl FnOnce(&T) -> Result<U, E>,
    ) -> Result<U, Mistake> {
        parse(&at.value).map_err(|e| self.wrong(at, &e.to_string()))
    }

    fn ttl(&self, at: Option<&Spanned<String>>, default: Duration) -> Result<Ttl, Mistake> {
        at.map_or(Ok(Ttl(default)), |at| self.parse(at, |t| t.parse::<Ttl>()))
    }

    fn mesh(&self, yaml: MeshYaml) -> Result<MeshSpec, Mistake> {
        let name = match &yaml.name {
            Some(at) => self.parse(at, |n| check_name(n).map(|()| n.clone()))?,
            None => "mesh".into(),
        };
        let trust_domain = match &yaml.trust_domain {
            Some(at) => self.parse(at, |t| parse_trust_domain(t))?,
            None => parse_trust_domain(&format!("{name}.local")).map_err(|e| Mistake(e.to_string()))?,
        };
        let mode = yaml.mode.as_ref().map_or(Ok(Mode::default()), |at| self.parse(at, |m| parse_mode(m)))?;
        let ca_ttl = self.ttl(yaml.ca_ttl.as_ref(), Duration::from_secs(86_400))?;
        let svid_ttl = self.ttl(yaml.svid_ttl.as_ref(), Duration::from_secs(3_600))?;
        if let (true, Some(at)) = (svid_ttl.0 > ca_ttl.0, yaml.svid_ttl.as_ref().or(yaml.ca_ttl.as_ref())) {
            return Err(self.wrong(at, "an SVID cannot outlive its authority: make svid_ttl shorter than ca_ttl"));
        }
        let ca_key_type = match &yaml.ca_key_type {
            Some(at) => self.parse(at, |t| t.parse::<countersign_identity::KeyType>().map(|k| k.to_string()))?,
            None => countersign_identity::KeyType::default().to_string(),
        };
        let upstream = yaml.upstream.as_ref().map(|at| self.upstream(&at.value)).transpose()?;
        if yaml.workloads.value.is_empty() {
            return Err(self.wrong(&yaml.workloads, "name at least one workload"));
        }
        if yaml.workloads.value.len() > MAX_WORKLOADS {
            return Err(
                self.wrong(&yaml.workloads, &format!("a mesh on one machine holds at most {MAX_WORKLOADS} workloads"))
            );
        }
        let mut ids = BTreeMap::new();
        for w in &yaml.workloads.value {
            self.parse(&w.name, |n| check_name(n))?;
            let id = self.spiffe_id(&trust_domain, w)?;
            if ids.insert(w.name.value.clone(), id).is_some() {
                return Err(
                    self.wrong(&w.name, &format!("`{}` is there twice; names are unique in a mesh", w.name.value))
                );
            }
        }
        let workloads = yaml.workloads.value.iter().map(|w| self.workload(w, mode, &ids)).collect::<Result<_, _>>()?;
        Ok(MeshSpec { name, trust_domain, mode, ca_ttl, svid_ttl, ca_key_type, upstream, workloads })
    }

    fn upstream(&self, yaml: &UpstreamYaml) -> Result<(PathBuf, PathBuf, Option<PathBuf>), Mistake> {
        // Paths in the file are relative to the file.
        let base = self.path.parent().unwrap_or(Path::new("."));
        let find = |at: &Spanned<PathBuf>| {
            let path = base.join(&at.value);
            if path.is_file() { Ok(path) } else { Err(self.wrong(at, &format!("there is no file {}", path.display()))) }
        };
        Ok((find(&yaml.certificate)?, find(&yaml.key)?, yaml.bundle.as_ref().map(find).transpose()?))
    }

    fn spiffe_id(&self, td: &TrustDomain, w: &WorkloadYaml) -> Result<SpiffeId, Mistake> {
        let namespace = w.namespace.as_ref().map_or("default", |n| &n.value);
        let account = w.service_account.as_ref().map_or(&w.name.value, |a| &a.value);
        service_account_id(td, namespace, account).map_err(|e| {
            self.wrong(w.service_account.as_ref().or(w.namespace.as_ref()).unwrap_or(&w.name), &e.to_string())
        })
    }

    fn workload(
        &self,
        w: &WorkloadYaml,
        mesh_mode: Mode,
        ids: &BTreeMap<String, SpiffeId>,
    ) -> Result<WorkloadSpec, Mistake> {
        let Some(program) = w.command.value.first() else {
            return Err(self.wrong(&w.command, "it is empty; name a program and its arguments"));
        };
        find_program(program).map_err(|why| self.wrong(&w.command, &why))?;
        let mut ports = BTreeSet::new();
        for at in &w.ports {
            if !ports.insert(self.port(at)?) {
                return Err(self.wrong(at, &format!("port {} is there twice", at.value)));
            }
        }
        let user = w.user.as_ref().map(|at| self.parse(at, |u| Account::find(u))).transpose()?;
        if let (Some(account), Some(at)) = (&user, &w.user) {
            let proxies = FIRST_PROXY_UID..FIRST_PROXY_UID + u32::try_from(MAX_WORKLOADS).unwrap_or(0);
            if proxies.contains(&account.uid) || account.uid == SERVER_UID {
                return Err(self.wrong(
                    at,
                    &format!(
                        "uid {} is kept for sidecars, whose traffic is never caught; use another user",
                        account.uid
                    ),
                ));
            }
        }
        let ids_of =
            |list: &[Spanned<String>]| list.iter().map(|at| self.caller(at, ids)).collect::<Result<BTreeSet<_>, _>>();
        let nets = |list: &[Spanned<String>]| {
            let parse = |at: &Spanned<String>| {
                self.parse(at, |n| n.parse::<IpNet>().map_err(|_| format!("`{n}` is no network: write 10.0.0.0/8")))
            };
            list.iter().map(parse).collect::<Result<BTreeSet<_>, _>>()
        };
        let plain_ports = |list: &[Spanned<u32>]| {
            list.iter().map(|at| any_port(at.value).map_err(|e| self.wrong(at, &e))).collect::<Result<BTreeSet<_>, _>>()
        };
        let mut policy =
            Policy { allow: ids_of(&w.allow)?, egress: nets(&w.egress)?.into_iter().collect(), ..Policy::default() };
        let own_mode = w.mode.as_ref().map(|at| self.parse(at, |m| parse_mode(m))).transpose()?;
        policy.mode = mesh_mode.narrowed_by(own_mode);
        for (port, at) in &w.port_modes {
            let port = port_key(port).map_err(|e| self.wrong(at, &e))?;
            policy.port_modes.insert(port, self.parse(at, |m| parse_mode(m))?);
        }
        for (port, list) in &w.port_allow {
            let at = list.first().unwrap_or(&w.name);
            let port = port_key(port).map_err(|e| self.wrong(at, &e))?;
            policy.port_allow.insert(port, ids_of(list)?);
        }
        Ok(WorkloadSpec {
            name: w.name.value.clone(),
            namespace: w.namespace.as_ref().map_or_else(|| "default".into(), |n| n.value.clone()),
            service_account: w.service_account.as_ref().map_or_else(|| w.name.value.clone(), |a| a.value.clone()),
            user,
            command: w.command.value.clone(),
            ports,
            env: w.env.clone(),
            policy,
            exclude_outbound_ports: plain_ports(&w.exclude_outbound_ports)?,
            exclude_inbound_ports: plain_ports(&w.exclude_inbound_ports)?,
            exclude_outbound_cidrs: nets(&w.exclude_outbound_cidrs)?,
            exclude_inbound_cidrs: nets(&w.exclude_inbound_cidrs)?,
        })
    }

    fn port(&self, at: &Spanned<u32>) -> Result<u16, Mistake> {
        let port = any_port(at.value).map_err(|e| self.wrong(at, &e))?;
        if SIDECAR_PORTS.contains(&port) {
            return Err(
                self.wrong(at, &format!("port {port} is the sidecar's own; let the program listen on another one"))
            );
        }
        Ok(port)
    }

    /// A caller on an allow-list: a workload's name, or a SPIFFE ID.
    fn caller(&self, at: &Spanned<String>, ids: &BTreeMap<String, SpiffeId>) -> Result<String, Mistake> {
        if at.value.starts_with("spiffe://") {
            return self.parse(at, |id| parse_workload_id(id).map(|id| id.to_string()));
        }
        ids.get(&at.value).map(ToString::to_string).ok_or_else(|| {
            self.wrong(
                at,
                &format!(
                    "`{}` is no workload of this mesh; name one of {}, or a SPIFFE ID",
                    at.value,
                    ids.keys().cloned().collect::<Vec<_>>().join(", ")
                ),
            )
        })
    }
}

fn any_port(number: u32) -> Result<u16, String> {
    u16::try_from(number).ok().filter(|p| *p != 0).ok_or_else(|| format!("{number} is no port: use 1 to 65535"))
}

fn port_key(text: &str) -> Result<u16, String> {
    text.parse::<u32>().map_err(|_| format!("`{text}` is no port: use 1 to 65535")).and_then(any_port)
}

/// Finds a program as a shell would.
pub fn find_program(program: &str) -> Result<PathBuf, String> {
    use std::os::unix::fs::PermissionsExt;
    let executable = |p: &Path| std::fs::metadata(p).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    if program.contains('/') {
        let path = PathBuf::from(program);
        return if executable(&path) { Ok(path) } else { Err(format!("there is no program `{program}`")) };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|d| d.join(program)).find(|p| executable(p));
    found.ok_or_else(|| format!("there is no program `{program}` on the PATH; install it, or write its whole path"))
}

#[cfg(test)]
mod tests;
