//! JWT-SVIDs: the only way to a token, and the record of each.

use std::time::{Duration, Instant};

use countersign_api::peer::TlsPeer;
use countersign_identity::SpiffeId;
use countersign_identity::profile::jwt::{Audience, TokenRequest};
use tonic::{Request, Status};

use crate::audit::{Outcome, Record, rfc3339};
use crate::core::{Core, refused_as, status_of};
use crate::refusals::Group;
use crate::signing_jwt::IssuedToken;

/// The kind of these SVIDs in metrics and the audit log.
pub const KIND: &str = "jwt_svid";

/// A token to be signed.
pub struct TokenSigning<'a> {
    /// The caller, as the audit log names it.
    pub caller: &'a str,
    /// ID of the registration entry; empty if there is none.
    pub entry_id: &'a str,
    /// Whose token it is.
    pub id: &'a SpiffeId,
    /// For whom it is.
    pub audience: &'a Audience,
    /// Lifetime that is requested.
    pub ttl: Duration,
    /// Whether it has an ID of its own.
    pub with_id: bool,
}

impl Core {
    /// Signs, and keeps the record of it either way. The token itself is recorded nowhere.
    pub async fn sign_token(&self, asked: &TokenSigning<'_>) -> Result<IssuedToken, Status> {
        let issuer = self.config.jwt_issuer.as_deref();
        let token_id = asked.with_id.then(fresh_token_id);
        let request = TokenRequest {
            id: asked.id,
            audience: asked.audience,
            ttl: asked.ttl,
            issuer,
            token_id: token_id.as_deref(),
        };
        let spiffe_id = asked.id.to_string();
        let issued = self.authorities.sign_token(&request).await.map_err(|error| {
            self.refuse(KIND, asked.caller, asked.entry_id, &spiffe_id, refused_as(&error), &error.to_string());
            status_of(&error)
        })?;
        self.metrics.signed(KIND);
        let record = Record {
            outcome: Outcome::Signed,
            kind: KIND,
            caller: asked.caller,
            entry_id: asked.entry_id,
            spiffe_id: &spiffe_id,
            serial: "",
            expires_at: &rfc3339(issued.expires_at),
            audience: asked.audience.names(),
            authority_id: &issued.authority_id,
            reason: "",
        };
        self.audit.write(&record, self.now());
        Ok(issued)
    }

    /// Checks the rate limit of a remote caller for one more token. Local callers have none.
    pub fn within_token_limit<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let Some(peer) = request.extensions().get::<TlsPeer>() else { return Ok(()) };
        if self.token_limit.take(Group::of(peer.address.ip()), 1, Instant::now()) {
            return Ok(());
        }
        self.refuse_over_limit(KIND, peer.address.ip().to_canonical());
        Err(Status::resource_exhausted("too many tokens asked for from this address; slow down"))
    }
}

/// An ID that no other token has (RFC 7519, 4.1.7): 122 random bits, written as SPIRE's are (RFC 9562, 5.4).
fn fresh_token_id() -> String {
    let mut bytes: [u8; 16] = rand::random();
    bytes[6] = 0x40 | bytes[6] & 0x0f;
    bytes[8] = 0x80 | bytes[8] & 0x3f;
    let text = hex::encode(bytes);
    [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]].join("-")
}
