//! A node's pods, converted to selectors: what is kept of them, whichever source they come from.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use countersign_identity::Selector;
use countersign_identity::selector::SelectorSet;
use k8s_openapi::List;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

/// Most pods of a node that are kept. A kubelet runs 110 unless it is told otherwise.
const MAX_PODS: usize = 4_096;

/// Prefixes of the selectors that come from the statuses of containers.
const OF_STATUS: [&str; 4] = ["container-name:", "container-image:", "pod-image", "pod-init-image"];

/// Whether a selector may be added to those of a pod later, because it comes from the statuses of its containers.
pub fn may_follow(selector: &Selector) -> bool {
    selector.kind() == "k8s" && OF_STATUS.iter().any(|prefix| selector.value().starts_with(prefix))
}

/// A node's pods by UID.
#[derive(Default)]
pub struct Pods(HashMap<String, Arc<KnownPod>>);

/// What is known about a pod.
#[derive(Debug, PartialEq, Eq)]
pub struct KnownPod {
    /// Namespace of the pod.
    pub namespace: String,
    /// Selectors of all its processes, from the pod's metadata and spec: known as soon as the pod is.
    pub selectors: SelectorSet,
    /// Further selectors of all its processes, from the statuses of its containers. They change while the pod starts, so they
    /// count once the caller's own container is known.
    pub images: SelectorSet,
    /// Additional selectors by container ID.
    containers: HashMap<String, SelectorSet>,
}

impl Pods {
    /// Parses a `PodList` in JSON.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        let list: List<Pod> = serde_json::from_slice(json)?;
        let mut pods = Self::default();
        list.items.iter().for_each(|pod| pods.insert(pod));
        Ok(pods)
    }

    /// Adds or replaces a pod. One without a UID, or beyond [`MAX_PODS`], is left out.
    pub fn insert(&mut self, pod: &Pod) {
        let Some(uid) = &pod.metadata.uid else { return };
        if self.0.len() >= MAX_PODS && !self.0.contains_key(uid) {
            tracing::warn!(uid, "more than {MAX_PODS} pods on this node; this one is left out");
            return;
        }
        self.0.insert(uid.clone(), Arc::new(known(pod)));
    }

    /// Removes a pod.
    pub fn remove(&mut self, uid: &str) {
        self.0.remove(uid);
    }

    /// The pod with this UID; `None` if it is not known.
    pub fn get(&self, uid: &str) -> Option<&Arc<KnownPod>> {
        self.0.get(uid)
    }

    /// Number of pods.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl KnownPod {
    /// Additional selectors of a container's processes; `None` while the container is not known.
    pub fn container(&self, id: &str) -> Option<&SelectorSet> {
        self.containers.get(id)
    }
}

fn selectors(values: impl IntoIterator<Item = String>) -> SelectorSet {
    values.into_iter().filter_map(|v| Selector::new("k8s", v).ok()).collect()
}

/// An image under both of its names: as requested, and by its digest.
fn images<'a>(statuses: impl Iterator<Item = &'a ContainerStatus>) -> BTreeSet<&'a str> {
    statuses.flat_map(|s| [s.image.as_str(), s.image_id.as_str()]).filter(|i| !i.is_empty()).collect()
}

fn known(pod: &Pod) -> KnownPod {
    let meta = &pod.metadata;
    let status = pod.status.as_ref();
    let statuses = |of: Option<&Option<Vec<ContainerStatus>>>| of.cloned().flatten().unwrap_or_default();
    let app = statuses(status.map(|s| &s.container_statuses));
    let init = statuses(status.map(|s| &s.init_container_statuses));
    let ephemeral = statuses(status.map(|s| &s.ephemeral_container_statuses));
    let namespace = meta.namespace.clone().unwrap_or_default();
    let mut values = vec![
        format!("ns:{namespace}"),
        format!("pod-uid:{}", meta.uid.as_deref().unwrap_or_default()),
        format!("pod-name:{}", meta.name.as_deref().unwrap_or_default()),
    ];
    if let Some(spec) = &pod.spec {
        values.push(format!("sa:{}", spec.service_account_name.as_deref().unwrap_or("default")));
        values.extend(spec.node_name.iter().map(|n| format!("node-name:{n}")));
    }
    values.extend(meta.labels.iter().flatten().map(|(k, v)| format!("pod-label:{k}:{v}")));
    for owner in meta.owner_references.iter().flatten() {
        values.push(format!("pod-owner:{}:{}", owner.kind, owner.name));
        values.push(format!("pod-owner-uid:{}:{}", owner.kind, owner.uid));
    }
    let mut of_images = vec![format!("pod-image-count:{}", app.len()), format!("pod-init-image-count:{}", init.len())];
    of_images.extend(images(app.iter()).into_iter().map(|i| format!("pod-image:{i}")));
    of_images.extend(images(init.iter()).into_iter().map(|i| format!("pod-init-image:{i}")));
    let containers = app.iter().chain(&init).chain(&ephemeral).filter_map(|c| {
        // The form is `containerd://ID`.
        let id = c.container_id.as_deref()?.rsplit('/').next()?.to_owned();
        let image = images(std::iter::once(c)).into_iter().map(|i| format!("container-image:{i}"));
        Some((id, selectors(std::iter::once(format!("container-name:{}", c.name)).chain(image))))
    });
    KnownPod { namespace, containers: containers.collect(), selectors: selectors(values), images: selectors(of_images) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[{
      "metadata":{"name":"web-0","namespace":"shop","uid":"u1","labels":{"app":"web","version":"v1"},
        "ownerReferences":[{"apiVersion":"apps/v1","kind":"StatefulSet","name":"web","uid":"o1"}]},
      "spec":{"nodeName":"n1","serviceAccountName":"web-sa","containers":[{"name":"app","image":"img:1"}]},
      "status":{"containerStatuses":[{"name":"app","image":"img:1","imageID":"img@sha256:1","containerID":"containerd://c1","ready":true,"restartCount":0}],
        "initContainerStatuses":[{"name":"proxy","image":"cs:1","imageID":"","containerID":"containerd://c2","ready":true,"restartCount":0}]}},
      {"metadata":{"name":"pending","namespace":"shop","uid":"u2"},"spec":{"containers":[]}}]}"#;

    #[test]
    fn a_container_has_every_selector_of_the_table_and_none_of_its_neighbours() {
        let pods = Pods::parse(LIST.as_bytes()).unwrap();
        let pod = pods.get("u1").unwrap();
        assert_eq!(pod.namespace, "shop");
        let later: SelectorSet = pod.images.iter().chain(pod.container("c2").unwrap()).cloned().collect();
        assert!(later.iter().all(may_follow) && !pod.selectors.iter().any(may_follow));
        let found: SelectorSet = pod.selectors.union(&later).cloned().collect();
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        let expected = [
            "k8s:container-image:cs:1",
            "k8s:container-name:proxy",
            "k8s:node-name:n1",
            "k8s:ns:shop",
            "k8s:pod-image-count:1",
            "k8s:pod-image:img:1",
            "k8s:pod-image:img@sha256:1",
            "k8s:pod-init-image-count:1",
            "k8s:pod-init-image:cs:1",
            "k8s:pod-label:app:web",
            "k8s:pod-label:version:v1",
            "k8s:pod-name:web-0",
            "k8s:pod-owner-uid:StatefulSet:o1",
            "k8s:pod-owner:StatefulSet:web",
            "k8s:pod-uid:u1",
            "k8s:sa:web-sa",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_container_that_is_not_known_has_none() {
        let pods = Pods::parse(LIST.as_bytes()).unwrap();
        assert!(pods.get("u1").unwrap().container("c3").is_none());
        assert!(pods.get("u2").unwrap().container("c1").is_none());
        assert!(pods.get("u3").is_none());
        assert!(Pods::parse(b"{").is_err());
    }
}
