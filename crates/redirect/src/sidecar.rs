//! Tells the sidecar from an app that has its user ID: by the cgroup in which its sockets were opened.
//!
//! A user ID can be taken on with `setuid`, a cgroup of another container cannot. A container's cgroup exists only once it
//! runs, so a redirect with [`Redirect::by_cgroup`](crate::Redirect::by_cgroup) begins with nobody in the sidecar's place, and
//! [`admit`] puts a cgroup there. It takes cgroups of version 2 and nf_tables (Linux 5.13).

use crate::nftables;
use crate::rules::{Hook, IF_SIDECAR, Match, Rule, Verdict};
use crate::{InstalledRule, Redirect, RedirectError, installed};

/// Deepest cgroup that is matched. Kubelets put containers at level 3 to 6.
const LEVELS: u8 = 16;
/// User ID of [`try_here`]'s redirect, in a namespace without processes.
const ANY_UID: u32 = 2102;

/// A cgroup of version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cgroup {
    /// The kernel's ID of it: the inode of its folder. It is not given again.
    pub id: u64,
    /// Number of cgroups from the root to it.
    pub level: u8,
}

/// Whom a namespace's redirect takes for the sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Whoever has its user ID, or there is no redirect.
    ByUserId,
    /// Nobody yet, or another cgroup.
    Otherwise,
    /// Sockets of this cgroup.
    ByCgroup,
}

/// Whether this namespace's redirect tells the sidecar by its cgroup.
pub fn is_asked_for() -> Result<bool, RedirectError> {
    Ok(asks(&installed()?))
}

/// Whom this namespace's redirect takes for the sidecar, seen from a cgroup.
pub fn known(cgroup: Cgroup) -> Result<Known, RedirectError> {
    let found = installed()?;
    let own = exempt(cgroup).comment();
    Ok(match asks(&found) {
        false => Known::ByUserId,
        true if found.iter().any(|rule| rule.comment == own) => Known::ByCgroup,
        true => Known::Otherwise,
    })
}

fn asks(found: &[InstalledRule]) -> bool {
    found.iter().any(|rule| rule.comment.ends_with(IF_SIDECAR))
}

fn exempt(cgroup: Cgroup) -> Rule {
    Rule { hook: Hook::Sidecar, matches: Match::Cgroup(cgroup), verdict: Verdict::Exempt }
}

/// Lets sockets of this cgroup, and of cgroups below it, pass for the sidecar's, in place of an earlier one.
///
/// # Errors
/// This namespace has no redirect that tells the sidecar by its cgroup, or the kernel cannot match cgroups.
pub fn admit(cgroup: Cgroup) -> Result<(), RedirectError> {
    // Kernels before 6.12 count levels from the root of all, later ones from the root of the cgroup namespace. An ID belongs to
    // one cgroup, so a wrong level matches nothing.
    let levels = std::iter::once(cgroup.level).chain((1..=LEVELS).filter(|level| *level != cgroup.level));
    nftables::admit(&levels.map(|level| exempt(Cgroup { level, ..cgroup })).collect::<Vec<_>>())
}

/// Whether the kernel can tell the sidecar by its cgroup. Call it in a network namespace of its own: it installs such a
/// redirect.
///
/// # Errors
/// It cannot; the reason.
pub fn try_here() -> Result<(), RedirectError> {
    nftables::install(&Redirect { by_cgroup: true, ..Redirect::for_proxy(ANY_UID) })?;
    admit(Cgroup { id: 1, level: 1 })
}

/// Whether this comment is that of a rule with the sidecar's cgroup.
pub(crate) fn is_cgroup(comment: &str) -> bool {
    comment.starts_with("countersign sidecar: ")
}
