//! Where the kubelet wants a volume: parsed, so that nothing outside of its folder of pods can be meant.

use std::fmt;
use std::path::{Component, Path, PathBuf};

/// Longest path that is taken, in bytes: the kernel's bound (`PATH_MAX`).
const MAX_PATH: usize = 4_096;
/// Longest name of one folder, in bytes (`NAME_MAX`).
const MAX_NAME: usize = 255;
/// Name of the folder that the volume is mounted on.
pub const MOUNT: &str = "mount";

/// A path that is no volume's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("target_path is not `PODS/POD_UID/volumes/kubernetes.io~csi/VOLUME/mount` below the kubelet's folder")]
pub struct NoTarget;

/// The folder of one volume of a pod, `POD_UID/volumes/kubernetes.io~csi/VOLUME`, relative to the kubelet's folder of pods.
/// The volume is mounted on the folder [`MOUNT`] in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target(String);

impl Target {
    /// Parses a path below `pods`, which has the form that the kubelet gives it (its `GetPath` of CSI volumes).
    pub fn parse(path: &str, pods: &Path) -> Result<Self, NoTarget> {
        if path.len() > MAX_PATH {
            return Err(NoTarget);
        }
        let below = Path::new(path).strip_prefix(pods).map_err(|_| NoTarget)?;
        let parts = below.components().map(|part| match part {
            Component::Normal(name) => name.to_str().filter(|name| is_name(name)).ok_or(NoTarget),
            _ => Err(NoTarget),
        });
        match parts.collect::<Result<Vec<_>, _>>()?.as_slice() {
            [pod, "volumes", "kubernetes.io~csi", volume, MOUNT] => {
                Ok(Self(format!("{pod}/volumes/kubernetes.io~csi/{volume}")))
            }
            _ => Err(NoTarget),
        }
    }

    /// The path below the kubelet's folder of pods.
    pub fn as_path(&self) -> PathBuf {
        PathBuf::from(&self.0)
    }
}

/// Whether a text is a pod's UID or a volume's name. The kubelet escapes `/` in names by `~`.
fn is_name(text: &str) -> bool {
    let form = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b);
    text.len() <= MAX_NAME && text.bytes().all(form)
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PODS: &str = "/var/lib/kubelet/pods";

    fn parse(path: &str) -> Result<String, NoTarget> {
        Target::parse(path, Path::new(PODS)).map(|t| t.to_string())
    }

    #[test]
    fn the_kubelets_own_path_is_taken() {
        let below = "7d0e1c5a-0000-4000-8000-0123456789ab/volumes/kubernetes.io~csi/countersign-agent";
        assert_eq!(parse(&format!("{PODS}/{below}/mount")), Ok(below.to_owned()));
    }

    #[test]
    fn nothing_else_is_a_target() {
        let long = format!("{PODS}/{}/volumes/kubernetes.io~csi/v/mount", "u".repeat(256));
        let longer = format!("{PODS}/u/volumes/kubernetes.io~csi/v/mount{}", "/".repeat(4_096));
        for path in [
            "",
            "/",
            "/etc",
            PODS,
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/v",
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/v/mount/x",
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/../mount",
            "/var/lib/kubelet/pods/../volumes/kubernetes.io~csi/v/mount",
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/v/mount",
            "/var/lib/kubelet/podsx/u/volumes/kubernetes.io~csi/v/mount",
            "var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/v/mount",
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/v\n/mount",
            "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/v/../v/mount",
            &long,
            &longer,
        ] {
            assert_eq!(parse(path), Err(NoTarget), "{path}");
        }
    }
}
