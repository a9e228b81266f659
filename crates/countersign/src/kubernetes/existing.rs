//! An installation that no memory in the namespace tells of: one that remembers nothing, as those of older versions,
//! and one in another namespace, whose objects of the whole cluster would become ours.

use std::fmt;
use std::time::Duration;

use anyhow::{Result, anyhow};
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::rbac::v1::ClusterRoleBinding;
use kube::api::Api;
use kube::{Client, ResourceExt};
use serde_json::{Map, Value};

use super::check::installed::Installed;
use super::given::Given;
use super::live_settings;
use super::memory::{Seen, get};
use super::values::defaults;

/// Longest look at what runs.
const CALL: Duration = Duration::from_secs(20);
/// No flag shows the permission that older kubelets need: it counts as the default.
const NEWEST: (u32, u32) = (u32::MAX, 0);

/// What the cluster has beside what is remembered.
#[derive(Debug, Default)]
pub struct Existing {
    /// Settings of an installation in the namespace that remembers none: those that what runs shows, without defaults.
    pub unremembered: Option<Given>,
    /// An object of an installation in another namespace.
    pub elsewhere: Option<Elsewhere>,
}

/// An object without a namespace that belongs to an installation in another namespace than ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elsewhere {
    /// Kind and name of the object.
    pub object: String,
    /// The namespace of that installation.
    pub namespace: String,
}

impl fmt::Display for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { object, namespace } = self;
        write!(f, "{object} belongs to an installation in namespace `{namespace}`, which would lose it")
    }
}

impl Existing {
    /// Looks for what `seen` does not tell of. Errors: something cannot be read.
    pub async fn look(client: &Client, namespace: &str, seen: &Seen) -> Result<Self> {
        let elsewhere = elsewhere(client, namespace).await?;
        if seen.memory.is_some() {
            return Ok(Self { unremembered: None, elsewhere });
        }
        let mesh = get(&Api::<ConfigMap>::namespaced(client.clone(), namespace), live_settings::NAME).await?;
        let installed = tokio::time::timeout(CALL, Installed::read(client, namespace)).await;
        let installed = installed.map_err(|_| anyhow!("the API server gave no answer within {} s", CALL.as_secs()))?;
        let installed = installed.map_err(|fault| {
            anyhow!("cannot compare with what is installed: {}; --ignore-cluster leaves that out", fault.found)
        })?;
        let is_there = mesh.is_some() || installed.server.is_some();
        let unremembered = if is_there { Some(in_force(&installed, mesh.as_ref())?) } else { None };
        Ok(Self { unremembered, elsewhere })
    }

    /// Why an installation over it needs consent to everything, in words; empty if it does not.
    pub fn doubts(&self) -> Vec<String> {
        let unremembered = self.unremembered.as_ref().map(|_| {
            "it does not remember its settings (ConfigMap countersign-install), and not all of them can be compared"
                .into()
        });
        unremembered.into_iter().chain(self.elsewhere.as_ref().map(ToString::to_string)).collect()
    }
}

/// An installation in another namespace than this one. Error: it cannot be read.
pub async fn elsewhere(client: &Client, namespace: &str) -> Result<Option<Elsewhere>> {
    let webhooks = Api::<MutatingWebhookConfiguration>::all(client.clone());
    let bindings = Api::<ClusterRoleBinding>::all(client.clone());
    let webhook = get(&webhooks, "countersign-injector").await?;
    let mut bound = vec![];
    for name in ["countersign-server", "countersign-agent"] {
        bound.extend(get(&bindings, name).await?);
    }
    Ok(other_than(namespace, webhook.as_ref(), &bound))
}

/// The first of these objects that names another namespace.
fn other_than(
    ours: &str,
    webhook: Option<&MutatingWebhookConfiguration>,
    bindings: &[ClusterRoleBinding],
) -> Option<Elsewhere> {
    let hooks = webhook.into_iter().flat_map(|w| w.webhooks.iter().flatten().map(|hook| (w.name_any(), hook)));
    let served = hooks.filter_map(|(name, hook)| {
        let namespace = hook.client_config.service.as_ref()?.namespace.clone();
        Some((format!("MutatingWebhookConfiguration {name}"), namespace))
    });
    let subjects = bindings.iter().flat_map(|b| b.subjects.iter().flatten().map(|subject| (b.name_any(), subject)));
    let bound =
        subjects.filter_map(|(name, subject)| Some((format!("ClusterRoleBinding {name}"), subject.namespace.clone()?)));
    let other = served.chain(bound).find(|(_, namespace)| namespace != ours);
    other.map(|(object, namespace)| Elsewhere { object, namespace })
}

/// The settings that an installation shows and that are no defaults.
fn in_force(installed: &Installed, mesh: Option<&ConfigMap>) -> Result<Given> {
    let defaults = defaults()?;
    let mut values = installed.values(NEWEST)?;
    if values["cni"]["enabled"] == false {
        // Only the component itself shows it.
        values["cni"]["repair"] = defaults["cni"]["repair"].clone();
    }
    let flags = [
        ("server", "--trust-domain=", "/trustDomain"),
        ("server", "--log=", "/logLevel"),
        ("registrar", "--cluster=", "/clusterName"),
        ("registrar", "--id-template=", "/registrar/idTemplate"),
        ("registrar", "--allow-exceptions=", "/mesh/allowExceptions"),
    ];
    let flag = |container: &str, flag: &str| {
        let args = installed.args("countersign-server", container)?;
        args.iter().find_map(|arg| arg.strip_prefix(flag))
    };
    let mut set = |at: &str, value: Value| {
        if let Some(place) = values.pointer_mut(at) {
            *place = value;
        }
    };
    for (container, name, at) in flags {
        if let Some(value) = flag(container, name) {
            set(at, value.into());
        }
    }
    if let Some(word) = flag("registrar", "--open-metrics=") {
        set("/mesh/openMetrics", (word == "true").into());
    }
    if let Some(spec) = installed.server.as_ref().and_then(|server| server.spec.as_ref()) {
        let claim = spec.volume_claim_templates.iter().flatten().find(|claim| claim.name_any() == "data");
        set("/server/persistence/enabled", claim.is_some().into());
        if let Some(claim) = claim.and_then(|claim| claim.spec.as_ref()) {
            set("/server/persistence/storageClass", claim.storage_class_name.as_deref().unwrap_or_default().into());
            let requests = claim.resources.as_ref().and_then(|resources| resources.requests.as_ref());
            if let Some(size) = requests.and_then(|requests| requests.get("storage")) {
                set("/server/persistence/size", size.0.clone().into());
            }
        }
        let pod = spec.template.spec.as_ref();
        let mut volumes = pod.into_iter().flat_map(|pod| pod.volumes.iter().flatten());
        let upstream = volumes.find(|v| v.name == "upstream").and_then(|v| v.secret.as_ref()?.secret_name.as_deref());
        set("/server/upstreamSecret", upstream.unwrap_or_default().into());
        let image = pod.into_iter().flat_map(|pod| &pod.containers).find(|c| c.name == "server");
        if let Some(image) = image.and_then(|container| container.image.as_deref()) {
            set("/image/name", image.into());
        }
    }
    for (key, setting) in live_settings::KEYS {
        if let Some(value) = mesh.and_then(|mesh| mesh.data.as_ref()?.get(key)) {
            set(&live_settings::pointer(setting), value.as_str().into());
        }
    }
    let beyond = beyond(&values, &defaults).unwrap_or_else(|| Value::Object(Map::new()));
    Given::of(beyond).map_err(|why| anyhow!(why))
}

/// What differs from the defaults; `None` if nothing does.
fn beyond(values: &Value, defaults: &Value) -> Option<Value> {
    let (Value::Object(values), Value::Object(defaults)) = (values, defaults) else {
        return (values != defaults).then(|| values.clone());
    };
    let differs = |(key, value): (&String, &Value)| {
        let beyond = match defaults.get(key) {
            Some(default) => beyond(value, default),
            None => Some(value.clone()),
        };
        Some((key.clone(), beyond?))
    };
    let all: Map<String, Value> = values.iter().filter_map(differs).collect();
    (!all.is_empty()).then_some(Value::Object(all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::check::fake_api::{Answer, Asked, client, refused};
    use crate::kubernetes::former::Revision;
    use crate::kubernetes::{changes, install};
    use serde_json::json;

    /// The API server of a cluster with an installation by these settings in a namespace, and none that is remembered.
    fn cluster(namespace: &str, given: Value) -> Client {
        let values = Given::of(given).unwrap().whole("test").unwrap();
        let all: Vec<Value> = serde_saphyr::from_multiple(&install::rendered(namespace, &values).unwrap()).unwrap();
        client(move |asked: &Asked| {
            let here = asked.path.split("/namespaces/").nth(1).map(|rest| rest.split('/').next().unwrap());
            let parts: Vec<&str> = asked.path.split('/').collect();
            let (kind, name) = (parts[parts.len() - 2], parts[parts.len() - 1]);
            let is_it = |o: &&Value| {
                o["metadata"]["name"] == name
                    && format!("{}s", o["kind"].as_str().unwrap().to_lowercase()) == kind
                    && here.is_none_or(|here| o["metadata"]["namespace"] == here)
            };
            all.iter().find(is_it).map_or_else(|| refused(404, "not found"), |o| Answer::Now(200, o.clone()))
        })
    }

    #[tokio::test]
    async fn of_an_installation_without_memory_the_settings_are_read_from_what_runs() {
        let given = json!({
            "trustDomain": "example.org", "clusterName": "east", "logLevel": "debug",
            "image": { "name": "registry/countersign:1" },
            "mesh": { "mode": "strict", "allowExceptions": "shop", "openMetrics": true },
            "registrar": { "idTemplate": "pod/{{.Pod.UID}}" }, "agent": { "workloadKeyType": "ec-p384" },
            "server": { "svidTTL": "30m", "upstreamSecret": "ca", "persistence": { "size": "2Gi", "storageClass": "x" } },
        });
        let existing = Existing::look(&cluster("mesh", given.clone()), "mesh", &Seen::default()).await.unwrap();
        let read = existing.unremembered.clone().unwrap();
        assert_eq!(read.tree(), given);
        assert_eq!((existing.doubts().len(), existing.elsewhere.clone()), (1, None));
        let changes = changes::changes(&read, Revision::NOW, &Given::default()).unwrap();
        let domain = changes.iter().find(|change| change.setting == "trustDomain").unwrap();
        assert!(!domain.is_allowed(changes::Consent { force: false, reset: true }));
        let lost = json!({ "server": { "persistence": { "enabled": false } } });
        let existing = Existing::look(&cluster("mesh", lost.clone()), "mesh", &Seen::default()).await.unwrap();
        assert_eq!(existing.unremembered.unwrap().tree(), lost);
    }

    #[tokio::test]
    async fn an_installation_in_another_namespace_is_found_by_what_it_would_lose() {
        let existing = Existing::look(&cluster("mesh", json!({})), "countersign", &Seen::default()).await.unwrap();
        assert!(existing.unremembered.is_none(), "there is nothing here");
        assert_eq!(
            existing.doubts(),
            [
                "MutatingWebhookConfiguration countersign-injector belongs to an installation in namespace `mesh`, which \
              would lose it"
            ]
        );
        let binding: ClusterRoleBinding = serde_json::from_value(json!({
            "metadata": { "name": "countersign-agent" },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "countersign-agent" },
            "subjects": [{ "kind": "ServiceAccount", "name": "countersign-agent", "namespace": "mesh" }],
        }))
        .unwrap();
        assert_eq!(other_than("mesh", None, std::slice::from_ref(&binding)), None);
        assert_eq!(other_than("countersign", None, &[binding]).unwrap().object, "ClusterRoleBinding countersign-agent");
    }

    #[tokio::test]
    async fn an_empty_cluster_leaves_no_doubt_and_one_that_cannot_be_read_is_an_error() {
        let existing = Existing::look(&client(|_| refused(404, "not found")), "mesh", &Seen::default()).await.unwrap();
        assert!(existing.doubts().is_empty());
        let why = Existing::look(&client(|_| refused(403, "no")), "mesh", &Seen::default()).await.unwrap_err();
        assert!(why.to_string().contains("--ignore-cluster"), "{why}");
    }
}
