//! Publishes the bundle as PEM in a ConfigMap, which agents mount as a file.

use async_trait::async_trait;
use countersign_identity::X509Bundle;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, Patch, PatchParams, WatchEvent, WatchParams};

use super::{BundlePublisher, PublishError};
use crate::config::BundleConfigMap;

/// Keeps one key of one ConfigMap up to date.
pub struct K8sConfigMap {
    /// Namespace, name and key.
    pub place: BundleConfigMap,
    /// Client of the cluster's API server.
    pub client: kube::Client,
    /// The version that we wrote last: a change to any other version was made by others.
    written: tokio::sync::Mutex<String>,
}

impl K8sConfigMap {
    /// A publisher to this ConfigMap.
    pub fn new(place: BundleConfigMap, client: kube::Client) -> Self {
        Self { place, client, written: tokio::sync::Mutex::default() }
    }

    fn api(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.place.namespace)
    }
}

#[async_trait]
impl BundlePublisher for K8sConfigMap {
    fn name(&self) -> String {
        format!("ConfigMap {}/{}", self.place.namespace, self.place.name)
    }

    async fn publish(&self, bundle: &X509Bundle) -> Result<(), PublishError> {
        let patch = serde_json::json!({ "data": { self.place.key.as_str(): bundle.to_pem() } });
        let patched = self.api().patch(&self.place.name, &PatchParams::default(), &Patch::Merge(patch)).await;
        let patched = patched.map_err(|e| match e {
            kube::Error::Api(status) if status.code == 404 => PublishError(format!(
                "it does not exist; make it with `kubectl -n {} create configmap {}`",
                self.place.namespace, self.place.name
            )),
            other => PublishError(other.to_string()),
        })?;
        *self.written.lock().await = patched.metadata.resource_version.unwrap_or_default();
        Ok(())
    }

    async fn disturbed(&self) -> Result<(), PublishError> {
        let written = self.written.lock().await.clone();
        let only = WatchParams::default().fields(&format!("metadata.name={}", self.place.name)).timeout(290);
        let events = self.api().watch(&only, &written).await.map_err(|e| PublishError(e.to_string()))?;
        let mut events = events.boxed();
        while let Some(event) = events.try_next().await.map_err(|e| PublishError(e.to_string()))? {
            match event {
                WatchEvent::Bookmark(_) => {}
                WatchEvent::Modified(map) if map.metadata.resource_version.as_deref() == Some(&written) => {}
                _ => return Ok(()),
            }
        }
        // The watch has ended. Publishing again costs one request and shows whether anything is wrong.
        Ok(())
    }
}
