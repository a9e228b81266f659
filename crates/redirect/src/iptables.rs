//! The redirect through the `iptables` and `ip6tables` binaries, for kernels without nf_tables.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use ipnet::IpNet;

use crate::rules::{Hook, Match, Rule, Verdict};
use crate::{InstalledRule, Redirect, RedirectError};

/// Where the rules of a hook are: table, our chain, and the chain that jumps to it.
fn place_of(hook: Hook) -> (&'static str, &'static str, &'static str) {
    match hook {
        // It has no rules with this backend.
        Hook::Sidecar | Hook::Output => ("nat", "COUNTERSIGN_OUT", "OUTPUT"),
        Hook::Prerouting => ("nat", "COUNTERSIGN_IN", "PREROUTING"),
        Hook::Loopback => ("filter", "COUNTERSIGN_INSIDE", "OUTPUT"),
        Hook::OwnPorts => ("filter", "COUNTERSIGN_OWN", "OUTPUT"),
        Hook::OwnInput => ("filter", "COUNTERSIGN_OWN_IN", "INPUT"),
        Hook::GuardOutput => ("filter", "COUNTERSIGN_OTHERS_OUT", "OUTPUT"),
        Hook::GuardInput => ("filter", "COUNTERSIGN_OTHERS_IN", "INPUT"),
    }
}

const TABLES: [&str; 2] = ["nat", "filter"];
/// What is in each of our rules as the kernel shows it.
const OURS: &str = "--comment \"countersign ";

/// Replaces our chains: one transaction per IP version and table, the dropping one first.
///
/// # Errors
/// The sidecar is to be told by its cgroup: `iptables` matches these by a path that is not known yet.
pub fn install(redirect: &Redirect) -> Result<(), RedirectError> {
    if redirect.by_cgroup {
        return Err(RedirectError::NoCgroups);
    }
    let rules = redirect.rules();
    for v6 in [false, true] {
        let done = match install_one(&rules, v6) {
            // A kernel that cannot log still drops.
            Err(_) if rules.iter().any(|r| r.verdict == Verdict::Sample) => {
                let rules: Vec<Rule> = rules.iter().copied().filter(|r| r.verdict != Verdict::Sample).collect();
                install_one(&rules, v6)
            }
            done => done,
        };
        if let Err(error) = done {
            // A host without IPv6 needs no IPv6 redirect.
            if v6 && !has_ipv6() {
                continue;
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Whether this thread's network namespace has IPv6.
fn has_ipv6() -> bool {
    std::path::Path::new("/proc/thread-self/net/if_inet6").exists()
}

fn install_one(rules: &[Rule], v6: bool) -> Result<(), RedirectError> {
    let used = |hook: Hook| rules.iter().any(|r| r.hook == hook);
    // Left over from an earlier redirect with a guard.
    unhook(v6, "filter", |hook| !used(hook))?;
    let mut script = String::new();
    for table in ["filter", "nat"] {
        let hooks: Vec<Hook> = Hook::ALL.into_iter().filter(|h| place_of(*h).0 == table && used(*h)).collect();
        if hooks.is_empty() {
            continue;
        }
        let _ = writeln!(script, "*{table}");
        let present = run(listing(v6), &["-w", "5", "-t", table, "-S"], None).unwrap_or_default();
        for hook in &hooks {
            // Declaring a chain empties it, so one transaction replaces the old rules by the new.
            let _ = writeln!(script, ":{} - [0:0]", place_of(*hook).1);
        }
        for rule in rules.iter().filter(|r| hooks.contains(&r.hook)) {
            if let Some(line) = rule_line(rule, v6) {
                let _ = writeln!(script, "{line}");
            }
        }
        for hook in &hooks {
            let (_, chain, builtin) = place_of(*hook);
            let jump = if hook.is_filter() {
                format!("-A {builtin} -j {chain}")
            } else {
                format!("-A {builtin} -p tcp -j {chain}")
            };
            let begins = format!("-A {builtin} ");
            let first = present.lines().find(|l| l.starts_with(&begins));
            let there = present.lines().any(|l| l == jump);
            // What somebody else's rule accepts is not seen by rules behind it: ours stand first.
            let jump = match (hook.is_filter(), there) {
                (true, true) if first != Some(jump.as_str()) => {
                    format!("-D {builtin} -j {chain}\n-I {builtin} 1 -j {chain}")
                }
                (_, true) => continue,
                (true, false) => format!("-I {builtin} 1 -j {chain}"),
                (false, false) => jump,
            };
            let _ = writeln!(script, "{jump}");
        }
        script.push_str("COMMIT\n");
    }
    let binary = if v6 { "ip6tables-restore" } else { "iptables-restore" };
    run(binary, &["-w", "5", "--noflush"], Some(&script)).map(drop)
}

fn rule_line(rule: &Rule, v6: bool) -> Option<String> {
    let (_, chain, _) = place_of(rule.hook);
    let (interface, address) = if rule.hook.is_out() { ("-o", "-d") } else { ("-i", "-s") };
    let net = |net: IpNet| (net.addr().is_ipv6() == v6).then(|| format!("{address} {net}"));
    let matches = match rule.matches {
        Match::Uid(uid) => format!("-m owner --uid-owner {uid}"),
        Match::Loopback => format!("{interface} lo"),
        // For IPv6 this match takes every address that is no group's for unicast, our own too.
        Match::LoopbackToOthers if v6 => "-o lo -m addrtype ! --dst-type LOCAL".into(),
        Match::LoopbackFromOthers if v6 => "-o lo -m addrtype ! --src-type LOCAL".into(),
        Match::LoopbackToOthers => "-o lo -m addrtype --dst-type UNICAST".into(),
        Match::LoopbackFromOthers => "-o lo -m addrtype --src-type UNICAST".into(),
        Match::Port(port) => format!("-p tcp --dport {port}"),
        Match::PortAt(port, at) => format!("{} -p tcp --dport {port}", net(at.into())?),
        Match::Net(of) => net(of)?,
        Match::TcpNet(of) => format!("{} -p tcp", net(of)?),
        Match::TcpInvalid => "-p tcp -m conntrack --ctstate INVALID".into(),
        Match::ForeignFrom(port, uid) => {
            // The kernel's own resets have a socket here, and no user.
            let from = format!("-p tcp -m tcp --sport {port} ! --tcp-flags RST RST -m conntrack --ctdir REPLY");
            format!("{from} -m owner --socket-exists ! --uid-owner {uid}")
        }
        Match::Icmp if !v6 => "-p icmp".into(),
        Match::Icmpv6 if v6 => "-p ipv6-icmp".into(),
        // Of the other IP version; cgroups with nf_tables alone.
        Match::Icmp | Match::Icmpv6 | Match::CgroupFrom(_) | Match::CgroupAt(_) | Match::Cgroup(_) => return None,
        Match::Reply => "-m conntrack --ctdir REPLY".into(),
        Match::Udp(port, None) => format!("-p udp --dport {port}"),
        Match::Udp(port, Some(at)) => format!("{} -p udp --dport {port}", net(at.into())?),
        Match::Rest if rule.hook.is_filter() => String::new(),
        Match::Rest | Match::Tcp => "-p tcp".into(),
    };
    let (more, verdict) = match rule.verdict {
        Verdict::Exempt => ("", "RETURN".to_owned()),
        Verdict::To(port) => ("", format!("REDIRECT --to-ports {port}")),
        Verdict::Sample => {
            let way = if rule.hook.is_out() { "out" } else { "in" };
            let limit = "-m limit --limit 10/min --limit-burst 5 ";
            (limit, format!("LOG --log-level notice --log-prefix \"countersign dropped {way}: \""))
        }
        Verdict::Drop => ("", "DROP".to_owned()),
        Verdict::IfSidecar => return None,
    };
    Some(format!("-A {chain} {matches} {more}-m comment --comment \"{}\" -j {verdict}", rule.comment()))
}

/// Removes our chains. They need not exist, nor does the binary.
pub fn remove() -> Result<(), RedirectError> {
    for v6 in [false, true] {
        for table in TABLES {
            unhook(v6, table, |_| true)?;
        }
    }
    Ok(())
}

fn listing(v6: bool) -> &'static str {
    if v6 { "ip6tables" } else { "iptables" }
}

/// Removes the chains of these hooks from a table.
fn unhook(v6: bool, table: &str, meant: impl Fn(Hook) -> bool) -> Result<(), RedirectError> {
    let binary = listing(v6);
    let Ok(rules) = run(binary, &["-w", "5", "-t", table, "-S"], None) else { return Ok(()) };
    for hook in Hook::ALL {
        let (of, chain, builtin) = place_of(hook);
        if of != table || !meant(hook) {
            continue;
        }
        for line in
            rules.lines().filter(|l| l.starts_with(&format!("-A {builtin} ")) && l.ends_with(&format!("-j {chain}")))
        {
            let arguments: Vec<&str> = std::iter::once("-D").chain(line.split(' ').skip(1)).collect();
            run(binary, &[&["-w", "5", "-t", table], &arguments[..]].concat(), None)?;
        }
        if rules.lines().any(|l| l == format!("-N {chain}")) {
            run(binary, &["-w", "5", "-t", table, "-F", chain], None)?;
            run(binary, &["-w", "5", "-t", table, "-X", chain], None)?;
        }
    }
    Ok(())
}

/// Whether every family of addresses has its redirect. A family's tables are written at once, `nat` as the last. What cannot be read,
/// as on a machine without `iptables`, counts as missing.
pub fn is_whole() -> bool {
    let has = |binary: &str| run(binary, &["-t", "nat"], None).is_ok_and(|rules| rules.contains(OURS));
    has("iptables-save") && (has("ip6tables-save") || !has_ipv6())
}

/// Our rules as the kernel has them, counters of both IP versions added, in the order of [`Redirect::rules`] except for
/// rules that exist for one IP version only.
pub fn installed() -> Result<Vec<InstalledRule>, RedirectError> {
    let mut found: Vec<InstalledRule> = vec![];
    for table in TABLES {
        for binary in ["iptables-save", "ip6tables-save"] {
            let Ok(rules) = run(binary, &["-c", "-t", table], None) else { continue };
            let mut at = 0;
            for line in rules.lines().filter(|l| l.contains(OURS)) {
                let Some(comment) = line.split('"').nth(1) else { continue };
                let counts =
                    line.strip_prefix('[').and_then(|l| l.split_once(']')).and_then(|(c, _)| c.split_once(':'));
                let (packets, bytes) = counts.map_or((0, 0), |(p, b)| (p.parse().unwrap_or(0), b.parse().unwrap_or(0)));
                if let Some(known) = found.iter().position(|r| r.comment == comment) {
                    found[known].packets += packets;
                    found[known].bytes += bytes;
                    at = known + 1;
                } else {
                    // The position among the rules of the other IP version.
                    let at_least = if at == 0 { found.len() } else { at };
                    found.insert(at_least, InstalledRule { comment: comment.to_owned(), packets, bytes });
                    at = at_least + 1;
                }
            }
        }
    }
    found.sort_by_key(|r| order(&r.comment));
    Ok(found)
}

/// The position of a rule's hook among the hooks.
fn order(comment: &str) -> usize {
    let hooks = [
        "countersign out:",
        "countersign in:",
        "countersign inside:",
        "countersign own ports:",
        "countersign others out:",
        "countersign others in:",
    ];
    hooks.iter().position(|hook| comment.starts_with(hook)).unwrap_or(hooks.len())
}

fn run(binary: &str, arguments: &[&str], input: Option<&str>) -> Result<String, RedirectError> {
    let command = format!("{binary} {}", arguments.join(" "));
    let failed = |why: String| RedirectError::Command { command: command.clone(), why };
    let mut child = Command::new(binary)
        .args(arguments)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(input.as_bytes()).map_err(|e| failed(e.to_string()))?;
    }
    let output = child.wait_with_output().map_err(|e| failed(e.to_string()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if why.contains("Permission denied") || why.contains("you must be root") {
        Err(RedirectError::NotPermitted)
    } else {
        Err(failed(why))
    }
}
