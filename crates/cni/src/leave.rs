//! Whether this process ends for good. The plugin's entry stays where it is while a pod of its DaemonSet follows, so that
//! an update leaves no gap; it goes with the DaemonSet.

use std::time::Duration;

use countersign_identity::shown::sentence;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::{Api, Client};

use crate::config::DaemonSetName;

/// Time for the API server to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Whether nobody follows: the DaemonSet is gone, is being deleted, or has no such container any more. An API
/// server that does not answer proves nothing, nor does a missing permission: an update may rename the service account.
pub async fn is_for_good(client: Client, name: &DaemonSetName, container: &str) -> bool {
    let sets = Api::<DaemonSet>::namespaced(client, &name.namespace);
    let Ok(asked) = tokio::time::timeout(PATIENCE, sets.get_opt(&name.name)).await else {
        tracing::warn!("the plugin stays: the API server does not answer");
        return false;
    };
    match asked {
        Ok(None) => true,
        Ok(Some(set)) => set.metadata.deletion_timestamp.is_some() || !runs(&set, container),
        Err(kube::Error::Api(status)) if status.code == 404 => true,
        Err(error) => {
            let error = error.to_string();
            tracing::warn!(error = %sentence(&error, 500), "the plugin stays: the API server cannot be asked");
            false
        }
    }
}

fn runs(set: &DaemonSet, container: &str) -> bool {
    let pod = set.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    pod.is_some_and(|pod| pod.containers.iter().any(|c| c.name == container))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::api_server;

    async fn after(status: u16, body: Value) -> bool {
        let (client, asked) = api_server(move |_| (status, body.clone()));
        let name = DaemonSetName { namespace: "mesh".into(), name: "agents".into() };
        let over = is_for_good(client, &name, "cni").await;
        assert_eq!(asked.lock().unwrap().as_slice(), ["/apis/apps/v1/namespaces/mesh/daemonsets/agents"]);
        over
    }

    fn set(containers: &[&str]) -> Value {
        let containers: Vec<Value> = containers.iter().map(|name| json!({ "name": name })).collect();
        json!({ "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "agents" },
                "spec": { "selector": {}, "template": { "spec": { "containers": containers } } } })
    }

    fn failure(code: u16) -> Value {
        json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "x", "code": code })
    }

    #[tokio::test]
    async fn the_plugin_goes_with_the_daemon_set_or_its_container() {
        assert!(!after(200, set(&["agent", "cni"])).await, "an update");
        assert!(after(200, set(&["agent"])).await, "turned off");
        let mut deleted = set(&["agent", "cni"]);
        deleted["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        assert!(after(200, deleted).await);
        assert!(after(404, failure(404)).await);
        for code in [401, 403, 429, 500, 503] {
            assert!(!after(code, failure(code)).await, "{code}");
        }
    }
}
