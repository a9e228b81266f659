//! One workload of the mesh file.

use std::collections::{BTreeMap, BTreeSet};

use countersign_identity::policy::{Egress, Mode, Policy};
use countersign_identity::trust_domain::{parse_workload_id, service_account_id};
use countersign_identity::{SpiffeId, TrustDomain};
use ipnet::IpNet;

use super::mesh::{MODES, distinct};
use super::program::find_program;
use super::{Account, Restart, WorkloadSpec, check_port, check_segment, check_user, check_workload_name};
use crate::settings::words::{did_you_mean, shown};
use crate::settings::yaml::{Fields, Node, Reader, Value};
use crate::settings::{Mistake, parse_mode};

const KEYS: &[&str] = &[
    "name",
    "namespace",
    "service_account",
    "user",
    "command",
    "workdir",
    "restart",
    "ports",
    "env",
    "allow",
    "mode",
    "port_modes",
    "port_allow",
    "proxy_protocol",
    "egress",
    "allow_udp_ports",
    "allow_other_cidrs",
    "exclude_outbound_ports",
    "exclude_inbound_ports",
    "exclude_outbound_cidrs",
    "exclude_inbound_cidrs",
];
/// Form of a caller, for error messages.
const CALLER: &str = "a workload's name or a SPIFFE ID";

/// The parts of the mesh that a workload refers to.
pub struct Known<'a> {
    /// Mode of the mesh.
    pub mode: Mode,
    /// SPIFFE ID of each workload by name.
    pub ids: &'a BTreeMap<String, SpiffeId>,
}

fn fields<'a>(reader: Reader<'a>, node: &'a Node) -> Result<Fields<'a>, Mistake> {
    // The name in errors tells which of many workloads is meant.
    let name = match &node.value {
        Value::Map(entries) => entries.iter().find(|e| e.key == "name").and_then(|e| match &e.value.value {
            Value::Scalar { text, .. } => Some(text.as_str()),
            _ => None,
        }),
        _ => None,
    };
    let what = name.map_or_else(|| "a workload".into(), |n| format!("workload `{}`", shown(n)));
    reader.fields(node, "workloads", &what, KEYS)
}

/// A workload's name with its line, and its SPIFFE ID.
pub fn identity(reader: Reader<'_>, node: &Node, td: &TrustDomain) -> Result<(String, usize, SpiffeId), Mistake> {
    let mut fields = fields(reader, node)?;
    let at = fields.required("name")?;
    let name = reader.parse(at, "name", "a name", |n| check_workload_name(n).map(|()| n.to_owned()))?;
    let (namespace, account) = segments(reader, &mut fields, &name)?;
    let id = service_account_id(td, &namespace, &account).map_err(|e| reader.wrong(at.line, "name", &e.to_string()))?;
    Ok((name, at.line, id))
}

/// Namespace and service account of a workload.
fn segments(reader: Reader<'_>, fields: &mut Fields<'_>, name: &str) -> Result<(String, String), Mistake> {
    let mut segment = |key: &'static str, default: &str| match fields.optional(key) {
        Some(at) => reader.parse(at, key, "a name", |n| check_segment(n).map(|()| n.to_owned())),
        None => Ok(default.to_owned()),
    };
    Ok((segment("namespace", "default")?, segment("service_account", name)?))
}

/// Reads a workload whose name and SPIFFE ID were validated before.
pub fn read(reader: Reader<'_>, node: &Node, known: &Known<'_>) -> Result<WorkloadSpec, Mistake> {
    let mut fields = fields(reader, node)?;
    let name = reader.text(fields.required("name")?, "name", "a name")?.to_owned();
    let (namespace, service_account) = segments(reader, &mut fields, &name)?;
    let command = command(reader, fields.required("command")?)?;
    let user = match fields.optional("user") {
        Some(at) => Some(reader.parse(at, "user", "a user's name or number", |u| {
            let account = Account::find(u)?;
            check_user(&account).map(|()| account)
        })?),
        None => None,
    };
    let workdir = match fields.optional("workdir") {
        Some(at) => Some(workdir(reader, at)?),
        None => None,
    };
    let restart = match fields.optional("restart") {
        Some(at) => reader.parse(at, "restart", "no, on-failure or always", str::parse::<Restart>)?,
        None => Restart::default(),
    };
    let mut ports_of = |key: &'static str, serves: bool| match fields.optional(key) {
        Some(at) => distinct(reader, at, key, "[8080]", |item| {
            let port = port(reader, item, key)?;
            if serves { check_port(port).map_err(|why| reader.wrong(item.line, key, &why)) } else { Ok(port) }
        }),
        None => Ok(BTreeSet::new()),
    };
    let ports = ports_of("ports", true)?;
    let exclude_outbound_ports = ports_of("exclude_outbound_ports", false)?;
    let exclude_inbound_ports = ports_of("exclude_inbound_ports", false)?;
    let allow_udp_ports = ports_of("allow_udp_ports", false)?;
    let proxy_protocol = match fields.optional("proxy_protocol") {
        Some(at) => distinct(reader, at, "proxy_protocol", "[8080]", |item| {
            let port = port(reader, item, "proxy_protocol")?;
            let wrong = || reader.wrong(item.line, "proxy_protocol", &not_served(port, &ports));
            ports.contains(&port).then_some(port).ok_or_else(wrong)
        })?,
        None => BTreeSet::new(),
    };
    let mut networks_of = |key: &'static str| match fields.optional(key) {
        Some(at) => distinct(reader, at, key, "[10.0.0.0/8]", |item| network(reader, item, key)),
        None => Ok(BTreeSet::new()),
    };
    let egress = networks_of("egress")?;
    let exclude_outbound_cidrs = networks_of("exclude_outbound_cidrs")?;
    let exclude_inbound_cidrs = networks_of("exclude_inbound_cidrs")?;
    let allow_other_cidrs = networks_of("allow_other_cidrs")?;
    let env = fields.optional("env").map(|at| environment(reader, at)).transpose()?.unwrap_or_default();
    let mut policy = Policy { egress: egress.into_iter().map(Egress::from).collect(), ..Policy::default() };
    if let Some(at) = fields.optional("allow") {
        // An empty list would admit none, as everywhere; a workload that none may call is more likely a mistake.
        if at.value == Value::List(vec![]) {
            let why = "an empty list; leave the key out to let the whole trust domain call, or name who may";
            return Err(reader.wrong(at.line, "allow", why));
        }
        policy.allow = Some(callers(reader, at, "allow", known)?);
    }
    let own_mode = match fields.optional("mode") {
        Some(at) => Some(reader.parse(at, "mode", MODES, parse_mode)?),
        None => None,
    };
    policy.mode = known.mode.narrowed_by(own_mode);
    for (port, at, key) in by_port(reader, fields.optional("port_modes"), "port_modes", "{8080: strict}", &ports)? {
        policy.port_modes.insert(port, reader.parse(at, &key, MODES, parse_mode)?);
    }
    for (port, at, key) in by_port(reader, fields.optional("port_allow"), "port_allow", "{8080: [web]}", &ports)? {
        // Here an empty list is clear: none may call this port.
        policy.port_allow.insert(port, callers(reader, at, &key, known)?);
    }
    Ok(WorkloadSpec {
        name,
        namespace,
        service_account,
        user,
        command,
        ports,
        workdir,
        restart,
        env,
        policy,
        exclude_outbound_ports,
        exclude_inbound_ports,
        exclude_outbound_cidrs,
        exclude_inbound_cidrs,
        proxy_protocol,
        allow_udp_ports,
        allow_other_cidrs,
    })
}

fn command(reader: Reader<'_>, node: &Node) -> Result<Vec<String>, Mistake> {
    let items = reader.list(node, "command", "[python3, -m, http.server]")?;
    let mut words = vec![];
    for item in items {
        words.push(reader.text(item, "command", "a text for each argument; write '' for an empty one")?.to_owned());
    }
    let (Some(program), Some(first)) = (words.first(), items.first()) else {
        return Err(reader.wrong(node.line, "command", "expected a program and its arguments, found an empty list"));
    };
    let found = find_program(program).map_err(|why| reader.wrong(first.line, "command", &why))?;
    // An absolute path means the same in any working directory of the program.
    if program.contains('/') && !program.starts_with('/') {
        let whole = std::path::absolute(&found).unwrap_or(found);
        words[0] = whole.display().to_string();
    }
    Ok(words)
}

/// The working directory of a program; relative to the file.
fn workdir(reader: Reader<'_>, node: &Node) -> Result<std::path::PathBuf, Mistake> {
    let text = reader.text(node, "workdir", "a folder's path")?;
    let path = reader.folder().join(text);
    let path = std::path::absolute(&path).unwrap_or(path);
    let wrong = |why: String| Err(reader.wrong(node.line, "workdir", &why));
    let name = shown(&path.display().to_string());
    match std::fs::metadata(&path) {
        Ok(about) if about.is_dir() => Ok(path),
        Ok(_) => wrong(format!("{name} is not a folder")),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => wrong(format!("there is no folder {name}")),
        Err(e) => wrong(format!("{name} cannot be reached: {e}")),
    }
}

fn port(reader: Reader<'_>, node: &Node, key: &str) -> Result<u16, Mistake> {
    let Value::Scalar { text, .. } = &node.value else {
        return Err(reader.unexpected(node, key, "a port from 1 to 65535"));
    };
    port_number(text).ok_or_else(|| reader.unexpected(node, key, "a port from 1 to 65535"))
}

fn port_number(text: &str) -> Option<u16> {
    let plain = text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|p: &u16| plain && *p != 0)
}

fn network(reader: Reader<'_>, node: &Node, key: &str) -> Result<IpNet, Mistake> {
    reader.parse(node, key, "a network such as 10.0.0.0/8", |text| {
        let one = || text.parse::<std::net::IpAddr>().ok();
        text.parse::<IpNet>().map_err(|_| match one() {
            Some(address) => format!(
                "expected a network such as 10.0.0.0/8, found the address {text}; write {}",
                IpNet::from(address)
            ),
            None => format!("expected a network such as 10.0.0.0/8, found `{text}`"),
        })
    })
}

fn environment(reader: Reader<'_>, node: &Node) -> Result<BTreeMap<String, String>, Mistake> {
    let mut env = BTreeMap::new();
    for entry in reader.pairs(node, "env", "{LANG: C}")? {
        let key = format!("env.{}", entry.key);
        if entry.key.is_empty() || entry.key.contains(['=', '\0']) {
            let why = format!("`{}` cannot be the name of a variable", shown(&entry.key));
            return Err(reader.wrong(entry.line, "env", &why));
        }
        let value = reader.text(&entry.value, &key, "a text; write '' for an empty one")?;
        env.insert(entry.key.clone(), value.to_owned());
    }
    Ok(env)
}

/// Settings of single ports. The workload must serve each of them: a rule for another port would protect nothing.
fn by_port<'a>(
    reader: Reader<'a>,
    node: Option<&'a Node>,
    key: &str,
    example: &str,
    served: &BTreeSet<u16>,
) -> Result<Vec<(u16, &'a Node, String)>, Mistake> {
    let Some(node) = node else { return Ok(vec![]) };
    let mut all = vec![];
    for entry in reader.pairs(node, key, example)? {
        let Some(port) = port_number(&entry.key) else {
            let why = format!("expected a port from 1 to 65535 as key, found `{}`", shown(&entry.key));
            return Err(reader.wrong(entry.line, key, &why));
        };
        if !served.contains(&port) {
            return Err(reader.wrong(entry.line, key, &not_served(port, served)));
        }
        all.push((port, &entry.value, format!("{key}.{port}")));
    }
    Ok(all)
}

fn not_served(port: u16, served: &BTreeSet<u16>) -> String {
    let list = |ports: &BTreeSet<u16>| ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if served.is_empty() {
        format!("port {port} is not served: the workload has no `ports`; add `ports: [{port}]`")
    } else {
        format!("port {port} is not served: `ports` lists {}", list(served))
    }
}

/// Callers: names of workloads, or SPIFFE IDs.
fn callers(reader: Reader<'_>, node: &Node, key: &str, known: &Known<'_>) -> Result<BTreeSet<String>, Mistake> {
    distinct(reader, node, key, "[web]", |item| {
        reader.parse(item, key, CALLER, |text| {
            if text.starts_with("spiffe://") {
                return parse_workload_id(text).map(|id| id.to_string()).map_err(|e| e.to_string());
            }
            known.ids.get(text).map(ToString::to_string).ok_or_else(|| stranger(text, known))
        })
    })
}

fn stranger(text: &str, known: &Known<'_>) -> String {
    const LISTED: usize = 10;
    let hint = did_you_mean(text, known.ids.keys().map(String::as_str));
    let hint = if hint.is_empty() {
        let names: Vec<&str> = known.ids.keys().take(LISTED).map(String::as_str).collect();
        let more = known.ids.len().saturating_sub(LISTED);
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        format!("; it has {}{more}", names.join(", "))
    } else {
        hint
    };
    format!("`{text}` is neither a workload of this mesh nor a SPIFFE ID{hint}")
}
