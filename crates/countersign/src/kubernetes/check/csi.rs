//! The CSI driver: whether the nodes can have it, before an installation; afterwards whether it is known to the API server and to each
//! node's kubelet, and ready beside each agent.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::{CSIDriver, CSINode};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use serde_json::Value;

use super::finding::{Fault, Outcome};
use super::installed::{CsiDriver, Installed};
use super::nodes::{Agent, Nodes, some};
use super::rendered::difference;
use crate::kubernetes::cluster::{listed, words};
use crate::kubernetes::{csi_volumes, pod_state};
use crate::one_line;

const INSTALL: &str = "apply the manifests of `countersign install` with your settings";
/// What is said of an installation whose sidecars mount the agent's directory from their node.
const BY_HOST_PATH: &str = "meshed pods mount the agent's directory by hostPath, which their namespaces must allow: whoever creates pods \
                            there can become root on a node";
/// The oldest Linux whose mounts can be restricted before they are anywhere (`mount_setattr(2)`).
const OLDEST: (u32, u32) = (5, 12);

/// Checks whether the nodes that an installation with these settings would have agents on can have the driver.
pub async fn before(client: &Client, values: &Value) -> Outcome {
    if values["agent"]["csi"]["enabled"] == false {
        return Ok(format!("not asked for: {BY_HOST_PATH}"));
    }
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await;
    let nodes = nodes.map_err(|e| Fault::unread(&e, "see whether you may list nodes"))?.items;
    let wanted = values["agent"]["nodeSelector"].as_object();
    let has =
        |node: &Node| wanted.into_iter().flatten().all(|(k, v)| node.labels().get(k).map(String::as_str) == v.as_str());
    kernels(nodes.iter().filter(|node| has(node)))
}

fn kernels<'a>(nodes: impl Iterator<Item = &'a Node>) -> Outcome {
    let (mut good, mut old, mut unknown) = (0, vec![], vec![]);
    for node in nodes {
        let said = node.status.as_ref().and_then(|s| s.node_info.as_ref()).map(|info| info.kernel_version.as_str());
        match said.and_then(linux) {
            Some(version) if version >= OLDEST => good += 1,
            Some(_) => old.push(format!("{} ({})", node.name_any(), words(said.unwrap_or_default()))),
            None => unknown.push(node.name_any()),
        }
    }
    let needs = format!("the CSI driver needs Linux {}.{}", OLDEST.0, OLDEST.1);
    if !old.is_empty() {
        let mend = "upgrade these nodes, or install with agent.csi.enabled=false (docs/kubernetes.md says what that gives away)";
        return Err(Fault::new(format!("{needs}, which is newer than that of {}", some(old.into_iter())), mend));
    }
    if !unknown.is_empty() {
        let mend = "see `kubectl get nodes -o wide`";
        return Err(Fault::unchecked(
            format!("{needs}, and these nodes do not say theirs: {}", listed(&unknown)),
            mend,
        ));
    }
    match good {
        0 => Err(Fault::unchecked(
            format!("{needs}, and there is no node with the labels of agent.nodeSelector"),
            "see `kubectl get nodes --show-labels`",
        )),
        1 => Ok(format!("{needs}, which 1 node has")),
        _ => Ok(format!("{needs}, which {good} nodes have")),
    }
}

/// The version of a kernel, of which distributions write `6.1.0-13-amd64` or `5.14.0-427.el9`.
fn linux(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Checks the driver of an installation, or that none is left of one.
pub(super) async fn driver(
    client: &Client,
    installed: &Installed,
    manifests: &anyhow::Result<Vec<Value>>,
    nodes: Result<&Nodes, &Fault>,
) -> Outcome {
    let Some(driver) = installed.csi_driver() else { return turned_off(client).await };
    let objects: Api<CSIDriver> = Api::all(client.clone());
    let found = objects.get_opt(&driver.name).await;
    let found = found.map_err(|e| Fault::unread(&e, "see whether you may get csidrivers"))?;
    let Some(found) = found else {
        let found = format!("there is no CSIDriver {}: kubelets refuse pods with a volume of it", driver.name);
        return Err(Fault::new(found, INSTALL));
    };
    let wanted = manifests.iter().flatten().find(|o| o["kind"] == "CSIDriver").map(|o| o["spec"].clone());
    let found = serde_json::to_value(&found.spec).unwrap_or_default();
    if let Some(where_) = wanted.and_then(|wanted| difference(&wanted, &found)) {
        return Err(Fault::new(format!("CSIDriver {} differs from the chart's at spec{where_}", driver.name), INSTALL));
    }
    let known: Api<CSINode> = Api::all(client.clone());
    let known = known.list(&ListParams::default()).await;
    let known = known.map_err(|e| Fault::unread(&e, "see whether you may list csinodes"))?.items;
    let served = judge(&driver, &known, nodes.map_err(Clone::clone)?)?;
    if installed.injects_csi_volumes() {
        return Ok(served);
    }
    Ok(format!("{served}, but injector.csiVolumes=false: {BY_HOST_PATH}"))
}

fn judge(driver: &CsiDriver, known: &[CSINode], nodes: &Nodes) -> Outcome {
    let lists = |node: &CSINode| node.spec.drivers.iter().any(|d| d.name == driver.name);
    let registered: BTreeSet<String> = known.iter().filter(|n| lists(n)).map(ResourceExt::name_any).collect();
    let down: Vec<String> =
        nodes.agents.iter().filter_map(|agent| Some(format!("{} ({})", agent.node, why_down(agent)?))).collect();
    if !down.is_empty() {
        let found =
            format!("the CSI driver is not ready on {}: pods that start or end there wait", some(down.into_iter()));
        return Err(Fault::new(found, "see the log of container csi of the agent's pod on that node"));
    }
    let unknown: Vec<String> =
        nodes.agents.iter().map(|agent| agent.node.clone()).filter(|node| !registered.contains(node)).collect();
    if !unknown.is_empty() {
        let mend = format!(
            "see the log of container csi of the agent's pod there; is {} (agent.csi.kubeletDir) the kubelet's --root-dir?",
            driver.kubelet_dir
        );
        let found = format!("the kubelet does not know driver {} on {}", driver.name, listed(&unknown));
        return Err(Fault::new(found, mend));
    }
    Ok(format!("{} serves {} nodes", driver.name, nodes.agents.len()))
}

/// Why the driver beside an agent does not serve; `None` if it does.
fn why_down(agent: &Agent) -> Option<String> {
    if pod_state::is_container_ready(&agent.pod, "csi") && !matches!(agent.driver, Some(Err(_))) {
        return None;
    }
    let state = || {
        pod_state::container(&agent.pod, "csi")
            .map_or_else(|| "its container is not there".into(), |how| format!("its container {how}"))
    };
    match &agent.driver {
        Some(Err(why)) if pod_state::is_container_running(&agent.pod, "csi") => Some(words(why)),
        _ => Some(state()),
    }
}

/// Without a driver no pod may have a volume of one: it could never end.
async fn turned_off(client: &Client) -> Outcome {
    let may = "see whether you may list csidrivers and pods";
    let drivers = csi_volumes::drivers(client).await.map_err(|e| Fault::unchecked(one_line(&e), may))?;
    if drivers.is_empty() {
        return Ok(format!("off: {BY_HOST_PATH}"));
    }
    let holders = csi_volumes::holders(client, &drivers).await.map_err(|e| Fault::unchecked(one_line(&e), may))?;
    left_behind(&drivers, &holders.names())
}

fn left_behind(drivers: &BTreeSet<String>, holders: &[String]) -> Outcome {
    let names = listed(&drivers.iter().cloned().collect::<Vec<_>>());
    if holders.is_empty() {
        return Ok(format!("off; CSIDriver {names} is left of it, and no pod has a volume of it; {BY_HOST_PATH}"));
    }
    let found =
        format!("the CSI driver {names} is off, and pods have volumes of it, which can never end: {}", listed(holders));
    Err(Fault::new(
        found,
        "set agent.csi.enabled=true again, with injector.csiVolumes=false, and restart these pods first",
    ))
}

#[cfg(test)]
mod tests {
    use super::super::fake_api::{client, list};
    use super::super::nodes::tests::{agent, nodes};
    use super::*;
    use crate::kubernetes::values::defaults;
    use serde_json::json;

    fn driver() -> CsiDriver {
        CsiDriver { name: "csi.countersign.dev".into(), kubelet_dir: "/var/lib/kubelet".into() }
    }

    fn with_driver(node: &str, state: &Value, ready: Result<(), String>) -> Agent {
        let mut agent = agent(node, "", Ok(()));
        let status = json!({ "name": "csi", "ready": ready.is_ok(), "restartCount": 0, "image": "", "imageID": "", "state": state });
        let statuses = agent.pod.status.as_mut().unwrap().container_statuses.as_mut().unwrap();
        statuses.push(serde_json::from_value(status).unwrap());
        agent.driver = Some(ready);
        agent
    }

    fn node_with(name: &str, kernel: &str) -> Value {
        let info = json!({
            "architecture": "", "bootID": "", "containerRuntimeVersion": "", "kernelVersion": kernel, "kubeProxyVersion": "",
            "kubeletVersion": "", "machineID": "", "operatingSystem": "linux", "osImage": "", "systemUUID": "",
        });
        json!({ "metadata": { "name": name, "labels": { "pool": name } }, "status": { "nodeInfo": info } })
    }

    #[test]
    fn nodes_whose_linux_is_too_old_are_named_with_the_way_out() {
        let judged = |all: &[(&str, &str)]| {
            let nodes = all.iter().map(|(name, kernel)| serde_json::from_value(node_with(name, kernel)).unwrap());
            kernels(nodes.collect::<Vec<_>>().iter())
        };
        let new = [("a", "5.12.0"), ("b", "6.1.0-13-amd64"), ("c", "5.14.0-427.el9.x86_64")];
        assert_eq!(judged(&new).unwrap(), "the CSI driver needs Linux 5.12, which 3 nodes have");
        let fault = judged(&[new[0], ("d", "5.10.0-28-amd64"), ("e", "4.18.0-553.el8")]).unwrap_err();
        assert!(fault.found.ends_with("than that of d (5.10.0-28-amd64), e (4.18.0-553.el8)"), "{}", fault.found);
        assert!(fault.is_checked && fault.mend.contains("agent.csi.enabled=false"));
        let unknown = judged(&[new[0], ("f", "")]).unwrap_err();
        assert!(!unknown.is_checked && unknown.found.ends_with("do not say theirs: f"), "{}", unknown.found);
    }

    #[tokio::test]
    async fn only_the_nodes_that_get_agents_count_and_none_if_the_driver_is_off() {
        let api = client(|_| list("NodeList", vec![node_with("new", "6.1.0"), node_with("old", "5.4.0")]));
        let mut values = defaults().unwrap();
        assert!(before(&api, &values).await.unwrap_err().found.ends_with("old (5.4.0)"));
        values["agent"]["nodeSelector"] = json!({ "pool": "new" });
        assert!(before(&api, &values).await.unwrap().ends_with("which 1 node has"));
        values["agent"]["nodeSelector"] = json!({ "pool": "none" });
        assert!(!before(&api, &values).await.unwrap_err().is_checked, "no node is none that fits");
        values["agent"]["nodeSelector"] = json!({});
        values["agent"]["csi"]["enabled"] = false.into();
        assert!(before(&api, &values).await.unwrap().contains("root on a node"));
    }

    fn csi_node(name: &str, drivers: &[&str]) -> CSINode {
        let drivers: Vec<_> = drivers.iter().map(|d| json!({ "name": d, "nodeID": name })).collect();
        serde_json::from_value(json!({ "metadata": { "name": name }, "spec": { "drivers": drivers } })).unwrap()
    }

    #[test]
    fn a_node_whose_kubelet_does_not_know_the_driver_is_named() {
        let running = json!({ "running": {} });
        let all = nodes(vec![with_driver("a", &running, Ok(())), with_driver("b", &running, Ok(()))]);
        let known = [csi_node("a", &["csi.countersign.dev"]), csi_node("b", &["other"])];
        let fault = judge(&driver(), &known, &all).unwrap_err();
        assert_eq!(fault.found, "the kubelet does not know driver csi.countersign.dev on b");
        assert!(fault.mend.contains("/var/lib/kubelet (agent.csi.kubeletDir)"));
        let known = [csi_node("a", &["csi.countersign.dev"]), csi_node("b", &["csi.countersign.dev"])];
        assert_eq!(judge(&driver(), &known, &all).unwrap(), "csi.countersign.dev serves 2 nodes");
    }

    #[test]
    fn a_driver_that_is_not_ready_says_why() {
        let crashing = json!({ "waiting": { "reason": "CrashLoopBackOff" } });
        let silent = || Err("no answer within 5 s".to_owned());
        let known = [csi_node("a", &["csi.countersign.dev"]), csi_node("b", &["csi.countersign.dev"])];
        let unregistered = Err("not ready: the kubelet has not registered the driver".to_owned());
        let all = nodes(vec![
            with_driver("a", &crashing, silent()),
            with_driver("b", &json!({ "running": {} }), unregistered),
        ]);
        let found = judge(&driver(), &known, &all).unwrap_err().found;
        assert!(found.contains("a (its container waits (CrashLoopBackOff))"), "{found}");
        assert!(found.contains("b (not ready: the kubelet has not registered the driver)"), "{found}");
    }

    #[test]
    fn a_driver_that_is_off_may_leave_no_volume_behind() {
        let drivers = BTreeSet::from(["csi.countersign.dev".to_owned()]);
        assert!(left_behind(&drivers, &[]).unwrap().contains("is left of it"));
        let fault = left_behind(&drivers, &["shop/web".into()]).unwrap_err();
        assert!(fault.found.contains("can never end: shop/web") && fault.mend.contains("agent.csi.enabled=true"));
    }
}
