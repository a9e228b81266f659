//! A cache of verified chains, so that the authority's signatures on a frequent peer's chain are checked once.
//!
//! An entry holds for one revision of the bundles, and until the first certificate of the chain or the bundle expires.
//! The proof that the peer holds the leaf's key is never cached: TLS requires it in each handshake.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest::{Context, SHA256};
use countersign_identity::BundleSet;
use countersign_identity::svid::LeafFacts;
use countersign_identity::verify::{PeerRole, Refusal, VerifiedPeer, verify_chain};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Most chains in the cache. Beyond that it is emptied and all are verified again.
const MAX_CHAINS: usize = 4_096;

type Digest = [u8; 32];

/// Verified chains under one revision of the bundles.
pub struct VerifiedChains {
    bundles: Arc<BundleSet>,
    known: Mutex<HashMap<Digest, Known>>,
}

struct Known {
    peer: Arc<VerifiedPeer>,
    from: OffsetDateTime,
    until: OffsetDateTime,
}

impl VerifiedChains {
    /// An empty cache for these bundles.
    pub fn new(bundles: Arc<BundleSet>) -> Self {
        Self { bundles, known: Mutex::default() }
    }

    /// The bundles that the chains were verified against.
    pub fn bundles(&self) -> &Arc<BundleSet> {
        &self.bundles
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`verify_chain`] with a cache. The role is not part of the key, because X509-SVID requires both usages of a
    /// leaf.
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        now: OffsetDateTime,
        role: PeerRole,
    ) -> Result<Arc<VerifiedPeer>, Refusal> {
        let digest = digest(chain);
        if let Some(known) = self.known().get(&digest).filter(|k| k.from <= now && now <= k.until) {
            return Ok(known.peer.clone());
        }
        let peer = Arc::new(verify_chain(chain, &self.bundles, now, role)?);
        let (from, until) = self.span(chain);
        let mut known = self.known();
        if known.len() >= MAX_CHAINS {
            known.clear();
        }
        known.insert(digest, Known { peer: peer.clone(), from, until });
        Ok(peer)
    }

    /// The peer of a chain that [`Self::verify`] has accepted before; `None` if it is not in the cache.
    pub fn recall(&self, chain: &[CertificateDer<'_>]) -> Option<Arc<VerifiedPeer>> {
        self.known().get(&digest(chain)).map(|k| k.peer.clone())
    }

    /// The time span of an entry: from the latest start to the earliest end in the chain and among the authorities that
    /// may be behind it.
    fn span(&self, chain: &[CertificateDer<'_>]) -> (OffsetDateTime, OffsetDateTime) {
        let facts: Vec<_> =
            chain.iter().filter_map(|c| X509Certificate::from_der(c).ok()).map(|(_, c)| LeafFacts::of(&c)).collect();
        let from = facts.iter().map(|f| f.not_before).max();
        let authorities =
            self.bundles.iter().flat_map(|b| b.authorities.iter().map(countersign_identity::X509Authority::not_after));
        let latest_from = from.unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let until = facts.iter().map(|f| f.not_after).chain(authorities.filter(|end| *end >= latest_from)).min();
        (latest_from, until.unwrap_or(OffsetDateTime::UNIX_EPOCH))
    }
}

fn digest(chain: &[CertificateDer<'_>]) -> Digest {
    let mut context = Context::new(&SHA256);
    for certificate in chain {
        // The length prefix tells apart two ways to split the same bytes.
        context.update(&certificate.len().to_be_bytes());
        context.update(certificate);
    }
    let mut digest = [0; 32];
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_identity::profile::{LeafRequest, RequestedKey, SigningAuthority, issue_leaf, issue_root, request};
    use countersign_identity::{KeyType, PrivateKey, SpiffeId, TrustBundle, TrustDomain, X509Authority};
    use std::time::Duration;

    fn authority(td: &TrustDomain, now: OffsetDateTime) -> (SigningAuthority, X509Authority) {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let cert = issue_root(td, &key, Duration::from_secs(600), now).unwrap();
        let root = X509Authority::from_der(cert.to_vec()).unwrap();
        (SigningAuthority::new(cert, vec![], &key).unwrap(), root)
    }

    fn leaf(ca: &SigningAuthority, now: OffsetDateTime) -> Vec<CertificateDer<'static>> {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let id = SpiffeId::new("spiffe://td/a").unwrap();
        let key = RequestedKey::from_csr(&request(&key, None).unwrap()).unwrap();
        issue_leaf(&LeafRequest { id: &id, dns_names: &[], key: &key, ttl: Duration::from_secs(60) }, ca, now)
            .unwrap()
            .chain
    }

    #[test]
    fn a_remembered_chain_ends_with_its_time_and_a_foreign_one_is_never_remembered() {
        let td = TrustDomain::new("td").unwrap();
        let now = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let (ca, root) = authority(&td, now);
        let (stranger, _) = authority(&td, now);
        let bundle = TrustBundle { authorities: vec![root], sequence: 1, ..TrustBundle::empty(td) };
        let chains = VerifiedChains::new(Arc::new([bundle].into_iter().collect()));
        let good = leaf(&ca, now);
        let at = |chain: &[CertificateDer<'_>], s: i64| {
            chains.verify(chain, now + time::Duration::seconds(s), PeerRole::Client).map_err(|e| e.code())
        };
        assert!(chains.recall(&good).is_none());
        assert_eq!(at(&good, 0).unwrap().id.path(), "/a");
        assert!(
            Arc::ptr_eq(&at(&good, 5).unwrap(), &chains.recall(&good).unwrap()),
            "the second time it is remembered"
        );
        assert_eq!(at(&good, 61), Err("expired"));
        assert_eq!(at(&good, -11), Err("not_yet_valid"));
        let foreign = leaf(&stranger, now);
        assert_eq!(at(&foreign, 0), Err("untrusted"));
        assert!(chains.recall(&foreign).is_none());
        assert_eq!(at(&foreign, 0), Err("untrusted"));
    }
}
