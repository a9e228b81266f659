//! `countersign redirect`: flags of the redirect.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Parser;
use countersign_cni::Order;
use countersign_redirect::guard::RESOLV_CONF;
use countersign_redirect::validate::{NotProved, wait_until_in_force};
use countersign_redirect::{Backend, Guard, Redirect, RedirectError, here, in_force, install, installed, remove};
use ipnet::IpNet;

use crate::operator::output::{Output, Table};
use crate::settings::Mistake;

/// Install, check or remove the NAT redirect in this network namespace.
///
/// The redirect sends a workload's TCP connections through its sidecar. Installing it again replaces it; other rules of
/// the namespace are not touched. It is meant for the namespace of one workload: in the machine's own it would redirect
/// SSH too, so it is refused there.
#[derive(Debug, clap::Args)]
#[allow(clippy::struct_excessive_bools)] // each is a flag of the command line
pub struct RedirectArgs {
    /// Show the installed rules and their counters; exit code 1 if there are none or they differ.
    #[arg(long, conflicts_with = "remove")]
    check: bool,
    /// Remove the redirect, and print the rules that were removed.
    #[arg(long)]
    remove: bool,
    /// Wait until somebody else has installed the redirect; exit code 1 if nobody has. Needs no privilege: it listens on
    /// --outbound-port, where the sidecar must not run yet, and dials an address that is nobody's.
    #[arg(long, conflicts_with_all = ["check", "remove"])]
    validate: bool,
    /// With --validate: how long to wait, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "60", requires = "validate")]
    patience: u64,
    /// User ID of the sidecar, whose own connections are never redirected.
    #[arg(long, value_name = "UID", required_unless_present = "remove", value_parser = clap::value_parser!(u32).range(..i64::from(u32::MAX)))]
    proxy_uid: Option<u32>,
    /// With --validate or --check: the sidecar is told from others of its user by its cgroup, which the node's CNI component
    /// admits, if it can.
    #[arg(long)]
    by_cgroup: bool,
    /// Port of the sidecar for outgoing connections.
    #[arg(long, value_name = "PORT", default_value = "15001")]
    outbound_port: NonZeroU16,
    /// Port of the sidecar for incoming connections.
    #[arg(long, value_name = "PORT", default_value = "15006")]
    inbound_port: NonZeroU16,
    /// Port of the sidecar for mTLS, which is not redirected.
    #[arg(long, value_name = "PORT", default_value = "15008")]
    mesh_port: NonZeroU16,
    /// Port of the sidecar's pages (its --http). As on its other ports, nobody but the sidecar can serve there.
    #[arg(long, value_name = "PORT", default_value = "15020")]
    http_port: NonZeroU16,
    /// Further incoming ports that are not redirected, comma separated.
    #[arg(long, value_name = "PORTS", value_delimiter = ',', default_value = "15020")]
    exclude_inbound_ports: Vec<String>,
    /// Outgoing ports that are not redirected, comma separated.
    #[arg(long, value_name = "PORTS", value_delimiter = ',', default_value = "53")]
    exclude_outbound_ports: Vec<String>,
    /// Source networks that are not redirected, comma separated.
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    exclude_inbound_cidrs: Vec<String>,
    /// Destination networks that are not redirected, comma separated.
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    exclude_outbound_cidrs: Vec<String>,
    /// Treatment of UDP and all other protocols than TCP: `leave`, or `drop` except for DNS to the resolvers, ICMP and
    /// replies.
    #[arg(long, value_name = "WHAT", default_value = "leave", value_parser = ["leave", "drop"])]
    other_protocols: String,
    /// With --other-protocols=drop: resolvers that DNS may go to, comma separated [default: those of /etc/resolv.conf].
    #[arg(long, value_name = "ADDRESSES", value_delimiter = ',')]
    resolvers: Option<Vec<String>>,
    /// With --other-protocols=drop: UDP ports that are allowed in both directions, comma separated.
    #[arg(long, value_name = "PORTS", value_delimiter = ',')]
    allow_udp_ports: Vec<String>,
    /// With --other-protocols=drop: networks with which every protocol is allowed, comma separated.
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    allow_other_cidrs: Vec<String>,
    /// Allow the machine's own network namespace, or that of process 1: all connections of this machine are redirected.
    #[arg(long)]
    host_namespace: bool,
    /// This is a pod's container, whose process 1 belongs to the pod.
    #[arg(long, hide = true, conflicts_with = "host_namespace")]
    in_pod: bool,
    /// Backend for the rules: auto, nftables or iptables.
    #[arg(long, default_value_t = Backend::Auto, value_name = "BACKEND")]
    backend: Backend,
    #[command(flatten)]
    output: Output,
}

/// Parses a list. Spaces around items and empty items are ignored.
fn list<T: std::str::FromStr, C: FromIterator<T>>(flag: &str, what: &str, items: &[String]) -> Result<C, Mistake> {
    let items = items.iter().map(|i| i.trim()).filter(|i| !i.is_empty());
    items.map(|i| i.parse().map_err(|_| Mistake::flag(flag, &format!("`{i}` is no {what}")))).collect()
}

/// A command line without the command.
#[derive(Parser)]
#[command(name = "redirect", no_binary_name = true)]
struct Flags {
    #[command(flatten)]
    args: RedirectArgs,
}

/// Reads the flags of a pod's redirect (`proxy --redirect`, or of its validator), for whoever installs it. `resolvers` are the pod's,
/// for flags that name none.
///
/// # Errors
/// They are wrong, or ask for something else, in words.
pub fn order(flags: &[String], resolvers: &BTreeSet<IpAddr>) -> Result<Order, String> {
    let args = Flags::try_parse_from(flags).map_err(|error| what_is_wrong(&error))?.args;
    if args.check || args.remove {
        return Err("--check and --remove install no redirect".into());
    }
    let proxy_uid = args.proxy_uid.ok_or("there is no --proxy-uid")?;
    let redirect = args.redirect(proxy_uid, || resolvers.clone()).map_err(|e| e.to_string())?;
    Ok(Order { redirect, backend: args.backend })
}

/// What is wrong with a command line, in one line. How the command is used comes behind it, after an empty line.
fn what_is_wrong(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ").trim_start_matches("error: ").to_owned()
}

/// The resolvers of this process's own file.
fn own_resolvers() -> BTreeSet<IpAddr> {
    Guard::with_resolvers_of(Path::new(RESOLV_CONF)).resolvers
}

impl RedirectArgs {
    /// The rules. `resolvers`: those that DNS may go to unless the arguments name some.
    fn redirect(&self, proxy_uid: u32, resolvers: impl FnOnce() -> BTreeSet<IpAddr>) -> Result<Redirect, Mistake> {
        let cidrs = |flag: &str, items: &[String]| list::<IpNet, _>(flag, "CIDR, such as 10.0.0.0/8", items);
        let ports = |flag: &str, items: &[String]| {
            let ports: Vec<NonZeroU16> = list(flag, "port", items)?;
            Ok::<_, Mistake>(ports.into_iter().map(NonZeroU16::get).collect::<std::collections::BTreeSet<u16>>())
        };
        if self.outbound_port == self.inbound_port {
            return Err(Mistake::flag(
                "--inbound-port",
                "is --outbound-port too: the sidecar could not tell them apart",
            ));
        }
        let mut exempt_inbound_ports = ports("--exclude-inbound-ports", &self.exclude_inbound_ports)?;
        exempt_inbound_ports.insert(self.mesh_port.get());
        Ok(Redirect {
            proxy_uid,
            by_cgroup: self.by_cgroup,
            outbound_port: self.outbound_port.get(),
            inbound_port: self.inbound_port.get(),
            sidecar_ports: [self.mesh_port.get(), self.http_port.get()].into(),
            exempt_inbound_ports,
            exempt_outbound_ports: ports("--exclude-outbound-ports", &self.exclude_outbound_ports)?,
            exempt_inbound_cidrs: cidrs("--exclude-inbound-cidrs", &self.exclude_inbound_cidrs)?,
            exempt_outbound_cidrs: cidrs("--exclude-outbound-cidrs", &self.exclude_outbound_cidrs)?,
            guard: self.guard(resolvers)?,
        })
    }

    fn guard(&self, resolvers: impl FnOnce() -> BTreeSet<IpAddr>) -> Result<Option<Guard>, Mistake> {
        let named = Guard {
            resolvers: list("--resolvers", "address", self.resolvers.as_deref().unwrap_or_default())?,
            udp_ports: list::<NonZeroU16, Vec<_>>("--allow-udp-ports", "port", &self.allow_udp_ports)?
                .into_iter()
                .map(NonZeroU16::get)
                .collect(),
            cidrs: list("--allow-other-cidrs", "CIDR, such as 10.0.0.0/8", &self.allow_other_cidrs)?,
        };
        if self.other_protocols != "drop" {
            let unused = [
                ("--resolvers", self.resolvers.is_some()),
                ("--allow-udp-ports", !named.udp_ports.is_empty()),
                ("--allow-other-cidrs", !named.cidrs.is_empty()),
            ];
            if let Some((flag, _)) = unused.into_iter().find(|(_, given)| *given) {
                return Err(Mistake::flag(flag, "has no effect without --other-protocols=drop"));
            }
            return Ok(None);
        }
        Ok(Some(match self.resolvers {
            Some(_) => named,
            None => Guard { resolvers: resolvers(), ..named },
        }))
    }

    /// Rejects a namespace that others depend on, unless the flag for it is given.
    fn refuse_shared(&self) -> Result<(), Mistake> {
        match here::shared(self.in_pod) {
            Some(shared) if !self.host_namespace => Err(Mistake(format!(
                "this is {shared}, {}: the redirect would catch every TCP connection of it, SSH too, and send them to a sidecar. \
                 Enter the workload's namespace first (`ip netns exec NAME countersign redirect …`), or say --host-namespace",
                here::name()
            ))),
            _ => Ok(()),
        }
    }
}

/// Installs, checks or removes the redirect.
pub fn run(args: &RedirectArgs) -> Result<ExitCode> {
    let mendable = |error: RedirectError| match error {
        RedirectError::NotPermitted | RedirectError::NoNftables(_) | RedirectError::NoNetfilter { .. } => {
            anyhow!(Mistake(error.to_string()))
        }
        other => other.into(),
    };
    if args.remove {
        let found = remove().map_err(mendable)?;
        eprintln!("{}", removed(&found, &here::name()));
        return Ok(ExitCode::SUCCESS);
    }
    // clap requires it unless --remove is given.
    let proxy_uid = args.proxy_uid.ok_or_else(|| Mistake::flag("--proxy-uid", "is missing"))?;
    let redirect = args.redirect(proxy_uid, own_resolvers)?;
    if args.validate {
        return validate(&redirect, Duration::from_secs(args.patience));
    }
    if !args.check {
        if args.by_cgroup {
            let why = "needs --validate or --check: only the CNI component admits a sidecar's cgroup (`countersign cni-node`)";
            return Err(Mistake::flag("--by-cgroup", why).into());
        }
        args.refuse_shared()?;
        let backend = install(&redirect, args.backend).map_err(mendable)?;
        eprintln!("{}", done(&redirect, backend, &here::name()));
        return Ok(ExitCode::SUCCESS);
    }
    let found = installed().map_err(mendable)?;
    let in_force = in_force(&redirect, &found);
    let mut table = Table::new(&["rule", "packets", "bytes"]);
    for rule in &found {
        table.row(vec![rule.comment.clone(), rule.packets.to_string(), rule.bytes.to_string()]);
    }
    let rules: Vec<_> =
        found.iter().map(|r| serde_json::json!({"rule": r.comment, "packets": r.packets, "bytes": r.bytes})).collect();
    args.output.print(&table, &serde_json::json!({"in_force": in_force, "rules": rules}))?;
    match (found.is_empty(), in_force) {
        (true, _) => Err(anyhow!("no redirect is installed in network namespace {}", here::name())),
        (false, false) => Err(anyhow!("the redirect in force differs from the one asked for; install it again")),
        (false, true) => Ok(ExitCode::SUCCESS),
    }
}

/// Waits for a redirect that the CNI plugin, or whoever else has the privilege, installs.
fn validate(redirect: &Redirect, patience: Duration) -> Result<ExitCode> {
    match wait_until_in_force(redirect, patience) {
        Ok(()) => {
            eprintln!("the redirect is in force in network namespace {}", here::name());
            Ok(ExitCode::SUCCESS)
        }
        Err(error @ NotProved::SidecarsUser(_)) => Err(Mistake::flag("--validate", &error.to_string()).into()),
        Err(error @ NotProved::NotInForce(_)) => Err(anyhow!(
            "{error}; in a pod the CNI plugin installs it: `countersign check` tells whether it runs on this node"
        )),
        Err(error) => Err(error.into()),
    }
}

fn done(redirect: &Redirect, backend: Backend, namespace: &str) -> String {
    let others = redirect.guard.as_ref().map_or_else(
        || "other protocols are left alone".to_owned(),
        |guard| {
            if guard.resolvers.is_empty() {
                return "other protocols are dropped, DNS too, for no resolver is known".to_owned();
            }
            let resolvers: Vec<String> = guard.resolvers.iter().map(IpAddr::to_string).collect();
            format!("other protocols are dropped but ICMP and DNS to {}", resolvers.join(", "))
        },
    );
    format!(
        "redirect installed in network namespace {namespace} with {backend}: TCP out to {}, in to {}; {others}",
        redirect.outbound_port, redirect.inbound_port
    )
}

fn removed(found: &[countersign_redirect::InstalledRule], namespace: &str) -> String {
    match found.len() {
        0 => format!("there was no redirect in network namespace {namespace}"),
        n => format!("removed the redirect from network namespace {namespace}: {n} rules"),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: RedirectArgs,
    }

    fn read(args: &[&str]) -> Result<Redirect, String> {
        let all = ["redirect"].iter().chain(args);
        let args = Cli::try_parse_from(all).map_err(|e| e.to_string())?.args;
        args.redirect(args.proxy_uid.unwrap(), own_resolvers).map_err(|e| e.to_string())
    }

    #[test]
    fn the_sidecars_user_is_asked_for_and_no_port_is_0() {
        assert!(read(&[]).unwrap_err().contains("--proxy-uid"));
        // It stands for no user: the sidecar's own connections would come back to it.
        assert!(read(&["--proxy-uid=4294967295"]).unwrap_err().contains("--proxy-uid"));
        for flag in
            ["--outbound-port", "--inbound-port", "--mesh-port", "--exclude-inbound-ports", "--exclude-outbound-ports"]
        {
            let said = read(&["--proxy-uid=2102", &format!("{flag}=0")]).unwrap_err();
            assert!(said.contains(flag) && said.contains('0'), "{said}");
        }
        let said = read(&["--proxy-uid=2102", "--outbound-port=15006"]).unwrap_err();
        assert!(said.contains("--inbound-port"), "{said}");
        assert_eq!(read(&["--proxy-uid=2102"]).unwrap(), Redirect::for_proxy(2102));
    }

    #[test]
    fn what_may_pass_is_named_only_where_the_rest_is_dropped() {
        let said = read(&["--proxy-uid=1", "--allow-udp-ports=1"]).unwrap_err();
        assert!(said.contains("--other-protocols=drop"), "{said}");
        let drop = [
            "--proxy-uid=1",
            "--other-protocols=drop",
            "--resolvers=10.0.0.10",
            "--allow-udp-ports=4433, 1",
            "--allow-other-cidrs=10.8.0.0/16",
        ];
        let guard = read(&drop).unwrap().guard.unwrap();
        assert_eq!(guard.resolvers, ["10.0.0.10".parse().unwrap()].into());
        assert_eq!(guard.udp_ports, [1, 4433].into());
        assert_eq!(guard.cidrs, ["10.8.0.0/16".parse().unwrap()].into());
        assert!(read(&["--proxy-uid=1", "--other-protocols=drop", "--allow-udp-ports=0"]).unwrap_err().contains("`0`"));
        let none = read(&["--proxy-uid=1", "--other-protocols=drop", "--resolvers="]).unwrap().guard.unwrap();
        assert_eq!(none.resolvers, [].into(), "an empty list is nobody, not everybody");
    }

    #[test]
    fn a_validators_arguments_are_read_as_the_command_reads_them() {
        let resolvers = ["10.96.0.10".parse().unwrap()].into();
        let order = |args: &[&str]| order(&args.iter().map(ToString::to_string).collect::<Vec<_>>(), &resolvers);
        let plain = ["--validate", "--proxy-uid=2102", "--in-pod", "--exclude-outbound-ports=53"];
        assert_eq!(order(&plain).unwrap().redirect, Redirect::for_proxy(2102));
        let guard = |args: &[&str]| order(&[&plain, args].concat()).unwrap().redirect.guard.unwrap();
        assert_eq!(guard(&["--other-protocols=drop"]).resolvers, resolvers);
        assert_eq!(guard(&["--other-protocols=drop", "--resolvers="]).resolvers, [].into());
        for (args, said) in [
            (&[][..], "--proxy-uid"),
            (&["--validate"], "--proxy-uid"),
            (&["--proxy-uid=2102", "--check"], "install no redirect"),
            (&["--validate", "--proxy-uid=2102", "--remove"], "--remove"),
            (&["--validate", "--proxy-uid=2102", "--nonsense"], "--nonsense"),
            (&["--validate", "--proxy-uid=2102", "extra"], "extra"),
            (&["--help"], ""),
        ] {
            let why = order(args).unwrap_err();
            assert!(why.contains(said) && why.lines().count() <= 1, "{args:?}: {why}");
        }
    }
}
