//! What we accept: the only verifier of peers' certificates.
//!
//! Rules: X509-SVID 5 (the path, and the leaf on its own) and RFC 5280. The leaf's own trust domain selects the bundle.

mod leaf;
mod refusal;

use rustls_pki_types::CertificateDer;
use spiffe::SpiffeId;
use time::OffsetDateTime;

use crate::bundle::{AuthorityKey, BundleSet, TrustBundle};
use crate::path::{PathError, check_bounds, trusted_path};
use crate::svid::LeafFacts;
use crate::trust_domain::trust_domain_of;

pub use leaf::leaf_id;
pub use refusal::Refusal;

/// The peer's side of the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerRole {
    /// The peer called us.
    Client,
    /// We called the peer.
    Server,
}

/// A peer whose chain and leaf passed every check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedPeer {
    /// The SPIFFE ID that its leaf proves.
    pub id: SpiffeId,
    /// Serial number, validity and issuer of the peer's leaf.
    pub facts: LeafFacts,
    /// ID of the trusted authority in which the verified path ends, see [`crate::X509Authority::id`].
    pub authority: String,
    /// Key of that authority. Once the bundle of the peer's trust domain no longer holds it, the peer is no longer
    /// trusted: see [`TrustBundle::holds`].
    pub anchor: AuthorityKey,
}

/// Verifies a chain (leaf first) against the bundle of the leaf's own trust domain.
///
/// Before the path is verified, only what selects the bundle is read from the leaf, and no error names its ID.
pub fn verify_chain(
    chain: &[CertificateDer<'_>],
    bundles: &BundleSet,
    now: OffsetDateTime,
    role: PeerRole,
) -> Result<VerifiedPeer, Refusal> {
    let first = chain.first().ok_or(Refusal::NoCertificate)?;
    check_bounds(chain).map_err(|e| Refusal::ChainTooLong(e.to_string()))?;
    let cert = leaf::parse(first)?;
    let id = leaf::claimed_id(&cert)?;
    let trust_domain = trust_domain_of(&id);
    // The claimed trust domain only selects the authorities that must have signed: claiming another one gains nothing.
    let bundle = bundles.get(trust_domain.as_str()).ok_or_else(|| Refusal::TrustDomain(trust_domain.clone()))?;
    let facts = LeafFacts::of(&cert);
    let path_at = |at| path_end(chain, bundle, at, role);
    // An expired leaf is verified at a time within its validity. Only then is it certain whose clock or renewal to
    // check.
    if now > facts.not_after {
        path_at(facts.not_after)?;
        return Err(Refusal::Expired { id, not_after: facts.not_after, now });
    }
    if now < facts.not_before {
        path_at(facts.not_before)?;
        return Err(Refusal::NotYetValid { id, not_before: facts.not_before, now });
    }
    let (authority, anchor) = path_at(now)?;
    // After the path, because this error names the ID, which is an unproven claim before.
    if id.path().is_empty() {
        return Err(Refusal::NoPath(id));
    }
    Ok(VerifiedPeer { id, facts, authority, anchor })
}

/// The authority at the end of the verified path: its ID and its key.
fn path_end(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    at: OffsetDateTime,
    role: PeerRole,
) -> Result<(String, AuthorityKey), Refusal> {
    match trusted_path(chain, &bundle.authorities, at, role) {
        Ok(path) => Ok((path.anchor.id().to_owned(), path.anchor.key())),
        Err(PathError::Unused(n)) => Err(Refusal::NotInPath(n)),
        Err(PathError::Empty) => Err(Refusal::NoCertificate),
        Err(error @ PathError::TooLong(_)) => Err(Refusal::ChainTooLong(error.to_string())),
        Err(PathError::Untrusted(why)) => Err(Refusal::Untrusted { trust_domain: bundle.trust_domain.clone(), why }),
    }
}
