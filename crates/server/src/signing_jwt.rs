//! A JWT authority with the key manager's key that signs its tokens. No token is signed elsewhere.

use std::sync::Arc;
use std::time::Duration;

use countersign_identity::JwtAuthority;
use countersign_identity::profile::IssueError;
use countersign_identity::profile::jwt::{TokenAuthority, TokenRequest, unsigned_token};
use countersign_identity::rotation::validity;
use time::OffsetDateTime;

use crate::key_manager::{SignError, Signer, sign};
use crate::signing_ca::SigningError;

/// Signed once with each new key, before anybody is told of it. It cannot be taken for a token: those have no space.
const PROOF: &[u8] = b"countersign: proof of a JWT authority's key";

/// A JWT authority and its key.
pub struct SigningJwt {
    authority: JwtAuthority,
    not_after: OffsetDateTime,
    key: Arc<dyn Signer>,
}

/// A signed JWT-SVID, with the facts that callers and the audit log are told.
#[derive(Clone)]
pub struct IssuedToken {
    /// The token itself: a secret, never logged.
    pub token: String,
    /// When it was issued.
    pub issued_at: OffsetDateTime,
    /// Its end.
    pub expires_at: OffsetDateTime,
    /// ID of the authority that signed it.
    pub authority_id: String,
}

impl SigningJwt {
    /// Errors: [`IssueError::Authority`] if the key does not match, or the authority has no end.
    pub fn new(authority: JwtAuthority, key: Arc<dyn Signer>) -> Result<Self, IssueError> {
        if authority.der() != key.public_key() {
            return Err(IssueError::Authority("the private key does not belong to the JWT authority".into()));
        }
        let not_after = authority.expires_at.ok_or_else(|| IssueError::Authority("it has no end".into()))?;
        Ok(Self { authority, not_after, key })
    }

    /// Issues a JWT-SVID.
    pub async fn issue(&self, request: &TokenRequest<'_>, now: OffsetDateTime) -> Result<IssuedToken, SigningError> {
        let authority = TokenAuthority {
            key_id: self.authority.key_id(),
            algorithm: self.key.public_side().algorithm,
            not_after: self.not_after,
        };
        let unsigned = unsigned_token(request, &authority, now)?;
        let signature = sign(&*self.key, unsigned.content()).await?;
        Ok(IssuedToken {
            token: unsigned.signed(&signature)?,
            issued_at: unsigned.issued_at,
            expires_at: unsigned.expires_at,
            authority_id: self.authority.key_id().to_owned(),
        })
    }
}

/// A new JWT authority for the key, valid for `ttl` from `now`, with the start of its validity. What the key signs is verified once.
pub async fn new_authority(
    key_id: &str,
    key: &dyn Signer,
    ttl: Duration,
    now: OffsetDateTime,
) -> Result<(JwtAuthority, OffsetDateTime), SigningError> {
    let public = key.public_side();
    let signature = sign(key, PROOF).await?;
    if !public.algorithm.verifies(public.key, PROOF, &signature) {
        return Err(SignError::Failed("its signature is not by its own public key".into()).into());
    }
    let mut authority = JwtAuthority::new(key_id, public.key).map_err(|e| IssueError::Authority(e.to_string()))?;
    let (not_before, not_after) = validity(now, ttl, None);
    authority.expires_at = Some(not_after);
    Ok((authority, not_before))
}
