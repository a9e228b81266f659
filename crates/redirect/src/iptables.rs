//! The redirect through the `iptables` and `ip6tables` binaries, for kernels without nf_tables.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use crate::rules::{Hook, Match, Rule, Verdict};
use crate::{InstalledRule, Redirect, RedirectError};

const OUT: &str = "COUNTERSIGN_OUT";
const IN: &str = "COUNTERSIGN_IN";

fn chain_of(hook: Hook) -> (&'static str, &'static str) {
    match hook {
        Hook::Output => (OUT, "OUTPUT"),
        Hook::Prerouting => (IN, "PREROUTING"),
    }
}

/// Puts our chains in place of earlier ones: one transaction an IP version.
pub fn install(redirect: &Redirect) -> Result<(), RedirectError> {
    for v6 in [false, true] {
        // Naming a chain empties it, so that one transaction puts the new rules in place of the old.
        let mut script = format!("*nat\n:{OUT} - [0:0]\n:{IN} - [0:0]\n");
        for rule in redirect.rules() {
            if let Some(line) = rule_line(&rule, v6) {
                let _ = writeln!(script, "{line}");
            }
        }
        let present = run(listing(v6), &["-w", "5", "-t", "nat", "-S"], None).unwrap_or_default();
        for (chain, builtin) in [chain_of(Hook::Output), chain_of(Hook::Prerouting)] {
            let jump = format!("-A {builtin} -p tcp -j {chain}");
            if !present.lines().any(|l| l == jump) {
                let _ = writeln!(script, "{jump}");
            }
        }
        script.push_str("COMMIT\n");
        let binary = if v6 { "ip6tables-restore" } else { "iptables-restore" };
        if let Err(error) = run(binary, &["-w", "5", "--noflush"], Some(&script)) {
            // A host without IPv6 needs no IPv6 redirect.
            if v6 && !std::path::Path::new("/proc/net/if_inet6").exists() {
                continue;
            }
            return Err(error);
        }
    }
    Ok(())
}

fn rule_line(rule: &Rule, v6: bool) -> Option<String> {
    let (chain, _) = chain_of(rule.hook);
    let way = if rule.hook == Hook::Output { ("-o", "-d") } else { ("-i", "-s") };
    let matches = match rule.matches {
        Match::Uid(uid) => format!("-m owner --uid-owner {uid}"),
        Match::Loopback => format!("{} lo", way.0),
        Match::Port(port) => format!("-p tcp --dport {port}"),
        Match::Net(net) if net.addr().is_ipv6() != v6 => return None,
        Match::Net(net) => format!("{} {net}", way.1),
        Match::Rest => "-p tcp".into(),
    };
    let verdict = match rule.verdict {
        Verdict::Exempt => "RETURN".to_owned(),
        Verdict::To(port) => format!("REDIRECT --to-ports {port}"),
    };
    Some(format!("-A {chain} {matches} -m comment --comment \"{}\" -j {verdict}", rule.comment()))
}

/// Removes our chains; nothing there is fine, and so is a machine without the binary.
pub fn remove() -> Result<(), RedirectError> {
    unhook(false)?;
    unhook(true)
}

fn listing(v6: bool) -> &'static str {
    if v6 { "ip6tables" } else { "iptables" }
}

fn unhook(v6: bool) -> Result<(), RedirectError> {
    let binary = listing(v6);
    let Ok(rules) = run(binary, &["-w", "5", "-t", "nat", "-S"], None) else { return Ok(()) };
    for hook in [Hook::Output, Hook::Prerouting] {
        let (chain, builtin) = chain_of(hook);
        for line in
            rules.lines().filter(|l| l.starts_with(&format!("-A {builtin} ")) && l.ends_with(&format!("-j {chain}")))
        {
            let arguments: Vec<&str> = std::iter::once("-D").chain(line.split(' ').skip(1)).collect();
            run(binary, &[&["-w", "5", "-t", "nat"], &arguments[..]].concat(), None)?;
        }
        if rules.lines().any(|l| l == format!("-N {chain}")) {
            run(binary, &["-w", "5", "-t", "nat", "-F", chain], None)?;
            run(binary, &["-w", "5", "-t", "nat", "-X", chain], None)?;
        }
    }
    Ok(())
}

/// Our rules as the kernel has them, both IP versions added up.
pub fn installed() -> Result<Vec<InstalledRule>, RedirectError> {
    let mut found: Vec<InstalledRule> = vec![];
    for binary in ["iptables-save", "ip6tables-save"] {
        let Ok(rules) = run(binary, &["-c", "-t", "nat"], None) else { continue };
        for line in rules.lines().filter(|l| l.contains("--comment \"countersign ")) {
            let Some(comment) = line.split('"').nth(1) else { continue };
            let counts = line.strip_prefix('[').and_then(|l| l.split_once(']')).and_then(|(c, _)| c.split_once(':'));
            let (packets, bytes) = counts.map_or((0, 0), |(p, b)| (p.parse().unwrap_or(0), b.parse().unwrap_or(0)));
            match found.iter_mut().find(|r| r.comment == comment) {
                Some(rule) => {
                    rule.packets += packets;
                    rule.bytes += bytes;
                }
                None => found.push(InstalledRule { comment: comment.to_owned(), packets, bytes }),
            }
        }
    }
    found.sort_by_key(|r| r.comment.starts_with("countersign in"));
    Ok(found)
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
