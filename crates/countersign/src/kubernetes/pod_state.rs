//! How a pod is, by its status: phase, conditions, and what each container waits for or ended with.

use countersign_identity::shown::sentence;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};

/// Longest text of others that is repeated, in characters.
const MAX_TEXT: usize = 300;
/// Waiting for one of these is the way of every pod that starts.
const ON_ITS_WAY: [&str; 2] = ["PodInitializing", "ContainerCreating"];

/// How a pod is. Error: it is not ready, and what can be told about why.
pub fn state(pod: &Pod) -> Result<String, String> {
    let node =
        pod.spec.as_ref().and_then(|s| s.node_name.as_deref()).map(|n| format!(" on node {n}")).unwrap_or_default();
    let Some(status) = &pod.status else { return Err(format!("it has no status yet{node}")) };
    let phase = status.phase.as_deref().unwrap_or("Unknown");
    let containers: Vec<String> = containers(status).filter_map(told).collect();
    let mut said = vec![format!("{phase}{node}")];
    if let Some(since) = &pod.metadata.deletion_timestamp {
        said.push(format!("it is being deleted since {}", since.0));
    }
    said.extend(status.reason.as_deref().map(|reason| reasoned(reason, status.message.as_deref())));
    said.extend(conditions(status));
    said.extend(containers);
    let said = said.join("; ");
    let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
    if ready && pod.metadata.deletion_timestamp.is_none() || phase == "Succeeded" { Ok(said) } else { Err(said) }
}

/// Why the scheduler has found no node, in its words; `None` if it has said nothing.
pub fn unscheduled(pod: &Pod) -> Option<String> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let says = conditions.iter().find(|c| c.type_ == "PodScheduled" && c.status == "False")?;
    Some(reasoned(says.reason.as_deref().unwrap_or("no reason"), says.message.as_deref()))
}

/// How one container is; `None` if it is not known yet.
pub fn container(pod: &Pod, name: &str) -> Option<String> {
    let status = pod.status.as_ref()?;
    containers(status).find(|c| c.name == name).and_then(described)
}

/// Whether a container is ready.
pub fn is_container_ready(pod: &Pod, name: &str) -> bool {
    pod.status.as_ref().is_some_and(|status| containers(status).any(|c| c.name == name && c.ready))
}

/// Whether a container runs, ready or not.
pub fn is_container_running(pod: &Pod, name: &str) -> bool {
    let runs = |c: &ContainerStatus| c.state.as_ref().is_some_and(|s| s.running.is_some());
    pod.status.as_ref().is_some_and(|status| containers(status).any(|c| c.name == name && runs(c)))
}

fn containers(status: &PodStatus) -> impl Iterator<Item = &ContainerStatus> {
    status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten())
}

/// A reason and a message of Kubernetes.
fn reasoned(reason: &str, message: Option<&str>) -> String {
    match message.map(str::trim).filter(|m| !m.is_empty()) {
        Some(message) => format!("{}: {}", sentence(reason, MAX_TEXT), sentence(message, MAX_TEXT)),
        None => sentence(reason, MAX_TEXT).to_string(),
    }
}

/// Conditions that say more than that containers are not ready.
fn conditions(status: &PodStatus) -> impl Iterator<Item = String> {
    let all = status.conditions.iter().flatten().filter(|c| c.status == "False");
    let telling = all.filter(|c| ["PodScheduled", "PodReadyToStartContainers"].contains(&c.type_.as_str()));
    telling.filter_map(|c| Some(format!("not {}: {}", c.type_, reasoned(c.reason.as_deref()?, c.message.as_deref()))))
}

/// What is to be told of a container; `None` if it is as it should be.
fn told(container: &ContainerStatus) -> Option<String> {
    let state = container.state.as_ref();
    let ended_well = state.and_then(|s| s.terminated.as_ref()).is_some_and(|t| t.exit_code == 0);
    let last = container.last_state.as_ref().and_then(|s| s.terminated.as_ref());
    if (container.ready || ended_well) && last.is_none() {
        return None;
    }
    described(container).map(|how| format!("{} {how}", container.name))
}

fn described(container: &ContainerStatus) -> Option<String> {
    let state = container.state.as_ref()?;
    let mut said = if let Some(waiting) = &state.waiting {
        let reason = waiting.reason.as_deref().unwrap_or("no reason");
        let message = waiting.message.as_deref().filter(|_| !ON_ITS_WAY.contains(&reason));
        format!("waits ({})", reasoned(reason, message))
    } else if let Some(ended) = &state.terminated {
        format!(
            "ended with exit code {} ({})",
            ended.exit_code,
            sentence(ended.reason.as_deref().unwrap_or("no reason"), MAX_TEXT)
        )
    } else if container.ready {
        "is ready".to_owned()
    } else {
        "runs and is not ready".to_owned()
    };
    if let Some(last) = container.last_state.as_ref().and_then(|s| s.terminated.as_ref()) {
        let reason = sentence(last.reason.as_deref().unwrap_or("no reason"), MAX_TEXT);
        said.push_str(&format!(", before that ended with exit code {} ({reason})", last.exit_code));
    }
    if container.restart_count > 0 {
        said.push_str(&format!(", {} restarts", container.restart_count));
    }
    Some(said)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(status: Value) -> Pod {
        let spec = json!({ "containers": [], "nodeName": "node2" });
        serde_json::from_value(json!({ "metadata": { "name": "a" }, "spec": spec, "status": status })).unwrap()
    }

    fn of(name: &str, ready: bool, state: Value, last: Value, restarts: i32) -> Value {
        json!({ "name": name, "ready": ready, "restartCount": restarts, "image": "", "imageID": "", "state": state, "lastState": last })
    }

    #[test]
    fn a_pod_that_is_well_is_told_of_in_a_word() {
        let running = of("app", true, json!({ "running": {} }), json!({}), 0);
        let done = of("countersign-redirect", false, json!({ "terminated": { "exitCode": 0 } }), json!({}), 0);
        let well = pod(json!({
            "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }],
            "containerStatuses": [running], "initContainerStatuses": [done],
        }));
        assert_eq!(state(&well), Ok("Running on node node2".into()));
        assert_eq!(container(&well, "app").unwrap(), "is ready");
        assert!(
            is_container_ready(&well, "app") && !is_container_ready(&well, "csi") && container(&well, "csi").is_none()
        );
        assert!(state(&pod(json!({ "phase": "Succeeded" }))).is_ok());
    }

    #[test]
    fn a_container_that_crashes_is_told_of_with_what_it_ended_with() {
        let waiting = json!({ "waiting": { "reason": "CrashLoopBackOff", "message": "back-off 5m0s\u{1b}[2J" } });
        let last = json!({ "terminated": { "exitCode": 137, "reason": "OOMKilled" } });
        let crashing = pod(json!({
            "phase": "Running", "conditions": [{ "type": "Ready", "status": "False", "reason": "ContainersNotReady" }],
            "containerStatuses": [of("app", false, waiting, last, 4)],
        }));
        let said = "Running on node node2; app waits (CrashLoopBackOff: back-off 5m0s\\u{1b}[2J), before that ended with exit \
                    code 137 (OOMKilled), 4 restarts";
        assert_eq!(state(&crashing).unwrap_err(), said);
    }

    #[test]
    fn a_pod_that_cannot_be_placed_says_why() {
        let reason =
            json!({ "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes" });
        let waiting = pod(json!({ "phase": "Pending", "conditions": [reason] }));
        let said = state(&waiting).unwrap_err();
        assert_eq!(said, "Pending on node node2; not PodScheduled: Unschedulable: 0/2 nodes");
        let evicted = pod(json!({ "phase": "Failed", "reason": "Evicted", "message": "low on memory" }));
        assert!(state(&evicted).unwrap_err().contains("Evicted: low on memory"));
        assert!(state(&Pod::default()).is_err());
    }
}
