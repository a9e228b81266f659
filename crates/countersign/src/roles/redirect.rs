//! `countersign redirect`.

use std::process::ExitCode;

use anyhow::{Result, anyhow};
use countersign_redirect::{Backend, Redirect, RedirectError, install, installed, remove};
use ipnet::IpNet;

use crate::operator::output::{Output, Table};
use crate::settings::Mistake;

/// Install, check or remove the NAT redirect in this network namespace.
///
/// A workload's traffic goes through its sidecar then. Installing again replaces it; nothing else in the namespace is touched.
#[derive(Debug, clap::Args)]
pub struct RedirectArgs {
    /// Show the rules that are in force, with what they matched; exit 1 when there are none or they differ.
    #[arg(long, conflicts_with = "remove")]
    check: bool,
    /// Remove the redirect.
    #[arg(long)]
    remove: bool,
    /// The sidecar's user, whose own connections are never caught.
    #[arg(long, value_name = "UID", default_value_t = 2102)]
    proxy_uid: u32,
    /// Where outgoing connections go.
    #[arg(long, value_name = "PORT", default_value_t = 15001)]
    outbound_port: u16,
    /// Where incoming connections go.
    #[arg(long, value_name = "PORT", default_value_t = 15006)]
    inbound_port: u16,
    /// The sidecar's mTLS port, which is left alone.
    #[arg(long, value_name = "PORT", default_value_t = 15008)]
    mesh_port: u16,
    /// Incoming ports that are left alone too, comma separated.
    #[arg(long, value_name = "PORTS", value_delimiter = ',', default_value = "15020")]
    exclude_inbound_ports: Vec<String>,
    /// Outgoing ports that are left alone, comma separated.
    #[arg(long, value_name = "PORTS", value_delimiter = ',', default_value = "53")]
    exclude_outbound_ports: Vec<String>,
    /// Sources that are left alone, comma separated.
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    exclude_inbound_cidrs: Vec<String>,
    /// Destinations that are left alone, comma separated.
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    exclude_outbound_cidrs: Vec<String>,
    /// What enforces it: auto, nftables, iptables.
    #[arg(long, default_value_t = Backend::Auto, value_name = "BACKEND")]
    backend: Backend,
    #[command(flatten)]
    output: Output,
}

/// Reads a list whose items may have blanks around them; empty items are passed over.
fn list<T: std::str::FromStr, C: FromIterator<T>>(flag: &str, what: &str, items: &[String]) -> Result<C, Mistake> {
    let items = items.iter().map(|i| i.trim()).filter(|i| !i.is_empty());
    items.map(|i| i.parse().map_err(|_| Mistake::flag(flag, &format!("`{i}` is no {what}")))).collect()
}

impl RedirectArgs {
    fn redirect(&self) -> Result<Redirect, Mistake> {
        let cidrs = |flag: &str, items: &[String]| list::<IpNet, _>(flag, "CIDR, such as 10.0.0.0/8", items);
        let mut exempt_inbound_ports: std::collections::BTreeSet<u16> =
            list("--exclude-inbound-ports", "port", &self.exclude_inbound_ports)?;
        exempt_inbound_ports.insert(self.mesh_port);
        Ok(Redirect {
            proxy_uid: self.proxy_uid,
            outbound_port: self.outbound_port,
            inbound_port: self.inbound_port,
            exempt_inbound_ports,
            exempt_outbound_ports: list("--exclude-outbound-ports", "port", &self.exclude_outbound_ports)?,
            exempt_inbound_cidrs: cidrs("--exclude-inbound-cidrs", &self.exclude_inbound_cidrs)?,
            exempt_outbound_cidrs: cidrs("--exclude-outbound-cidrs", &self.exclude_outbound_cidrs)?,
        })
    }
}

/// Installs, checks or removes.
pub fn run(args: &RedirectArgs) -> Result<ExitCode> {
    let redirect = args.redirect()?;
    let mendable = |error: RedirectError| match error {
        RedirectError::NotPermitted | RedirectError::NoNftables(_) | RedirectError::NoNetfilter { .. } => {
            anyhow!(Mistake(error.to_string()))
        }
        other => other.into(),
    };
    if args.remove {
        remove().map_err(mendable)?;
        return Ok(ExitCode::SUCCESS);
    }
    if !args.check {
        let backend = install(&redirect, args.backend).map_err(mendable)?;
        eprintln!(
            "redirect installed with {backend}: out to {}, in to {}",
            redirect.outbound_port, redirect.inbound_port
        );
        return Ok(ExitCode::SUCCESS);
    }
    let found = installed().map_err(mendable)?;
    let expected: Vec<String> = redirect.rules().iter().map(countersign_redirect::rules::Rule::comment).collect();
    let in_force = found.iter().map(|r| r.comment.clone()).eq(expected);
    let mut table = Table::new(&["rule", "packets", "bytes"]);
    for rule in &found {
        table.row(vec![rule.comment.clone(), rule.packets.to_string(), rule.bytes.to_string()]);
    }
    let rules: Vec<_> =
        found.iter().map(|r| serde_json::json!({"rule": r.comment, "packets": r.packets, "bytes": r.bytes})).collect();
    args.output.print(&table, &serde_json::json!({"in_force": in_force, "rules": rules}))?;
    match (found.is_empty(), in_force) {
        (true, _) => Err(anyhow!("no redirect is installed in this network namespace")),
        (false, false) => Err(anyhow!("the redirect in force differs from the one asked for; install it again")),
        (false, true) => Ok(ExitCode::SUCCESS),
    }
}
