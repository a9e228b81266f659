//! `countersign.v1.Status`: the facts that `countersign status` shows about an agent, for root of its machine and the agent's own
//! user.

use std::sync::LazyLock;

use async_trait::async_trait;
use countersign_api::peer::UnixPeer;
use countersign_api::push::status_server::Status as StatusService;
use countersign_api::push::{GetStatusRequest, GetStatusResponse, Identity};
use countersign_watch::cgroup::container_of;
use tonic::{Request, Response, Status};

use super::Endpoint;
use crate::peer;

/// Whether a caller with such a number is who it seems: root in a container has the same one.
fn is_of_this_machine(peer: &UnixPeer) -> bool {
    static OWN: LazyLock<String> = LazyLock::new(|| std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default());
    // Whether its namespaces are others does not matter here.
    peer::look_up(peer, true).is_ok_and(|process| are_neighbours(&process.cgroup, &OWN))
}

/// Whether a process is in no pod, or in the same one as the agent, by the cgroups of both (`/proc/PID/cgroup`).
fn are_neighbours(theirs: &str, own: &str) -> bool {
    let pod = |text: &str| container_of(text).map(|container| container.map(|c| c.pod_uid));
    match pod(theirs) {
        Ok(None) => true,
        Ok(theirs) => pod(own) == Ok(theirs),
        Err(_) => false,
    }
}

#[async_trait]
impl StatusService for Endpoint {
    async fn get_status(&self, request: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        let own = nix::unistd::geteuid().as_raw();
        let peer = request.extensions().get::<UnixPeer>();
        if peer.is_none_or(|peer| peer.uid != 0 && peer.uid != own) {
            return Err(Status::permission_denied(format!("only root and uid {own} may ask for the agent's status")));
        }
        if !peer.is_some_and(is_of_this_machine) {
            return Err(Status::permission_denied("root in a pod is not root of the node: ask in the agent's own pod"));
        }
        let core = &self.0;
        let state = core.cache.read();
        let agent = core.link.identity().borrow().clone();
        let mut facts = vec![
            ("server".to_owned(), core.config.server.clone()),
            ("agent ID".to_owned(), agent.as_ref().map_or_else(|| "not attested".into(), |s| s.id().to_string())),
            ("entries".to_owned(), state.entries.len().to_string()),
            ("SVIDs ready".to_owned(), state.entries.values().filter(|c| c.svid.is_some()).count().to_string()),
            ("bundle authorities".to_owned(), state.bundle.as_ref().map_or(0, |b| b.authorities.len()).to_string()),
            ("directory addresses followed".to_owned(), core.directory.len().to_string()),
            ("open streams".to_owned(), core.metrics.streams.get().to_string()),
        ];
        facts.extend(core.attestors.iter().flat_map(|a| a.facts()));
        if let Some(svid) = agent {
            facts.push(("agent SVID expires".to_owned(), svid.facts().not_after.to_string()));
        }
        if let Some(why) = core.link.keeper().unsaved() {
            facts.push(("not on disk yet".to_owned(), why));
        }
        let identities = state.entries.values().map(|c| Identity {
            entry_id: c.entry.id.to_string(),
            spiffe_id: c.entry.spiffe_id.to_string(),
            serial: c.svid.as_ref().map(|s| s.facts().serial.clone()).unwrap_or_default(),
            expires_at: c.svid.as_ref().map_or(0, |s| s.facts().not_after.unix_timestamp()),
            authority_id: c.svid.as_ref().map(|s| s.facts().authority_id.clone()).unwrap_or_default(),
        });
        Ok(Response::new(GetStatusResponse {
            role: "agent".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            trust_domain: core.config.trust_domain.to_string(),
            started_at: core.started_at.unix_timestamp(),
            facts: facts.into_iter().collect(),
            refused: core.metrics.refused_counts().into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
            identities: identities.collect(),
            ..GetStatusResponse::default()
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_in_a_pod_is_not_root_of_the_node_but_for_the_agents_own_pod() {
        let pod = |uid: &str, container: char| {
            let id = container.to_string().repeat(64);
            format!("0::/kubepods/burstable/pod{uid}/{id}\n")
        };
        let (own, theirs) = ("11111111-2222-3333-4444-555555555555", "66666666-2222-3333-4444-555555555555");
        let agent = pod(own, 'a');
        assert!(are_neighbours("0::/system.slice/ssh.service\n", &agent));
        assert!(are_neighbours(&pod(own, 'b'), &agent), "a command in the agent's pod");
        assert!(!are_neighbours(&pod(theirs, 'c'), &agent));
        let machine = "0::/system.slice/countersign-agent.service\n";
        assert!(are_neighbours("0::/user.slice\n", machine));
        assert!(!are_neighbours(&pod(theirs, 'c'), machine), "an agent of the machine has no pod of its own");
        let imitated = format!("0::/user.slice/u{}", &pod(own, 'a')[4..]);
        assert!(!are_neighbours(&imitated, &agent), "a cgroup that anybody may have made");
    }
}
