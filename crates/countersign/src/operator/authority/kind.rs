//! The calls of the server for each kind of authority.

use std::str::FromStr;

use anyhow::Result;
use countersign_api::spire::localauthority::local_authority_client::LocalAuthorityClient;
use countersign_api::spire::localauthority::{
    ActivateJwtAuthorityRequest, ActivateX509AuthorityRequest, AuthorityState, GetJwtAuthorityStateRequest,
    GetX509AuthorityStateRequest, PrepareJwtAuthorityRequest, PrepareX509AuthorityRequest, RevokeJwtAuthorityRequest,
    RevokeX509AuthorityRequest, RevokeX509UpstreamAuthorityRequest, TaintJwtAuthorityRequest,
    TaintX509AuthorityRequest, TaintX509UpstreamAuthorityRequest,
};

use super::super::bundle::own as own_bundle;
use crate::clients::{Asking, ServerArg, client, refused};

/// What an authority signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// X509-SVIDs.
    X509,
    /// JWT-SVIDs.
    Jwt,
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "x509" => Ok(Self::X509),
            "jwt" => Ok(Self::Jwt),
            _ => Err("is neither x509 nor jwt".to_owned()),
        }
    }
}

/// What is tainted and revoked: an authority of the server, or a root of the CA above it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trusted {
    /// Signs for the server.
    Own(Kind),
    /// A root that the upstream named, or that somebody else appended to the bundle.
    Upstream,
}

impl FromStr for Trusted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "upstream" => Ok(Self::Upstream),
            _ => text.parse().map(Self::Own).map_err(|_: String| "is none of x509, jwt and upstream".to_owned()),
        }
    }
}

impl Trusted {
    /// Marks it as compromised.
    pub async fn taint(self, server: &ServerArg, id: &str) -> Result<Option<AuthorityState>> {
        let Self::Own(kind) = self else {
            let root = root(server, id).await?;
            let asked = TaintX509UpstreamAuthorityRequest { subject_key_id: id.to_owned() };
            let mut client = client!(LocalAuthorityClient, server.channel()?);
            client.taint_x509_upstream_authority(asked).await.map_err(refused)?;
            return Ok(root);
        };
        Authorities::of(server, kind)?.taint(id).await
    }

    /// Removes it from the bundle once it is tainted.
    pub async fn revoke(self, server: &ServerArg, id: &str) -> Result<Option<AuthorityState>> {
        let Self::Own(kind) = self else {
            let root = root(server, id).await?;
            let asked = RevokeX509UpstreamAuthorityRequest { subject_key_id: id.to_owned() };
            let mut client = client!(LocalAuthorityClient, server.channel()?);
            client.revoke_x509_upstream_authority(asked).await.map_err(refused)?;
            return Ok(root);
        };
        Authorities::of(server, kind)?.revoke(id).await
    }
}

/// What the bundle says of a root, which the answer to a change does not; `None` if it has none with this ID.
async fn root(server: &ServerArg, id: &str) -> Result<Option<AuthorityState>> {
    let bundle = own_bundle(server.channel()?).await?;
    let found = bundle.authorities.iter().find(|root| root.id().eq_ignore_ascii_case(id));
    Ok(found.map(|root| AuthorityState {
        authority_id: root.id().to_owned(),
        expires_at: root.not_after().unix_timestamp(),
        ..AuthorityState::default()
    }))
}

/// The newest authority in each state; `None` where there is none.
pub struct States {
    pub active: Option<AuthorityState>,
    pub prepared: Option<AuthorityState>,
    pub old: Option<AuthorityState>,
}

/// The authorities of one kind of a server.
pub struct Authorities {
    client: LocalAuthorityClient<Asking>,
    kind: Kind,
}

/// Calls that take an ID and answer with the state of that authority.
macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident, $x509:ident($x509_request:ident), $jwt:ident($jwt_request:ident), $answer:ident;)*) => {
        impl Authorities {
            $($(#[$doc])* pub async fn $name(&mut self, id: &str) -> Result<Option<AuthorityState>> {
                let authority_id = id.to_owned();
                Ok(match self.kind {
                    Kind::X509 => {
                        let changed = self.client.$x509($x509_request { authority_id }).await;
                        changed.map_err(refused)?.into_inner().$answer
                    }
                    Kind::Jwt => {
                        let changed = self.client.$jwt($jwt_request { authority_id }).await;
                        changed.map_err(refused)?.into_inner().$answer
                    }
                })
            })*
        }
    };
}

calls! {
    /// Makes a prepared authority the signing one.
    activate, activate_x509_authority(ActivateX509AuthorityRequest), activate_jwt_authority(ActivateJwtAuthorityRequest), activated_authority;
    /// Marks an old authority as compromised.
    taint, taint_x509_authority(TaintX509AuthorityRequest), taint_jwt_authority(TaintJwtAuthorityRequest), tainted_authority;
    /// Removes a tainted authority from the bundle.
    revoke, revoke_x509_authority(RevokeX509AuthorityRequest), revoke_jwt_authority(RevokeJwtAuthorityRequest), revoked_authority;
}

impl Authorities {
    /// Those of this server.
    pub fn of(server: &ServerArg, kind: Kind) -> Result<Self> {
        Ok(Self { client: client!(LocalAuthorityClient, server.channel()?), kind })
    }

    /// Prepares the next one.
    pub async fn prepare(&mut self) -> Result<Option<AuthorityState>> {
        Ok(match self.kind {
            Kind::X509 => {
                let prepared = self.client.prepare_x509_authority(PrepareX509AuthorityRequest {}).await;
                prepared.map_err(refused)?.into_inner().prepared_authority
            }
            Kind::Jwt => {
                let prepared = self.client.prepare_jwt_authority(PrepareJwtAuthorityRequest {}).await;
                prepared.map_err(refused)?.into_inner().prepared_authority
            }
        })
    }

    /// The newest in each state.
    pub async fn states(&mut self) -> Result<States> {
        Ok(match self.kind {
            Kind::X509 => {
                let found = self.client.get_x509_authority_state(GetX509AuthorityStateRequest {}).await;
                let found = found.map_err(refused)?.into_inner();
                States { active: found.active, prepared: found.prepared, old: found.old }
            }
            Kind::Jwt => {
                let found = self.client.get_jwt_authority_state(GetJwtAuthorityStateRequest {}).await;
                let found = found.map_err(refused)?.into_inner();
                States { active: found.active, prepared: found.prepared, old: found.old }
            }
        })
    }
}
