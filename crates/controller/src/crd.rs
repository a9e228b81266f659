//! The `SpiffeID` custom resource: one per pod, created by the registrar as in the reference implementation; others may
//! be made by hand.

use std::collections::BTreeMap;

use countersign_identity::entry::{MAX_DNS_NAMES, MAX_FEDERATED};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{CustomResource, CustomResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Who gets which identity.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, CustomResource)]
#[kube(
    group = "spiffeid.spiffe.io",
    version = "v1beta1",
    kind = "SpiffeID",
    plural = "spiffeids",
    singular = "spiffeid",
    namespaced,
    status = "SpiffeIdStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"SPIFFE ID","type":"string","jsonPath":".spec.spiffeId"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".spec.selector.nodeName"}"#,
    printcolumn = r#"{"name":"Entry","type":"string","jsonPath":".status.entryId"}"#,
    printcolumn = r#"{"name":"Registered","type":"string","jsonPath":".status.conditions[?(@.type==\"Registered\")].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct SpiffeIdSpec {
    /// The identity.
    #[schemars(length(max = 2048))]
    pub spiffe_id: String,
    /// Who may hand it out: the node's agent.
    #[schemars(length(max = 2048))]
    pub parent_id: String,
    /// What a caller must have, all of it.
    pub selector: SpiffeIdSelector,
    /// DNS names in the certificate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_DNS_NAMES), inner(length(max = 253)))]
    pub dns_names: Vec<String>,
    /// Foreign trust domains whose bundles the workload gets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_FEDERATED), inner(length(max = 255)))]
    pub federates_with: Vec<String>,
}

/// What a caller must have, all of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SpiffeIdSelector {
    /// UID of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// Name of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<String>,
    /// Namespace of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Service account of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
    /// Name of the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container_name: Option<String>,
    /// Image of the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container_image: Option<String>,
    /// Labels of the pod.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pod_label: BTreeMap<String, String>,
    /// Name of the node. For people: the parent ID already binds the entry to the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Name of the cluster, for entries of nodes (`k8s_psat:cluster`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Selectors in full, `type:value`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4096)))]
    pub arbitrary: Vec<String>,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SpiffeIdStatus {
    /// ID of the registration entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry_id: Option<String>,
    /// Whether it is registered, and why not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// One thing that is so, or not.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// `Registered`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True` or `False`.
    pub status: String,
    /// One word.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Since when, RFC 3339.
    pub last_transition_time: String,
}

impl SpiffeIdSelector {
    /// The selectors of a registration entry, as pairs of `type` and `value`.
    pub fn selectors(&self) -> Vec<(String, String)> {
        let k8s = [
            ("pod-uid", &self.pod_uid),
            ("pod-name", &self.pod_name),
            ("ns", &self.namespace),
            ("sa", &self.service_account),
            ("container-name", &self.container_name),
            ("container-image", &self.container_image),
        ];
        let one =
            |(key, value): (&str, &Option<String>)| value.as_ref().map(|v| ("k8s".to_owned(), format!("{key}:{v}")));
        let mut all: Vec<_> = k8s.into_iter().filter_map(one).collect();
        all.extend(self.pod_label.iter().map(|(k, v)| ("k8s".to_owned(), format!("pod-label:{k}:{v}"))));
        all.extend(self.cluster.iter().map(|c| ("k8s_psat".to_owned(), format!("cluster:{c}"))));
        all.extend(self.arbitrary.iter().filter_map(|s| s.split_once(':')).map(|(t, v)| (t.to_owned(), v.to_owned())));
        all
    }
}

/// The resource definition to install in the cluster.
pub fn definition() -> CustomResourceDefinition {
    SpiffeID::crd()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_of_the_selector_becomes_a_selector() {
        let selector = SpiffeIdSelector {
            pod_uid: Some("u".into()),
            namespace: Some("n".into()),
            pod_label: [("app".to_owned(), "web".to_owned())].into(),
            node_name: Some("ignored".into()),
            arbitrary: vec!["unix:uid:1".into(), "nonsense".into()],
            ..SpiffeIdSelector::default()
        };
        let text: Vec<String> = selector.selectors().iter().map(|(t, v)| format!("{t}:{v}")).collect();
        assert_eq!(text, ["k8s:pod-uid:u", "k8s:ns:n", "k8s:pod-label:app:web", "unix:uid:1"]);
    }

    #[test]
    fn the_definition_has_a_schema_and_columns() {
        let crd = definition();
        assert_eq!(crd.metadata.name.as_deref(), Some("spiffeids.spiffeid.spiffe.io"));
        let version = &crd.spec.versions[0];
        assert!(version.schema.as_ref().unwrap().open_api_v3_schema.is_some());
        assert!(version.subresources.as_ref().unwrap().status.is_some());
        assert_eq!(version.additional_printer_columns.as_ref().unwrap().len(), 5);
    }
}
