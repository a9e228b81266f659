//! The top-level keys of the mesh file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use countersign_identity::policy::Mode;
use countersign_identity::trust_domain::parse_trust_domain;
use countersign_identity::{KeyType, SpiffeId};

use super::workload::{self, Known};
use super::{MAX_WORKLOADS, MeshSpec, check_name};
use crate::settings::words::shown;
use crate::settings::yaml::{Node, Reader};
use crate::settings::{Mistake, Ttl, parse_mode};

const KEYS: &[&str] = &["name", "trust_domain", "mode", "svid_ttl", "ca_ttl", "ca_key_type", "upstream", "workloads"];
const UPSTREAM_KEYS: &[&str] = &["certificate", "key", "bundle"];
/// Form of a duration, for error messages.
const TTL: &str = "a length of time such as 20s, 5m or 1h30m";
/// Names of the modes, for error messages.
pub const MODES: &str = "off, permissive or strict";
/// Shortest lifetime of an SVID: renewal at half of it needs time to fail and try again.
const LEAST_SVID_TTL: Duration = Duration::from_secs(10);

/// Reads the tree of a mesh file.
pub fn read(path: &Path, tree: &Node) -> Result<MeshSpec, Mistake> {
    let reader = Reader::new(path);
    let mut fields = reader.fields(tree, "", "a mesh file", KEYS)?;
    let name = match fields.optional("name") {
        Some(at) => reader.parse(at, "name", "a name", |n| check_name(n).map(|()| n.to_owned()))?,
        None => "mesh".into(),
    };
    let trust_domain = match fields.optional("trust_domain") {
        Some(at) => reader.parse(at, "trust_domain", "a name such as shop.local", parse_trust_domain)?,
        None => parse_trust_domain(&format!("{name}.local")).map_err(|e| Mistake(e.to_string()))?,
    };
    let mode = match fields.optional("mode") {
        Some(at) => reader.parse(at, "mode", MODES, parse_mode)?,
        None => Mode::default(),
    };
    let (svid_ttl, ca_ttl) = lives(reader, fields.optional("svid_ttl"), fields.optional("ca_ttl"))?;
    let ca_key_type = match fields.optional("ca_key_type") {
        Some(at) => reader
            .parse(at, "ca_key_type", "a key type such as ec-p256", |t| t.parse::<KeyType>().map(|k| k.to_string()))?,
        None => KeyType::default().to_string(),
    };
    let upstream = fields.optional("upstream").map(|at| upstream(reader, at)).transpose()?;
    let list = fields.required("workloads")?;
    let items = reader.list(list, "workloads", "[{name: web, command: [nginx]}]")?;
    if items.is_empty() {
        return Err(reader.wrong(list.line, "workloads", "expected at least one workload, found an empty list"));
    }
    if items.len() > MAX_WORKLOADS {
        let why = format!("a mesh on one machine holds at most {MAX_WORKLOADS} workloads, found {}", items.len());
        return Err(reader.wrong(list.line, "workloads", &why));
    }
    // Names first: an allow-list may name a workload that is defined further below.
    let mut ids: BTreeMap<String, (SpiffeId, usize)> = BTreeMap::new();
    for item in items {
        let (name, line, id) = workload::identity(reader, item, &trust_domain)?;
        if let Some((_, before)) = ids.get(&name) {
            let why = format!(
                "`{}` is already the name of the workload on line {before}; names are unique in a mesh",
                shown(&name)
            );
            return Err(reader.wrong(line, "name", &why));
        }
        ids.insert(name, (id, line));
    }
    let ids: BTreeMap<String, SpiffeId> = ids.into_iter().map(|(name, (id, _))| (name, id)).collect();
    let known = Known { mode, ids: &ids };
    let workloads = items.iter().map(|item| workload::read(reader, item, &known)).collect::<Result<_, _>>()?;
    Ok(MeshSpec { name, trust_domain, mode, ca_ttl, svid_ttl, ca_key_type, upstream, workloads })
}

/// The lifetimes of SVIDs and authorities, which must fit together.
fn lives(reader: Reader<'_>, svid: Option<&Node>, ca: Option<&Node>) -> Result<(Ttl, Ttl), Mistake> {
    let parse = |at: Option<&Node>, key: &str, default: u64| match at {
        Some(at) => reader.parse(at, key, TTL, str::parse::<Ttl>),
        None => Ok(Ttl(Duration::from_secs(default))),
    };
    let svid_ttl = parse(svid, "svid_ttl", 3_600)?;
    let ca_ttl = parse(ca, "ca_ttl", 86_400)?;
    if svid_ttl.0 < LEAST_SVID_TTL
        && let Some(at) = svid
    {
        let why = format!(
            "expected at least {}s, so that an SVID can be renewed in time, found {svid_ttl}",
            LEAST_SVID_TTL.as_secs()
        );
        return Err(reader.wrong(at.line, "svid_ttl", &why));
    }
    if svid_ttl.0 > ca_ttl.0 {
        // Reports the key that the file contains.
        let (key, line) = match (svid, ca) {
            (Some(at), _) => ("svid_ttl", at.line),
            (None, Some(at)) => ("ca_ttl", at.line),
            (None, None) => ("", 1),
        };
        let why = format!("an SVID cannot outlive its authority: svid_ttl is {svid_ttl} and ca_ttl is {ca_ttl}");
        return Err(reader.wrong(line, key, &why));
    }
    Ok((svid_ttl, ca_ttl))
}

fn upstream(reader: Reader<'_>, node: &Node) -> Result<(PathBuf, PathBuf, Option<PathBuf>), Mistake> {
    let mut fields = reader.fields(node, "upstream", "upstream", UPSTREAM_KEYS)?;
    // Paths in the file are relative to the file.
    let find = |at: &Node, key: &str| {
        let text = reader.text(at, key, "a path")?;
        let path = reader.folder().join(text);
        let wrong = |why: String| Err(reader.wrong(at.line, key, &why));
        match std::fs::metadata(&path) {
            Ok(about) if about.is_file() => Ok(path),
            Ok(about) if about.is_dir() => {
                wrong(format!("{} is a folder; expected a PEM file", shown(&path.display().to_string())))
            }
            Ok(_) => {
                wrong(format!("{} is not a regular file; expected a PEM file", shown(&path.display().to_string())))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                wrong(format!("there is no file {}", shown(&path.display().to_string())))
            }
            Err(e) => wrong(format!("{} cannot be reached: {e}", shown(&path.display().to_string()))),
        }
    };
    let certificate = find(fields.required("certificate")?, "certificate")?;
    let key = find(fields.required("key")?, "key")?;
    let bundle = fields.optional("bundle").map(|at| find(at, "bundle")).transpose()?;
    Ok((certificate, key, bundle))
}

/// A list of distinct items, parsed one by one.
pub fn distinct<T: Ord + std::fmt::Display>(
    reader: Reader<'_>,
    node: &Node,
    key: &str,
    example: &str,
    parse: impl Fn(&Node) -> Result<T, Mistake>,
) -> Result<BTreeSet<T>, Mistake> {
    let mut all = BTreeSet::new();
    for item in reader.list(node, key, example)? {
        let value = parse(item)?;
        let text = value.to_string();
        if !all.insert(value) {
            return Err(reader.wrong(item.line, key, &format!("{text} is in this list twice")));
        }
    }
    Ok(all)
}
