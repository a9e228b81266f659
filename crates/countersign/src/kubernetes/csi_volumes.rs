//! Pods that have a volume of our CSI driver. The kubelet removes such a volume through the driver alone, and removes a pod only
//! without volumes: one that still has it when the driver is gone stays in `Terminating` until a driver of that name is back.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context, Result};
use countersign_controller::injector::{IN_MANIFEST, INJECTED, VOLUME};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::storage::v1::CSIDriver;
use kube::api::{Api, DeleteParams, ListParams};
use kube::{Client, ResourceExt};

use super::cluster::{by_namespace, listed, name_of, node_of};
use super::without::{Without, is_without};
use crate::settings::words::count;

/// Names of the drivers that the chart installed.
pub async fn drivers(client: &Client) -> Result<BTreeSet<String>> {
    let ours = ListParams::default().labels("app.kubernetes.io/name=countersign");
    let drivers: Api<CSIDriver> = Api::all(client.clone());
    let found = drivers.list(&ours).await.context("cannot list CSI drivers")?;
    Ok(found.items.iter().map(ResourceExt::name_any).collect())
}

/// Pods with a volume of a driver, `NAMESPACE/NAME`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// Those that have it from the injector, and whose successors have none once nothing is injected.
    pub injected: Vec<String>,
    /// Those whose own specification asks for it, which their successors have too.
    pub by_themselves: Vec<String>,
}

/// All pods with a volume of one of these drivers.
pub async fn holders(client: &Client, drivers: &BTreeSet<String>) -> Result<Holders> {
    let pods: Api<Pod> = Api::all(client.clone());
    let pods = pods.list(&ListParams::default()).await.context("cannot list pods")?;
    Ok(Holders::among(&pods.items, drivers))
}

impl Holders {
    fn among(pods: &[Pod], drivers: &BTreeSet<String>) -> Self {
        let mut all = Self::default();
        for pod in pods {
            let name = name_of(pod);
            match volumes(pod, drivers).collect::<Vec<_>>().as_slice() {
                [] => {}
                [VOLUME] if !is_in_manifest(pod) => all.injected.push(name),
                _ => all.by_themselves.push(name),
            }
        }
        all
    }

    /// Those that are waited for.
    pub fn without(mut self, some: &[Without]) -> Self {
        self.injected.retain(|pod| !is_without(some, pod));
        self.by_themselves.retain(|pod| !is_without(some, pod));
        self
    }

    /// Their number.
    pub fn count(&self) -> usize {
        self.injected.len() + self.by_themselves.len()
    }

    /// All names.
    pub fn names(&self) -> Vec<String> {
        [&self.injected[..], &self.by_themselves[..]].concat()
    }
}

/// Whether `countersign inject` has written the volume into the specification that this pod is made of.
fn is_in_manifest(pod: &Pod) -> bool {
    pod.annotations().get(INJECTED).is_some_and(|by| by.ends_with(IN_MANIFEST))
}

/// How many there are in each namespace, and which of them a restart alone does not help.
impl fmt::Display for Holders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.names();
        let namespaces = by_namespace(&names);
        write!(f, "{} with a volume of the CSI driver (by namespace: {namespaces})", count(names.len(), "pod"))?;
        match self.by_themselves.as_slice() {
            [] => Ok(()),
            own => write!(f, ", {} of them by their own specification: {}", own.len(), listed(own)),
        }
    }
}

/// Removes the objects of these drivers.
pub async fn remove(client: &Client, drivers: &BTreeSet<String>) -> Result<()> {
    let all: Api<CSIDriver> = Api::all(client.clone());
    for name in drivers {
        match all.delete(name, &DeleteParams::default()).await {
            Ok(_) => eprintln!("CSIDriver {name} is removed"),
            Err(kube::Error::Api(e)) if e.code == 404 => {}
            Err(error) => return Err(error).with_context(|| format!("cannot remove CSIDriver {name}")),
        }
    }
    Ok(())
}

/// Names of a pod's volumes of these drivers. The kubelet takes the volumes of a pod that has ended away at once, and one that has no
/// node has no kubelet that would have to.
fn volumes<'a>(pod: &'a Pod, drivers: &BTreeSet<String>) -> impl Iterator<Item = &'a str> {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default();
    let has_ended = matches!(phase, "Succeeded" | "Failed");
    let spec = pod.spec.as_ref().filter(|_| !has_ended && node_of(pod).is_some());
    let inline = spec.into_iter().flat_map(|s| s.volumes.iter().flatten());
    inline.filter(|v| v.csi.as_ref().is_some_and(|csi| drivers.contains(&csi.driver))).map(|v| v.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(name: &str, volumes: Value, phase: &str) -> Pod {
        let (namespace, name) = name.split_once('/').unwrap();
        let spec = json!({ "containers": [], "volumes": volumes, "nodeName": "n1" });
        let metadata = json!({ "namespace": namespace, "name": name });
        serde_json::from_value(json!({ "metadata": metadata, "spec": spec, "status": { "phase": phase } })).unwrap()
    }

    fn volume(name: &str, driver: &str) -> Value {
        json!([{ "name": "a", "emptyDir": {} }, { "name": name, "csi": { "driver": driver } }])
    }

    fn holders(pods: &[Pod]) -> Holders {
        Holders::among(pods, &BTreeSet::from(["csi.countersign.dev".to_owned()]))
    }

    #[test]
    fn a_pod_holds_a_volume_of_ours_until_it_has_ended() {
        let holds = |volumes: Value, phase: &str| holders(&[pod("shop/web", volumes, phase)]).count() == 1;
        let ours = || volume(VOLUME, "csi.countersign.dev");
        assert!(holds(ours(), "Running") && holds(ours(), "Pending"));
        assert!(!holds(ours(), "Failed"));
        let mut unscheduled = pod("shop/web", ours(), "Pending");
        unscheduled.spec.as_mut().unwrap().node_name = None;
        assert_eq!(holders(&[unscheduled]).count(), 0, "nothing is mounted, and it ends at once");
        assert!(!holds(volume(VOLUME, "csi.example.org"), "Running"));
        assert!(!holds(json!([]), "Running"));
    }

    #[test]
    fn holders_are_told_of_by_namespace_and_those_that_ask_for_it_themselves_by_name() {
        let running = |name: &str, of: &str| pod(name, volume(of, "csi.countersign.dev"), "Running");
        let injected = holders(&[running("shop/a", VOLUME), running("pay/b", VOLUME), running("shop/c", VOLUME)]);
        assert_eq!(injected.to_string(), "3 pods with a volume of the CSI driver (by namespace: pay 1, shop 2)");
        let own = holders(&[running("shop/a", VOLUME), running("spire/b", "api")]);
        assert_eq!(own.by_themselves, ["spire/b"]);
        assert!(own.to_string().ends_with(", 1 of them by their own specification: spire/b"), "{own}");
        let mut written = running("shop/c", VOLUME);
        written.metadata.annotations = Some([(INJECTED.to_owned(), format!("0.1.0{IN_MANIFEST}"))].into());
        let left = own.without(&["shop".parse().unwrap()]);
        assert_eq!((left.injected.len(), left.by_themselves.len()), (0, 1));
        assert_eq!(holders(&[written]).by_themselves, ["shop/c"], "the webhook is not where it has it from");
    }
}
