//! What commands read of a cluster's pods: which are meshed, how they are, and the pages that they serve.

use std::collections::BTreeMap;
use std::time::Duration;

use countersign_watch::in_words;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::{Client, ResourceExt};

/// Longest request for a pod's page.
const PAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// TCP port of a sidecar's pages.
pub const SIDECAR_PORT: u16 = 15020;

/// Why a pod has given no page.
#[derive(Debug, PartialEq, Eq)]
pub enum NoPage {
    /// The pod answered that it has none of this name.
    Unknown,
    /// There was no answer of its own; why, in words.
    Unanswered(String),
}

/// Fetches a page of a pod through the API server's proxy. Error: why there is none, in words.
pub async fn page(client: &Client, pod: &Pod, port: u16, path: &str) -> Result<String, String> {
    match proxied(client, pod, port, path).await {
        Ok(answer) => answer.map_err(|e| in_words(&e)),
        Err(why) => Err(why),
    }
}

/// As [`page`], where it counts whether the pod knows the page.
pub async fn ask(client: &Client, pod: &Pod, port: u16, path: &str) -> Result<String, NoPage> {
    match proxied(client, pod, port, path).await {
        Ok(Ok(answer)) => Ok(answer),
        // The API server itself says `NotFound`, of a pod that is gone.
        Ok(Err(kube::Error::Api(status))) if status.code == 404 && status.reason != "NotFound" => Err(NoPage::Unknown),
        Ok(Err(error)) => Err(NoPage::Unanswered(in_words(&error))),
        Err(why) => Err(NoPage::Unanswered(why)),
    }
}

async fn proxied(client: &Client, pod: &Pod, port: u16, path: &str) -> Result<Result<String, kube::Error>, String> {
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    let path = format!("/api/v1/namespaces/{namespace}/pods/{name}:{port}/proxy{path}");
    let request = http::Request::get(path).body(vec![]).map_err(|e| e.to_string())?;
    let answer = tokio::time::timeout(PAGE_TIMEOUT, client.request_text(request)).await;
    answer.map_err(|_| format!("no answer within {} s", PAGE_TIMEOUT.as_secs()))
}

/// A pod as `NAMESPACE/NAME`.
pub fn name_of(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any())
}

/// Whether a pod has our sidecar.
pub fn is_meshed(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let mut all = spec.init_containers.iter().flatten().chain(&spec.containers);
    all.any(|c| c.name == countersign_controller::injector::SIDECAR)
}

/// Pods of a namespace with these labels that are not being deleted. Error: why they cannot be listed, in words.
pub async fn pods(client: &Client, namespace: &str, labels: &str) -> Result<Vec<Pod>, String> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let listed = api.list(&kube::api::ListParams::default().labels(labels)).await;
    let listed = listed.map_err(|e| format!("cannot list pods: {}", in_words(&e)))?;
    Ok(listed.items.into_iter().filter(|p| p.metadata.deletion_timestamp.is_none()).collect())
}

/// Whether a pod is ready.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Name of the node that a pod was bound to.
pub fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

/// Longest text of others within a line, and longest line, in characters.
const MAX_WORDS: usize = 200;
const MAX_LINE: usize = 1_000;

/// A text as a part of a line.
pub fn words(text: &str) -> String {
    joined(text, MAX_WORDS)
}

/// A text as one line, for a cell of a table.
pub fn one_line(text: &str) -> String {
    joined(text, MAX_LINE)
}

fn joined(text: &str, most: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// Most names in a list that is shown.
const MAX_NAMED: usize = 5;

/// Some names, and the number of the rest.
pub fn listed(names: &[String]) -> String {
    let shown = names.iter().take(MAX_NAMED).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(MAX_NAMED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Of some objects, `NAMESPACE/NAME`, how many are in each namespace: `pay 1, shop 2`.
pub fn by_namespace(names: &[String]) -> String {
    let told: Vec<String> = namespaces(names).into_iter().map(|(name, count)| format!("{name} {count}")).collect();
    listed(&told)
}

fn namespaces(names: &[String]) -> BTreeMap<&str, usize> {
    let mut all = BTreeMap::<&str, usize>::new();
    for name in names {
        *all.entry(name.split('/').next().unwrap_or_default()).or_default() += 1;
    }
    all
}

/// The commands that restart what made some pods, `NAMESPACE/NAME`; without any, for a namespace to be filled in.
pub fn restarts(pods: &[String]) -> String {
    let command = |namespace: &str| format!("kubectl -n {namespace} rollout restart deployment,statefulset,daemonset");
    let all = namespaces(pods);
    let mut commands: Vec<String> = all.keys().take(MAX_NAMED).map(|namespace| command(namespace)).collect();
    if commands.is_empty() {
        commands.push(command("NAMESPACE"));
    }
    match all.len().saturating_sub(MAX_NAMED) {
        0 => commands.join("; "),
        more => format!("{}; and so in {more} more namespaces", commands.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_others_is_a_part_of_a_line() {
        assert_eq!(words("a\n  b"), "a b");
        assert_eq!(words(&"é".repeat(300)).chars().count(), MAX_WORDS + 1);
        assert_eq!(one_line(&"é".repeat(300)).chars().count(), 300);
    }

    #[test]
    fn of_many_names_some_are_shown() {
        let many: Vec<String> = (0..7).map(|n| n.to_string()).collect();
        assert_eq!(listed(&many), "0, 1, 2, 3, 4 and 2 more");
        assert_eq!(listed(&many[..2]), "0, 1");
    }

    #[test]
    fn pods_are_counted_and_restarted_by_namespace() {
        let pods = ["shop/a", "pay/b", "shop/c"].map(ToOwned::to_owned);
        assert_eq!(by_namespace(&pods), "pay 1, shop 2");
        let restart = "rollout restart deployment,statefulset,daemonset";
        assert_eq!(restarts(&pods), format!("kubectl -n pay {restart}; kubectl -n shop {restart}"));
        assert_eq!(restarts(&[]), format!("kubectl -n NAMESPACE {restart}"));
        let many: Vec<String> = (0..7).map(|n| format!("{n}/a")).collect();
        assert!(restarts(&many).ends_with("; and so in 2 more namespaces"));
    }
}
