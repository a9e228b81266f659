//! Which objects go into the archive.

use std::time::Duration;

use countersign_controller::crd::SpiffeID;
use countersign_watch::in_words;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Event, LimitRange, Namespace, Node, PersistentVolumeClaim, Pod, ResourceQuota, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::api::storage::v1::{CSIDriver, StorageClass};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ApiResource, DynamicObject, ListParams};
use kube::{Client, Resource};
use serde_json::Value;

use super::scrub;

/// Longest answer to one question of the API server.
const DEADLINE: Duration = Duration::from_secs(20);
/// Most objects of one kind.
const MAX_OBJECTS: u32 = 2_000;
/// The chart's label.
const OURS: &str = "app.kubernetes.io/name=countersign";

/// Which objects of a kind are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    /// All in the installation's namespace.
    Installation,
    /// Those of the chart in the installation's namespace.
    Chart,
    /// Those of the chart among the cluster's.
    Cluster,
    /// All of the cluster, in every namespace.
    All,
}

/// A kind of objects.
pub struct Kind {
    resource: ApiResource,
    which: Which,
}

fn kind<K: Resource<DynamicType = ()>>(which: Which) -> Kind {
    Kind { resource: ApiResource::erase::<K>(&()), which }
}

/// Everything that is taken. Secrets are not among it, and of `ConfigMap` objects only the chart's: bundle and
/// settings.
pub fn kinds() -> Vec<Kind> {
    use Which::{All, Chart, Cluster, Installation};
    vec![
        kind::<Pod>(Chart),
        kind::<Event>(Installation),
        kind::<StatefulSet>(Chart),
        kind::<DaemonSet>(Chart),
        kind::<Deployment>(Chart),
        kind::<Service>(Installation),
        kind::<EndpointSlice>(Installation),
        kind::<PersistentVolumeClaim>(Installation),
        kind::<Lease>(Installation),
        kind::<PodDisruptionBudget>(Installation),
        kind::<ConfigMap>(Chart),
        kind::<ServiceAccount>(Chart),
        kind::<Role>(Chart),
        kind::<RoleBinding>(Chart),
        kind::<ClusterRole>(Cluster),
        kind::<ClusterRoleBinding>(Cluster),
        kind::<MutatingWebhookConfiguration>(Cluster),
        kind::<ValidatingAdmissionPolicy>(Cluster),
        kind::<ValidatingAdmissionPolicyBinding>(Cluster),
        kind::<CSIDriver>(Cluster),
        kind::<CustomResourceDefinition>(Cluster),
        kind::<SpiffeID>(All),
        kind::<Node>(All),
        kind::<Namespace>(All),
        kind::<LimitRange>(All),
        kind::<ResourceQuota>(All),
        kind::<StorageClass>(All),
    ]
}

/// Some objects of one kind, fit to leave the cluster.
pub struct Listed {
    /// The objects.
    pub objects: Vec<Value>,
    /// Whether there are more of them.
    pub more: bool,
}

impl Kind {
    /// The kind's name in the plural, in lowercase, as in the API's paths.
    pub fn name(&self) -> &str {
        &self.resource.plural
    }

    /// Lists what is taken of this kind. Error: why it could not be listed, in words.
    pub async fn list(&self, client: &Client, installation: &str) -> Result<Listed, String> {
        let namespaced = matches!(self.which, Which::Installation | Which::Chart);
        let api: Api<DynamicObject> = if namespaced {
            Api::namespaced_with(client.clone(), installation, &self.resource)
        } else {
            Api::all_with(client.clone(), &self.resource)
        };
        let mut params = ListParams::default().limit(MAX_OBJECTS);
        // The definition of our resource has a name of its own and no label: Helm does not template it.
        if self.resource.plural == "customresourcedefinitions" {
            params = params.fields("metadata.name=spiffeids.spiffeid.spiffe.io");
        } else if matches!(self.which, Which::Chart | Which::Cluster) {
            params = params.labels(OURS);
        }
        let listed = in_time(api.list(&params)).await?;
        let more = listed.metadata.continue_.as_ref().is_some_and(|token| !token.is_empty());
        let fit = |object: DynamicObject| {
            let mut object = serde_json::to_value(object).map_err(|e| e.to_string())?;
            scrub::object(&mut object, matches!(self.which, Which::Chart | Which::Cluster));
            Ok::<_, String>(object)
        };
        Ok(Listed { objects: listed.items.into_iter().map(fit).collect::<Result<_, _>>()?, more })
    }
}

/// An answer of the API server, or why there is none, in words.
pub async fn in_time<T>(asked: impl Future<Output = Result<T, kube::Error>>) -> Result<T, String> {
    match tokio::time::timeout(DEADLINE, asked).await {
        Ok(answer) => answer.map_err(|e| in_words(&e)),
        Err(_) => Err(format!("no answer within {} s", DEADLINE.as_secs())),
    }
}

/// Events of a pod. Error: why they could not be listed, in words.
pub async fn events_of(client: &Client, namespace: &str, pod: &str) -> Result<Vec<Value>, String> {
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    let of_pod = ListParams::default().fields(&format!("involvedObject.kind=Pod,involvedObject.name={pod}"));
    let listed = in_time(api.list(&of_pod.limit(MAX_OBJECTS))).await?;
    let fit = |event| {
        let mut event = serde_json::to_value(event).map_err(|e| e.to_string())?;
        scrub::object(&mut event, false);
        Ok(event)
    };
    listed.items.into_iter().map(fit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_holds_secrets_is_listed() {
        let kinds = kinds();
        assert!(kinds.iter().all(|k| k.name() != "secrets"));
        let config_maps: Vec<Which> = kinds.iter().filter(|k| k.name() == "configmaps").map(|k| k.which).collect();
        assert_eq!(config_maps, [Which::Chart]);
        let pods: Vec<Which> = kinds.iter().filter(|k| k.name() == "pods").map(|k| k.which).collect();
        assert_eq!(pods, [Which::Chart], "what is not meshed is not ours to look at");
    }
}
