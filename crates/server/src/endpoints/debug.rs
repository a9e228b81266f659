//! `spire.api.server.debug.v1`: facts about the server.

use async_trait::async_trait;
use countersign_api::convert::id_to_wire;
use countersign_api::spire::debug::debug_server::Debug;
use countersign_api::spire::debug::{GetInfoRequest, GetInfoResponse, get_info_response};
use countersign_identity::X509Authority;
use countersign_identity::trust_domain::parse_id;
use rustls::pki_types::CertificateDer;
use tonic::{Request, Response, Status};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::Endpoint;
use crate::caller::Caller;
use crate::core::Core;

/// Counts as the API has them.
fn count(number: usize) -> i32 {
    number.try_into().unwrap_or(i32::MAX)
}

fn certificate(der: &CertificateDer<'_>) -> Option<get_info_response::Cert> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    let names = cert.subject_alternative_name().ok().flatten();
    let id = names.and_then(|names| {
        names.value.general_names.iter().find_map(|name| match name {
            GeneralName::URI(uri) => parse_id(uri).ok(),
            _ => None,
        })
    });
    Some(get_info_response::Cert {
        id: id.as_ref().map(id_to_wire),
        expires_at: cert.validity().not_after.timestamp(),
        subject: cert.subject().to_string(),
    })
}

/// The server's own SVID with what is above it, up to the root.
fn chain(core: &Core) -> Vec<get_info_response::Cert> {
    let (own, bundle) = (core.own_chain.load_full(), core.authorities.bundle().borrow().clone());
    let root = bundle.authorities.iter().find(|root| own.last().is_some_and(|last| root.has_issued(last)));
    own.iter().chain(root.map(X509Authority::der)).filter_map(certificate).collect()
}

#[async_trait]
impl Debug for Endpoint {
    async fn get_info(&self, request: Request<GetInfoRequest>) -> Result<Response<GetInfoResponse>, Status> {
        Caller::local(&self.0, &request)?;
        let core = &self.0;
        let uptime = (core.now() - core.started_at).whole_seconds().try_into().unwrap_or(i32::MAX);
        Ok(Response::new(GetInfoResponse {
            svid_chain: chain(core),
            uptime,
            agents_count: count(core.agents.len()),
            // As SPIRE counts them: with our own.
            federated_bundles_count: count(core.federated.all().len() + 1),
            entries_count: count(core.entries.len()),
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::own_svid::OwnSvid;
    use crate::testing::{agent_call, local, server};
    use tonic::Code;

    #[tokio::test]
    async fn a_local_caller_is_told_what_the_server_has_and_who_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let core = server(&dir).await;
        let _own = OwnSvid::new(core.clone()).await.unwrap();
        let endpoint = Endpoint(Arc::clone(&core));
        let (_, agent) = agent_call(&core, "1").await;
        let info = endpoint.get_info(local(GetInfoRequest {})).await.unwrap().into_inner();
        assert_eq!((info.agents_count, info.entries_count, info.federated_bundles_count), (1, 0, 1));
        let ids: Vec<_> = info.svid_chain.iter().map(|c| c.id.clone().unwrap().path).collect();
        assert_eq!(ids, ["/spire/server", ""], "its own and the root's");
        let foreign = endpoint.get_info(agent.map(|()| GetInfoRequest {})).await.unwrap_err();
        assert_eq!(foreign.code(), Code::PermissionDenied);
    }
}
