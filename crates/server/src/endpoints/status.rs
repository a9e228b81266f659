//! `countersign.v1.Status`: the facts that `countersign status` shows about a server.

use async_trait::async_trait;
use countersign_api::push::status_server::Status as StatusService;
use countersign_api::push::{GetStatusRequest, GetStatusResponse};
use tonic::{Request, Response, Status};

use super::Endpoint;
use crate::audit::rfc3339;
use crate::authority::{self, Kind};
use crate::caller::Caller;

#[async_trait]
impl StatusService for Endpoint {
    async fn get_status(&self, request: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let core = &self.0;
        let bundle = core.authorities.bundle().borrow().clone();
        let mut facts = vec![
            ("agents".to_owned(), core.agents.len().to_string()),
            ("agents connected".to_owned(), core.metrics.push_streams.get().to_string()),
            ("entries".to_owned(), core.entries.len().to_string()),
            ("directory workloads".to_owned(), core.directory.len().to_string()),
            ("bundle authorities".to_owned(), bundle.authorities.len().to_string()),
            ("bundle sequence".to_owned(), bundle.sequence.to_string()),
            ("listening on".to_owned(), core.config.bind.to_string()),
        ];
        for record in core.authorities.journal().iter() {
            if record.status != authority::Status::Old {
                let what = if record.kind() == Kind::Jwt { "JWT authority" } else { "authority" };
                facts.push((
                    format!("{what} {}", record.status),
                    format!("{} until {}", record.id, rfc3339(record.validity().1)),
                ));
            }
        }
        Ok(Response::new(GetStatusResponse {
            role: "server".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            trust_domain: core.trust_domain().to_string(),
            started_at: core.started_at.unix_timestamp(),
            facts: facts.into_iter().collect(),
            refused: core.metrics.refused_counts().into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
            identities: vec![],
            ..GetStatusResponse::default()
        }))
    }
}
