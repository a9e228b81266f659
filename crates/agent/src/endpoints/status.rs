//! `countersign.v1.Status`: the facts that `countersign status` shows about an agent, for root and the agent's own
//! user.

use async_trait::async_trait;
use countersign_api::peer::UnixPeer;
use countersign_api::push::status_server::Status as StatusService;
use countersign_api::push::{GetStatusRequest, GetStatusResponse, Identity};
use tonic::{Request, Response, Status};

use super::Endpoint;

#[async_trait]
impl StatusService for Endpoint {
    async fn get_status(&self, request: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        let own = nix::unistd::geteuid().as_raw();
        let uid = request.extensions().get::<UnixPeer>().map(|p| p.uid);
        if uid.is_none_or(|uid| uid != 0 && uid != own) {
            return Err(Status::permission_denied(format!("only root and uid {own} may ask for the agent's status")));
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
