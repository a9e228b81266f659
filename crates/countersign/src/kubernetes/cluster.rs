//! Access to the cluster of the current KUBECONFIG, for commands.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::{Client, ResourceExt};

use crate::settings::Mistake;

/// Longest request for a pod's page.
const PAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// TCP port of a sidecar's pages.
pub const SIDECAR_PORT: u16 = 15020;

/// A way to the API server.
pub async fn client() -> Result<Client> {
    let client = Client::try_default().await;
    Ok(client.map_err(|e| Mistake(format!("cannot reach the Kubernetes API: {e}; set KUBECONFIG")))?)
}

/// A way to the API server that takes 503 for an answer: a page that is not ready says why, and a client that asks again
/// until it is would not read it.
pub async fn client_without_retries() -> Result<Client> {
    let mut config = kube::Config::infer().await.map_err(|e| Mistake(format!("{e}; set KUBECONFIG")))?;
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}

/// Fetches a page of a pod through the API server's proxy.
pub async fn page(client: &Client, pod: &Pod, port: u16, path: &str) -> Result<String> {
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    let path = format!("/api/v1/namespaces/{namespace}/pods/{name}:{port}/proxy{path}");
    let asked = client.request_text(http::Request::get(path).body(vec![])?);
    Ok(tokio::time::timeout(PAGE_TIMEOUT, asked).await.context("it does not answer")??)
}

/// Whether a pod has our sidecar.
pub fn is_meshed(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let mut all = spec.init_containers.iter().flatten().chain(&spec.containers);
    all.any(|c| c.name == countersign_controller::injector::SIDECAR)
}

/// Pods of a namespace with these labels that are not being deleted.
pub async fn pods(client: &Client, namespace: &str, labels: &str) -> Result<Vec<Pod>> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let listed = api.list(&kube::api::ListParams::default().labels(labels)).await.context("cannot list pods")?;
    Ok(listed.items.into_iter().filter(|p| p.metadata.deletion_timestamp.is_none()).collect())
}

/// Whether a pod is ready.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// The longest finding, in characters: a table has one line for it.
const MAX_WORDS: usize = 200;

/// An error's text as one line. The Kubernetes client appends the whole structure of an answer to its message.
pub fn words(text: &str) -> String {
    // For example `ApiError: MESSAGE: REASON (Status { … })`.
    let text = text.split(" (Status {").next().unwrap_or(text).split(" (ErrorResponse {").next().unwrap_or(text);
    let line = text.replace("ApiError: ", "").split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_WORDS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_of_words() {
        let long = "ApiError: namespaces \"nosuch\" not found: NotFound (Status { status: Some(Failure), code: 404 })";
        assert_eq!(words(long), "namespaces \"nosuch\" not found: NotFound");
        assert_eq!(words("a\n  b"), "a b");
        assert_eq!(words(&"é".repeat(300)).chars().count(), MAX_WORDS + 1);
    }
}
