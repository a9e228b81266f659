//! A pod's network namespace, by descriptor: looked at and changed from a thread that enters it and ends there.

use std::fs::Metadata;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use countersign_redirect::netns::run_in;
use countersign_redirect::{RedirectError, here, in_force, install, installed, is_whole};

use crate::pod::Order;

/// Namespaces into which no redirect of a pod belongs: ours, and that of the node's first process.
const NODES: [&str; 2] = ["/proc/self/ns/net", "/proc/1/ns/net"];

/// Why a redirect is not in force.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The namespace cannot be entered or told apart from the node's.
    #[error("the network namespace cannot be entered: {0}")]
    Entering(io::Error),
    /// It is the node's own.
    #[error("the network namespace is the node's own")]
    Nodes,
    /// The kernel refuses the rules.
    #[error(transparent)]
    Redirect(#[from] RedirectError),
}

/// What was found in a namespace, or done there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The redirect was in force.
    InForce,
    /// It was not, and is now.
    Installed,
    /// Another one of ours is: of another version, or with other resolvers.
    Other,
    /// None is, or not as a whole.
    Missing,
}

/// Whether a redirect that is missing is to be installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Do {
    /// Install it, in place of any other.
    Install,
    /// Only look.
    Look,
}

/// Brings a redirect into force in a namespace, or looks whether it is. Blocks.
pub fn apply(netns: OwnedFd, order: Order, what: Do) -> Result<Found, NamespaceError> {
    let netns = std::fs::File::from(netns);
    let about = netns.metadata().map_err(NamespaceError::Entering)?;
    for path in NODES {
        match std::fs::metadata(path) {
            Ok(nodes) if is_same(&about, &nodes) => return Err(NamespaceError::Nodes),
            Ok(_) => {}
            // Where a machine's first process is hidden from us: the machine's own namespace is known below, by itself.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
            Err(e) => return Err(NamespaceError::Entering(e)),
        }
    }
    let inside = move || {
        // The first process was compared above, as far as it can be seen.
        if here::shared(true).is_some() {
            return Ok(Err(NamespaceError::Nodes));
        }
        Ok(applied(&order, what).map_err(NamespaceError::from))
    };
    run_in(netns.as_fd(), inside).map_err(NamespaceError::Entering)?
}

fn applied(order: &Order, what: Do) -> Result<Found, RedirectError> {
    let (found, whole) = (installed()?, is_whole()?);
    if whole && in_force(&order.redirect, &found) {
        return Ok(Found::InForce);
    }
    if what == Do::Look {
        return Ok(if whole { Found::Other } else { Found::Missing });
    }
    install(&order.redirect, order.backend)?;
    Ok(Found::Installed)
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use countersign_redirect::{Backend, Redirect};

    use super::*;
    use crate::testing::Namespace;

    fn order() -> Order {
        Order { redirect: Redirect::for_proxy(2102), backend: Backend::Nftables }
    }

    #[test]
    fn a_redirect_is_installed_once_and_found_afterwards() {
        let Some(ns) = Namespace::new("apply") else { return };
        let apply = |what| apply(ns.open(), order(), what).unwrap();
        assert_eq!(apply(Do::Look), Found::Missing);
        assert_eq!(apply(Do::Install), Found::Installed);
        assert_eq!((apply(Do::Install), apply(Do::Look)), (Found::InForce, Found::InForce));
        assert!(ns.has_redirect(&order().redirect));
    }

    #[test]
    fn another_redirect_is_told_from_none() {
        let Some(ns) = Namespace::new("other") else { return };
        apply(ns.open(), order(), Do::Install).unwrap();
        let newer = Order { redirect: Redirect::for_proxy(2104), ..order() };
        assert_eq!(apply(ns.open(), newer.clone(), Do::Look).unwrap(), Found::Other);
        assert!(ns.has_redirect(&order().redirect), "looking changes nothing");
        assert_eq!(apply(ns.open(), newer, Do::Install).unwrap(), Found::Installed);
    }

    #[test]
    fn the_nodes_own_namespace_is_refused_and_what_is_no_namespace_too() {
        if Namespace::new("own").is_none() {
            return;
        }
        for path in NODES.into_iter().filter(|path| File::open(path).is_ok()) {
            let refused = apply(File::open(path).unwrap().into(), order(), Do::Install);
            assert!(matches!(refused, Err(NamespaceError::Nodes)), "{path}: {refused:?}");
        }
        let file = tempfile::tempfile().unwrap();
        let refused = apply(file.into(), order(), Do::Install);
        assert!(matches!(refused, Err(NamespaceError::Entering(_))), "{refused:?}");
        assert_eq!(installed().unwrap(), []);
    }
}
