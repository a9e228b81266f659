//! Whether the namespace of an installation would admit the agents' pods, which no level of Pod Security but `privileged` does. The API
//! server itself is asked, so that a policy of any kind shows.

use countersign_watch::in_words;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::Client;
use kube::api::{Api, PostParams};
use serde_json::{Value, json};

use super::finding::{Fault, Outcome};
use super::requirements::may_create;
use crate::kubernetes::cluster::words;
use crate::kubernetes::install;

/// Name of the pods that are tried. None is created.
const NAME: &str = "countersign-check";

/// Has the API server judge a pod of the agent as these settings make it.
pub(super) async fn before(client: &Client, namespace: &str, values: &Value) -> Outcome {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let there = namespaces.get_opt(namespace).await;
    if there.map_err(|e| Fault::unread(&e, "see whether you may get namespaces"))?.is_none() {
        return Ok(format!(
            "namespace {namespace} is not there yet: `countersign install` makes it with pod-security.kubernetes.io/enforce=privileged, \
             and who installs by Helm labels it so"
        ));
    }
    if may_create(client, "", "pods", namespace).await != Ok(true) {
        let mend = format!("have `create` on pods in namespace {namespace} granted to you: nothing is created");
        return Err(Fault::unchecked("you may not try a pod", mend));
    }
    let Some(why) = refusal(client, namespace, values).await? else {
        return Ok(format!("namespace {namespace} admits them"));
    };
    let mut without = values.clone();
    without["agent"]["csi"]["enabled"] = false.into();
    let mend = match refusal(client, namespace, &without).await? {
        None => {
            "allow the privileged container of the CSI driver, or install with agent.csi.enabled=false (docs/kubernetes.md says what \
                 that gives away)"
        }
        Some(_) => {
            "allow what the pod asks for; Pod Security does with the namespace's label \
                    pod-security.kubernetes.io/enforce=privileged, which `countersign install` sets and Helm does not"
        }
    };
    Err(Fault::new(format!("namespace {namespace} refuses them: {}", words(&why)), mend))
}

/// Why the API server refuses an agent's pod; `None` if it does not.
async fn refusal(client: &Client, namespace: &str, values: &Value) -> Result<Option<String>, Fault> {
    let pod =
        agents_pod(namespace, values).map_err(|e| Fault::unchecked(e.to_string(), "this is a bug of this command"))?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    match pods.create(&PostParams { dry_run: true, ..PostParams::default() }, &pod).await {
        Ok(_) => Ok(None),
        Err(kube::Error::Api(status)) if is_verdict(status.code) => Ok(Some(status.message)),
        Err(error) => {
            Err(Fault::unchecked(in_words(&error), "see whether the API server answers: kubectl get --raw /readyz"))
        }
    }
}

/// Whether a status is a verdict on what was sent, and not on who sent it (401), on when (408, 429), or on what else is there (404,
/// 409, 410). A webhook that refuses with one of these is not told from the API server itself.
fn is_verdict(code: u16) -> bool {
    (400..500).contains(&code) && ![401, 404, 408, 409, 410, 429].contains(&code)
}

/// A pod of the agents' DaemonSet.
fn agents_pod(namespace: &str, values: &Value) -> anyhow::Result<Pod> {
    let all: Vec<Value> = serde_saphyr::from_multiple(&install::rendered(namespace, values)?)?;
    let mut pod = all.into_iter().find(|o| o["kind"] == "DaemonSet").unwrap_or_default()["spec"]["template"].take();
    pod["metadata"]["name"] = NAME.into();
    // Its own account need not be there yet.
    pod["spec"]["serviceAccountName"] = json!("default");
    Ok(serde_json::from_value(pod)?)
}

#[cfg(test)]
mod tests {
    use super::super::fake_api::{Answer, Asked, client, refused};
    use super::*;
    use crate::kubernetes::values::defaults;

    /// An API server that refuses what `refuses` says of a pod.
    fn api(refuses: fn(&Value) -> Option<&'static str>) -> Client {
        client(move |asked: &Asked| match asked.path.as_str() {
            "/api/v1/namespaces/mesh" => Answer::Now(200, json!({ "metadata": { "name": "mesh" } })),
            "/api/v1/namespaces/mesh/pods" => {
                let why = refuses(&asked.body["spec"]);
                why.map_or_else(|| Answer::Now(201, asked.body.clone()), |why| refused(403, why))
            }
            path if path.ends_with("selfsubjectaccessreviews") => {
                Answer::Now(201, json!({ "spec": {}, "status": { "allowed": true } }))
            }
            _ => refused(404, "not found"),
        })
    }

    fn is_privileged(spec: &Value) -> bool {
        spec["containers"].as_array().unwrap().iter().any(|c| c["securityContext"]["privileged"] == true)
    }

    #[tokio::test]
    async fn a_namespace_that_refuses_the_agents_pods_is_named_with_the_way_out() {
        let (fine, values) = (api(|_| None), defaults().unwrap());
        assert_eq!(before(&fine, "mesh", &values).await, Ok("namespace mesh admits them".into()));
        assert!(before(&fine, "elsewhere", &values).await.unwrap().contains("is not there yet"));
        let level = api(|spec| (spec["hostPID"] == true).then_some("violates PodSecurity \"baseline:latest\""));
        let fault = before(&level, "mesh", &values).await.unwrap_err();
        assert_eq!(fault.found, "namespace mesh refuses them: violates PodSecurity \"baseline:latest\"");
        assert!(fault.mend.contains("enforce=privileged"), "{}", fault.mend);
        let policy = api(|spec| is_privileged(spec).then_some("denied the request: no privileged containers"));
        let fault = before(&policy, "mesh", &values).await.unwrap_err();
        assert!(fault.mend.contains("agent.csi.enabled=false"), "{}", fault.mend);
        for passing in [401, 404, 409, 429, 500, 503] {
            let busy = client(move |asked: &Asked| match asked.path.as_str() {
                "/api/v1/namespaces/mesh/pods" => refused(passing, "not now"),
                "/api/v1/namespaces/mesh" => Answer::Now(200, json!({ "metadata": { "name": "mesh" } })),
                _ => Answer::Now(201, json!({ "spec": {}, "status": { "allowed": true } })),
            });
            let fault = before(&busy, "mesh", &values).await.unwrap_err();
            assert!(!fault.is_checked, "{passing}: {}", fault.found);
        }
        let mut without = values;
        without["agent"]["csi"]["enabled"] = false.into();
        assert!(before(&policy, "mesh", &without).await.is_ok());
    }
}
