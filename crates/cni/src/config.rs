//! Settings of a node's component, read once at start.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use countersign_identity::shown::shown;
pub use countersign_watch::node::NodeName;

/// Settings of a node's component. Every combination of valid fields is a valid one.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of this node.
    pub node: NodeName,
    /// The node's folder of plugins (of binaries), as it is seen from here.
    pub bin_dir: PathBuf,
    /// The node's folder of network configurations, as it is seen from here.
    pub conf_dir: PathBuf,
    /// Unix socket for the plugin, mode 0600.
    pub socket: PathBuf,
    /// Path of that socket as the plugin sees it, on the node.
    pub plugin_socket: PathBuf,
    /// Unix socket for sidecars, mode 0666; `None` serves none.
    pub sidecar_socket: Option<PathBuf>,
    /// Whether sidecars are told by their cgroups where pods ask for it and the node allows it.
    pub sidecar_by_cgroup: bool,
    /// Whether pods that wait for their redirect are looked for.
    pub repair: bool,
    /// The DaemonSet with whose end the plugin is removed; `None` keeps it.
    pub daemon_set: Option<DaemonSetName>,
    /// Listening address of `/metrics`, `/ready` and `/live`; `None` serves none of them.
    pub metrics: Option<SocketAddr>,
}

/// Longest name of an object, in bytes (a DNS subdomain, RFC 1123).
const MAX_NAME: usize = 253;

/// A DaemonSet: `NAMESPACE/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonSetName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl FromStr for DaemonSetName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
        let is_name = |text: &str| (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(form);
        match text.split_once('/') {
            Some((namespace, name)) if is_name(namespace) && is_name(name) => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("`{}` is no DaemonSet: write NAMESPACE/NAME", shown(text))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_set_has_a_namespace_and_a_name() {
        let set: DaemonSetName = "countersign/countersign-agent".parse().unwrap();
        assert_eq!((set.namespace.as_str(), set.name.as_str()), ("countersign", "countersign-agent"));
        for bad in ["", "a", "a/", "/b", "a/b/c", "a/B", "a /b"] {
            assert!(bad.parse::<DaemonSetName>().is_err(), "{bad}");
        }
    }
}
