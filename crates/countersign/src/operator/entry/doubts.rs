//! What an entry says that is allowed, takes effect for nobody, and is probably a mistake.

use std::collections::BTreeSet;

use countersign_api::spire::agent::GetAgentRequest;
use countersign_api::spire::agent::agent_client::AgentClient;
use countersign_api::spire::entry::list_entries_request::Filter;
use countersign_api::spire::types;
use tonic::Code;

use super::super::shown;
use super::list;
use crate::clients::{Asking, client};
use crate::settings::words::did_you_mean;

/// Types of the selectors that an attestor of ours makes: of workloads, then of nodes.
const TYPES: [&str; 5] = ["unix", "k8s", "x509pop", "k8s_psat", "spiffe_id"];
/// Path of the server's ID, which is the parent of node aliases (SPIRE's `entry create -node`).
const SERVER: &str = "/spire/server";

/// A sentence for each doubt about an entry. What the server does not answer is not doubted.
pub async fn about(channel: Asking, entry: &types::Entry) -> Vec<String> {
    let types: BTreeSet<&str> = entry.selectors.iter().map(|s| s.r#type.as_str()).collect();
    let mut doubts: Vec<String> = types.into_iter().filter_map(of_selector).collect();
    let parent = entry.parent_id.clone().filter(|id| id.path != SERVER);
    if let Some(parent) = parent
        && is_nobody(channel, &parent).await
    {
        doubts.push(format!(
            "no node has the parent ID {} yet, so no agent serves this entry; `countersign node list` shows the nodes",
            shown(Some(&parent))
        ));
    }
    doubts
}

fn of_selector(kind: &str) -> Option<String> {
    (!TYPES.contains(&kind)).then(|| {
        let hint = did_you_mean(kind, TYPES);
        format!("no attestor makes selectors of type `{}`, so nothing matches this entry{hint}", kind.escape_debug())
    })
}

/// Whether neither an agent nor a node alias has this ID.
async fn is_nobody(channel: Asking, id: &types::Spiffeid) -> bool {
    let request = GetAgentRequest { id: Some(id.clone()), output_mask: None };
    match client!(AgentClient, channel.clone()).get_agent(request).await {
        Err(status) if status.code() == Code::NotFound => {}
        _ => return false,
    }
    let alias = Filter { by_spiffe_id: Some(id.clone()), ..Filter::default() };
    list(channel, alias).await.is_ok_and(|found| found.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_of_no_attestor_is_doubted_with_what_was_meant() {
        assert_eq!(of_selector("unix"), None);
        let said = of_selector("unx").unwrap();
        assert!(said.contains("`unx`") && said.ends_with("did you mean `unix`?"), "{said}");
        assert!(of_selector("a\nb").unwrap().contains("`a\\nb`"));
    }
}
