//! `spire.api.server.localauthority.v1`: the life cycle of X.509 and JWT authorities.

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
use crate::authority::{AuthorityError, Kind, Record, Status as Life};
use crate::caller::Caller;
use crate::core::{Core, status_of};

impl Endpoint {
    fn state(&self, record: &Record) -> AuthorityState {
        AuthorityState {
            authority_id: record.id.clone(),
            expires_at: record.validity().1.unix_timestamp(),
            upstream_authority_subject_key_id: self.0.authorities.root_above(record).unwrap_or_default(),
        }
    }

    /// The newest authority of this kind in one of these states.
    fn newest(&self, kind: Kind, states: &[Life]) -> Option<AuthorityState> {
        let journal = self.0.authorities.journal();
        journal.iter().rev().find(|r| r.kind() == kind && states.contains(&r.status)).map(|r| self.state(r))
    }

    /// Makes an operator's change to its end.
    async fn changed<T, F, R>(
        &self,
        request: &Request<T>,
        change: impl FnOnce(Arc<Core>) -> F + Send,
    ) -> Result<R, Status>
    where
        T: Sync,
        R: Send + 'static,
        F: Future<Output = Result<R, AuthorityError>> + Send + 'static,
    {
        Caller::operator(&self.0, request)?;
        let changed = change(self.0.clone());
        self.0.to_the_end(|_| async move { changed.await.map_err(|e| status_of(&e)) }).await
    }

    /// [`Self::changed`] of an authority of ours.
    async fn change<T, F>(
        &self,
        request: &Request<T>,
        change: impl FnOnce(Arc<Core>) -> F + Send,
    ) -> Result<Option<AuthorityState>, Status>
    where
        T: Sync,
        F: Future<Output = Result<Record, AuthorityError>> + Send + 'static,
    {
        Ok(Some(self.state(&self.changed(request, change).await?)))
    }
}

#[async_trait]
impl LocalAuthority for Endpoint {
    async fn get_x509_authority_state(
        &self,
        request: Request<GetX509AuthorityStateRequest>,
    ) -> Result<Response<GetX509AuthorityStateResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        Ok(Response::new(GetX509AuthorityStateResponse {
            active: self.newest(Kind::X509, &[Life::Active]),
            prepared: self.newest(Kind::X509, &[Life::Prepared]),
            old: self.newest(Kind::X509, &[Life::Old, Life::Tainted]),
        }))
    }

    async fn prepare_x509_authority(
        &self,
        request: Request<PrepareX509AuthorityRequest>,
    ) -> Result<Response<PrepareX509AuthorityResponse>, Status> {
        let prepare = |core: Arc<Core>| async move { core.authorities.prepare(Kind::X509).await };
        let prepared_authority = self.change(&request, prepare).await?;
        Ok(Response::new(PrepareX509AuthorityResponse { prepared_authority }))
    }

    async fn activate_x509_authority(
        &self,
        request: Request<ActivateX509AuthorityRequest>,
    ) -> Result<Response<ActivateX509AuthorityResponse>, Status> {
        let id = request.get_ref().authority_id.clone();
        let activate = |core: Arc<Core>| async move { core.authorities.activate(Kind::X509, &id).await };
        let activated_authority = self.change(&request, activate).await?;
        Ok(Response::new(ActivateX509AuthorityResponse { activated_authority }))
    }

    async fn taint_x509_authority(
        &self,
        request: Request<TaintX509AuthorityRequest>,
    ) -> Result<Response<TaintX509AuthorityResponse>, Status> {
        let id = request.get_ref().authority_id.clone();
        let taint = |core: Arc<Core>| async move { core.authorities.taint(Kind::X509, &id).await };
        let tainted_authority = self.change(&request, taint).await?;
        Ok(Response::new(TaintX509AuthorityResponse { tainted_authority }))
    }

    async fn revoke_x509_authority(
        &self,
        request: Request<RevokeX509AuthorityRequest>,
    ) -> Result<Response<RevokeX509AuthorityResponse>, Status> {
        let id = request.get_ref().authority_id.clone();
        let revoke = |core: Arc<Core>| async move { core.authorities.revoke(Kind::X509, &id).await };
        let revoked_authority = self.change(&request, revoke).await?;
        Ok(Response::new(RevokeX509AuthorityResponse { revoked_authority }))
    }

    async fn taint_x509_upstream_authority(
        &self,
        request: Request<TaintX509UpstreamAuthorityRequest>,
    ) -> Result<Response<TaintX509UpstreamAuthorityResponse>, Status> {
        let id = request.get_ref().subject_key_id.clone();
        let root = self.changed(&request, |core| async move { core.authorities.taint_root(&id).await }).await?;
        let upstream_authority_subject_key_id = root.id().to_owned();
        Ok(Response::new(TaintX509UpstreamAuthorityResponse { upstream_authority_subject_key_id }))
    }

    async fn revoke_x509_upstream_authority(
        &self,
        request: Request<RevokeX509UpstreamAuthorityRequest>,
    ) -> Result<Response<RevokeX509UpstreamAuthorityResponse>, Status> {
        let id = request.get_ref().subject_key_id.clone();
        let root = self.changed(&request, |core| async move { core.authorities.revoke_root(&id).await }).await?;
        let upstream_authority_subject_key_id = root.id().to_owned();
        Ok(Response::new(RevokeX509UpstreamAuthorityResponse { upstream_authority_subject_key_id }))
    }

    async fn get_jwt_authority_state(
        &self,
        request: Request<GetJwtAuthorityStateRequest>,
    ) -> Result<Response<GetJwtAuthorityStateResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        Ok(Response::new(GetJwtAuthorityStateResponse {
            active: self.newest(Kind::Jwt, &[Life::Active]),
            prepared: self.newest(Kind::Jwt, &[Life::Prepared]),
            old: self.newest(Kind::Jwt, &[Life::Old, Life::Tainted]),
        }))
    }

    async fn prepare_jwt_authority(
        &self,
        request: Request<PrepareJwtAuthorityRequest>,
    ) -> Result<Response<PrepareJwtAuthorityResponse>, Status> {
        let prepare = |core: Arc<Core>| async move { core.authorities.prepare(Kind::Jwt).await };
        let prepared_authority = self.change(&request, prepare).await?;
        Ok(Response::new(PrepareJwtAuthorityResponse { prepared_authority }))
    }

    async fn activate_jwt_authority(
        &self,
        request: Request<ActivateJwtAuthorityRequest>,
    ) -> Result<Response<ActivateJwtAuthorityResponse>, Status> {
        let id = request.get_ref().authority_id.clone();
        let activate = |core: Arc<Core>| async move { core.authorities.activate(Kind::Jwt, &id).await };
        let activated_authority = self.change(&request, activate).await?;
        Ok(Response::new(ActivateJwtAuthorityResponse { activated_authority }))
    }

    async fn taint_jwt_authority(
        &self,
        request: Request<TaintJwtAuthorityRequest>,
    ) -> Result<Response<TaintJwtAuthorityResponse>, Status> {
        let id = request.get_ref().authority_id.clone();
        let taint = |core: Arc<Core>| async move { core.authorities.taint(Kind::Jwt, &id).await };
        let tainted_authority = self.change(&request, taint).await?;
        Ok(Response::new(TaintJwtAuthorityResponse { tainted_authority }))
    }

    async fn revoke_jwt_authority(
        &self,
        request: Request<RevokeJwtAuthorityRequest>,
    ) -> Result<Response<RevokeJwtAuthorityResponse>, Status> {
        let id = request.get_ref().authority_id.clone();
        let revoke = |core: Arc<Core>| async move { core.authorities.revoke(Kind::Jwt, &id).await };
        let revoked_authority = self.change(&request, revoke).await?;
        Ok(Response::new(RevokeJwtAuthorityResponse { revoked_authority }))
    }
}
