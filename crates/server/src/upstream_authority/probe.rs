//! Tests with our own verifier whether peers will accept what we issue below an upstream authority.
//!
//! A bundle without the upstream's root, or name constraints that exclude our trust domain, would otherwise show only
//! in the first handshake: the server looks healthy, and every sidecar rejects every SVID.

use std::sync::Arc;
use std::time::Duration;

use countersign_identity::profile::{IssueError, LeafRequest, RequestedKey, request};
use countersign_identity::trust_domain::parse_workload_id;
use countersign_identity::verify::{PeerRole, Refusal, verify_chain};
use countersign_identity::{BundleSet, KeyType, PrivateKey, TrustBundle, TrustDomain};
use time::OffsetDateTime;

use super::UpstreamSigned;
use crate::key_manager::{SignError, Signer};
use crate::signing_ca::{SigningCa, SigningError};

/// Lifetime of the test SVID. It never leaves this process.
const PROBE_TTL: Duration = Duration::from_secs(60);

/// Why an SVID below an upstream authority would be rejected.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProbeError {
    /// The test SVID could not be issued.
    #[error("no SVID can be issued below it: {0}")]
    Issue(#[from] IssueError),
    /// The key has not signed the test SVID.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// Our verifier rejects it, and so would every peer.
    #[error(
        "every peer would refuse the SVIDs of `{trust_domain}` issued below it: {refusal}. The roots must hold the one in \
         which the chain ends, and name constraints must leave room for `spiffe://{trust_domain}`"
    )]
    Refused {
        /// The trust domain of the SVID.
        trust_domain: TrustDomain,
        /// The verifier's reason.
        refusal: Refusal,
    },
}

/// Issues an SVID below `signed`, whose first certificate belongs to `key`, and verifies it as both sides of a
/// handshake do.
pub(super) async fn probe(
    trust_domain: &TrustDomain,
    signed: &UpstreamSigned,
    key: &Arc<dyn Signer>,
    now: OffsetDateTime,
) -> Result<(), ProbeError> {
    let own = signed.chain.first().cloned().ok_or_else(|| IssueError::Authority("it signed nothing".into()))?;
    let authority = SigningCa::new(own, signed.chain.clone(), key.clone())?;
    let failed = |e: &dyn std::fmt::Display| IssueError::Sign(e.to_string());
    let leaf_key = PrivateKey::generate(KeyType::EcP256).map_err(|e| failed(&e))?;
    let requested = RequestedKey::from_csr(&request(&leaf_key, None)?)?;
    let id = parse_workload_id(&format!("spiffe://{trust_domain}/probe")).map_err(|e| failed(&e))?;
    let leaf = LeafRequest { id: &id, dns_names: &[], key: &requested, ttl: PROBE_TTL };
    let issued = authority.issue(&leaf, now).await.map_err(|error| match error {
        SigningError::Issue(error) => ProbeError::Issue(error),
        SigningError::Sign(error) => ProbeError::Sign(error),
    })?;
    let bundles: BundleSet =
        std::iter::once(TrustBundle { authorities: signed.roots.clone(), ..TrustBundle::empty(trust_domain.clone()) })
            .collect();
    for role in [PeerRole::Client, PeerRole::Server] {
        verify_chain(&issued.chain, &bundles, now, role)
            .map_err(|refusal| ProbeError::Refused { trust_domain: trust_domain.clone(), refusal })?;
    }
    Ok(())
}
