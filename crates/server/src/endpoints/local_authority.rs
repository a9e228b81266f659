//! `spire.api.server.localauthority.v1`: the life cycle of X.509 authorities. JWT authorities are not supported yet.

use std::sync::Arc;

use async_trait::async_trait;
use countersign_api::spire::localauthority::local_authority_server::LocalAuthority;
use countersign_api::spire::localauthority::{
    ActivateJwtAuthorityRequest, ActivateJwtAuthorityResponse, ActivateX509AuthorityRequest,
    ActivateX509AuthorityResponse, AuthorityState, GetJwtAuthorityStateRequest, GetJwtAuthorityStateResponse,
    GetX509AuthorityStateRequest, GetX509AuthorityStateResponse, PrepareJwtAuthorityRequest,
    PrepareJwtAuthorityResponse, PrepareX509AuthorityRequest, PrepareX509AuthorityResponse, RevokeJwtAuthorityRequest,
    RevokeJwtAuthorityResponse, RevokeX509AuthorityRequest, RevokeX509AuthorityResponse,
    RevokeX509UpstreamAuthorityRequest, RevokeX509UpstreamAuthorityResponse, TaintJwtAuthorityRequest,
    TaintJwtAuthorityResponse, TaintX509AuthorityRequest, TaintX509AuthorityResponse,
    TaintX509UpstreamAuthorityRequest, TaintX509UpstreamAuthorityResponse,
};
use tonic::{Request, Response, Status};

use super::Endpoint;
use crate::authority::{Record, Status as Life};
use crate::caller::Caller;
use crate::core::{Core, status_of};

fn state(record: &Record) -> AuthorityState {
    AuthorityState { authority_id: record.id.clone(), expires_at: record.validity().1.unix_timestamp() }
}

fn no_jwt<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("JWT authorities are not served by this version"))
}

#[async_trait]
impl LocalAuthority for Endpoint {
    async fn get_x509_authority_state(
        &self,
        request: Request<GetX509AuthorityStateRequest>,
    ) -> Result<Response<GetX509AuthorityStateResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let journal = self.0.authorities.journal();
        // Of several old authorities, the API returns the newest.
        let find = |statuses: &[Life]| journal.iter().rev().find(|r| statuses.contains(&r.status)).map(state);
        Ok(Response::new(GetX509AuthorityStateResponse {
            active: find(&[Life::Active]),
            prepared: find(&[Life::Prepared]),
            old: find(&[Life::Old, Life::Tainted]),
        }))
    }

    async fn prepare_x509_authority(
        &self,
        request: Request<PrepareX509AuthorityRequest>,
    ) -> Result<Response<PrepareX509AuthorityResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let prepare = |core: Arc<Core>| async move { core.authorities.prepare().await.map_err(|e| status_of(&e)) };
        let record = self.0.to_the_end(prepare).await?;
        Ok(Response::new(PrepareX509AuthorityResponse { prepared_authority: Some(state(&record)) }))
    }

    async fn activate_x509_authority(
        &self,
        request: Request<ActivateX509AuthorityRequest>,
    ) -> Result<Response<ActivateX509AuthorityResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let id = request.into_inner().authority_id;
        let activate = |core: Arc<Core>| async move { core.authorities.activate(&id).await.map_err(|e| status_of(&e)) };
        let record = self.0.to_the_end(activate).await?;
        Ok(Response::new(ActivateX509AuthorityResponse { activated_authority: Some(state(&record)) }))
    }

    async fn taint_x509_authority(
        &self,
        request: Request<TaintX509AuthorityRequest>,
    ) -> Result<Response<TaintX509AuthorityResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let id = request.into_inner().authority_id;
        let taint = |core: Arc<Core>| async move { core.authorities.taint(&id).await.map_err(|e| status_of(&e)) };
        let record = self.0.to_the_end(taint).await?;
        Ok(Response::new(TaintX509AuthorityResponse { tainted_authority: Some(state(&record)) }))
    }

    async fn revoke_x509_authority(
        &self,
        request: Request<RevokeX509AuthorityRequest>,
    ) -> Result<Response<RevokeX509AuthorityResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let id = request.into_inner().authority_id;
        let revoke = |core: Arc<Core>| async move { core.authorities.revoke(&id).await.map_err(|e| status_of(&e)) };
        let record = self.0.to_the_end(revoke).await?;
        Ok(Response::new(RevokeX509AuthorityResponse { revoked_authority: Some(state(&record)) }))
    }

    async fn taint_x509_upstream_authority(
        &self,
        _: Request<TaintX509UpstreamAuthorityRequest>,
    ) -> Result<Response<TaintX509UpstreamAuthorityResponse>, Status> {
        Err(Status::unimplemented("upstream authorities cannot be tainted by this version"))
    }

    async fn revoke_x509_upstream_authority(
        &self,
        _: Request<RevokeX509UpstreamAuthorityRequest>,
    ) -> Result<Response<RevokeX509UpstreamAuthorityResponse>, Status> {
        Err(Status::unimplemented("upstream authorities cannot be revoked by this version"))
    }

    async fn get_jwt_authority_state(
        &self,
        _: Request<GetJwtAuthorityStateRequest>,
    ) -> Result<Response<GetJwtAuthorityStateResponse>, Status> {
        no_jwt()
    }

    async fn prepare_jwt_authority(
        &self,
        _: Request<PrepareJwtAuthorityRequest>,
    ) -> Result<Response<PrepareJwtAuthorityResponse>, Status> {
        no_jwt()
    }

    async fn activate_jwt_authority(
        &self,
        _: Request<ActivateJwtAuthorityRequest>,
    ) -> Result<Response<ActivateJwtAuthorityResponse>, Status> {
        no_jwt()
    }

    async fn taint_jwt_authority(
        &self,
        _: Request<TaintJwtAuthorityRequest>,
    ) -> Result<Response<TaintJwtAuthorityResponse>, Status> {
        no_jwt()
    }

    async fn revoke_jwt_authority(
        &self,
        _: Request<RevokeJwtAuthorityRequest>,
    ) -> Result<Response<RevokeJwtAuthorityResponse>, Status> {
        no_jwt()
    }
}
