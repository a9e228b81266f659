//! The NAT redirect that sends a workload's traffic to its sidecar, and the network namespaces of workloads.
//!
//! [`rules`] defines what is redirected and what is not; [`nftables`] installs it over netlink, [`iptables`] through
//! the binary if the kernel lacks nf_tables. [`validate`] proves without privileges that it is in force. [`guard`] defines
//! what happens to protocols other than TCP, [`sidecar`] how the sidecar is told from an app of its user. [`here`] determines
//! the current namespace. [`netns`] creates and enters network namespaces, [`bridge`] connects them.

pub mod bridge;
pub mod conntrack;
pub mod guard;
pub mod here;
pub mod iptables;
pub mod netns;
pub mod nftables;
pub mod rules;
pub mod sidecar;
pub mod validate;

use std::fmt;
use std::str::FromStr;

pub use guard::Guard;
pub use rules::Redirect;
use rules::{Rule, Verdict};

/// Why the redirect could not be installed, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// The process lacks `CAP_NET_ADMIN` in this network namespace.
    #[error("changing the redirect needs CAP_NET_ADMIN in this network namespace; run as root")]
    NotPermitted,
    /// The kernel has no nf_tables NAT.
    #[error("this kernel has no nf_tables NAT ({0})")]
    NoNftables(std::io::Error),
    /// Neither backend works here.
    #[error(
        "the redirect cannot be installed here: {nftables}, and {iptables}; load the kernel modules nf_tables and nft_redir, or install iptables"
    )]
    NoNetfilter {
        /// Error of the nf_tables backend.
        nftables: Box<RedirectError>,
        /// Error of the iptables backend.
        iptables: Box<RedirectError>,
    },
    /// `iptables` cannot tell the sidecar by its cgroup.
    #[error("only nf_tables tells the sidecar by its cgroup: use --backend=nftables")]
    NoCgroups,
    /// The kernel rejected a rule.
    #[error("the kernel refused the redirect: {0}")]
    Kernel(std::io::Error),
    /// An `iptables` binary failed.
    #[error("`{command}` failed: {why}")]
    Command {
        /// The command line that was run.
        command: String,
        /// Its error output, or why it could not be started.
        why: String,
    },
}

/// The kernel interface that holds the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// nf_tables if the kernel supports it, otherwise iptables. The default.
    #[default]
    Auto,
    /// nf_tables over netlink.
    Nftables,
    /// The `iptables` and `ip6tables` binaries.
    Iptables,
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "nftables" => Ok(Self::Nftables),
            "iptables" => Ok(Self::Iptables),
            other => Err(format!("`{other}` is no backend: use auto, nftables or iptables")),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        })
    }
}

/// One installed rule, as reported by the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledRule {
    /// Purpose of the rule, see [`Rule::comment`].
    pub comment: String,
    /// Number of packets that matched.
    pub packets: u64,
    /// Number of bytes that matched.
    pub bytes: u64,
}

/// Installs the redirect in this network namespace, in place of an earlier one, whichever backend held that. Returns the backend
/// that holds it.
///
/// With a guard that is not in force yet connections that are open are judged anew: those that would go past the sidecar are
/// reset.
pub fn install(redirect: &Redirect, backend: Backend) -> Result<Backend, RedirectError> {
    let judged = redirect.guard.is_none() || installed().is_ok_and(|found| in_force(redirect, &found));
    let held_by = install_by(redirect, backend)?;
    match held_by {
        Backend::Iptables => match nftables::remove() {
            Err(RedirectError::NoNftables(_)) | Ok(()) => {}
            Err(error) => return Err(error),
        },
        Backend::Nftables | Backend::Auto if !iptables::installed()?.is_empty() => iptables::remove()?,
        Backend::Nftables | Backend::Auto => {}
    }
    if !judged && let Err(error) = conntrack::forget_all() {
        tracing::warn!(%error, "connections that are open already may go on past the sidecar until they end");
    }
    Ok(held_by)
}

fn install_by(redirect: &Redirect, backend: Backend) -> Result<Backend, RedirectError> {
    match backend {
        Backend::Nftables => nftables::install(redirect).map(|()| Backend::Nftables),
        Backend::Iptables => iptables::install(redirect).map(|()| Backend::Iptables),
        Backend::Auto => match nftables::install(redirect) {
            Ok(()) => Ok(Backend::Nftables),
            Err(nftables @ RedirectError::NoNftables(_)) => match iptables::install(redirect) {
                Ok(()) => Ok(Backend::Iptables),
                Err(iptables) => {
                    Err(RedirectError::NoNetfilter { nftables: nftables.into(), iptables: iptables.into() })
                }
            },
            Err(error) => Err(error),
        },
    }
}

/// Removes the redirect from this network namespace, whichever backend holds it. It need not exist. Returns the rules
/// that were removed.
pub fn remove() -> Result<Vec<InstalledRule>, RedirectError> {
    let found = installed()?;
    match nftables::remove() {
        Err(RedirectError::NoNftables(_)) | Ok(()) => {}
        Err(error) => return Err(error),
    }
    iptables::remove()?;
    Ok(found)
}

/// Whether exactly these rules are installed. Missing log samples do not count, because a kernel may not support them;
/// neither do the order within a run of exemptions and the sidecar's cgroup, which is added later.
pub fn in_force(redirect: &Redirect, found: &[InstalledRule]) -> bool {
    let asked = redirect.rules();
    let samples: Vec<String> = asked.iter().filter(|r| r.verdict == Verdict::Sample).map(Rule::comment).collect();
    let asked = asked.iter().filter(|r| r.verdict != Verdict::Sample).map(Rule::comment);
    let found = found.iter().map(|r| r.comment.clone()).filter(|c| !samples.contains(c) && !sidecar::is_cgroup(c));
    runs(asked).eq(&runs(found))
}

/// Rules in order, with each run of exemptions of one hook sorted.
fn runs(comments: impl Iterator<Item = String>) -> Vec<Vec<String>> {
    let run_of = |c: &str| c.ends_with(" exempt").then(|| c.split(':').next().map(ToOwned::to_owned)).flatten();
    let mut all: Vec<Vec<String>> = vec![];
    for comment in comments {
        match all.last_mut().filter(|run| run_of(&comment).is_some() && run_of(&run[0]) == run_of(&comment)) {
            Some(run) => run.push(comment),
            None => all.push(vec![comment]),
        }
    }
    all.iter_mut().for_each(|run| run.sort_unstable());
    all
}

/// The rules that are installed in this network namespace; empty if there is no redirect.
pub fn installed() -> Result<Vec<InstalledRule>, RedirectError> {
    let found = match nftables::installed() {
        Err(RedirectError::NoNftables(_)) => vec![],
        other => other?,
    };
    if found.is_empty() { iptables::installed() } else { Ok(found) }
}

/// Whether a redirect of ours is in force in this network namespace as a whole, whatever its rules are.
pub fn is_whole() -> Result<bool, RedirectError> {
    match nftables::installed() {
        // It comes in one transaction.
        Ok(found) if !found.is_empty() => Ok(true),
        Ok(_) | Err(RedirectError::NoNftables(_)) => Ok(iptables::is_whole()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_in_force_or_differ() {
        let mut redirect = Redirect::for_proxy(2102);
        redirect.guard = Some(Guard { udp_ports: [1, 2].into(), ..Guard::default() });
        let rule = |r: &Rule| InstalledRule { comment: r.comment(), packets: 0, bytes: 0 };
        let all: Vec<InstalledRule> = redirect.rules().iter().map(rule).collect();
        assert!(in_force(&redirect, &all));
        let unsampled: Vec<_> = all.iter().filter(|r| !r.comment.ends_with("by sample")).cloned().collect();
        assert!(in_force(&redirect, &unsampled), "a kernel that cannot log");
        let mut swapped = all.clone();
        swapped.swap(0, 1);
        assert!(in_force(&redirect, &swapped), "exemptions in another order");
        let last = all.len() - 1;
        swapped.swap(last, last - 2);
        assert!(!in_force(&redirect, &swapped), "an exemption behind the drop");
        assert!(!in_force(&redirect, &all[..last]));
        assert!(!in_force(&redirect, &[]));
    }
}
