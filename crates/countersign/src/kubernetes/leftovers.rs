//! What an uninstallation leaves behind, because it is somebody's data or somebody's wish: volumes that Kubernetes keeps, labels and
//! annotations of namespaces, and the sidecars of pods that run on.

use countersign_controller::injector::INJECT;
use countersign_controller::store::MODE;
use countersign_watch::in_words;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolume, Pod};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

use super::cluster::{by_namespace, is_meshed, listed, name_of, restarts};
use crate::settings::words::count;

/// What is left, a line each, with the command that removes it.
pub async fn told(client: &Client, namespace: &str) -> String {
    let all = ListParams::default();
    let (volumes, namespaces, pods) = (Api::all(client.clone()), Api::all(client.clone()), Api::all(client.clone()));
    let (volumes, namespaces, pods) = futures::join!(volumes.list(&all), namespaces.list(&all), pods.list(&all));
    let unread = |what: &str, why: &kube::Error| vec![format!("{what} were not looked at: {}", in_words(why))];
    let mut lines =
        volumes.map_or_else(|e| unread("persistent volumes", &e), |list| of_volumes(&list.items, namespace));
    lines.extend(namespaces.map_or_else(|e| unread("namespaces", &e), |list| of_namespaces(&list.items)));
    lines.extend(pods.map_or_else(|e| unread("pods", &e), |list| of_pods(&list.items)));
    lines.push(ON_NODES.to_owned());
    format!("Countersign is removed. What is left:\n- {}", lines.join("\n- "))
}

/// Nobody is left there who could remove it.
const ON_NODES: &str = "on each node that had an agent its key and bundle, in /var/lib/countersign/agent, and until the node starts anew \
                        /run/countersign; with the CNI plugin the file countersign-cni among the node's plugins: remove them there once \
                        no pod has a sidecar";

/// Volumes of claims of the namespace. Those that are not retained go by themselves.
fn of_volumes(volumes: &[PersistentVolume], namespace: &str) -> Vec<String> {
    let is_ours = |volume: &&PersistentVolume| {
        let spec = volume.spec.as_ref();
        let claim = spec.and_then(|s| s.claim_ref.as_ref()).and_then(|claim| claim.namespace.as_deref());
        let policy = spec.and_then(|s| s.persistent_volume_reclaim_policy.as_deref());
        claim == Some(namespace) && policy != Some("Delete")
    };
    let names: Vec<String> = volumes.iter().filter(is_ours).map(ResourceExt::name_any).collect();
    if names.is_empty() {
        return vec![];
    }
    vec![format!(
        "the authority's keys and database, in PersistentVolume {}: kubectl delete pv {}, and delete what it holds on its storage",
        listed(&names),
        names.join(" ")
    )]
}

fn of_namespaces(namespaces: &[Namespace]) -> Vec<String> {
    let with = |has: &dyn Fn(&Namespace) -> bool| {
        let live = namespaces.iter().filter(|n| n.metadata.deletion_timestamp.is_none() && has(n));
        live.map(ResourceExt::name_any).collect::<Vec<_>>()
    };
    let labelled = with(&|n| [INJECT, MODE].into_iter().any(|key| n.labels().contains_key(key)));
    let annotated = with(&|n| n.annotations().contains_key(MODE));
    let line = |what: &str, verb: &str, names: &[String], keys: &str| {
        let told =
            format!("{what} of namespace {}: kubectl {verb} namespace {} {keys}", listed(names), names.join(" "));
        (!names.is_empty()).then_some(told)
    };
    let labels = line("labels", "label", &labelled, &format!("{INJECT}- {MODE}-"));
    labels.into_iter().chain(line("annotations", "annotate", &annotated, &format!("{MODE}-"))).collect()
}

fn of_pods(pods: &[Pod]) -> Vec<String> {
    let meshed = pods.iter().filter(|pod| is_meshed(pod) && pod.metadata.deletion_timestamp.is_none());
    let names: Vec<String> = meshed.map(name_of).collect();
    if names.is_empty() {
        return vec![];
    }
    vec![format!(
        "idle sidecars of {} ({}), until they are restarted: {}",
        count(names.len(), "pod"),
        by_namespace(&names),
        restarts(&names)
    )]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::check::fake_api::{Asked, client, list, refused};
    use serde_json::{Value, json};

    #[tokio::test]
    async fn what_is_left_is_named_with_the_command_that_removes_it() {
        let volume = |name: &str, of: &str, policy: &str| json!({ "metadata": { "name": name }, "spec": { "claimRef": { "namespace": of }, "persistentVolumeReclaimPolicy": policy } });
        let space = |name: &str, labels: Value, annotations: Value| json!({ "metadata": { "name": name, "labels": labels, "annotations": annotations } });
        let api = client(move |asked: &Asked| match asked.path.as_str() {
            "/api/v1/persistentvolumes" => list(
                "PersistentVolumeList",
                vec![
                    volume("kept", "mesh", "Retain"),
                    volume("going", "mesh", "Delete"),
                    volume("other", "db", "Retain"),
                ],
            ),
            "/api/v1/namespaces" => list(
                "NamespaceList",
                vec![
                    space("shop", json!({ INJECT: "enabled" }), json!({})),
                    space("pay", json!({ INJECT: "enabled", MODE: "strict" }), json!({ MODE: "strict" })),
                    space("plain", json!({}), json!({})),
                ],
            ),
            _ => refused(403, "you may not list pods"),
        });
        let said = told(&api, "mesh").await;
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.len(), 6, "{said}");
        assert!(lines[1].contains("PersistentVolume kept: kubectl delete pv kept,"), "{said}");
        let label = "kubectl label namespace shop pay countersign.dev/inject- countersign.dev/mode-";
        assert!(lines[2].ends_with(label), "{said}");
        assert!(lines[3].ends_with("kubectl annotate namespace pay countersign.dev/mode-"), "{said}");
        assert_eq!(lines[4], "- pods were not looked at: you may not list pods");
        assert!(lines[5].contains("/var/lib/countersign/agent"), "{said}");
    }

    #[test]
    fn pods_that_keep_their_sidecar_are_counted() {
        let pod = |sidecar: &str| {
            let metadata = json!({ "namespace": "shop", "name": "web" });
            serde_json::from_value(json!({ "metadata": metadata, "spec": { "containers": [{ "name": sidecar }] } }))
                .unwrap()
        };
        let said = of_pods(&[pod("countersign-proxy"), pod("app")]).remove(0);
        assert!(
            said.starts_with("idle sidecars of 1 pod (shop 1), until they are restarted: kubectl -n shop"),
            "{said}"
        );
        assert_eq!(of_pods(&[pod("app")]), [""; 0]);
    }
}
