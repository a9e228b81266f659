//! Publishes the bundle as caBundle of each mutating webhook configuration with a label: the API server verifies our
//! webhook by it.

use async_trait::async_trait;
use base64::Engine;
use countersign_identity::TrustBundle;
use countersign_watch::in_words;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use kube::api::{Api, ListParams, Patch, PatchParams, WatchEvent, WatchParams};

use super::{BundlePublisher, PublishError};

/// Keeps the caBundle of labelled configurations up to date.
pub struct K8sWebhook {
    /// Label `KEY=VALUE` of the configurations.
    pub label: String,
    /// Client of the cluster's API server.
    pub client: kube::Client,
    /// Version of the list after our last write.
    seen: tokio::sync::Mutex<String>,
}

impl K8sWebhook {
    /// A publisher to all configurations with this label.
    pub fn new(label: String, client: kube::Client) -> Self {
        Self { label, client, seen: tokio::sync::Mutex::default() }
    }

    fn api(&self) -> Api<MutatingWebhookConfiguration> {
        Api::all(self.client.clone())
    }
}

#[allow(clippy::needless_pass_by_value)] // taken by `map_err`
fn failed(error: kube::Error) -> PublishError {
    PublishError(in_words(&error))
}

#[async_trait]
impl BundlePublisher for K8sWebhook {
    fn name(&self) -> String {
        format!("webhook configurations labelled {}", self.label)
    }

    async fn publish(&self, bundle: &TrustBundle) -> Result<(), PublishError> {
        let wanted = base64::engine::general_purpose::STANDARD.encode(bundle.to_pem());
        let listed = self.api().list(&ListParams::default().labels(&self.label)).await.map_err(failed)?;
        if listed.items.is_empty() {
            // Not made again: whoever uninstalls by Helm removes it first, and one without an injector refuses pods.
            tracing::warn!(
                label = self.label,
                "no webhook configuration has this label, so new pods get no sidecar; apply the manifests of `countersign install`"
            );
        }
        for found in listed.items {
            let differs = |hook: &k8s_openapi::api::admissionregistration::v1::MutatingWebhook| {
                hook.client_config.ca_bundle.as_ref().is_none_or(|b| b.0 != bundle.to_pem().as_bytes())
            };
            let webhooks = found.webhooks.unwrap_or_default();
            let name = found.metadata.name.unwrap_or_default();
            if !webhooks.iter().any(differs) {
                continue;
            }
            // A test before each change: a webhook that was moved in the list meanwhile is not overwritten.
            let steps = webhooks.iter().enumerate().flat_map(|(at, hook)| {
                [
                    serde_json::json!({ "op": "test", "path": format!("/webhooks/{at}/name"), "value": hook.name }),
                    serde_json::json!({ "op": "add", "path": format!("/webhooks/{at}/clientConfig/caBundle"), "value": wanted }),
                ]
            });
            let patch = serde_json::from_value(serde_json::Value::Array(steps.collect()));
            let patch = Patch::Json::<()>(patch.map_err(|e| PublishError(e.to_string()))?);
            self.api().patch(&name, &PatchParams::default(), &patch).await.map_err(failed)?;
        }
        *self.seen.lock().await = listed.metadata.resource_version.unwrap_or_default();
        Ok(())
    }

    async fn disturbed(&self) -> Result<(), PublishError> {
        let seen = self.seen.lock().await.clone();
        let labelled = WatchParams::default().labels(&self.label).timeout(290);
        let mut events = self.api().watch(&labelled, &seen).await.map_err(failed)?.boxed();
        while let Some(event) = events.try_next().await.map_err(failed)? {
            if !matches!(event, WatchEvent::Bookmark(_)) {
                return Ok(());
            }
        }
        Ok(())
    }
}
