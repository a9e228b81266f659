//! Publishes the bundle as PEM in a ConfigMap, which agents mount as a file. A ConfigMap that was deleted is made again, because
//! no agent could start without it.

use std::collections::BTreeMap;

use async_trait::async_trait;
use countersign_identity::TrustBundle;
use countersign_watch::in_words;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use kube::api::{Api, ListParams, Patch, PatchParams, WatchEvent, WatchParams};
use serde_json::json;
use tokio::sync::Mutex;

use super::{BundlePublisher, PublishError};
use crate::config::BundleConfigMap;

/// Who owns the key of the bundle, in the ConfigMap's managed fields.
const FIELD_MANAGER: &str = "countersign-server";
/// Life of one watch request, in seconds.
const WATCH_SECONDS: u32 = 290;
/// The chart's labels, for a ConfigMap that was deleted before this server has seen it.
const LABELS: [(&str, &str); 2] =
    [("app.kubernetes.io/name", "countersign"), ("app.kubernetes.io/component", "server")];

/// Keeps one key of one ConfigMap up to date.
pub struct K8sConfigMap {
    /// Namespace, name and key.
    place: BundleConfigMap,
    /// Client of the cluster's API server.
    client: kube::Client,
    last: Mutex<Last>,
}

/// The ConfigMap as it was seen last.
struct Last {
    /// The bundle that we published; empty before the first.
    pem: String,
    marks: Marks,
}

/// Labels and annotations. They belong to whoever installed the mesh: kubectl and Helm know their objects by them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Marks {
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

impl Marks {
    /// Those of an object; `None` if it has none, as one that was made by our publication alone.
    fn of(map: &ConfigMap) -> Option<Self> {
        let marks = Self { labels: map.labels().clone(), annotations: map.annotations().clone() };
        (!marks.labels.is_empty() || !marks.annotations.is_empty()).then_some(marks)
    }
}

impl K8sConfigMap {
    /// A publisher to this ConfigMap.
    pub fn new(place: BundleConfigMap, client: kube::Client) -> Self {
        let labels = LABELS.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let marks = Marks { labels, annotations: BTreeMap::new() };
        Self { place, client, last: Mutex::new(Last { pem: String::new(), marks }) }
    }

    fn api(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.place.namespace)
    }

    /// Keeps what others have marked the ConfigMap with, and gives it back to one that we had to make.
    async fn mark(&self, last: &mut Last, published: &ConfigMap) -> Result<(), PublishError> {
        if let Some(marks) = Marks::of(published) {
            last.marks = marks;
            return Ok(());
        }
        tracing::warn!(configmap = self.name(), "it was gone and is made again");
        // Not by the apply request: that would own the labels from then on, and remove them with the first request that does not
        // name them.
        let patch = json!({ "metadata": { "labels": last.marks.labels, "annotations": last.marks.annotations } });
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        self.api().patch(&self.place.name, &params, &Patch::Merge(patch)).await.map(drop).map_err(failed)
    }
}

#[allow(clippy::needless_pass_by_value)] // taken by `map_err`
fn failed(error: kube::Error) -> PublishError {
    let lacks = matches!(&error, kube::Error::Api(status) if status.code == 403);
    let mend = if lacks { "; apply the manifests of `countersign install`, which have the permission" } else { "" };
    PublishError(format!("{}{mend}", in_words(&error)))
}

#[async_trait]
impl BundlePublisher for K8sConfigMap {
    fn name(&self) -> String {
        format!("ConfigMap {}/{}", self.place.namespace, self.place.name)
    }

    async fn publish(&self, bundle: &TrustBundle) -> Result<(), PublishError> {
        let BundleConfigMap { namespace, name, key } = &self.place;
        let pem = bundle.to_pem();
        // Applied: it makes a ConfigMap that is gone, and owns this key of one that is there.
        let patch = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "namespace": namespace, "name": name },
            "data": { key: pem },
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let published = self.api().patch(name, &params, &Patch::Apply(patch)).await.map_err(failed)?;
        let mut last = self.last.lock().await;
        last.pem = pem;
        self.mark(&mut last, &published).await
    }

    async fn disturbed(&self) -> Result<(), PublishError> {
        let published = self.last.lock().await.pem.clone();
        let is_whole = |map: &ConfigMap| map.data.as_ref().and_then(|d| d.get(&self.place.key)) == Some(&published);
        let only = format!("metadata.name={}", self.place.name);
        // From the list's version on. The object's own may be older than what the API server remembers, and a watch from there
        // would end as soon as it begins.
        let listed = self.api().list(&ListParams::default().fields(&only)).await.map_err(failed)?;
        if !listed.items.first().is_some_and(is_whole) {
            return Ok(());
        }
        let from = listed.metadata.resource_version.unwrap_or_default();
        let watch = WatchParams::default().fields(&only).timeout(WATCH_SECONDS);
        let mut events = self.api().watch(&watch, &from).await.map_err(failed)?.boxed();
        while let Some(event) = events.try_next().await.map_err(failed)? {
            match event {
                WatchEvent::Bookmark(_) => {}
                WatchEvent::Added(map) | WatchEvent::Modified(map) if is_whole(&map) => {
                    if let Some(marks) = Marks::of(&map) {
                        self.last.lock().await.marks = marks;
                    }
                }
                _ => {
                    tracing::warn!(configmap = self.name(), "others have deleted or changed it; publishing again");
                    return Ok(());
                }
            }
        }
        // The watch has ended. Publishing again costs one request and shows whether anything is wrong.
        Ok(())
    }
}

#[cfg(test)]
mod tests;
