//! The part of a pod's way into the mesh that objects of the cluster tell: injection, registration, the agent of its node.

use std::time::Duration;

use countersign_controller::crd::{SpiffeID, SpiffeIdSelector};
use countersign_controller::injector::{INJECT, SIDECAR, did_you_mean};
use countersign_identity::shown::{sentence, shown};
use countersign_watch::in_words;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::Api;
use kube::{Client, ResourceExt};

use crate::kubernetes::check::misspelled;
use crate::kubernetes::cluster::{is_meshed, is_ready, node_of, pods};
use crate::kubernetes::exceptions::exceptions;
use crate::kubernetes::pod_state;

/// Longest message of a condition that is repeated, in characters.
const MAX_MESSAGE: usize = 400;
/// Longest wait for the API server.
const DEADLINE: Duration = Duration::from_secs(10);

/// Whether a pod was injected, and whether it should have been.
pub struct Injection {
    /// What was found, or why it was not.
    pub outcome: Result<String, String>,
    /// Whether pod or namespace ask for it.
    pub is_wanted: bool,
}

/// The namespace of some pods, which says whether those without a sidecar should have one; `None` if it cannot be read, or all have one.
pub async fn space(client: &Client, pods: &[&Pod], namespace: &str) -> Option<Namespace> {
    if pods.iter().all(|pod| is_meshed(pod)) {
        return None;
    }
    let spaces: Api<Namespace> = Api::all(client.clone());
    tokio::time::timeout(DEADLINE, spaces.get(namespace)).await.ok()?.ok()
}

/// Looks at a pod and its namespace.
pub fn injection(pod: &Pod, namespace: Option<&Namespace>) -> Injection {
    if is_meshed(pod) {
        let past = exceptions(pod);
        let past = if past.is_empty() { String::new() } else { format!("; exceptions: {}", past.join(" ")) };
        return Injection { outcome: Ok(format!("it has container {SIDECAR}{past}")), is_wanted: true };
    }
    let asks =
        |labels: &std::collections::BTreeMap<String, String>| labels.get(INJECT).is_some_and(|v| v != "disabled");
    let own = asks(pod.labels());
    let is_wanted = own || pod.labels().get(INJECT).is_none() && namespace.is_some_and(|n| asks(n.labels()));
    Injection { outcome: Err(not_injected(pod, namespace)), is_wanted }
}

fn not_injected(pod: &Pod, namespace: Option<&Namespace>) -> String {
    let own = pod.labels().get(INJECT).map(String::as_str);
    let theirs = namespace.and_then(|n| n.labels().get(INJECT)).map(String::as_str);
    let unclear = |whose: &str, value: &str| {
        let meant = did_you_mean(value, &["enabled", "disabled"]);
        format!("{whose} label {INJECT} is `{}`, neither enabled nor disabled{meant}", shown(value))
    };
    let host = pod.spec.as_ref().and_then(|s| s.host_network) == Some(true);
    match (own, theirs) {
        _ if host => "it uses its node's network, where a redirect would catch the node's traffic".into(),
        (Some("disabled"), _) => format!("its label {INJECT} is disabled"),
        (Some("enabled"), _) | (None, Some("enabled")) => {
            "it asks for a sidecar and has none: it is older than the label, or was made while there was no webhook; delete it, \
             or restart what it belongs to"
                .into()
        }
        (Some(value), _) => unclear("its", value),
        (None, Some(value)) if value != "disabled" => unclear("its namespace's", value),
        _ => {
            let mut nearly = misspelled("the pod", pod.labels().keys());
            nearly.extend(namespace.into_iter().flat_map(|n| misspelled("its namespace", n.labels().keys())));
            let nearly = if nearly.is_empty() { String::new() } else { format!("; {}", nearly.join("; ")) };
            format!("neither the pod nor its namespace is labelled {INJECT}=enabled{nearly}")
        }
    }
}

/// The pod's entry, by the `SpiffeID` object of its name.
pub async fn registration(client: &Client, pod: &Pod, namespace: &str) -> Result<String, String> {
    let api: Api<SpiffeID> = Api::namespaced(client.clone(), namespace);
    match api.get_opt(&pod.name_any()).await.map_err(|e| in_words(&e))? {
        Some(object) => registered(&object, pod),
        None => Err(unregistered(pod)),
    }
}

/// Why a pod has no entry. The entry names the pod's node, so that before there is one nobody is to blame but who would choose it.
fn unregistered(pod: &Pod) -> String {
    if node_of(pod).is_some() {
        return "it has no SpiffeID object: is its namespace left out, and is the registrar running?".into();
    }
    let why = pod_state::unscheduled(pod).unwrap_or_else(|| "the scheduler has not said why".into());
    format!("it is not scheduled, and is registered once it has a node: {why}")
}

fn registered(object: &SpiffeID, pod: &Pod) -> Result<String, String> {
    let id = shown(&object.spec.spiffe_id);
    let lacks = lacking(&object.spec.selector, pod);
    if !lacks.is_empty() {
        return Err(format!("{id}: the pod lacks {} of the object's selector", lacks.join(", ")));
    }
    let status = object.status.clone().unwrap_or_default();
    let condition = status.conditions.iter().find(|c| c.kind == "Registered");
    match (status.entry_id, condition) {
        (Some(entry), Some(c)) if c.status == "True" => Ok(format!("{id} by entry {}", shown(&entry))),
        (_, Some(c)) => Err(format!("{id}: {}: {}", shown(&c.reason), sentence(&c.message, MAX_MESSAGE))),
        _ => Err(format!("{id}: the registrar has not registered it yet")),
    }
}

/// The selectors that a pod does not have, as far as its metadata and spec tell.
fn lacking(selector: &SpiffeIdSelector, pod: &Pod) -> Vec<String> {
    let spec = pod.spec.as_ref();
    let account = spec.and_then(|s| s.service_account_name.clone()).unwrap_or_else(|| "default".into());
    let facts = [
        ("k8s:pod-uid", &selector.pod_uid, pod.uid()),
        ("k8s:pod-name", &selector.pod_name, pod.metadata.name.clone()),
        ("k8s:ns", &selector.namespace, pod.namespace()),
        ("k8s:sa", &selector.service_account, Some(account)),
        ("node", &selector.node_name, node_of(pod).map(ToOwned::to_owned)),
    ];
    let lacks = facts.into_iter().filter(|(_, asked, has)| asked.is_some() && *asked != has);
    let mut all: Vec<String> =
        lacks.filter_map(|(key, asked, _)| Some(format!("{key}:{}", shown(asked.as_deref()?)))).collect();
    let labels = selector.pod_label.iter().filter(|(key, value)| pod.labels().get(*key) != Some(value));
    all.extend(labels.map(|(key, value)| format!("k8s:pod-label:{}:{}", shown(key), shown(value))));
    all
}

/// The agent of a pod's node.
pub async fn agent(client: &Client, pod: &Pod, mesh: &str) -> Result<String, String> {
    let node = node_of(pod).ok_or("it is not scheduled, so that it has no node whose agent would serve it")?;
    let agents = pods(client, mesh, "app.kubernetes.io/component=agent").await?;
    match agents.iter().find(|a| node_of(a) == Some(node)) {
        Some(agent) if is_ready(agent) => Ok(format!("{} on node {node} is ready", agent.name_any())),
        Some(agent) => {
            let how = pod_state::state(agent).unwrap_or_else(|why| why);
            Err(format!("{} on node {node} is not ready: {how}", agent.name_any()))
        }
        None => Err(format!("there is none on node {node}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(labels: Value) -> Pod {
        let metadata = json!({ "name": "web-0", "namespace": "shop", "uid": "u2", "labels": labels });
        serde_json::from_value(json!({ "metadata": metadata, "spec": { "containers": [], "nodeName": "n1" } })).unwrap()
    }

    fn space(labels: Value) -> Namespace {
        serde_json::from_value(json!({ "metadata": { "name": "shop", "labels": labels } })).unwrap()
    }

    #[test]
    fn a_label_that_is_wrong_is_told_apart_from_one_that_is_missing() {
        let said = |own: Value, theirs: Value| not_injected(&pod(own), Some(&space(theirs)));
        assert!(said(json!({ INJECT: "disabled" }), json!({ INJECT: "enabled" })).contains("its label"));
        assert!(said(json!({ INJECT: "enabled" }), json!({})).contains("older than the label"));
        assert!(said(json!({ INJECT: "true" }), json!({})).contains("did you mean `enabled`?"));
        let of_namespace = said(json!({}), json!({ INJECT: "enable" }));
        assert!(
            of_namespace.starts_with("its namespace's label") && of_namespace.contains("`enabled`?"),
            "{of_namespace}"
        );
        let of_key = said(json!({}), json!({ "countersign.dev/inejct": "enabled" }));
        assert!(of_key.contains("neither the pod nor its namespace is labelled"), "{of_key}");
        assert!(of_key.ends_with("did you mean `countersign.dev/inject`?"), "{of_key}");
        assert!(said(json!({}), json!({ INJECT: "disabled" })).contains("neither the pod nor"));
    }

    #[test]
    fn of_a_pod_that_is_not_scheduled_the_scheduler_is_asked_and_not_the_registrar() {
        let mut waiting = pod(json!({}));
        assert!(unregistered(&waiting).contains("is the registrar running?"), "it has a node");
        waiting.spec.as_mut().unwrap().node_name = None;
        assert!(unregistered(&waiting).ends_with("the scheduler has not said why"));
        let condition = json!({ "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                                "message": "0/2 nodes are available: 2 Insufficient memory." });
        waiting.status = serde_json::from_value(json!({ "conditions": [condition] })).unwrap();
        let said = "it is not scheduled, and is registered once it has a node: Unschedulable: 0/2 nodes are available: \
                    2 Insufficient memory.";
        assert_eq!(unregistered(&waiting), said);
    }

    fn object(selector: Value, status: Value) -> SpiffeID {
        serde_json::from_value(json!({
            "apiVersion": "spiffeid.spiffe.io/v1beta1", "kind": "SpiffeID", "metadata": { "name": "web-0" },
            "spec": { "spiffeId": "spiffe://td/web", "parentId": "spiffe://td/p", "selector": selector }, "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn a_selector_that_the_pod_lacks_is_named() {
        let condition = |status: &str, message: &str| {
            let condition = json!({
                "type": "Registered", "status": status, "reason": "Refused", "message": message, "lastTransitionTime": "",
            });
            json!({ "entryId": "e1", "conditions": [condition] })
        };
        let well = object(json!({ "podUid": "u2", "namespace": "shop", "nodeName": "n1" }), condition("True", ""));
        assert_eq!(registered(&well, &pod(json!({}))).unwrap(), "spiffe://td/web by entry e1");
        let other =
            object(json!({ "podUid": "u1", "podLabel": { "app": "web" }, "nodeName": "n2" }), condition("True", ""));
        assert_eq!(
            registered(&other, &pod(json!({}))).unwrap_err(),
            "spiffe://td/web: the pod lacks k8s:pod-uid:u1, node:n2, k8s:pod-label:app:web of the object's selector"
        );
        let refused = object(json!({}), condition("False", "spiffeId: no\u{1b}"));
        assert_eq!(registered(&refused, &pod(json!({}))).unwrap_err(), "spiffe://td/web: Refused: spiffeId: no\\u{1b}");
        assert!(
            registered(&object(json!({}), Value::Null), &pod(json!({}))).unwrap_err().contains("not registered it yet")
        );
    }
}
