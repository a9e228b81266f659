//! Node attestation by a projected service account token, which the cluster's API server verifies (`TokenReview`).
//! SPIRE's wire format.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use countersign_identity::TrustDomain;
use countersign_identity::selector::{Selector, SelectorSet};
use countersign_identity::shown::shown;
use countersign_identity::trust_domain::agent_id;
use countersign_watch::in_words;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, PostParams};
use serde::Deserialize;

use super::{AttestError, AttestedNode, Challenger, NodeAttestor};
use crate::config::PsatCluster;

/// Keys under which the API server names the token's pod (`k8s.io/apiserver`, bound tokens).
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Accepts agents whose pod is known to this cluster's API server.
pub struct K8sPsat {
    /// The cluster, and which of its tokens are accepted.
    pub cluster: PsatCluster,
    /// The trust domain of the agent's SPIFFE ID.
    pub trust_domain: TrustDomain,
    /// Client of the cluster's API server.
    pub client: kube::Client,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Evidence {
    cluster: String,
    token: String,
}

/// The pod that a token is bound to.
#[derive(Debug, PartialEq, Eq)]
struct TokenPod {
    namespace: String,
    service_account: String,
    name: String,
    uid: String,
}

#[async_trait]
impl NodeAttestor for K8sPsat {
    fn kind(&self) -> &'static str {
        "k8s_psat"
    }

    async fn attest(&self, payload: &[u8], _: &mut dyn Challenger) -> Result<AttestedNode, AttestError> {
        let malformed = |why: String| AttestError::Malformed(format!("k8s_psat payload: {why}"));
        let evidence: Evidence = serde_json::from_slice(payload).map_err(|e| malformed(e.to_string()))?;
        if evidence.cluster != self.cluster.name {
            return Err(AttestError::Refused(format!(
                "the agent says it is in cluster `{}`; this server attests nodes of `{}` (--k8s-psat-cluster)",
                shown(&evidence.cluster),
                self.cluster.name
            )));
        }
        let pod = token_pod(&self.review(evidence.token).await?)?;
        let account = format!("{}:{}", pod.namespace, pod.service_account);
        // Any pod of the cluster can get a token with our audience; only the agents' service account may attest a node.
        if !self.cluster.service_accounts.contains(&account) {
            return Err(AttestError::Refused(format!(
                "service account `{account}` may not attest nodes; allowed are {} (--k8s-psat-allow)",
                self.cluster.service_accounts.iter().cloned().collect::<Vec<_>>().join(", ")
            )));
        }
        // Node name and labels come from the API server, never from the payload, which the agent could make up.
        let found: Pod = Api::namespaced(self.client.clone(), &pod.namespace).get(&pod.name).await.map_err(asked)?;
        // A pod of the same name may have replaced the one that the token was issued for.
        if found.metadata.uid.as_deref() != Some(&pod.uid) {
            return Err(AttestError::Refused(format!(
                "the token belongs to a pod `{}` that is gone; another has its name now",
                pod.name
            )));
        }
        let on = found.spec.as_ref().and_then(|s| s.node_name.clone());
        let on = on.ok_or_else(|| AttestError::Refused(format!("pod `{}` is on no node yet", pod.name)))?;
        let node: Node = Api::all(self.client.clone()).get(&on).await.map_err(asked)?;
        let node_uid =
            node.metadata.uid.clone().ok_or_else(|| AttestError::Refused(format!("node `{on}` has no UID")))?;
        let id = agent_id(&self.trust_domain, "k8s_psat", &format!("{}/{node_uid}", self.cluster.name));
        let id = id.map_err(|e| malformed(e.to_string()))?;
        let selectors = self.selectors(&pod, &found, &on, &node, &node_uid)?;
        Ok(AttestedNode { id, selectors, can_reattest: true, alias: None, evidence: None })
    }
}

impl K8sPsat {
    /// Asks the API server for the identity of the token's bearer.
    async fn review(&self, token: String) -> Result<UserInfo, AttestError> {
        let audiences = Some(self.cluster.audiences.iter().cloned().collect());
        let review = TokenReview { spec: TokenReviewSpec { audiences, token: Some(token) }, ..TokenReview::default() };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let status = reviews.create(&PostParams::default(), &review).await.map_err(asked)?.status.unwrap_or_default();
        let refused = |why: &str| AttestError::Refused(format!("the service account token is refused: {why}"));
        if status.authenticated != Some(true) {
            return Err(refused(status.error.as_deref().unwrap_or("the API server does not know it")));
        }
        // An API server without audience support returns none. The token then proves nothing to us, as any service
        // could replay it.
        if !status.audiences.unwrap_or_default().iter().any(|a| self.cluster.audiences.contains(a)) {
            return Err(refused("it was made for another audience"));
        }
        status.user.ok_or_else(|| refused("it names nobody"))
    }

    fn selectors(
        &self,
        pod: &TokenPod,
        found: &Pod,
        node_name: &str,
        node: &Node,
        node_uid: &str,
    ) -> Result<SelectorSet, AttestError> {
        let mut values = vec![
            format!("cluster:{}", self.cluster.name),
            format!("agent_ns:{}", pod.namespace),
            format!("agent_sa:{}", pod.service_account),
            format!("agent_pod_name:{}", pod.name),
            format!("agent_pod_uid:{}", pod.uid),
            format!("agent_node_name:{node_name}"),
            format!("agent_node_uid:{node_uid}"),
        ];
        if let Some(ip) = found.status.as_ref().and_then(|s| s.host_ip.as_ref()) {
            values.push(format!("agent_node_ip:{ip}"));
        }
        let labels = |kind: &str, labels: Option<&BTreeMap<String, String>>, keys: &BTreeSet<String>| {
            let allowed = labels.into_iter().flatten().filter(|(k, _)| keys.contains(*k));
            allowed.map(|(k, v)| format!("agent_{kind}_label:{k}:{v}")).collect::<Vec<_>>()
        };
        values.extend(labels("node", node.metadata.labels.as_ref(), &self.cluster.node_labels));
        values.extend(labels("pod", found.metadata.labels.as_ref(), &self.cluster.pod_labels));
        let all = values.into_iter().map(|v| Selector::new("k8s_psat", v)).collect::<Result<SelectorSet, _>>();
        all.map_err(|e| AttestError::Refused(e.to_string()))
    }
}

/// A failure of the API server itself is not the agent's fault, so the agent may try again.
#[allow(clippy::needless_pass_by_value)] // taken by `map_err`
fn asked(error: kube::Error) -> AttestError {
    AttestError::Unavailable(format!("the Kubernetes API server did not answer for the token: {}", in_words(&error)))
}

fn token_pod(user: &UserInfo) -> Result<TokenPod, AttestError> {
    let refused = |why: String| AttestError::Refused(format!("the service account token is refused: {why}"));
    let name = user.username.as_deref().unwrap_or_default();
    let mut account = name.strip_prefix("system:serviceaccount:").unwrap_or_default().splitn(2, ':');
    let (Some(namespace), Some(service_account)) = (account.next().filter(|n| !n.is_empty()), account.next()) else {
        return Err(refused(format!("`{name}` is no service account")));
    };
    let extra = |key: &str| {
        let values = user.extra.as_ref().and_then(|e| e.get(key));
        values
            .and_then(|v| v.first())
            .cloned()
            .ok_or_else(|| refused("it is not bound to a pod; project it into the agent's pod".into()))
    };
    Ok(TokenPod {
        namespace: namespace.to_owned(),
        service_account: service_account.to_owned(),
        name: extra(POD_NAME)?,
        uid: extra(POD_UID)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str, extra: &[(&str, &str)]) -> UserInfo {
        UserInfo {
            username: Some(name.to_owned()),
            extra: Some(extra.iter().map(|(k, v)| ((*k).to_owned(), vec![(*v).to_owned()])).collect()),
            ..UserInfo::default()
        }
    }

    #[test]
    fn a_token_counts_only_when_it_is_bound_to_a_pod_of_a_service_account() {
        let bound = [(POD_NAME, "agent-x"), (POD_UID, "u1")];
        let pod = token_pod(&user("system:serviceaccount:mesh:agent", &bound)).unwrap();
        assert_eq!((pod.namespace.as_str(), pod.service_account.as_str(), pod.uid.as_str()), ("mesh", "agent", "u1"));
        for (name, extra) in [
            ("system:serviceaccount:mesh:agent", &bound[..1]),
            ("system:node:a", &bound[..]),
            ("", &bound),
            ("system:serviceaccount:mesh", &bound),
        ] {
            assert!(token_pod(&user(name, extra)).is_err(), "{name}");
        }
    }
}
