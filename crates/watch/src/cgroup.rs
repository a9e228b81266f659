//! Finds a process's pod and container from its cgroups, for both of the kubelet's drivers and each runtime.
//!
//! A path counts only below the kubelet's own root, where only root can create cgroups: below a delegated tree, such as
//! a user's own service manager (`user.slice/user-1000.slice/user@1000.service`), any user can create a path that looks
//! like a pod's. The root is `/kubepods` or `/kubelet/kubepods`, or their forms under systemd. If the kubelet has
//! another root (`cgroupRoot`, a node in a container), the agent's own cgroup shows it, because the agent is one of the
//! kubelet's pods.
//!
//! A container may create cgroups below its own if its runtime allows it, but none above. So the pod nearest to the
//! root counts, and the container is the part directly below it. Contradicting lines prove nothing.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use countersign_identity::shown::shown_up_to;

/// The container that a process runs in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// UID of the pod, in the API's form.
    pub pod_uid: String,
    /// ID of the container, 64 hex digits.
    pub id: String,
}

/// Why cgroups prove nothing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CgroupError {
    /// The lines name two different containers.
    #[error("its cgroups name two containers, {0} and {1}")]
    Contradiction(String, String),
    /// A path looks like a pod's, but is not below the kubelet's root.
    #[error(
        "its cgroup `{0}` is spelled like a pod's, but is not below the kubelet's root; such a cgroup may be anybody's. Where the kubelet has another `cgroupRoot`, run the agent as a pod of that node"
    )]
    OutsideOfKubelet(String),
}

/// Parses `/proc/PID/cgroup` (cgroups(7): `hierarchy:controllers:path`); `None` for a process outside of pods.
pub fn container_of(text: &str) -> Result<Option<Container>, CgroupError> {
    static ROOTS: LazyLock<Roots> =
        LazyLock::new(|| Roots::seen_from(&std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default()));
    container_below(&ROOTS, text)
}

fn container_below(roots: &Roots, text: &str) -> Result<Option<Container>, CgroupError> {
    let mut found: Option<Container> = None;
    for path in paths(text) {
        let parts = components(path);
        let Some(here) = roots.container_in(&parts) else {
            // An error rather than "no pod": a process that imitates one must not be attested as an ordinary process
            // either.
            if spells_a_pod(&parts) {
                return Err(CgroupError::OutsideOfKubelet(shown_up_to(path, 200).to_string()));
            }
            continue;
        };
        // On cgroup v1 each line is one hierarchy, and a process may be moved in one of them only.
        match &found {
            Some(before) if *before != here => {
                return Err(CgroupError::Contradiction(before.id.clone(), here.id));
            }
            _ => found = Some(here),
        }
    }
    Ok(found)
}

fn paths(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.splitn(3, ':').nth(2))
}

/// The components of a path as the kernel writes it, below the root. Empty ones stay, and a path that does not begin at
/// the root has one in front: the kernel writes neither, and what is skipped here might not be skipped elsewhere.
fn components(path: &str) -> Vec<&str> {
    match path.strip_prefix('/') {
        Some(below) => below.split('/').collect(),
        None => std::iter::once("").chain(path.split('/')).collect(),
    }
}

/// The path prefixes before `kubepods` under which a kubelet creates the cgroups of its pods.
struct Roots(BTreeSet<Vec<String>>);

impl Roots {
    /// The usual prefixes, and the one that the agent itself is under, by its own `/proc/self/cgroup`.
    fn seen_from(own: &str) -> Self {
        // kind and others put the kubelet and its pods under `kubelet`. A runtime that does not support the kubelet's
        // systemd driver creates the pods' cgroups below its own service.
        let usual: [&[&str]; 4] = [&[], &["kubelet"], &["kubelet.slice"], &["system.slice", "containerd.service"]];
        let mut roots: BTreeSet<Vec<String>> =
            usual.iter().map(|p| p.iter().map(|p| (*p).to_owned()).collect()).collect();
        for path in paths(own) {
            let parts = components(path);
            let below = (0..parts.len()).find(|n| pod_in(&parts[*n..]).is_some());
            roots.extend(below.map(|n| parts[..n].iter().map(|p| (*p).to_owned()).collect()));
        }
        Self(roots)
    }

    fn container_in(&self, parts: &[&str]) -> Option<Container> {
        let up = parts.iter().take_while(|p| **p == "..").count();
        let (above, rest) = parts.split_at(up);
        if !above.is_empty() {
            // Seen from the agent's own cgroup namespace, whose root is its container: the path goes up to the common
            // ancestor and then down. On the way down to a pod there are only the kubelet's own cgroups.
            return pod_in(rest).or_else(|| pod_below_common(rest).filter(|_| up >= 2));
        }
        let below = |root: &Vec<String>| {
            let starts = rest.len() >= root.len() && rest.iter().zip(root).all(|(part, root)| part == root);
            if starts { pod_in(&rest[root.len()..]) } else { None }
        };
        self.0.iter().find_map(below)
    }
}

/// `kubepods[/QOS]/podUID/ID` (cgroupfs), `R.slice[/R-QOS.slice]/R[-QOS]-podUID.slice/RUNTIME-ID.scope` (systemd; R
/// ends in `kubepods`), `R[-QOS]-podUID.slice:RUNTIME:ID` (runtime and kubelet with different drivers).
fn pod_in(parts: &[&str]) -> Option<Container> {
    let (root, rest) = parts.split_first()?;
    if *root == "kubepods" {
        let rest = match rest.split_first()? {
            (&("burstable" | "besteffort"), rest) => rest,
            _ => rest,
        };
        return plain(rest);
    }
    if let Some((slice, id)) = root.split_once(".slice:") {
        let slice = format!("{slice}.slice");
        let (pod_uid, above) = pod_of_slice(&slice)?;
        if !is_kubepods(without_qos(&above)) {
            return None;
        }
        return Some(Container { pod_uid, id: container_id(id.rsplit(':').next()?)? });
    }
    let base = root.strip_suffix(".slice").filter(|base| is_kubepods(base))?;
    let rest = match rest.split_first()? {
        (qos, rest) if QOS.iter().any(|q| *qos == format!("{base}{q}.slice")) => rest,
        _ => rest,
    };
    let (slice, rest) = rest.split_first()?;
    let (pod_uid, above) = pod_of_slice(slice)?;
    let of_this_root = std::iter::once(&"").chain(&QOS).any(|q| above == format!("{base}{q}"));
    of_this_root.then_some(Container { pod_uid, id: container_id(rest.first()?)? })
}

/// Whether a slice's name without its end is that of the kubelet's pods.
fn is_kubepods(base: &str) -> bool {
    base == "kubepods" || base.ends_with("-kubepods")
}

/// The name of a slice without the quality of service at its end.
fn without_qos(above: &str) -> &str {
    QOS.iter().find_map(|q| above.strip_suffix(q)).unwrap_or(above)
}

/// Quality of service in names of slices; the one of guaranteed pods is not named.
const QOS: [&str; 2] = ["-burstable", "-besteffort"];

/// The rest of the forms above, when both paths share their beginning.
fn pod_below_common(parts: &[&str]) -> Option<Container> {
    let (first, rest) = parts.split_first()?;
    if let Some((pod_uid, above)) = pod_of_slice(first) {
        let of_kubelet = is_kubepods(without_qos(&above));
        return of_kubelet.then_some(Container { pod_uid, id: container_id(rest.first()?)? });
    }
    match *first {
        "burstable" | "besteffort" => plain(rest),
        slice if qos_slice(slice).is_some() => {
            let (_, above) = pod_of_slice(rest.first()?)?;
            pod_below_common(rest).filter(|_| qos_slice(slice) == Some(above.as_str()))
        }
        _ if first.contains(".slice:") => pod_in(parts),
        _ => plain(parts),
    }
}

/// The name, without its end, of the slice that the kubelet creates for a quality of service.
fn qos_slice(slice: &str) -> Option<&str> {
    let base = slice.strip_suffix(".slice")?;
    let root = without_qos(base);
    (root.len() < base.len() && is_kubepods(root)).then_some(base)
}

/// Parses `podUID/ID`.
fn plain(parts: &[&str]) -> Option<Container> {
    let (pod, rest) = parts.split_first()?;
    Some(Container { pod_uid: uid(pod.strip_prefix("pod")?)?, id: container_id(rest.first()?)? })
}

/// Parses `ABOVE-podUID.slice`, with `_` for `-` in the UID, into the UID and `ABOVE`.
fn pod_of_slice(part: &str) -> Option<(String, String)> {
    let (above, found) = part.strip_suffix(".slice")?.rsplit_once("-pod")?;
    Some((uid(&found.replace('_', "-"))?, above.to_owned()))
}

/// A pod's UID; that of a static pod is a hash. `None` if the form is wrong.
fn uid(text: &str) -> Option<String> {
    let lengths: Vec<usize> = text.split('-').map(str::len).collect();
    let formed = lengths == [8, 4, 4, 4, 12] || lengths == [32];
    (formed && text.bytes().all(|b| b == b'-' || is_hex(b))).then(|| text.to_owned())
}

/// Whether a path contains anything that would be a pod and its container below the kubelet's root.
fn spells_a_pod(parts: &[&str]) -> bool {
    (0..parts.len()).any(|n| pod_in(&parts[n..]).or_else(|| pod_below_common(&parts[n..])).is_some())
}

/// Parses `ID` (cgroupfs), `cri-containerd-ID.scope`, `crio-ID.scope`, `docker-ID.scope` (systemd), `crio-ID` (CRI-O,
/// cgroupfs).
fn container_id(part: &str) -> Option<String> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    // CRI-O's monitor is next to the container: in the pod's cgroup, but not part of the pod.
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
            format!("/kubelet/kubepods/besteffort/pod{UID}/{id}"),
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
            format!("/../../../pod{UID}/{id}"),
            format!("/../../../besteffort/pod{UID}/{id}"),
            format!("/../../../kubepods-besteffort.slice/kubepods-besteffort-pod{under}.slice/crio-{id}.scope"),
            format!("/../../kubepods-besteffort-pod{under}.slice:cri-containerd:{id}"),
            format!("/system.slice/containerd.service/kubepods-burstable-pod{under}.slice:cri-containerd:{id}"),
            // A cgroup that the container created below its own.
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
        assert_eq!(container_of(&contradicts), Err(CgroupError::Contradiction(id, other)));
    }

    /// Trees in which an unprivileged user or a container may create cgroups of any name.
    #[test]
    fn a_pod_that_is_not_below_the_kubelets_root_is_nobodys() {
        let (id, under) = (id(), UID.replace('-', "_"));
        let user = "/user.slice/user-1000.slice/user@1000.service";
        for path in [
            format!("{user}/app.slice/pod{UID}/{id}"),
            format!("{user}/kubepods/burstable/pod{UID}/{id}"),
            format!("{user}/kubepods.slice/kubepods-pod{under}.slice/cri-containerd-{id}.scope"),
            format!("{user}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{under}.slice/crio-{id}.scope"),
            format!("/system.slice/app.service/kubepods/pod{UID}/{id}"),
            format!("/docker/{id}/kubepods/pod{UID}/{id}"),
            format!("/lxc.payload.box/kubepods/pod{UID}/{id}"),
            format!("/pod{UID}/{id}"),
            format!("/app-kubepods.slice/kubepods-pod{under}.slice/crio-{id}.scope"),
            format!("/../../../..{user}/kubepods/pod{UID}/{id}"),
            format!("/../../../..{user}/pod{UID}/{id}"),
            format!("/../../../nokubepods-burstable.slice/kubepods-burstable-pod{under}.slice/crio-{id}.scope"),
            format!("/../../../kubepods-burstable.slice/kubepods-besteffort-pod{under}.slice/crio-{id}.scope"),
            // The kernel writes no empty component, and no path that is not absolute.
            format!("../../pod{UID}/{id}"),
            format!("/..//../pod{UID}/{id}"),
            format!("//kubepods/pod{UID}/{id}"),
        ] {
            let found = container_of(&format!("0::{path}\n"));
            assert_eq!(found, Err(CgroupError::OutsideOfKubelet(shown_up_to(&path, 200).to_string())), "{path}");
        }
    }

    #[test]
    fn a_slice_of_another_name_is_no_pods_in_any_form() {
        let (id, under) = (id(), UID.replace('-', "_"));
        let found = |above: &str| container_of(&format!("0::/{above}-pod{under}.slice:cri-containerd:{id}\n"));
        for above in ["kubepods", "kubepods-burstable", "kubelet-kubepods-besteffort"] {
            assert!(matches!(found(above), Ok(Some(_))), "{above}");
        }
        for above in ["kable", "nokubepods", "kubepods-other", "kubepods-burstable-x"] {
            assert_eq!(found(above), Ok(None), "{above}");
        }
    }

    #[test]
    fn the_kubelets_root_is_where_the_agents_own_pod_is() {
        let id = id();
        let agents =
            format!("4:memory:/node1/kubepods/burstable/pod{}/{}\n0::/\n", UID.replace('7', "8"), "e".repeat(64));
        let beside = format!("4:memory:/node1/kubepods/besteffort/pod{UID}/{id}\n0::/\n");
        let here = Some(Container { pod_uid: UID.to_owned(), id });
        assert_eq!(container_below(&Roots::seen_from(&agents), &beside), Ok(here));
        let elsewhere = Roots::seen_from(&agents.replace("node1", "node2"));
        assert!(matches!(container_below(&elsewhere, &beside), Err(CgroupError::OutsideOfKubelet(_))));
        let by_hand = Roots::seen_from("0::/system.slice/countersign-agent.service\n");
        assert!(matches!(container_below(&by_hand, &beside), Err(CgroupError::OutsideOfKubelet(_))));
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
