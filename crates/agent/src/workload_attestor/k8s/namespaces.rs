//! `k8s:ns-label:KEY:VALUE`: labels of a pod's namespace. A pod does not hold them, so they are read from the API server
//! if the operator enables it.

use std::time::Duration;

use countersign_identity::Selector;
use countersign_identity::selector::SelectorSet;
use countersign_watch::in_words;
use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client};

/// Longest query.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads namespaces from the API server, one at a time.
pub struct Namespaces(Api<Namespace>);

impl Namespaces {
    /// By a client as the agent's service account, which must be allowed `get` on namespaces.
    pub fn new(client: Client) -> Self {
        Self(Api::all(client))
    }

    /// The current labels of a namespace.
    pub async fn labels(&self, namespace: &str) -> Result<SelectorSet, String> {
        let asked = tokio::time::timeout(QUERY_TIMEOUT, self.0.get_metadata(namespace)).await;
        let answer = asked.map_err(|_| "no answer in time".to_owned()).and_then(|a| a.map_err(|e| in_words(&e)));
        let found = answer.map_err(|e| format!("cannot ask the API server for namespace {namespace}: {e}"))?;
        Ok(selectors(found.metadata.labels.iter().flatten()))
    }
}

fn selectors<'a>(labels: impl Iterator<Item = (&'a String, &'a String)>) -> SelectorSet {
    labels.filter_map(|(k, v)| Selector::new("k8s", format!("ns-label:{k}:{v}")).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_label_is_a_selector() {
        let labels = [("team".to_owned(), "shop".to_owned()), ("empty".to_owned(), String::new())];
        let found: Vec<String> =
            selectors(labels.iter().map(|(k, v)| (k, v))).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["k8s:ns-label:empty:", "k8s:ns-label:team:shop"]);
    }
}
