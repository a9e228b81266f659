//! `spire.api.server.trustdomain.v1`: federation relationships with foreign trust domains.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use countersign_api::convert::{bundle_to_wire, trust_domain_from_wire};
use countersign_api::portions::first_portion;
use countersign_api::spire::trustdomain::trust_domain_server::TrustDomain as TrustDomainService;
use countersign_api::spire::trustdomain::{
    BatchCreateFederationRelationshipRequest, BatchCreateFederationRelationshipResponse,
    BatchDeleteFederationRelationshipRequest, BatchDeleteFederationRelationshipResponse,
    BatchUpdateFederationRelationshipRequest, BatchUpdateFederationRelationshipResponse,
    GetFederationRelationshipRequest, ListFederationRelationshipsRequest, ListFederationRelationshipsResponse,
    RefreshBundleRequest, batch_create_federation_relationship_response, batch_delete_federation_relationship_response,
    batch_update_federation_relationship_response,
};
use countersign_api::spire::types::federation_relationship::BundleEndpointProfile;
use countersign_api::spire::types::{self, FederationRelationshipMask};
use countersign_identity::trust_domain::parse_workload_id;
use countersign_identity::{TrustBundle, TrustDomain};
use tonic::{Request, Response, Status};

use super::bundle::set_status;
use super::{Endpoint, invalid, item_status, masks, paging};
use crate::caller::Caller;
use crate::core::{Core, store_status};
use crate::federation::refresh::{self, RefreshError};
use crate::federation::relationship::{EndpointUrl, Profile, Relationship};
use crate::federation::relationships::{ChangeError, MAX_RELATIONSHIPS};

/// Longest wait of an operator for a refresh: shorter than the command line waits for an answer.
const REFRESH_WITHIN: Duration = Duration::from_secs(8);

/// All fields, for what is asked without a mask.
const WHOLE: FederationRelationshipMask =
    FederationRelationshipMask { bundle_endpoint_url: true, bundle_endpoint_profile: true, trust_domain_bundle: true };

/// What a caller says about a relationship, as far as the mask counts it.
struct Said {
    trust_domain: TrustDomain,
    url: Option<EndpointUrl>,
    profile: Option<Profile>,
    bundle: Option<TrustBundle>,
}

impl Endpoint {
    fn parse_relationship(
        &self,
        wire: types::FederationRelationship,
        mask: FederationRelationshipMask,
    ) -> Result<Said, Status> {
        let trust_domain = trust_domain_from_wire(&wire.trust_domain).map_err(invalid)?;
        let url = mask.bundle_endpoint_url.then(|| wire.bundle_endpoint_url.parse()).transpose().map_err(invalid)?;
        let profile =
            mask.bundle_endpoint_profile.then(|| profile_from_wire(wire.bundle_endpoint_profile)).transpose()?;
        let bundle = wire.trust_domain_bundle.filter(|_| mask.trust_domain_bundle);
        let bundle = bundle.map(|bundle| self.parse_foreign(bundle)).transpose()?;
        match bundle.as_ref().map(|b| &b.trust_domain) {
            Some(other) if *other != trust_domain => Err(invalid(format!(
                "the bundle is of `{other}`, and the relationship with `{trust_domain}`; set it by itself (SetFederatedBundle)"
            ))),
            _ => Ok(Said { trust_domain, url, profile, bundle }),
        }
    }

    fn relationship_to_wire(
        &self,
        relationship: &Relationship,
        mask: Option<FederationRelationshipMask>,
    ) -> types::FederationRelationship {
        let bundle = self.0.federated.get(relationship.trust_domain.as_str());
        let whole = types::FederationRelationship {
            trust_domain: relationship.trust_domain.to_string(),
            bundle_endpoint_url: relationship.url.to_string(),
            bundle_endpoint_profile: Some(profile_to_wire(&relationship.profile)),
            trust_domain_bundle: bundle.map(|b| bundle_to_wire(&b)),
        };
        masks::relationship(whole, mask)
    }
}

fn profile_from_wire(wire: Option<BundleEndpointProfile>) -> Result<Profile, Status> {
    match wire {
        Some(BundleEndpointProfile::HttpsWeb(_)) => Ok(Profile::HttpsWeb),
        Some(BundleEndpointProfile::HttpsSpiffe(spiffe)) => {
            let id = parse_workload_id(&spiffe.endpoint_spiffe_id);
            Ok(Profile::HttpsSpiffe(id.map_err(|e| invalid(format!("endpoint_spiffe_id: {e}")))?))
        }
        None => Err(invalid("bundle_endpoint_profile is missing: https_web or https_spiffe")),
    }
}

fn profile_to_wire(profile: &Profile) -> BundleEndpointProfile {
    match profile {
        Profile::HttpsWeb => BundleEndpointProfile::HttpsWeb(types::HttpsWebProfile {}),
        Profile::HttpsSpiffe(id) => {
            BundleEndpointProfile::HttpsSpiffe(types::HttpsspiffeProfile { endpoint_spiffe_id: id.to_string() })
        }
    }
}

fn check_batch(len: usize) -> Result<(), Status> {
    if len > MAX_RELATIONSHIPS {
        Err(invalid(format!("a batch holds at most {MAX_RELATIONSHIPS} federation relationships, this one {len}")))
    } else {
        Ok(())
    }
}

fn change_status(error: ChangeError) -> Status {
    match error {
        ChangeError::Exists(_) => Status::already_exists(error.to_string()),
        ChangeError::Unknown(_) => Status::not_found(error.to_string()),
        ChangeError::Own(_) => invalid(error),
        ChangeError::TooMany => Status::resource_exhausted(error.to_string()),
        ChangeError::Bundle(error) => set_status(error),
        ChangeError::Store(error) => store_status(&error),
    }
}

/// Adds a relationship.
async fn create(core: &Core, said: Said, caller: &Caller) -> Result<Arc<Relationship>, Status> {
    let (Some(url), Some(profile)) = (said.url, said.profile) else {
        return Err(Status::internal("a new relationship is said in full"));
    };
    let relationship = Relationship { trust_domain: said.trust_domain, url, profile };
    let created = core.relationships.create((relationship, said.bundle), &core.federated).await;
    created.map_err(change_status).inspect(|r| log("created", r, caller))
}

/// Changes what is said of a relationship.
async fn update(core: &Core, said: Said, caller: &Caller) -> Result<Arc<Relationship>, Status> {
    let change = |before: &Relationship| {
        let url = said.url.clone().unwrap_or_else(|| before.url.clone());
        let profile = said.profile.clone().unwrap_or_else(|| before.profile.clone());
        (Relationship { trust_domain: before.trust_domain.clone(), url, profile }, said.bundle.clone())
    };
    let updated = core.relationships.update(&said.trust_domain, &core.federated, change).await;
    updated.map_err(change_status).inspect(|r| log("updated", r, caller))
}

async fn delete(core: &Core, trust_domain: &TrustDomain, caller: &Caller) -> Result<(), Status> {
    if core.relationships.delete(trust_domain).await.map_err(|e| store_status(&e))? {
        tracing::info!(%trust_domain, %caller, "federation relationship deleted");
        Ok(())
    } else {
        Err(unknown(trust_domain))
    }
}

fn log(what: &'static str, relationship: &Relationship, caller: &Caller) {
    let Relationship { trust_domain, url, profile } = relationship;
    let (url, profile) = (url.as_str(), profile.name());
    tracing::info!(%trust_domain, url, profile, %caller, "federation relationship {what}");
}

fn unknown(trust_domain: &TrustDomain) -> Status {
    Status::not_found(format!("there is no federation relationship with `{trust_domain}`"))
}

#[async_trait]
impl TrustDomainService for Endpoint {
    async fn list_federation_relationships(
        &self,
        request: Request<ListFederationRelationshipsRequest>,
    ) -> Result<Response<ListFederationRelationshipsResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let all = self.0.relationships.all().values().cloned().collect();
        let (page, mut next_page_token) =
            paging::page(all, request.page_size, &request.page_token, |r: &Arc<Relationship>| {
                r.trust_domain.to_string()
            });
        let mut federation_relationships: Vec<_> =
            page.iter().map(|r| self.relationship_to_wire(r, request.output_mask)).collect();
        // A page of large bundles is shorter: it must fit into a message.
        federation_relationships.truncate(first_portion(&federation_relationships, page.len()));
        if let Some(last) = federation_relationships.last()
            && federation_relationships.len() < page.len()
        {
            next_page_token.clone_from(&last.trust_domain);
        }
        Ok(Response::new(ListFederationRelationshipsResponse { federation_relationships, next_page_token }))
    }

    async fn get_federation_relationship(
        &self,
        request: Request<GetFederationRelationshipRequest>,
    ) -> Result<Response<types::FederationRelationship>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let td = trust_domain_from_wire(&request.trust_domain).map_err(invalid)?;
        let found = self.0.relationships.get(&td).ok_or_else(|| unknown(&td))?;
        Ok(Response::new(self.relationship_to_wire(&found, request.output_mask)))
    }

    async fn batch_create_federation_relationship(
        &self,
        request: Request<BatchCreateFederationRelationshipRequest>,
    ) -> Result<Response<BatchCreateFederationRelationshipResponse>, Status> {
        let caller = Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        check_batch(request.federation_relationships.len())?;
        let mut results = vec![];
        for wire in request.federation_relationships {
            let caller = caller.clone();
            let made = match self.parse_relationship(wire, WHOLE) {
                Ok(said) => self.0.to_the_end(|core| async move { create(&core, said, &caller).await }).await,
                Err(status) => Err(status),
            };
            let relationship = made.as_ref().ok().map(|r| self.relationship_to_wire(r, request.output_mask));
            results.push(batch_create_federation_relationship_response::Result {
                status: Some(item_status(&made.map(drop))),
                federation_relationship: relationship,
            });
        }
        Ok(Response::new(BatchCreateFederationRelationshipResponse { results }))
    }

    async fn batch_update_federation_relationship(
        &self,
        request: Request<BatchUpdateFederationRelationshipRequest>,
    ) -> Result<Response<BatchUpdateFederationRelationshipResponse>, Status> {
        let caller = Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        check_batch(request.federation_relationships.len())?;
        let mask = request.input_mask.unwrap_or(WHOLE);
        let mut results = vec![];
        for wire in request.federation_relationships {
            let caller = caller.clone();
            let made = match self.parse_relationship(wire, mask) {
                Ok(said) => self.0.to_the_end(|core| async move { update(&core, said, &caller).await }).await,
                Err(status) => Err(status),
            };
            let relationship = made.as_ref().ok().map(|r| self.relationship_to_wire(r, request.output_mask));
            results.push(batch_update_federation_relationship_response::Result {
                status: Some(item_status(&made.map(drop))),
                federation_relationship: relationship,
            });
        }
        Ok(Response::new(BatchUpdateFederationRelationshipResponse { results }))
    }

    async fn batch_delete_federation_relationship(
        &self,
        request: Request<BatchDeleteFederationRelationshipRequest>,
    ) -> Result<Response<BatchDeleteFederationRelationshipResponse>, Status> {
        let caller = Caller::operator(&self.0, &request)?;
        let names = request.into_inner().trust_domains;
        check_batch(names.len())?;
        let mut results = vec![];
        for name in names {
            let parsed = trust_domain_from_wire(&name).map_err(invalid);
            let trust_domain = parsed.as_ref().map_or(name, ToString::to_string);
            let caller = caller.clone();
            let deleted = match parsed {
                Ok(td) => self.0.to_the_end(|core| async move { delete(&core, &td, &caller).await }).await,
                Err(status) => Err(status),
            };
            results.push(batch_delete_federation_relationship_response::Result {
                status: Some(item_status(&deleted)),
                trust_domain,
            });
        }
        Ok(Response::new(BatchDeleteFederationRelationshipResponse { results }))
    }

    async fn refresh_bundle(&self, request: Request<RefreshBundleRequest>) -> Result<Response<()>, Status> {
        Caller::operator(&self.0, &request)?;
        let td = trust_domain_from_wire(&request.into_inner().trust_domain).map_err(invalid)?;
        let relationship = self.0.relationships.get(&td).ok_or_else(|| unknown(&td))?;
        let refreshed = tokio::time::timeout(REFRESH_WITHIN, refresh::refresh(&self.0, &relationship)).await;
        let late = |_| {
            let url = &relationship.url;
            Status::deadline_exceeded(format!("{url} has not answered within {} s", REFRESH_WITHIN.as_secs()))
        };
        match refreshed.map_err(late)? {
            Ok(_) => Ok(Response::new(())),
            Err(RefreshError::Ending) => Err(Status::unavailable(RefreshError::Ending.to_string())),
            // SPIRE's code, whatever the reason.
            Err(error) => {
                let why =
                    countersign_identity::shown::sentence(&error.to_string(), crate::core::MAX_REASON).to_string();
                Err(Status::internal(format!("the bundle of `{td}` was not refreshed: {why}")))
            }
        }
    }
}

#[cfg(test)]
mod tests;
