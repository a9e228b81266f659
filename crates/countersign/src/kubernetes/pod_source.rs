//! `check`'s finding about where each node's agent learns of its pods: from the API server, and from the kubelet where
//! its certificate verifies.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use countersign_identity::bundle::certificates_from_pem;
use countersign_watch::in_words;
use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::check::nodes::{self, Nodes};
use super::check::{Fault, Outcome};
use super::cluster::words;
use crate::metrics_page::{label, metric};

/// Port of a kubelet that does not say another.
const KUBELET_PORT: i32 = 10_250;
/// Longest attempt to reach a kubelet.
const TRY_TIMEOUT: Duration = Duration::from_secs(3);
/// Most kubelets that are tried, and how many at once.
const MAX_TRIES: usize = 100;
const AT_ONCE: usize = 16;
/// Most nodes that are named in a finding.
const MAX_NAMED: usize = 3;

const MEND: &str = "may service account countersign-agent list and watch pods? Apply the manifests of `countersign \
                    install`, and see the agent's log";
const KUBELET_MEND: &str = "set agent.watchPods=true, or have the kubelet's certificate signed by the cluster's CA or by that of \
                            agent.kubeletCA (docs/kubernetes.md, where agents learn of pods)";

/// Which sources each agent has, by what it says itself.
pub fn installed(nodes: &Nodes) -> Outcome {
    let told = |agent: &nodes::Agent| Agent {
        node: agent.node.clone(),
        sources: agent.metrics.as_deref().map(Sources::read).map_err(Clone::clone),
        ready: agent.ready.clone(),
    };
    judge(nodes.agents.iter().map(told).collect())
}

/// What an agent says of itself, or why it says nothing.
struct Agent {
    node: String,
    sources: Result<Sources, String>,
    /// Whether it is ready; else its reason.
    ready: Result<(), String>,
}

/// The sources of one agent.
#[derive(Debug, PartialEq, Eq)]
struct Sources {
    works: BTreeSet<&'static str>,
    fails: BTreeSet<&'static str>,
}

impl Sources {
    fn read(metrics: &str) -> Self {
        let (mut works, mut fails) = (BTreeSet::new(), BTreeSet::new());
        for (labels, value) in metric(metrics, "countersign_agent_pod_source_up") {
            let name = match label(labels, "source") {
                Some("api_server") => "API server",
                Some("kubelet") => "kubelet",
                _ => continue,
            };
            if value > 0.0 {
                works.insert(name)
            } else {
                fails.insert(name)
            };
        }
        Self { works, fails }
    }
}

fn judge(agents: Vec<Agent>) -> Outcome {
    if agents.is_empty() {
        return Err(Fault::new("no agent runs", "apply the manifests of `countersign install`"));
    }
    let (mut good, mut bad) = (BTreeMap::<String, Vec<String>>::new(), vec![]);
    // A kubelet that cannot be verified is mended otherwise than a permission that is missing.
    let mut mends = BTreeSet::new();
    for Agent { node, sources, ready } in agents {
        let sources = match sources {
            Ok(sources) => sources,
            Err(why) => {
                bad.push(format!("the agent of {node} does not say: {}", words(&why)));
                mends.insert(MEND);
                continue;
            }
        };
        let lacks = if sources.works.is_empty() {
            Some("no source of pods works")
        } else if sources.fails.contains("API server") {
            Some("the watch on the API server fails")
        } else {
            None
        };
        if let Some(lacks) = lacks {
            mends.insert(if sources.fails.contains("API server") { MEND } else { KUBELET_MEND });
            // Its own words name the permission.
            let why = ready.err().map(|e| format!(": {}", words(&e))).unwrap_or_default();
            bad.push(format!("on {node} {lacks}{why}"));
        } else {
            let which = sources.works.into_iter().collect::<Vec<_>>().join(" and ");
            let without = if sources.fails.is_empty() { "" } else { " (the kubelet does not verify or answer)" };
            good.entry(format!("{which}{without}")).or_default().push(node);
        }
    }
    if bad.is_empty() {
        return Ok(good
            .into_iter()
            .map(|(which, on)| format!("{}: {which}", named(on)))
            .collect::<Vec<_>>()
            .join("; "));
    }
    Err(Fault::new(bad.join("; "), mends.into_iter().collect::<Vec<_>>().join("; ")))
}

/// Some nodes by name, the rest by number.
fn named(mut nodes: Vec<String>) -> String {
    nodes.sort_unstable();
    let rest = nodes.len().saturating_sub(MAX_NAMED);
    nodes.truncate(MAX_NAMED);
    let named = nodes.join(", ");
    if rest == 0 { named } else { format!("{named} and {rest} more") }
}

/// What a kubelet's certificate is worth from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kubelet {
    Verified,
    Unverified,
    Unreachable,
}

/// Which kubelets can serve as the second source. That none can is no fault: the API server is enough.
pub async fn before(client: &Client) -> Outcome {
    let told = |what: String| Ok(format!("agents watch pods on the API server; {what}"));
    let tls = match trusting_cluster(client).await {
        Ok(tls) => tls,
        Err(why) => return told(format!("kubelets were not tried: {}", words(&why))),
    };
    let nodes = match Api::<Node>::all(client.clone()).list(&ListParams::default()).await {
        Ok(nodes) => nodes.items,
        Err(why) => return told(format!("kubelets were not tried: {}", in_words(&why))),
    };
    let tries = stream::iter(nodes.into_iter().take(MAX_TRIES)).map(|node| {
        let tls = tls.clone();
        async move {
            let tried = tokio::time::timeout(TRY_TIMEOUT, try_kubelet(&node, tls)).await;
            (tried.unwrap_or(Kubelet::Unreachable), node.name_any())
        }
    });
    let mut found = BTreeMap::<Kubelet, Vec<String>>::new();
    for (kubelet, node) in tries.buffer_unordered(AT_ONCE).collect::<Vec<_>>().await {
        found.entry(kubelet).or_default().push(node);
    }
    told(kubelets(found))
}

fn kubelets(found: BTreeMap<Kubelet, Vec<String>>) -> String {
    let said = found.into_iter().map(|(kubelet, nodes)| {
        let nodes = named(nodes);
        match kubelet {
            Kubelet::Verified => format!("kubelets that verify: {nodes}"),
            Kubelet::Unverified => format!("kubelets that sign themselves, and are not asked: {nodes}"),
            Kubelet::Unreachable => format!("kubelets out of reach from here: {nodes}"),
        }
    });
    said.collect::<Vec<_>>().join("; ")
}

/// Trusts the CA that pods verify the cluster by.
async fn trusting_cluster(client: &Client) -> Result<Arc<ClientConfig>, String> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    let map = maps.get("kube-root-ca.crt").await.map_err(|e| in_words(&e))?;
    let pem = map.data.unwrap_or_default().remove("ca.crt").ok_or("ConfigMap kube-root-ca.crt has no ca.crt")?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates_from_pem(pem.as_bytes()).map_err(|e| e.to_string())? {
        roots.add(certificate).map_err(|e| e.to_string())?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(Arc::new(tls.map_err(|e| e.to_string())?.with_root_certificates(roots).with_no_client_auth()))
}

/// Makes a TLS connection to a kubelet, as an agent does, and sends nothing over it.
async fn try_kubelet(node: &Node, tls: Arc<ClientConfig>) -> Kubelet {
    let status = node.status.as_ref();
    let addresses = status.and_then(|s| s.addresses.as_ref());
    let Some(address) = addresses.into_iter().flatten().find(|a| a.type_ == "InternalIP") else {
        return Kubelet::Unreachable;
    };
    let port = status.and_then(|s| s.daemon_endpoints.as_ref()?.kubelet_endpoint.as_ref()).map(|e| e.port);
    let Ok(port) = u16::try_from(port.unwrap_or(KUBELET_PORT)) else { return Kubelet::Unreachable };
    let Ok(name) = ServerName::try_from(address.address.clone()) else { return Kubelet::Unreachable };
    let Ok(tcp) = TcpStream::connect((address.address.as_str(), port)).await else { return Kubelet::Unreachable };
    match TlsConnector::from(tls).connect(name, tcp).await {
        Ok(_) => Kubelet::Verified,
        Err(error) => {
            let tls = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
            if matches!(tls, Some(rustls::Error::InvalidCertificate(_))) {
                Kubelet::Unverified
            } else {
                Kubelet::Unreachable
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(node: &str, api_server: u8, kubelet: u8, ready: Result<(), String>) -> Agent {
        let sources = Sources::read(&format!(
            "# TYPE x gauge\ncountersign_agent_pod_source_up{{source=\"api_server\"}} {api_server}\n\
             countersign_agent_pod_source_up{{source=\"kubelet\"}} {kubelet}\n"
        ));
        Agent { node: node.into(), sources: Ok(sources), ready }
    }

    #[test]
    fn each_nodes_sources_are_named_and_a_kubelet_that_signs_itself_is_no_fault() {
        let agents = vec![agent("a", 1, 1, Ok(())), agent("c", 1, 0, Ok(())), agent("b", 1, 1, Ok(()))];
        let found = judge(agents).unwrap();
        assert_eq!(found, "c: API server (the kubelet does not verify or answer); a, b: API server and kubelet");
        assert_eq!(named(["e", "d", "c", "b", "a"].map(str::to_owned).to_vec()), "a, b, c and 2 more");
    }

    #[test]
    fn an_agent_whose_watch_fails_is_named_with_the_permission() {
        let why = || Err("not ready: the API server refuses pods: pods is forbidden".to_owned());
        let Fault { found, mend, .. } = judge(vec![agent("a", 0, 1, why()), agent("b", 1, 0, Ok(()))]).unwrap_err();
        assert!(found.contains("on a the watch on the API server fails: not ready: the API server refuses"), "{found}");
        assert!(!found.contains("on b") && mend.contains("list and watch pods"));
        let Fault { found, .. } = judge(vec![agent("a", 0, 0, why())]).unwrap_err();
        assert!(found.contains("on a no source of pods works: not ready"), "{found}");
        assert!(judge(vec![]).is_err());
        let kubelet = Sources { works: BTreeSet::new(), fails: ["kubelet"].into() };
        let alone = Agent { sources: Ok(kubelet), ..agent("a", 0, 0, why()) };
        assert!(judge(vec![alone]).unwrap_err().mend.starts_with("set agent.watchPods=true"));
        assert!(judge(vec![Agent { sources: Err("silent".into()), ..agent("a", 1, 1, Ok(())) }]).is_err());
    }

    #[test]
    fn kubelets_are_told_apart_before_an_installation() {
        let found = [(Kubelet::Unverified, vec!["b".to_owned()]), (Kubelet::Verified, vec!["a".to_owned()])];
        let told = kubelets(found.into());
        assert_eq!(told, "kubelets that verify: a; kubelets that sign themselves, and are not asked: b");
    }
}
