//! `spire.api.server.svid.v1`: signing.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use countersign_api::convert::{id_from_wire, id_to_wire};
use countersign_api::spire::svid::svid_server::Svid;
use countersign_api::spire::svid::{
    BatchNewX509svidRequest, BatchNewX509svidResponse, MintJwtsvidRequest, MintJwtsvidResponse, MintX509svidRequest,
    MintX509svidResponse, NewDownstreamX509caRequest, NewDownstreamX509caResponse, NewJwtsvidRequest,
    NewJwtsvidResponse, NewX509svidParams, batch_new_x509svid_response,
};
use countersign_api::spire::types;
use countersign_identity::profile::jwt::Audience;
use countersign_identity::profile::{Issued, RequestedKey};
use countersign_identity::trust_domain::{is_reserved, parse_workload_id};
use countersign_identity::{Entry, EntryId, SpiffeId};
use futures::StreamExt;
use tonic::{Request, Response, Status};

use super::{Endpoint, invalid, item_status};
use crate::agents::AttestedAgent;
use crate::caller::{Caller, Downstream};
use crate::config::JWT_SVID_TTL;
use crate::core::{Core, SigningRequest};
use crate::signing_jwt::IssuedToken;
use crate::tokens::{self, TokenSigning};

/// Most requests per batch (SPIRE: 500).
const MAX_BATCH: usize = 500;
/// Signatures of a batch that are waited for at once, where the authority's key is slow.
const SIGNED_AT_ONCE: usize = 16;

/// Encodes a signed SVID; `hint` is the entry's, or empty.
pub(super) fn svid_to_wire(id: &SpiffeId, issued: &Issued, hint: &str) -> types::X509svid {
    types::X509svid {
        cert_chain: issued.chain.iter().map(|c| c.to_vec()).collect(),
        id: Some(id_to_wire(id)),
        expires_at: issued.facts.not_after.unix_timestamp(),
        hint: hint.to_owned(),
    }
}

/// Encodes a signed token; `hint` is the entry's, or empty.
fn token_to_wire(id: &SpiffeId, issued: IssuedToken, hint: &str) -> types::Jwtsvid {
    types::Jwtsvid {
        token: issued.token,
        id: Some(id_to_wire(id)),
        expires_at: issued.expires_at.unix_timestamp(),
        issued_at: issued.issued_at.unix_timestamp(),
        hint: hint.to_owned(),
    }
}

/// The entry with this ID, if this agent may have SVIDs for it now.
fn authorized(core: &Core, kind: &'static str, agent: &AttestedAgent, id: &EntryId) -> Result<Arc<Entry>, Status> {
    core.entries.authorized_one(agent, id, core.now()).ok_or_else(|| {
        let why = "the entry does not exist or is not this agent's";
        core.refuse(kind, &agent.id.to_string(), id.as_str(), "", "not_authorized", why);
        Status::not_found(why)
    })
}

/// The lifetime that is asked for, in seconds; zero stands for `default`.
fn ttl_or(seconds: i32, default: Duration) -> Result<Duration, Status> {
    match u64::try_from(seconds) {
        Ok(0) => Ok(default),
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => Err(invalid(format!("ttl: {seconds} is below zero"))),
    }
}

impl Endpoint {
    /// Refuses to mint what is not a workload's of our own trust domain.
    fn refuse_foreign(&self, kind: &'static str, caller: &str, id: &SpiffeId) -> Result<(), Status> {
        let td = self.0.trust_domain();
        if id.is_member_of(td) && !is_reserved(id) {
            return Ok(());
        }
        let why = format!("`{id}` cannot be minted: it must be a workload's ID of trust domain `{td}`");
        self.0.refuse(kind, caller, "", &id.to_string(), "bad_request", &why);
        Err(invalid(why))
    }
}

/// Signs one request of a batch.
async fn batch_item(
    core: &Core,
    agent: &AttestedAgent,
    caller: &Caller,
    asked: &NewX509svidParams,
) -> Result<types::X509svid, Status> {
    let id = asked.entry_id.parse().map_err(invalid)?;
    let entry = authorized(core, "x509_svid", agent, &id)?;
    let issued = core.sign_entry(caller, &entry, &asked.csr).await?;
    Ok(svid_to_wire(&entry.spiffe_id, &issued, &entry.hint))
}

#[async_trait]
impl Svid for Endpoint {
    async fn mint_x509svid(
        &self,
        request: Request<MintX509svidRequest>,
    ) -> Result<Response<MintX509svidResponse>, Status> {
        let caller = Caller::operator(&self.0, &request)?;
        self.0.within_sign_limit(&request, 1)?;
        let request = request.into_inner();
        let key = RequestedKey::from_csr(&request.csr).map_err(invalid)?;
        let id = parse_workload_id(key.uri().ok_or_else(|| invalid("the CSR has no URI name"))?).map_err(invalid)?;
        self.refuse_foreign("x509_svid", &caller.to_string(), &id)?;
        let ttl = ttl_or(request.ttl, self.0.issuance().svid_ttl)?;
        let issued = self
            .0
            .sign(&SigningRequest {
                kind: "x509_svid",
                caller: &caller.to_string(),
                entry_id: "",
                id: &id,
                dns_names: key.dns_names(),
                ttl,
                csr: &request.csr,
            })
            .await?;
        Ok(Response::new(MintX509svidResponse { svid: Some(svid_to_wire(&id, &issued, "")) }))
    }

    async fn batch_new_x509svid(
        &self,
        request: Request<BatchNewX509svidRequest>,
    ) -> Result<Response<BatchNewX509svidResponse>, Status> {
        let agent = Caller::agent(&self.0, &request)?;
        let count = request.get_ref().params.len();
        if count > MAX_BATCH {
            return Err(invalid(format!("a batch holds at most {MAX_BATCH} requests, this one {count}")));
        }
        self.0.within_sign_limit(&request, count)?;
        let caller = Caller::Agent(agent.clone());
        let signed = request.into_inner().params.into_iter().map(|p| {
            let (core, agent, caller) = (self.0.clone(), agent.clone(), caller.clone());
            async move { batch_item(&core, &agent, &caller, &p).await }
        });
        let results = futures::stream::iter(signed).buffered(SIGNED_AT_ONCE).map(|signed| {
            let (verdict, svid) = match signed {
                Ok(svid) => (Ok(()), Some(svid)),
                Err(status) => (Err(status), None),
            };
            batch_new_x509svid_response::Result { status: Some(item_status(&verdict)), svid }
        });
        Ok(Response::new(BatchNewX509svidResponse { results: results.collect().await }))
    }

    async fn mint_jwtsvid(
        &self,
        request: Request<MintJwtsvidRequest>,
    ) -> Result<Response<MintJwtsvidResponse>, Status> {
        let caller = Caller::operator(&self.0, &request)?.to_string();
        self.0.within_token_limit(&request)?;
        let asked = request.into_inner();
        let id = id_from_wire("id", asked.id).map_err(invalid)?;
        self.refuse_foreign(tokens::KIND, &caller, &id)?;
        let audience = Audience::new(asked.audience).map_err(invalid)?;
        let ttl = ttl_or(asked.ttl, JWT_SVID_TTL)?;
        let signing = TokenSigning { caller: &caller, entry_id: "", id: &id, audience: &audience, ttl, with_id: false };
        let issued = self.0.sign_token(&signing).await?;
        Ok(Response::new(MintJwtsvidResponse { svid: Some(token_to_wire(&id, issued, "")) }))
    }

    async fn new_jwtsvid(&self, request: Request<NewJwtsvidRequest>) -> Result<Response<NewJwtsvidResponse>, Status> {
        let agent = Caller::agent(&self.0, &request)?;
        self.0.within_token_limit(&request)?;
        let (caller, asked) = (agent.id.to_string(), request.into_inner());
        let audience = Audience::new(asked.audience).map_err(invalid)?;
        let id = asked.entry_id.parse().map_err(invalid)?;
        let entry = authorized(&self.0, tokens::KIND, &agent, &id)?;
        let ttl = entry.jwt_svid_ttl.unwrap_or(JWT_SVID_TTL);
        let signing = TokenSigning {
            caller: &caller,
            entry_id: id.as_str(),
            id: &entry.spiffe_id,
            audience: &audience,
            ttl,
            with_id: entry.additional.jwt_svid_include_jti,
        };
        let issued = self.0.sign_token(&signing).await?;
        Ok(Response::new(NewJwtsvidResponse { svid: Some(token_to_wire(&entry.spiffe_id, issued, &entry.hint)) }))
    }

    async fn new_downstream_x509ca(
        &self,
        request: Request<NewDownstreamX509caRequest>,
    ) -> Result<Response<NewDownstreamX509caResponse>, Status> {
        let caller = Downstream::of(&self.0, &request)?;
        self.0.within_sign_limit(&request, 1)?;
        let asked = request.into_inner();
        let ttl = ttl_or(asked.preferred_ttl, self.0.issuance().ca_ttl)?;
        let issued = self.0.sign_downstream(&caller, &asked.csr, ttl).await?;
        let bundle = self.0.authorities.bundle().borrow().clone();
        Ok(Response::new(NewDownstreamX509caResponse {
            ca_cert_chain: issued.chain.iter().map(|c| c.to_vec()).collect(),
            x509_authorities: bundle.authorities.iter().map(|root| root.der().to_vec()).collect(),
        }))
    }
}

#[cfg(test)]
mod tests;
