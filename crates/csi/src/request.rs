//! What the kubelet asks for, parsed: an ephemeral inline volume that is only read, or the end of one.

use std::path::Path;

use countersign_api::csi::volume_capability::AccessType;
use countersign_api::csi::{NodePublishVolumeRequest, NodeUnpublishVolumeRequest};
use countersign_identity::shown::shown;

use crate::target::{NoTarget, Target};

/// Longest ID of a volume, in bytes. The kubelet's are `csi-` and a SHA-256 in hexadecimal.
const MAX_ID: usize = 256;
/// Prefix of the keys of what the kubelet says about the pod (`podInfoOnMount`).
const POD: &str = "csi.storage.k8s.io/";

/// Why a request is refused. The text names what the pod's author has to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no ID, or one that is too long.
    #[error("volume_id is missing or longer than {MAX_ID} bytes")]
    NoId,
    /// The path is no volume's.
    #[error(transparent)]
    Target(#[from] NoTarget),
    /// It is no volume of a pod's own specification.
    #[error(
        "only ephemeral inline volumes are served: write `csi` in the pod's volumes, and no PersistentVolume; the CSIDriver object needs podInfoOnMount: true"
    )]
    NotEphemeral,
    /// The pod asks for a writable volume.
    #[error("the agent's folder is never writable: write readOnly: true in the pod's spec.volumes[].csi")]
    Writable,
    /// It is no folder, or one with a file system of its own.
    #[error("the volume is a folder of the node: it takes no block device, no fsType and no mount options")]
    NotAFolder,
}

/// A volume to put into a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// Folder below the kubelet's, on which the agent's is mounted.
    pub target: Target,
    /// Namespace and name of the pod, escaped for a log.
    pub pod: String,
}

impl Publish {
    /// Parses a request; `pods` is the kubelet's folder of pods.
    pub fn parse(request: &NodePublishVolumeRequest, pods: &Path) -> Result<Self, Refused> {
        judge_id(&request.volume_id)?;
        let target = Target::parse(&request.target_path, pods)?;
        let said = |key: &str| request.volume_context.get(&format!("{POD}{key}")).map(String::as_str);
        if said("ephemeral") != Some("true") {
            return Err(Refused::NotEphemeral);
        }
        if !request.readonly {
            return Err(Refused::Writable);
        }
        match request.volume_capability.as_ref().and_then(|c| c.access_type.as_ref()) {
            Some(AccessType::Mount(mount)) if mount.fs_type.is_empty() && mount.mount_flags.is_empty() => {}
            _ => return Err(Refused::NotAFolder),
        }
        let word = |key| shown(said(key).unwrap_or("?")).to_string();
        Ok(Self { target, pod: format!("{}/{}", word("pod.namespace"), word("pod.name")) })
    }
}

/// Parses the request for the end of a volume.
pub fn unpublished(request: &NodeUnpublishVolumeRequest, pods: &Path) -> Result<Target, Refused> {
    judge_id(&request.volume_id)?;
    Ok(Target::parse(&request.target_path, pods)?)
}

fn judge_id(id: &str) -> Result<(), Refused> {
    if id.is_empty() || id.len() > MAX_ID { Err(Refused::NoId) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_api::csi::VolumeCapability;
    use countersign_api::csi::volume_capability::{BlockVolume, MountVolume};

    fn folder(mount: MountVolume) -> VolumeCapability {
        VolumeCapability { access_type: Some(AccessType::Mount(mount)) }
    }

    /// As the kubelet asks for a pod's volume.
    fn asked() -> NodePublishVolumeRequest {
        let said = [("ephemeral", "true"), ("pod.namespace", "shop"), ("pod.name", "web-0")];
        NodePublishVolumeRequest {
            volume_id: "csi-0123".into(),
            target_path: "/k/pods/u-1/volumes/kubernetes.io~csi/v/mount".into(),
            volume_capability: Some(folder(MountVolume::default())),
            readonly: true,
            volume_context: said.map(|(key, value)| (format!("{POD}{key}"), value.to_owned())).into(),
        }
    }

    fn parse(change: impl Fn(&mut NodePublishVolumeRequest)) -> Result<Publish, Refused> {
        let mut request = asked();
        change(&mut request);
        Publish::parse(&request, Path::new("/k/pods"))
    }

    #[test]
    fn an_inline_volume_that_is_only_read_is_taken() {
        let publish = parse(|_| {}).unwrap();
        assert_eq!(publish.pod, "shop/web-0");
        assert_eq!(publish.target.to_string(), "u-1/volumes/kubernetes.io~csi/v");
        // Attributes of the pod's author mean nothing, as with SPIRE's driver.
        assert!(parse(|r| drop(r.volume_context.insert("hint".into(), "x".into()))).is_ok());
    }

    #[test]
    fn anything_else_is_refused_with_what_to_write() {
        let flags = MountVolume { mount_flags: vec!["suid".into()], ..MountVolume::default() };
        let other = MountVolume { fs_type: "ext4".into(), ..MountVolume::default() };
        let block = VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})) };
        let refused = |change: &dyn Fn(&mut NodePublishVolumeRequest)| parse(change).unwrap_err();
        assert_eq!(refused(&|r| r.readonly = false), Refused::Writable);
        assert_eq!(refused(&|r| r.volume_context.clear()), Refused::NotEphemeral);
        let said = |value: &str| value.to_owned();
        assert_eq!(
            refused(&|r| drop(r.volume_context.insert(format!("{POD}ephemeral"), said("false")))),
            Refused::NotEphemeral
        );
        assert_eq!(refused(&|r| r.volume_id.clear()), Refused::NoId);
        assert_eq!(refused(&|r| r.volume_id = "x".repeat(257)), Refused::NoId);
        assert_eq!(refused(&|r| r.target_path = "/etc".into()), Refused::Target(NoTarget));
        for capability in [None, Some(block), Some(folder(flags)), Some(folder(other))] {
            assert_eq!(refused(&|r| r.volume_capability.clone_from(&capability)), Refused::NotAFolder);
        }
        assert!(Refused::Writable.to_string().contains("readOnly: true"));
    }

    #[test]
    fn a_pods_name_is_escaped_for_the_log() {
        let named = |r: &mut NodePublishVolumeRequest| {
            r.volume_context.insert(format!("{POD}pod.name"), "x\n2026 forged\u{1b}[2J".into());
        };
        let pod = parse(named).unwrap().pod;
        assert!(!pod.contains(['\n', '\u{1b}']), "{pod}");
    }
}
