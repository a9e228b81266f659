//! Labels and annotations of namespaces and pods.

use countersign_controller::injector::{INJECT, did_you_mean};
use countersign_controller::store::MODE;
use countersign_identity::policy::Mode;
use countersign_identity::shown::shown;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

use super::finding::{Fault, Outcome};
use crate::kubernetes::cluster::is_meshed;
use crate::kubernetes::exceptions::{exceptions, leave};

/// Most mistakes that are named; of others their number is.
const MISTAKES_SHOWN: usize = 20;

/// Checks labels and annotations of namespaces and pods for invalid or incomplete values.
pub(super) async fn labels(client: &Client) -> Outcome {
    let api: Api<Namespace> = Api::all(client.clone());
    let all = api.list(&ListParams::default()).await.map_err(Fault::absent)?;
    // In one that is being deleted nothing is created any more, and nothing can be corrected.
    let live = all.items.iter().filter(|n| n.metadata.deletion_timestamp.is_none());
    let mut wrong: Vec<String> = live.clone().filter_map(label_mistake).collect();
    let called = |namespace: &Namespace| format!("namespace {}", namespace.name_any());
    wrong.extend(live.flat_map(|n| misspelled(&called(n), n.labels().keys().chain(n.annotations().keys()))));
    let api: Api<Pod> = Api::all(client.clone());
    let pods =
        api.list(&ListParams::default()).await.map_err(|e| Fault::unread(&e, "see whether you may list pods"))?;
    let called = |pod: &Pod| format!("pod {}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
    wrong.extend(pods.items.iter().filter_map(|pod| word_mistake(&called(pod), &pod.metadata)));
    wrong.extend(pods.items.iter().flat_map(|pod| misspelled(&called(pod), pod.labels().keys())));
    if wrong.is_empty() {
        let (namespaces, pods) = (all.items.len(), pods.items.len());
        return Ok(format!("{namespaces} namespaces and {pods} pods, each with words that mean something"));
    }
    let more = wrong.len().saturating_sub(MISTAKES_SHOWN);
    wrong.truncate(MISTAKES_SHOWN);
    if more > 0 {
        wrong.push(format!("and {more} more"));
    }
    Err(Fault::new(wrong.join("; "), "correct them: `kubectl label`, `kubectl annotate` with --overwrite"))
}

/// A word that means nothing in one of our labels or annotations.
fn word_mistake(object: &str, metadata: &ObjectMeta) -> Option<String> {
    let places = [&metadata.annotations, &metadata.labels];
    let said = |key: &str| places.into_iter().flatten().filter_map(|words| words.get(key)).collect::<Vec<_>>();
    if let Some(value) = said(INJECT).iter().find(|v| !["enabled", "disabled"].contains(&v.as_str())) {
        return Some(format!("{object}: {INJECT} is `{value}`, neither enabled nor disabled"));
    }
    let modes = said(MODE);
    let value = modes.iter().find(|v| v.parse::<Mode>().is_err())?;
    Some(format!("{object}: {MODE} is `{value}`, no mode, so it is strict"))
}

/// Keys that mean nothing to anybody and were probably meant for us: pods are as if they had none.
pub fn misspelled<'a>(object: &str, keys: impl Iterator<Item = &'a String>) -> Vec<String> {
    let unknown = keys.filter(|key| ![INJECT, MODE].contains(&key.as_str()) && is_meant_for_us(key));
    unknown.map(|key| format!("{object}: nobody reads {}{}", shown(key), did_you_mean(key, &[INJECT, MODE]))).collect()
}

/// Whether a key is one of ours, or nearly.
fn is_meant_for_us(key: &str) -> bool {
    let lower = key.to_ascii_lowercase();
    let (prefix, name) = lower.split_once('/').unwrap_or(("", &lower));
    prefix == "countersign.dev"
        || prefix.contains("countersign") && ["inject", "mode"].contains(&name)
        || !did_you_mean(key, &[INJECT, MODE]).is_empty()
}

fn label_mistake(namespace: &Namespace) -> Option<String> {
    let name = namespace.name_any();
    if let Some(mistake) = word_mistake(&format!("namespace {name}"), &namespace.metadata) {
        return Some(mistake);
    }
    let modes = [namespace.annotations().get(MODE), namespace.labels().get(MODE)];
    let is_strict = |said: Option<&String>| said.and_then(|m| m.parse().ok()) == Some(Mode::Strict);
    (is_strict(modes[0]) && !is_strict(modes[1])).then(|| {
        format!("namespace {name}: strict by annotation and not by label, so new pods do not drop what is not TCP")
    })
}

/// Finds pods that let traffic bypass their sidecars without permission.
pub(super) async fn past_sidecars(client: &Client, namespace: &str) -> Outcome {
    let leave = leave(client, namespace).await.map_err(Fault::absent)?;
    let api: Api<Pod> = Api::all(client.clone());
    let all = api.list(&ListParams::default()).await.map_err(|e| Fault::unread(&e, "see whether you may list pods"))?;
    let (mut allowed, mut not) = (vec![], vec![]);
    for pod in all.items.iter().filter(|p| is_meshed(p)) {
        let (of, which) = (pod.namespace().unwrap_or_default(), exceptions(pod));
        if which.is_empty() {
            continue;
        }
        let list = if leave.is_given(&of) { &mut allowed } else { &mut not };
        list.push(format!("{of}/{} ({})", pod.name_any(), which.join(" ")));
    }
    match not.as_slice() {
        [] if allowed.is_empty() => Ok("no pod lets traffic past its sidecar".into()),
        [] => {
            let count = allowed.len();
            allowed.truncate(MISTAKES_SHOWN);
            let more = if count > allowed.len() { ", …" } else { "" };
            Ok(format!("{count} pods let traffic past their sidecars by your leave: {}{more}", allowed.join(", ")))
        }
        some => Err(Fault::new(
            format!("{} pods let traffic past their sidecars: {}", some.len(), some.join(", ")),
            "remove the annotations, or allow them by mesh.allowExceptions",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_word_that_means_nothing_on_a_pod_is_found() {
        let said = |metadata: serde_json::Value| word_mistake("pod a/b", &serde_json::from_value(metadata).unwrap());
        assert_eq!(said(json!({ "labels": { INJECT: "disabled", MODE: "strict" } })), None);
        assert!(said(json!({ "labels": { INJECT: "true" } })).unwrap().starts_with("pod a/b: "));
        // The annotation is fine; the label beside it counts too.
        let both = json!({ "annotations": { INJECT: "enabled" }, "labels": { INJECT: "yes" } });
        assert!(said(both).unwrap().contains("`yes`"));
        assert!(said(json!({ "labels": { MODE: "stict" } })).unwrap().contains("`stict`, no mode"));
    }

    #[test]
    fn a_key_that_nobody_reads_is_found_with_the_one_that_was_meant() {
        let said = |key: &str| misspelled("namespace a", [key.to_owned()].iter()).join("");
        assert_eq!(
            said("countersign.dev/inejct"),
            "namespace a: nobody reads countersign.dev/inejct; did you mean `countersign.dev/inject`?"
        );
        for key in ["countersign.dev/injection", "countersign.io/inject", "Countersign.dev/mode", "countersign.de/mode"]
        {
            assert!(said(key).contains("nobody reads"), "{key}");
        }
        for key in [INJECT, MODE, "istio-injection", "app", "kubernetes.io/metadata.name", "linkerd.io/inject"] {
            assert_eq!(said(key), "", "{key}");
        }
    }

    #[test]
    fn a_label_that_means_nothing_is_found() {
        let said = |labels: serde_json::Value, annotations: serde_json::Value| {
            let namespace = json!({ "metadata": { "name": "shop", "labels": labels, "annotations": annotations } });
            label_mistake(&serde_json::from_value(namespace).unwrap())
        };
        assert_eq!(said(json!({ INJECT: "enabled" }), json!({})), None);
        assert!(said(json!({ INJECT: "true" }), json!({})).unwrap().contains("`true`, neither"));
        assert!(said(json!({}), json!({ "countersign.dev/mode": "stict" })).unwrap().contains("`stict`, no mode"));
        assert!(said(json!({}), json!({ "countersign.dev/mode": "strict" })).unwrap().contains("not by label"));
        let both = json!({ "countersign.dev/mode": "strict" });
        assert_eq!(said(both.clone(), both), None);
    }
}
