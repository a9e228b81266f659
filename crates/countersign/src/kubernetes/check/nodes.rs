//! What the agent of each node says of itself, asked once for all checks: several agents at a time, each within a bound.

use std::time::Duration;

use futures::stream::{self, StreamExt};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use tokio::time::Instant;

use super::finding::{Fault, Outcome};
use super::requirements::NARROW_KUBELET;
use crate::kubernetes::cluster::{is_ready, listed, node_of, page, pods, words};
use crate::kubernetes::pod_state;
use crate::metrics_page::metric;

/// TCP ports of the pages of an agent, and of the CSI driver and the CNI component beside it.
const AGENT_PAGES: u16 = 9464;
const DRIVER_PAGES: u16 = 9466;
const PLUGIN_PAGES: u16 = 9467;
/// Agents that are asked at once, and how long all of them may take.
const AT_ONCE: usize = 32;
const ALL: Duration = Duration::from_secs(25);
/// Names of the driver's and the component's containers.
const DRIVER: &str = "csi";
const PLUGIN: &str = countersign_cni::CONTAINER;
/// Most nodes of a finding that are told of with their reasons.
const MAX_REASONS: usize = 3;

/// The cluster's nodes and their agents.
pub struct Nodes {
    names: Vec<String>,
    /// Agents that have a node and are not being deleted.
    pub agents: Vec<Agent>,
}

/// What an agent says of itself, or why it says nothing.
pub struct Agent {
    /// Its node.
    pub node: String,
    /// Its pod.
    pub pod: Pod,
    /// Its metrics page.
    pub metrics: Result<String, String>,
    /// Whether it is ready; else its reason.
    pub ready: Result<(), String>,
    /// Whether the CSI driver beside it is ready; else its reason. `None` if there is none.
    pub driver: Option<Result<(), String>>,
    /// The metrics page of the CNI component beside it; `None` if there is none, or it does not answer.
    pub plugin: Option<String>,
}

impl Nodes {
    /// Asks all agents, or only the one of a node.
    ///
    /// The client must take 503 for an answer: an agent that is not ready answers so, with its reason.
    pub async fn look(client: &Client, namespace: &str, only: Option<&str>) -> Result<Self, Fault> {
        let nodes: Api<Node> = Api::all(client.clone());
        let may = "see whether you may list nodes, and pods in the mesh's namespace";
        let nodes = nodes.list(&ListParams::default()).await.map_err(|e| Fault::unread(&e, may))?;
        let running = pods(client, namespace, "app.kubernetes.io/component=agent").await;
        let running = running.map_err(|why| Fault::unchecked(why, may))?;
        let wanted = |node: &str| only.is_none_or(|only| only == node);
        let names = nodes.items.iter().map(ResourceExt::name_any).filter(|name| wanted(name)).collect();
        let here = running.into_iter().filter_map(|pod| Some((node_of(&pod)?.to_owned(), pod)));
        let end = Instant::now() + ALL;
        let asked = stream::iter(here.filter(|(node, _)| wanted(node))).map(|(node, pod)| ask(client, node, pod, end));
        Ok(Self { names, agents: asked.buffer_unordered(AT_ONCE).collect().await })
    }

    /// Whether each node has an agent that is ready. `version`: that of Kubernetes.
    pub fn are_served(&self, version: (u32, u32)) -> Outcome {
        let is_served = |node: &String| self.agents.iter().any(|a| a.node == *node && is_ready(&a.pod));
        let lacking: Vec<&String> = self.names.iter().filter(|node| !is_served(node)).collect();
        if lacking.is_empty() {
            return Ok(format!("{} agents ready, one per node", self.names.len()));
        }
        let mend = if version < NARROW_KUBELET {
            "see the agent's log; before Kubernetes 1.33 install with agent.nodesProxyPermission=true"
        } else {
            "see the agent's log on that node: it is ready when the server has attested it"
        };
        let told = lacking.iter().map(|node| format!("{node} ({})", self.why_unserved(node)));
        Err(Fault::new(format!("no agent is ready on {}", some(told)), mend))
    }

    fn why_unserved(&self, node: &str) -> String {
        let Some(agent) = self.agents.iter().find(|a| a.node == node) else {
            return "it has no pod of the agent".into();
        };
        match &agent.ready {
            Err(why) if pod_state::is_container_running(&agent.pod, "agent") => why.clone(),
            _ => pod_state::container(&agent.pod, "agent")
                .map_or_else(|| "its container is not there yet".into(), |how| format!("its container {how}")),
        }
    }

    /// Nodes whose CNI component tells sidecars by their user ID alone, as those of older versions do, which do not say so.
    pub fn that_trust_a_user_id(&self) -> Vec<String> {
        let trusts =
            |page: &str| metric(page, "countersign_cni_sidecar_by_cgroup").next().is_none_or(|(_, value)| value == 0.0);
        let those = self.agents.iter().filter(|agent| agent.plugin.as_deref().is_some_and(trusts));
        those.map(|agent| agent.node.clone()).collect()
    }

    /// Whether the socket of each node is the agent's own: whoever else answers there would give pods their identities.
    pub fn sockets(&self) -> Outcome {
        let (mut own, mut unknown, mut bad) = (0, vec![], vec![]);
        for agent in &self.agents {
            let answers = agent.metrics.as_ref().map(|page| metric(page, "countersign_agent_socket_own").next());
            match answers {
                Ok(Some((_, value))) if value > 0.0 => own += 1,
                Ok(Some(_)) => {
                    let why = agent.ready.as_ref().err().map(|why| format!(" ({})", words(why))).unwrap_or_default();
                    bad.push(format!("{}{why}", agent.node));
                }
                // Of an older version, or without an answer.
                Ok(None) | Err(_) => unknown.push(agent.node.clone()),
            }
        }
        if !bad.is_empty() {
            let mend = "end the process that answers there: another agent of this node, or SPIRE's with the same path";
            return Err(Fault::new(
                format!("the agent's socket is not answered by the agent on {}", some(bad.into_iter())),
                mend,
            ));
        }
        if !unknown.is_empty() {
            let mend = "see `agents`; an agent of an older version does not say";
            return Err(Fault::unchecked(format!("no answer from the agents of {}", listed(&unknown)), mend));
        }
        if own == 0 {
            return Err(Fault::new("no agent runs", "apply the manifests of `countersign install`"));
        }
        Ok(format!("answered by the agent on {own} nodes"))
    }
}

/// Some reasons, and the number of the rest.
pub fn some(reasons: impl ExactSizeIterator<Item = String>) -> String {
    let more = reasons.len().saturating_sub(MAX_REASONS);
    let shown = reasons.take(MAX_REASONS).collect::<Vec<_>>().join(", ");
    if more == 0 { shown } else { format!("{shown} and {more} more") }
}

async fn ask(client: &Client, node: String, pod: Pod, end: Instant) -> Agent {
    let has = |name| pod.spec.iter().flat_map(|s| &s.containers).any(|c| c.name == name);
    let (has_driver, has_plugin) = (has(DRIVER), has(PLUGIN));
    let within = |port, path| {
        let (client, pod) = (client, &pod);
        async move {
            let asked = tokio::time::timeout_at(end, page(client, pod, port, path)).await;
            asked.unwrap_or_else(|_| Err("it was not asked in time".into()))
        }
    };
    let driver = async { if has_driver { Some(within(DRIVER_PAGES, "/ready").await.map(drop)) } else { None } };
    let plugin = async { if has_plugin { within(PLUGIN_PAGES, "/metrics").await.ok() } else { None } };
    let (metrics, ready, driver, plugin) =
        futures::join!(within(AGENT_PAGES, "/metrics"), within(AGENT_PAGES, "/ready"), driver, plugin);
    Agent { metrics, ready: ready.map(drop), driver, plugin, node, pod }
}

#[cfg(test)]
pub mod tests {
    use super::super::fake_api::{Answer, Asked, client, list};
    use super::*;
    use serde_json::json;

    /// The agent of a node; `ready`: whether, or why not.
    pub fn agent(node: &str, metrics: &str, ready: Result<(), String>) -> Agent {
        let is_ready = if ready.is_ok() { "True" } else { "False" };
        let running = json!({ "name": "agent", "ready": ready.is_ok(), "restartCount": 0, "image": "", "imageID": "", "state": { "running": {} } });
        let pod = json!({
            "metadata": { "name": format!("agent-{node}") },
            "spec": { "nodeName": node, "containers": [] },
            "status": { "conditions": [{ "type": "Ready", "status": is_ready }], "containerStatuses": [running] },
        });
        let pod = serde_json::from_value(pod).unwrap();
        Agent { node: node.into(), pod, metrics: Ok(metrics.into()), ready, driver: None, plugin: None }
    }

    pub fn nodes(agents: Vec<Agent>) -> Nodes {
        Nodes { names: agents.iter().map(|a| a.node.clone()).collect(), agents }
    }

    #[test]
    fn a_node_without_an_agent_that_is_ready_is_named_with_the_reason() {
        let why = || Err("not ready: the server has not been heard yet".to_owned());
        let mut all = nodes(vec![agent("a", "", Ok(())), agent("b", "", why())]);
        all.names.push("c".into());
        let fault = all.are_served((1, 34)).unwrap_err();
        let said =
            "no agent is ready on b (not ready: the server has not been heard yet), c (it has no pod of the agent)";
        assert_eq!(fault.found, said);
        assert!(all.are_served((1, 32)).unwrap_err().mend.contains("nodesProxyPermission"));
        assert_eq!(nodes(vec![agent("a", "", Ok(()))]).are_served((1, 34)), Ok("1 agents ready, one per node".into()));
        let many = nodes((0..10).map(|n| agent(&n.to_string(), "", why())).collect());
        assert!(many.are_served((1, 34)).unwrap_err().found.ends_with("and 7 more"));
    }

    #[test]
    fn nodes_whose_component_trusts_a_user_id_are_named() {
        let with = |node: &str, page: Option<&str>| Agent { plugin: page.map(Into::into), ..agent(node, "", Ok(())) };
        let all = nodes(vec![
            with("a", Some("countersign_cni_sidecar_by_cgroup 1\n")),
            with("b", Some("countersign_cni_sidecar_by_cgroup 0\n")),
            with("c", Some("countersign_cni_installed 1\n")),
            with("d", None),
        ]);
        assert_eq!(all.that_trust_a_user_id(), ["b", "c"]);
    }

    #[test]
    fn a_socket_that_somebody_else_answers_is_named() {
        let own = |up: u8| format!("# TYPE x gauge\ncountersign_agent_socket_own {up}\n");
        let judged = |agents| nodes(agents).sockets();
        assert!(judged(vec![agent("a", &own(1), Ok(()))]).unwrap().contains("1 nodes"));
        let why = || Err("/run/x.sock is answered by process 7".to_owned());
        let fault = judged(vec![agent("a", &own(1), Ok(())), agent("b", &own(0), why())]).unwrap_err();
        assert!(fault.found.ends_with("on b (/run/x.sock is answered by process 7)"), "{}", fault.found);
        assert!(!judged(vec![agent("a", "", Ok(()))]).unwrap_err().is_checked, "an older version");
        assert!(judged(vec![]).unwrap_err().is_checked);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hundred_agents_that_never_answer_take_no_hundred_times_as_long() {
        let names: Vec<String> = (0..100).map(|n| format!("n{n}")).collect();
        let api = client(move |asked: &Asked| match asked.path.as_str() {
            "/api/v1/nodes" => list("NodeList", names.iter().map(|n| json!({ "metadata": { "name": n } })).collect()),
            "/api/v1/namespaces/mesh/pods" => {
                let pod = |n: &String| json!({ "metadata": { "name": n, "namespace": "mesh" }, "spec": { "nodeName": n, "containers": [] } });
                list("PodList", names.iter().map(pod).collect())
            }
            // Half of them are gone for good, the others refuse.
            path if path.contains("/pods/n1") => Answer::Never,
            _ => Answer::Now(503, json!("not ready: the server has not been heard yet")),
        });
        let began = Instant::now();
        let nodes = Nodes::look(&api, "mesh", None).await.ok().unwrap();
        assert!(began.elapsed() <= ALL, "{:?}", began.elapsed());
        assert_eq!((nodes.names.len(), nodes.agents.len()), (100, 100));
        let fault = nodes.are_served((1, 34)).unwrap_err();
        assert!(fault.found.ends_with("and 97 more"), "{}", fault.found);
        let heard = nodes.agents.iter().find(|a| a.node == "n2").unwrap();
        assert_eq!(heard.ready, Err("not ready: the server has not been heard yet".into()));
        let one = Nodes::look(&api, "mesh", Some("n2")).await.ok().unwrap();
        assert_eq!((one.names, one.agents.len()), (vec!["n2".to_owned()], 1));
    }
}
