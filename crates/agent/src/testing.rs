//! Shared test helpers: an authority, entries, and a server whose behaviour each test controls.

#![allow(clippy::unwrap_used)]

mod fake_server;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use countersign_identity::bundle::pem_block;
use countersign_identity::profile::jwt::{Audience, TokenAuthority, TokenRequest, unsigned_token};
use countersign_identity::profile::{
    Issued, LeafRequest, RequestedKey, SigningAuthority, issue_leaf, issue_root, request,
};
use countersign_identity::trust_domain::parse_trust_domain;
use countersign_identity::{
    Entry, JwtAuthority, KeyType, LocalKey, PrivateKey, SpiffeId, TrustBundle, TrustDomain, X509Svid,
};
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::cache::Cached;
use crate::config::{Config, SdsConfig};
use crate::node_attestor::{JoinToken, NodeAttestor};

pub use fake_server::FakeServer;

/// The trust domain of all tests.
pub fn td() -> TrustDomain {
    parse_trust_domain("test.local").unwrap()
}

/// A SPIFFE ID in that trust domain.
pub fn id(path: &str) -> SpiffeId {
    SpiffeId::new(format!("spiffe://test.local{path}")).unwrap()
}

/// A root that signs.
pub struct Ca(SigningAuthority);

impl Ca {
    /// A root with a lifetime of one day.
    pub fn new(now: OffsetDateTime) -> Self {
        Self::lasting(Duration::from_secs(86_400), now)
    }

    /// A root with this lifetime.
    pub fn lasting(ttl: Duration, now: OffsetDateTime) -> Self {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let root = issue_root(&td(), &key, ttl, now).unwrap();
        Self(SigningAuthority::new(root, vec![], &key).unwrap())
    }

    /// A bundle that holds this root only.
    pub fn bundle(&self) -> TrustBundle {
        TrustBundle::from_pem(td(), pem_block("CERTIFICATE", self.0.certificate()).as_bytes()).unwrap()
    }

    /// Signs a request for `id`.
    pub fn sign(&self, id: &SpiffeId, csr: &[u8], ttl: Duration, now: OffsetDateTime) -> Issued {
        let key = RequestedKey::from_csr(csr).unwrap();
        issue_leaf(&LeafRequest { id, dns_names: &[], key: &key, ttl }, &self.0, now).unwrap()
    }

    /// An SVID with a new key.
    pub fn svid(&self, path: &str, ttl: Duration, now: OffsetDateTime) -> X509Svid {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let issued = self.sign(&id(path), &request(&key, None).unwrap(), ttl, now);
        X509Svid::new(issued.chain, key).unwrap()
    }
}

/// A JWT authority that signs.
#[derive(Clone)]
pub struct Jwt(Arc<LocalKey>, &'static str);

impl Jwt {
    /// One whose key has this ID.
    pub fn new(key_id: &'static str) -> Self {
        Self(Arc::new(LocalKey::new(&PrivateKey::generate(KeyType::EcP256).unwrap()).unwrap()), key_id)
    }

    /// As bundles have it.
    pub fn authority(&self) -> JwtAuthority {
        JwtAuthority::new(self.1, self.0.public_side().key).unwrap()
    }

    /// A token of `id` for these audiences.
    pub fn token(&self, id: &SpiffeId, audience: &[String], ttl: Duration, now: OffsetDateTime) -> String {
        let audience = Audience::new(audience.to_vec()).unwrap();
        let request = TokenRequest { id, audience: &audience, ttl, issuer: None, token_id: None };
        let (algorithm, not_after) = (self.0.public_side().algorithm, now + Duration::from_secs(86_400));
        let unsigned = unsigned_token(&request, &TokenAuthority { key_id: self.1, algorithm, not_after }, now).unwrap();
        unsigned.signed(&self.0.sign(unsigned.content()).unwrap()).unwrap()
    }
}

/// An entry for `/NAME`, with this revision.
pub fn entry(name: &str, revision: i64) -> Entry {
    Entry {
        id: name.parse().unwrap(),
        spiffe_id: id(&format!("/{name}")),
        parent_id: id("/spire/agent/test/1"),
        selectors: std::iter::once("unix:uid:0".parse().unwrap()).collect(),
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        federates_with: BTreeSet::new(),
        admin: false,
        downstream: false,
        dns_names: vec![],
        expires_at: None,
        hint: String::new(),
        store_svid: false,
        additional: Default::default(),
        revision,
        created_at: OffsetDateTime::UNIX_EPOCH,
    }
}

/// The same entry without an SVID.
pub fn cached(name: &str, revision: i64) -> Cached {
    Cached {
        entry: Arc::new(entry(name, revision)),
        svid: None,
        stale: false,
        obtained: OffsetDateTime::UNIX_EPOCH,
        jitter: 0.0,
    }
}

/// Attests by a join token; a fake server takes any.
pub fn join_token() -> Arc<dyn NodeAttestor> {
    Arc::new(JoinToken::new(zeroize::Zeroizing::new("token".into())))
}

/// Settings of an agent below `dir` that connects to `server` and authenticates it by `bundle`.
pub fn config(dir: &Path, server: String, bundle: &TrustBundle, attestor: Arc<dyn NodeAttestor>) -> Config {
    let trust_bundle = dir.join("given.pem");
    std::fs::write(&trust_bundle, bundle.to_pem()).unwrap();
    Config {
        trust_domain: td(),
        server,
        socket: dir.join("agent.sock"),
        socket_link: None,
        data_dir: dir.join("agent"),
        trust_bundle: Some(trust_bundle),
        attestor: Some(attestor),
        key_type: watch::Sender::new(KeyType::EcP256).subscribe(),
        sync_interval: Duration::from_secs(1),
        discover_path: false,
        hash_limit: 0,
        foreign_namespaces: true,
        pods: None,
        sds: SdsConfig::default(),
        metrics: None,
    }
}

/// Polls until `look` finds something, for at most twenty seconds.
pub async fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..1_000 {
        if let Some(found) = look() {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("waited for {what}");
}
