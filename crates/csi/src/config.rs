//! Settings of a driver, read once at start.

use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use countersign_identity::shown::shown;

/// Settings of a driver. Every combination of valid fields is a valid driver.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name that pods' volumes give.
    pub driver: DriverName,
    /// Name of this node.
    pub node: NodeId,
    /// Folder of this node's kubelet.
    pub kubelet: KubeletDir,
    /// Folder of the agent's socket, which pods get. It has to stay the same folder while the agent restarts.
    pub agent_dir: PathBuf,
    /// Listening address of `/metrics`, `/ready` and `/live`; `None` serves none of them.
    pub metrics: Option<SocketAddr>,
}

/// Longest name of a driver, in bytes (CSI, `GetPluginInfo`).
const MAX_NAME: usize = 63;
/// Longest name of a node, in bytes: a DNS subdomain (RFC 1123).
const MAX_NODE: usize = 253;

/// Whether a text is a DNS subdomain: labels of lowercase letters, digits and `-`, none at a label's ends.
fn is_subdomain(text: &str) -> bool {
    let form = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let is_label = |l: &str| !l.is_empty() && l.bytes().all(form) && !l.starts_with('-') && !l.ends_with('-');
    text.split('.').all(is_label)
}

/// Name of a driver: a domain name in lowercase. It is also the name of a folder and of a `CSIDriver` object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverName(String);

impl DriverName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DriverName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_NAME || !is_subdomain(text) {
            return Err(format!(
                "`{}` is no driver's name: a domain name in lowercase, of at most {MAX_NAME} bytes, such as csi.countersign.dev",
                shown(text)
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Name of a node, which the driver gives as its ID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeId(String);

impl NodeId {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_NODE || !is_subdomain(text) {
            return Err(format!("`{}` is no node's name: lowercase letters, digits, `-` and `.`", shown(text)));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Folder of a kubelet: an absolute path without `..`. The driver has to see it at the same path as the kubelet does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubeletDir(PathBuf);

impl KubeletDir {
    /// Folder of the pods' volumes.
    pub fn pods(&self) -> PathBuf {
        self.0.join("pods")
    }

    /// Path of a driver's socket.
    pub fn socket(&self, driver: &DriverName) -> PathBuf {
        self.0.join("plugins").join(driver.as_str()).join("csi.sock")
    }

    /// Path of the socket by which the kubelet learns of a driver.
    pub fn registration(&self, driver: &DriverName) -> PathBuf {
        self.0.join("plugins_registry").join(format!("{}-reg.sock", driver.as_str()))
    }
}

impl FromStr for KubeletDir {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = Path::new(text);
        let plain = |c: Component<'_>| matches!(c, Component::RootDir | Component::Normal(_));
        // Components leave out `.` and doubled slashes, so that the path is as the kubelet writes it.
        let normal: PathBuf = path.components().collect();
        if !path.is_absolute() || !path.components().all(plain) || normal.parent().is_none() {
            return Err(format!("`{}` is no folder of a kubelet: an absolute path without `..`", shown(text)));
        }
        Ok(Self(normal))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drivers_name_is_a_domain_name() {
        for good in ["csi.countersign.dev", "csi.spiffe.io", "x"] {
            assert_eq!(good.parse::<DriverName>().unwrap().as_str(), good);
        }
        for bad in ["", "CSI.io", "a..b", "-a.b", "a-.b", "a/b", "..", "a b", &"x".repeat(64), "a.\u{1b}[2J"] {
            let why = bad.parse::<DriverName>().unwrap_err();
            assert!(why.contains("is no driver's name") && !why.contains('\u{1b}'), "{why}");
        }
    }

    #[test]
    fn a_kubelets_folder_is_absolute_and_normal() {
        let dir: KubeletDir = "//var//lib/./kubelet/".parse().unwrap();
        let name: DriverName = "csi.countersign.dev".parse().unwrap();
        assert_eq!(dir.pods(), Path::new("/var/lib/kubelet/pods"));
        assert_eq!(dir.socket(&name), Path::new("/var/lib/kubelet/plugins/csi.countersign.dev/csi.sock"));
        let registration = dir.registration(&name);
        assert_eq!(registration, Path::new("/var/lib/kubelet/plugins_registry/csi.countersign.dev-reg.sock"));
        for bad in ["", "/", "kubelet", "/var/../etc", "./x"] {
            assert!(bad.parse::<KubeletDir>().is_err(), "{bad}");
        }
        assert!("node-1.example".parse::<NodeId>().is_ok() && "a,b".parse::<NodeId>().is_err());
    }
}
