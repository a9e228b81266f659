//! What we accept: the one verifier of peers' certificates.
//!
//! Rules: X509-SVID 5 (path, then the leaf again), RFC 5280. The peer's bundle is chosen by the leaf's own trust domain.

mod leaf;
mod refusal;

use rustls_pki_types::CertificateDer;
use spiffe::SpiffeId;
use time::OffsetDateTime;

use crate::bundle::{AuthorityKey, BundleSet, X509Bundle};
use crate::path::{PathError, check_bounds, trusted_path};
use crate::svid::LeafFacts;
use crate::trust_domain::trust_domain_of;

pub use leaf::leaf_id;
pub use refusal::Refusal;

/// Which side of the handshake the peer is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerRole {
    /// It called us.
    Client,
    /// We called it.
    Server,
}

/// A peer whose chain and leaf passed every rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedPeer {
    /// The identity that its leaf proves.
    pub id: SpiffeId,
    /// Serial number, validity and issuer of its leaf.
    pub facts: LeafFacts,
    /// The trusted authority in which the verified path ends, as [`crate::X509Authority::id`] names it.
    pub authority: String,
    /// That authority's key. When the bundle of the peer's trust domain holds it no longer, the peer is no longer vouched
    /// for: see [`X509Bundle::holds`].
    pub anchor: AuthorityKey,
}

/// Verifies a chain (leaf first) against the bundle of the leaf's own trust domain.
///
/// Of the leaf only what chooses the bundle is read before the path is verified, and no error names its ID before that.
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
    let bundle = bundles.get(trust_domain.as_str()).ok_or_else(|| Refusal::TrustDomain(trust_domain.clone()))?;
    let facts = LeafFacts::of(&cert);
    let path_at = |at| path_end(chain, bundle, at, role);
    // A leaf out of its time is verified within it: only then is it certain whose clock or renewal is to be checked.
    if now > facts.not_after {
        path_at(facts.not_after)?;
        return Err(Refusal::Expired { id, not_after: facts.not_after, now });
    }
    if now < facts.not_before {
        path_at(facts.not_before)?;
        return Err(Refusal::NotYetValid { id, not_before: facts.not_before, now });
    }
    let (authority, anchor) = path_at(now)?;
    if id.path().is_empty() {
        return Err(Refusal::NoPath(id));
    }
    Ok(VerifiedPeer { id, facts, authority, anchor })
}

/// The authority at the end of the path.
fn path_end(
    chain: &[CertificateDer<'_>],
    bundle: &X509Bundle,
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
