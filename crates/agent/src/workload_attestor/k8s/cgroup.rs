//! From a process's cgroups to its pod and container, in the forms of the kubelet's two drivers and of each runtime.
//!
//! A container can make cgroups below its own where its runtime lets it, but none above: the pod nearest to the root
//! counts, and the container is what stands right below it. Lines that contradict each other prove nothing.

/// Where a process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// UID of the pod, as the API spells it.
    pub pod_uid: String,
    /// ID of the container, 64 hex digits.
    pub id: String,
}

/// A process that claims to be in two places.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("its cgroups name two containers, {0} and {1}")]
pub struct Contradiction(String, String);

/// The container in the text of `/proc/PID/cgroup` (cgroups(7): `hierarchy:controllers:path`); `None` outside of pods.
pub fn container_of(text: &str) -> Result<Option<Container>, Contradiction> {
    let mut found: Option<Container> = None;
    for path in text.lines().filter_map(|line| line.splitn(3, ':').nth(2)) {
        let Some(here) = container_in(path) else { continue };
        match &found {
            Some(before) if *before != here => return Err(Contradiction(before.id.clone(), here.id)),
            _ => found = Some(here),
        }
    }
    Ok(found)
}

fn container_in(path: &str) -> Option<Container> {
    let mut parts = path.split('/');
    let pod_uid = parts.by_ref().find_map(pod_uid)?;
    let id = container_id(parts.next()?)?;
    Some(Container { pod_uid, id })
}

/// `podUID` (cgroupfs), `kubepods-QOS-podUID.slice` (systemd, `_` for `-`); a static pod's UID is a hash.
fn pod_uid(part: &str) -> Option<String> {
    let slice = part.strip_suffix(".slice");
    let name = match slice {
        Some(slice) => &slice[slice.rfind("-pod")? + 1..],
        None => part,
    };
    let uid = name.strip_prefix("pod")?;
    let uid = if slice.is_some() { uid.replace('_', "-") } else { uid.to_owned() };
    let lengths: Vec<usize> = uid.split('-').map(str::len).collect();
    let formed = lengths == [8, 4, 4, 4, 12] || lengths == [32];
    (formed && uid.bytes().all(|b| b == b'-' || is_hex(b))).then_some(uid)
}

/// `ID` (cgroupfs), `cri-containerd-ID.scope`, `crio-ID.scope`, `docker-ID.scope` (systemd), `crio-ID` (CRI-O, cgroupfs).
fn container_id(part: &str) -> Option<String> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    // CRI-O's monitor stands beside the container, in the pod but not of it.
    if name.contains("conmon") {
        return None;
    }
    let id = name.rsplit('-').next()?;
    (id.len() == 64 && id.bytes().all(is_hex)).then(|| id.to_owned())
}

fn is_hex(b: u8) -> bool {
    matches!(b, b'0'..=b'9' | b'a'..=b'f')
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "7f1a6c1e-2c57-4a4f-9f3c-0d9b7f6b2a11";

    fn id() -> String {
        "0123456789abcdef".repeat(4)
    }

    fn found(text: &str) -> Option<Container> {
        container_of(text).unwrap()
    }

    #[test]
    fn every_form_of_driver_and_runtime_is_understood() {
        let (id, under) = (id(), UID.replace('-', "_"));
        let here = Some(Container { pod_uid: UID.to_owned(), id: id.clone() });
        for path in [
            format!("/kubepods/burstable/pod{UID}/{id}"),
            format!("/kubepods/pod{UID}/{id}"),
            format!("/node1/kubepods/besteffort/pod{UID}/{id}"),
            format!(
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{under}.slice/cri-containerd-{id}.scope"
            ),
            format!(
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{under}.slice/cri-containerd-{id}.scope"
            ),
            format!("/kubepods.slice/kubepods-pod{under}.slice/crio-{id}.scope"),
            format!("/kubepods.slice/kubepods-pod{under}.slice/docker-{id}.scope"),
            format!("/kubepods/burstable/pod{UID}/crio-{id}"),
            // cgroup v2, seen from the agent's own cgroup namespace.
            format!("/../../kubepods-burstable-pod{under}.slice/cri-containerd-{id}.scope"),
            format!("/../../pod{UID}/{id}"),
            // A cgroup of the container's own making below it.
            format!("/kubepods/pod{UID}/{id}/system.slice/x.service"),
        ] {
            assert_eq!(found(&format!("0::{path}\n")), here, "{path}");
            assert_eq!(found(&format!("12:cpu,cpuacct:{path}\n3:memory:{path}\n0::/\n")), here, "{path}");
        }
        let hash = "4c9fbd0d6a2f4f6fa1b2c3d4e5f60718";
        assert_eq!(found(&format!("0::/kubepods/pod{hash}/{id}")).unwrap().pod_uid, hash, "a static pod");
    }

    #[test]
    fn a_pod_that_a_container_makes_up_below_itself_does_not_count() {
        let (id, other) = (id(), "f".repeat(64));
        let forged = format!("0::/kubepods/pod{UID}/{id}/kubepods/pod00000000-0000-0000-0000-000000000000/{other}");
        assert_eq!(found(&forged), Some(Container { pod_uid: UID.to_owned(), id: id.clone() }));
        let contradicts = format!("5:cpu:/kubepods/pod{UID}/{id}\n6:memory:/kubepods/pod{UID}/{other}\n");
        assert_eq!(container_of(&contradicts), Err(Contradiction(id, other)));
    }

    #[test]
    fn what_is_in_no_container_is_in_no_pod() {
        let id = id();
        for path in [
            "/".to_owned(),
            "/system.slice/kubelet.service".into(),
            format!("/docker/{id}"),
            format!("/kubepods/pod{UID}"),
            format!("/kubepods/pod{UID}/crio-conmon-{id}.scope"),
            format!("/kubepods/podnot-a-uid/{id}"),
            format!("/kubepods/pod{UID}/{}", "g".repeat(64)),
            format!("/kubepods/pod{}/{id}", UID.to_uppercase()),
        ] {
            assert_eq!(found(&format!("0::{path}")), None, "{path}");
        }
        assert_eq!(found(""), None);
        assert_eq!(found("garbage\n:::\n0"), None);
    }
}
