//! What the container runtime has on record of a container: the specification that it was started by (OCI runtime
//! specification, `config.json`), in a folder of root's on the node. It is there before the container runs, long before the
//! kubelet tells the API server.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// The first process's files: the node's.
const NODE: &str = "/proc/1/root";
/// Where containerd keeps the specifications of Kubernetes' containers, by their IDs: as itself, and as part of k3s and RKE2.
const FOLDERS: [&str; 2] =
    ["run/containerd/io.containerd.runtime.v2.task/k8s.io", "run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io"];
/// Largest specification that is read, in bytes.
const MAX_SPECIFICATION: u64 = 4 * 1024 * 1024;

/// The part of a specification that names the container (containerd's CRI plugin, `pkg/cri/annotations`).
#[derive(Deserialize)]
struct Specification {
    #[serde(default)]
    annotations: Annotations,
}

#[derive(Default, Deserialize)]
struct Annotations {
    #[serde(rename = "io.kubernetes.cri.container-name")]
    container: Option<String>,
}

/// The runtime's records.
#[derive(Debug, Clone)]
pub struct Records(PathBuf);

impl Records {
    /// Those of this node.
    pub fn of_node() -> Self {
        Self(NODE.into())
    }

    /// Those below another root.
    #[cfg(test)]
    pub fn below(root: &Path) -> Self {
        Self(root.into())
    }

    /// A container's name in its pod; `None` if the runtime has no such record. Blocks. `id` is one from a cgroup, 64 hex digits.
    pub fn name_of(&self, id: &str) -> Option<String> {
        let files = FOLDERS.iter().map(|folder| self.0.join(folder).join(id).join("config.json"));
        files.into_iter().find_map(|file| read(&file))
    }
}

fn read(file: &Path) -> Option<String> {
    let mut text = vec![];
    File::open(file).ok()?.take(MAX_SPECIFICATION).read_to_end(&mut text).ok()?;
    serde_json::from_slice::<Specification>(&text).ok()?.annotations.container
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_the_name_that_its_specification_says() {
        let root = tempfile::tempdir().unwrap();
        let records = Records::below(root.path());
        let write = |folder: &str, id: &str, text: &str| {
            let folder = root.path().join(folder).join(id);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("config.json"), text).unwrap();
        };
        let named = r#"{"ociVersion":"1.0","process":{},"annotations":{"io.kubernetes.cri.container-name":"countersign-proxy"}}"#;
        write(FOLDERS[0], "a", named);
        write(FOLDERS[1], "b", named);
        write(FOLDERS[0], "c", r#"{"annotations":{"io.kubernetes.cri.container-type":"sandbox"}}"#);
        write(FOLDERS[0], "d", "{");
        for id in ["a", "b"] {
            assert_eq!(records.name_of(id).as_deref(), Some("countersign-proxy"), "{id}");
        }
        for id in ["c", "d", "e"] {
            assert_eq!(records.name_of(id), None, "{id}");
        }
    }
}
