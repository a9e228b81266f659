//! Whether the parts of an installation are there and ready.

use std::collections::BTreeMap;

use countersign_watch::in_words;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhook, MutatingWebhookConfiguration};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ListParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::json;

use super::finding::{Fault, Outcome};
use super::requirements::may_create;
use crate::kubernetes::cluster::{is_meshed, pods};
use crate::kubernetes::{live_settings, memory, pod_state, transparency};
use crate::settings::MeshSettings;

pub(super) async fn resource(client: &Client) -> Outcome {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let definition = countersign_controller::crd::definition();
    let gone =
        "apply the manifests of `countersign install`; meanwhile known pods keep their identities, new ones get none";
    match api.get(&definition.name_any()).await {
        Ok(found) if found.metadata.deletion_timestamp.is_some() => Err(Fault::new("it is being deleted", gone)),
        Ok(_) => Ok("defined".into()),
        Err(kube::Error::Api(e)) if e.code == 404 => Err(Fault::new("it is not defined", gone)),
        Err(e) => Err(Fault::absent(e)),
    }
}

/// Checks the current settings of the mesh. Every role rejects an invalid value.
pub(super) async fn settings(client: &Client, namespace: &str) -> Outcome {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let Some(map) = api.get_opt(live_settings::NAME).await.map_err(Fault::absent)? else {
        return Err(Fault::new(
            "there is no ConfigMap countersign-mesh, so the mesh is strict; server and agents that start now use default lifetimes",
            "apply the manifests of `countersign install` with your settings, and see that the mode is the one that you had",
        ));
    };
    let well = valid(&map, namespace)?;
    // An installation by Helm has its own memory, and who may not read ours learns less.
    let memory = memory::look(client, namespace, true).await.ok().and_then(|seen| seen.memory);
    let by_hand = memory.and_then(|memory| Some(live_settings::by_hand(&map, &memory.values().ok()?)));
    match by_hand.unwrap_or_default().as_slice() {
        [] => Ok(well),
        some => Ok(format!("{well}; ConfigMap countersign-mesh was {}", live_settings::kept_by(some, namespace))),
    }
}

fn valid(map: &ConfigMap, namespace: &str) -> Outcome {
    let wrong = |why: String| {
        Fault::new(format!("ConfigMap countersign-mesh: {why}"), "mend it; until then the last ones stand")
    };
    let none = BTreeMap::new();
    let found = MeshSettings::read(map.data.as_ref().unwrap_or(&none)).map_err(|e| wrong(e.to_string()))?;
    if let Some(open) = found.transparent.and_then(transparency::told) {
        let mend = format!(
            "finish it: countersign uninstall -n {namespace} --yes; or take it back: {}",
            live_settings::way_back(namespace)
        );
        return Err(Fault::new(open, mend));
    }
    match (found.mode, found.svid_ttl, found.ca_ttl) {
        (None, ..) => Err(wrong("it names no mode, so the mesh is strict".into())),
        (_, Some(svid), Some(ca)) if svid.0 > ca.0 => Err(wrong(format!("svidTTL {svid} is more than caTTL {ca}"))),
        (Some(mode), ..) => Ok(format!("the mesh is {mode}")),
    }
}

/// Ready and wanted replicas of a role.
struct Replicas {
    ready: Option<i32>,
    wanted: Option<i32>,
    /// The role in the singular.
    role: &'static str,
}

impl Replicas {
    async fn judge(self, client: &Client, namespace: &str, mend: &'static str) -> Outcome {
        let (ready, wanted) = (self.ready.unwrap_or(0), self.wanted.unwrap_or(1));
        let said = format!("{ready} of {wanted} {}s ready", self.role);
        if wanted < 1 {
            return Err(Fault::new(
                format!("{said}: it is scaled to 0"),
                "scale it up: `kubectl scale` with --replicas=1",
            ));
        }
        if ready >= wanted {
            return Ok(said);
        }
        let found = pods(client, namespace, &format!("app.kubernetes.io/component={}", self.role)).await;
        let why = match &found {
            Ok(found) if found.is_empty() => ": it has no pod; see the events of its namespace".to_owned(),
            Ok(found) => {
                found.iter().find_map(|p| pod_state::state(p).err()).map(|why| format!(": {why}")).unwrap_or_default()
            }
            Err(_) => String::new(),
        };
        Err(Fault::new(format!("{said}{why}"), mend))
    }
}

pub(super) async fn server_ready(client: &Client, namespace: &str) -> Outcome {
    let api: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
    let mend = "see `kubectl describe` and the log of pod countersign-server-0";
    let found = api.get("countersign-server").await.map_err(Fault::absent)?;
    let (ready, wanted) = (found.status.and_then(|s| s.ready_replicas), found.spec.and_then(|s| s.replicas));
    Replicas { ready, wanted, role: "server" }.judge(client, namespace, mend).await
}

pub(super) async fn injector(client: &Client, namespace: &str) -> Outcome {
    let api: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let mend = "see the injector's log: it is ready when the agent of its node has given it a certificate";
    let found = api.get("countersign-injector").await.map_err(Fault::absent)?;
    let (ready, wanted) = (found.status.and_then(|s| s.ready_replicas), found.spec.and_then(|s| s.replicas));
    Replicas { ready, wanted, role: "injector" }.judge(client, namespace, mend).await
}

/// Has the API server ask the webhook about a pod that is never created.
pub(super) async fn webhook(client: &Client, namespace: &str) -> Outcome {
    let all: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    // Without it no pod is injected, which the trial shows.
    let hooks = all.get_opt("countersign-injector").await.map_err(Fault::absent)?;
    let hooks = hooks.and_then(|found| found.webhooks).unwrap_or_default();
    let warning = if fails_open(&hooks) { FAILS_OPEN } else { "" };
    if needs_more_labels(&hooks) {
        return Ok(format!("it is asked about namespaces with further labels only, and was not tried{warning}"));
    }
    let pod = json!({
        "metadata": { "name": "countersign-check", "labels": { "countersign.dev/inject": "enabled" } },
        "spec": { "containers": [{ "name": "app", "image": "none" }] },
    });
    let pod: Pod = serde_json::from_value(pod).map_err(|e| Fault::unchecked(e.to_string(), ""))?;
    let api: Api<Pod> = Api::namespaced(client.clone(), "default");
    match api.create(&PostParams { dry_run: true, ..PostParams::default() }, &pod).await {
        Ok(made) if is_meshed(&made) => Ok(format!("it injects{warning}")),
        Ok(_) => Err(Fault::new(
            "a pod that asks for it is not injected",
            "see the webhook configuration's selectors and the injector's log",
        )),
        // RBAC judges before any webhook is asked.
        Err(error) if may_create(client, "", "pods", "default").await == Ok(false) => {
            Err(Fault::unread(&error, "have `create` on pods in namespace default granted to you: nothing is created"))
        }
        Err(error) => Err(unanswered(client, namespace, &in_words(&error)).await),
    }
}

/// Why the API server gets no answer from the webhook, by what is behind the Service that it asks.
async fn unanswered(client: &Client, namespace: &str, said: &str) -> Fault {
    const SERVICE: &str = "countersign-injector";
    let services: Api<Service> = Api::namespaced(client.clone(), namespace);
    if let Ok(None) = services.get_opt(SERVICE).await {
        let found = format!("there is no Service {SERVICE} to ask: {said}");
        return Fault::new(found, "apply the manifests of `countersign install` with your settings");
    }
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), namespace);
    let of_service = ListParams::default().labels(&format!("kubernetes.io/service-name={SERVICE}"));
    match slices.list(&of_service).await {
        Ok(slices) if !slices.items.iter().any(has_ready) => {
            let found = format!("no injector is ready behind Service {SERVICE}: {said}");
            Fault::new(found, "see `injector`: it is ready when the agent of its node has given it a certificate")
        }
        _ => Fault::new(
            format!("the API server gets no answer from the injectors: {said}"),
            "see `webhook's caBundle`, and whether the API server may reach port 9443 of the injectors",
        ),
    }
}

fn has_ready(slice: &EndpointSlice) -> bool {
    slice.endpoints.iter().any(|e| e.conditions.as_ref().and_then(|c| c.ready) != Some(false))
}

/// What failurePolicy Ignore gives away.
const FAILS_OPEN: &str = "; failurePolicy is Ignore: pods that begin while no injector answers have no sidecar";

fn fails_open(hooks: &[MutatingWebhook]) -> bool {
    // Nothing depends on what a namespace is told of a mistake.
    let injecting = hooks.iter().filter(|hook| !hook.name.starts_with("judge-"));
    injecting.into_iter().any(|hook| hook.failure_policy.as_deref() == Some("Ignore"))
}

fn needs_more_labels(hooks: &[MutatingWebhook]) -> bool {
    let labels = |hook: &MutatingWebhook| hook.namespace_selector.clone()?.match_labels;
    hooks.iter().filter_map(labels).any(|labels| !labels.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::check::fake_api::{Answer, Asked, client, refused};
    use crate::kubernetes::given::Given;
    use serde_json::Value;

    async fn settings_of(data: Value, remembered: Option<Value>) -> Outcome {
        let memory = remembered.map(|given| memory::Memory::new(Given::of(given).unwrap()).object("mesh").unwrap());
        let client = client(move |asked: &Asked| match asked.path.rsplit('/').next().unwrap() {
            "countersign-mesh" => Answer::Now(200, json!({ "metadata": { "name": "m" }, "data": data })),
            "countersign-install" => memory.as_ref().map_or_else(
                || refused(404, "not found"),
                |memory| Answer::Now(200, serde_json::to_value(memory).unwrap()),
            ),
            other => panic!("{other}"),
        });
        settings(&client, "mesh").await
    }

    #[tokio::test]
    async fn what_was_changed_by_hand_since_the_installation_is_told() {
        let with = |ttl: &str| json!({ "mode": "strict", "svidTTL": ttl });
        let given = json!({ "server": { "svidTTL": "30m" } });
        assert_eq!(settings_of(with("30m"), Some(given.clone())).await.unwrap(), "the mesh is strict");
        let said = settings_of(with("5m"), Some(given)).await.unwrap();
        assert!(
            said.starts_with("the mesh is strict; ConfigMap countersign-mesh was changed by hand: svidTTL is 5m"),
            "{said}"
        );
        assert!(said.contains("installed with 30m") && said.contains("--set server.svidTTL=5m"), "{said}");
        assert_eq!(settings_of(with("5m"), None).await.unwrap(), "the mesh is strict", "nothing to compare with");
    }

    #[tokio::test]
    async fn a_mesh_on_its_way_out_is_a_finding_with_the_command_that_takes_it_back() {
        for (says, does) in [("inbound", "accepts plaintext"), ("true", "nothing is encrypted")] {
            let fault = settings_of(json!({ "mode": "strict", "transparent": says }), None).await.unwrap_err();
            assert!(fault.found.contains("an uninstall was begun") && fault.found.contains(does), "{}", fault.found);
            assert!(
                fault.found.contains(&format!("`transparent: {says}` in ConfigMap countersign-mesh")),
                "{}",
                fault.found
            );
            assert!(fault.mend.contains("kubectl -n mesh patch configmap countersign-mesh"), "{}", fault.mend);
        }
        assert!(settings_of(json!({ "mode": "strict", "transparent": "false" }), None).await.is_ok());
    }

    #[test]
    fn a_webhook_that_fails_open_or_needs_further_labels_is_told_from_the_charts_own() {
        let hook = |name: &str, policy: &str, labels: serde_json::Value| {
            let hook = json!({
                "name": name, "failurePolicy": policy, "namespaceSelector": { "matchLabels": labels },
                "admissionReviewVersions": ["v1"], "clientConfig": {}, "sideEffects": "None",
            });
            serde_json::from_value::<MutatingWebhook>(hook).unwrap()
        };
        let own = [hook("pod.inject", "Fail", json!({})), hook("judge-namespace", "Ignore", json!({}))];
        assert!(!fails_open(&own) && !needs_more_labels(&own));
        assert!(fails_open(&[hook("pod.inject", "Ignore", json!({}))]));
        assert!(needs_more_labels(&[hook("pod.inject", "Fail", json!({ "team": "a" }))]));
    }
}
