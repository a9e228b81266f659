//! `spire.api.server.bundle.v1`: our bundle and those of foreign trust domains.

use std::sync::Arc;

use async_trait::async_trait;
use countersign_api::convert::{
    bundle_from_wire, bundle_to_wire, jwt_authority_from_wire, jwt_authority_to_wire, trust_domain_from_wire,
};
use countersign_api::spire::bundle::batch_delete_federated_bundle_request::Mode;
use countersign_api::spire::bundle::bundle_server::Bundle;
use countersign_api::spire::bundle::{
    AppendBundleRequest, BatchCreateFederatedBundleRequest, BatchCreateFederatedBundleResponse,
    BatchDeleteFederatedBundleRequest, BatchDeleteFederatedBundleResponse, BatchSetFederatedBundleRequest,
    BatchSetFederatedBundleResponse, BatchUpdateFederatedBundleRequest, BatchUpdateFederatedBundleResponse,
    CountBundlesRequest, CountBundlesResponse, GetBundleRequest, GetFederatedBundleRequest,
    ListFederatedBundlesRequest, ListFederatedBundlesResponse, PublishJwtAuthorityRequest, PublishJwtAuthorityResponse,
    batch_create_federated_bundle_response, batch_delete_federated_bundle_response,
    batch_set_federated_bundle_response, batch_update_federated_bundle_response,
};
use countersign_api::spire::types;
use countersign_identity::shown::shown;
use countersign_identity::{TrustBundle, TrustDomain, X509Authority};
use tonic::{Request, Response, Status};

use super::{Endpoint, invalid, item_status, masks, paging};
use crate::caller::{Caller, Downstream};
use crate::core::{Core, status_of, store_status};
use crate::federation::bundles::{Expect, SetError};

/// Most bundles per batch.
const MAX_BATCH: usize = 1_000;

impl Endpoint {
    fn own_bundle(&self, mask: Option<types::BundleMask>) -> types::Bundle {
        masks::bundle(bundle_to_wire(&self.0.authorities.bundle().borrow()), mask)
    }

    /// A foreign trust domain's bundle that a caller brings.
    pub(super) fn parse_foreign(&self, wire: types::Bundle) -> Result<TrustBundle, Status> {
        let bundle = bundle_from_wire(wire).map_err(invalid)?;
        if bundle.trust_domain == *self.0.trust_domain() {
            return Err(invalid(format!(
                "`{}` is this server's own trust domain; use AppendBundle",
                bundle.trust_domain
            )));
        }
        if bundle.is_empty() {
            return Err(invalid(format!(
                "the bundle of `{}` holds no authority; delete it instead",
                bundle.trust_domain
            )));
        }
        Ok(bundle)
    }

    /// Sets bundles one by one, with a status for each.
    async fn set_foreign(
        &self,
        bundles: Vec<types::Bundle>,
        expect: Expect,
    ) -> Result<Vec<(types::Status, Option<types::Bundle>)>, Status> {
        if bundles.len() > MAX_BATCH {
            return Err(invalid(format!("a batch holds at most {MAX_BATCH} bundles")));
        }
        let mut results = vec![];
        for wire in bundles {
            let set = async {
                let bundle = self.parse_foreign(wire)?;
                let set = |core: Arc<Core>| async move { core.federated.set(bundle, expect).await.map_err(set_status) };
                let set: Arc<TrustBundle> = self.0.to_the_end(set).await?;
                Ok(bundle_to_wire(&set))
            };
            let set = set.await;
            results.push(match set {
                Ok(bundle) => (item_status(&Ok(())), Some(bundle)),
                Err(status) => (item_status(&Err(status)), None),
            });
        }
        Ok(results)
    }
}

/// Why a foreign bundle was not set or removed, as a gRPC status.
pub(super) fn set_status(error: SetError) -> Status {
    match error {
        SetError::Exists(_) => Status::already_exists(error.to_string()),
        SetError::Unknown(_) => Status::not_found(error.to_string()),
        SetError::Own(_) => invalid(error),
        SetError::Store(error) => store_status(&error),
    }
}

/// Deletes a foreign bundle, and does with the entries that federate with it as `mode` says.
async fn delete_foreign(core: &Core, td: &TrustDomain, mode: Mode) -> Result<(), Status> {
    // First of all: nothing federates with ourselves, and no entry may be changed on the way to a refusal.
    core.federated.refuse_own(td).map_err(set_status)?;
    let gone = || Status::not_found(format!("no bundle of `{td}` is here"));
    if core.federated.get(td.as_str()).is_none() {
        return Err(gone());
    }
    let linked = core.entries.page(None, usize::MAX, |e| e.federates_with.contains(td));
    match mode {
        _ if linked.is_empty() => {}
        Mode::Restrict => {
            return Err(Status::failed_precondition(format!(
                "{} entries federate with `{td}`: have it taken out of them (mode dissociate), or delete them with it (mode delete)",
                linked.len()
            )));
        }
        Mode::Delete => {
            let ids: Vec<_> = linked.iter().map(|e| e.id.clone()).collect();
            core.entries.delete(&ids).await.map_err(|e| store_status(&e))?;
        }
        Mode::Dissociate => core.entries.dissociate(td).await.map_err(|e| store_status(&e))?,
    }
    if core.federated.remove(td).await.map_err(set_status)? { Ok(()) } else { Err(gone()) }
}

#[async_trait]
impl Bundle for Endpoint {
    async fn count_bundles(
        &self,
        request: Request<CountBundlesRequest>,
    ) -> Result<Response<CountBundlesResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let count = (self.0.federated.all().len() + 1).try_into().unwrap_or(i32::MAX);
        Ok(Response::new(CountBundlesResponse { count }))
    }

    async fn get_bundle(&self, request: Request<GetBundleRequest>) -> Result<Response<types::Bundle>, Status> {
        Ok(Response::new(self.own_bundle(request.into_inner().output_mask)))
    }

    async fn append_bundle(&self, request: Request<AppendBundleRequest>) -> Result<Response<types::Bundle>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let more = request
            .x509_authorities
            .into_iter()
            .map(|c| X509Authority::from_der(c.asn1))
            .collect::<Result<Vec<_>, _>>()
            .map_err(invalid)?;
        let keys = request.jwt_authorities.into_iter().map(jwt_authority_from_wire).collect::<Result<Vec<_>, _>>();
        let keys = keys.map_err(invalid)?;
        if more.is_empty() && keys.is_empty() {
            return Err(invalid("no authority is given that could be appended"));
        }
        let append =
            |core: Arc<Core>| async move { core.authorities.append(more, keys).await.map_err(|e| status_of(&e)) };
        self.0.to_the_end(append).await?;
        Ok(Response::new(self.own_bundle(request.output_mask)))
    }

    async fn publish_jwt_authority(
        &self,
        request: Request<PublishJwtAuthorityRequest>,
    ) -> Result<Response<PublishJwtAuthorityResponse>, Status> {
        let caller = Downstream::of(&self.0, &request)?;
        self.0.within_sign_limit(&request, 1)?;
        let key = request.into_inner().jwt_authority.ok_or_else(|| invalid("missing JWT authority"))?;
        let mut key = jwt_authority_from_wire(key).map_err(|e| invalid(format!("invalid JWT authority: {e}")))?;
        // Without a near end it would stay for good, whatever becomes of the server below.
        let longest = self.0.issuance().ca_ttl.mul_f64(1.1);
        let (now, end) = (self.0.now(), key.expires_at);
        if end.is_none_or(|end| end <= now || end > now.saturating_add(longest.try_into().unwrap_or_default())) {
            return Err(invalid(format!(
                "invalid JWT authority: it needs an end that is ahead, by no more than authorities of this server live \
                 (--ca-ttl, {} s)",
                self.0.issuance().ca_ttl.as_secs()
            )));
        }
        key.tainted = false;
        let publish = |core: Arc<Core>| async move {
            let key_id = key.key_id().to_owned();
            let all = core.authorities.publish_jwt_key(key).await.map_err(|e| status_of(&e))?;
            tracing::info!(authority = shown(&key_id).to_string(), server = %caller.id, "JWT authority of a server below published");
            Ok(all)
        };
        let all = self.0.to_the_end(publish).await?;
        let jwt_authorities = all.iter().map(jwt_authority_to_wire).collect();
        Ok(Response::new(PublishJwtAuthorityResponse { jwt_authorities }))
    }

    async fn list_federated_bundles(
        &self,
        request: Request<ListFederatedBundlesRequest>,
    ) -> Result<Response<ListFederatedBundlesResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let all = self.0.federated.all().values().cloned().collect();
        let (page, next_page_token) =
            paging::page(all, request.page_size, &request.page_token, |b| b.trust_domain.to_string());
        let bundles = page.iter().map(|b| masks::bundle(bundle_to_wire(b), request.output_mask)).collect();
        Ok(Response::new(ListFederatedBundlesResponse { bundles, next_page_token }))
    }

    async fn get_federated_bundle(
        &self,
        request: Request<GetFederatedBundleRequest>,
    ) -> Result<Response<types::Bundle>, Status> {
        match Caller::of(&self.0, &request)? {
            Caller::Local { .. } | Caller::Admin(_) | Caller::Agent(_) => {}
            other => return Err(Status::permission_denied(format!("{other} may not read foreign bundles"))),
        }
        let request = request.into_inner();
        let td = trust_domain_from_wire(&request.trust_domain).map_err(invalid)?;
        let all = self.0.federated.all();
        let found = all.get(td.as_str()).ok_or_else(|| Status::not_found(format!("no bundle of `{td}` is here")))?;
        Ok(Response::new(masks::bundle(bundle_to_wire(found), request.output_mask)))
    }

    async fn batch_create_federated_bundle(
        &self,
        request: Request<BatchCreateFederatedBundleRequest>,
    ) -> Result<Response<BatchCreateFederatedBundleResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let results = self.set_foreign(request.bundle, Expect::New).await?.into_iter().map(|(status, bundle)| {
            let bundle = bundle.map(|b| masks::bundle(b, request.output_mask));
            batch_create_federated_bundle_response::Result { status: Some(status), bundle }
        });
        Ok(Response::new(BatchCreateFederatedBundleResponse { results: results.collect() }))
    }

    async fn batch_update_federated_bundle(
        &self,
        request: Request<BatchUpdateFederatedBundleRequest>,
    ) -> Result<Response<BatchUpdateFederatedBundleResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        if request.input_mask.is_some_and(|m| !m.x509_authorities || !m.jwt_authorities) {
            return Err(Status::unimplemented("a bundle is updated whole: leave the input mask out"));
        }
        let results = self.set_foreign(request.bundle, Expect::Known).await?.into_iter().map(|(status, bundle)| {
            let bundle = bundle.map(|b| masks::bundle(b, request.output_mask));
            batch_update_federated_bundle_response::Result { status: Some(status), bundle }
        });
        Ok(Response::new(BatchUpdateFederatedBundleResponse { results: results.collect() }))
    }

    async fn batch_set_federated_bundle(
        &self,
        request: Request<BatchSetFederatedBundleRequest>,
    ) -> Result<Response<BatchSetFederatedBundleResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let results = self.set_foreign(request.bundle, Expect::Any).await?.into_iter().map(|(status, bundle)| {
            let bundle = bundle.map(|b| masks::bundle(b, request.output_mask));
            batch_set_federated_bundle_response::Result { status: Some(status), bundle }
        });
        Ok(Response::new(BatchSetFederatedBundleResponse { results: results.collect() }))
    }

    async fn batch_delete_federated_bundle(
        &self,
        request: Request<BatchDeleteFederatedBundleRequest>,
    ) -> Result<Response<BatchDeleteFederatedBundleResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let mode = request.mode();
        let mut results = vec![];
        for name in request.trust_domains {
            let deleted = async {
                let td = trust_domain_from_wire(&name).map_err(invalid)?;
                self.0.to_the_end(|core: Arc<Core>| async move { delete_foreign(&core, &td, mode).await }).await
            };
            let verdict = deleted.await;
            results.push(batch_delete_federated_bundle_response::Result {
                status: Some(item_status(&verdict)),
                trust_domain: name,
            });
        }
        Ok(Response::new(BatchDeleteFederatedBundleResponse { results }))
    }
}
