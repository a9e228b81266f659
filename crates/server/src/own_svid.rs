//! The server's own SVID, `spiffe://<td>/spire/server`, and the TLS configuration for agents.

use std::sync::Arc;

use arc_swap::ArcSwap;
use countersign_api::tls::{ServerTls, SvidVerifier, TlsError, certified_key, public_server_config};
use countersign_identity::profile::request;
use countersign_identity::rotation::is_rested;
use countersign_identity::trust_domain::server_id;
use countersign_identity::{BundleSet, KeyType, PrivateKey, X509Svid};
use rustls::ServerConfig;
use time::OffsetDateTime;

use crate::ServerError;
use crate::authority::AuthorityError;
use crate::core::{Core, SigningRequest};

/// The current SVID, renewed by [`OwnSvid::renew_if_due`].
pub struct OwnSvid {
    core: Arc<Core>,
    current: ArcSwap<Current>,
}

struct Current {
    svid: X509Svid,
    tls: Arc<ServerTls>,
    public_tls: Arc<ServerConfig>,
    jitter: f64,
    obtained: OffsetDateTime,
}

impl OwnSvid {
    /// Issues the first SVID.
    pub async fn new(core: Arc<Core>) -> Result<Self, ServerError> {
        let current = ArcSwap::from_pointee(issue(&core).await?);
        Ok(Self { core, current })
    }

    /// The current TLS configuration.
    pub fn tls(&self) -> Arc<ServerTls> {
        self.current.load().tls.clone()
    }

    /// The current TLS configuration for a bundle endpoint, which asks nobody for a certificate.
    pub fn public_tls(&self) -> Arc<ServerConfig> {
        self.current.load().public_tls.clone()
    }

    /// When the one of the moment ends.
    pub fn ends_at(&self) -> OffsetDateTime {
        self.current.load().svid.facts().not_after
    }

    /// Issues a new one at half life, or as soon as its authority is not to be used any more; but not before this one was used
    /// for a while, however short its life is.
    pub async fn renew_if_due(&self) -> Result<(), ServerError> {
        let current = self.current.load_full();
        let bundle = self.core.authorities.bundle().borrow().clone();
        let gone = !current.svid.is_below_good_authority(&bundle);
        let now = self.core.now();
        let due = gone || current.svid.renew_at(current.jitter) <= now;
        if due && is_rested(current.obtained, current.svid.remaining(current.obtained), gone, now) {
            self.current.store(Arc::new(issue(&self.core).await?));
        }
        Ok(())
    }
}

async fn issue(core: &Arc<Core>) -> Result<Current, ServerError> {
    let id = server_id(core.trust_domain());
    let failed = |e: String| AuthorityError::Issue(countersign_identity::profile::IssueError::Sign(e));
    let key = PrivateKey::generate(KeyType::EcP256).map_err(|e| failed(e.to_string()))?;
    let csr = request(&key, Some(&id)).map_err(AuthorityError::from)?;
    let issued = core
        .sign(&SigningRequest {
            kind: "server_svid",
            caller: "server",
            entry_id: "",
            id: &id,
            dns_names: &[],
            ttl: core.issuance().svid_ttl.max(std::time::Duration::from_secs(60)),
            csr: &csr,
        })
        .await
        .map_err(|e| failed(e.message().to_owned()))?;
    let svid = X509Svid::new(issued.chain, key).map_err(|e| failed(e.to_string()))?;
    let tls = tls_of(core, &svid)?;
    core.own_chain.store(Arc::new(svid.chain().to_vec()));
    let public_tls = Arc::new(public_server_config(certified_key(&svid)?, &[b"http/1.1"])?);
    Ok(Current { svid, tls, public_tls, jitter: rand::random_range(-1.0..=1.0), obtained: core.now() })
}

/// A TLS configuration for clients with an SVID of our trust domain or without a certificate (agents before
/// attestation).
fn tls_of(core: &Arc<Core>, svid: &X509Svid) -> Result<Arc<ServerTls>, TlsError> {
    let bundles = {
        let bundle = core.authorities.bundle();
        move || {
            Arc::new(std::iter::once(countersign_identity::TrustBundle::clone(&bundle.borrow())).collect::<BundleSet>())
        }
    };
    let verifier = SvidVerifier::new(bundles, |_| Ok(())).client_may_be_anonymous();
    Ok(Arc::new(ServerTls::new(certified_key(svid)?, verifier, &[b"h2"])?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::config;
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicI64, Ordering};

    #[tokio::test]
    async fn an_authority_that_is_about_to_end_does_not_make_the_server_sign_for_itself_without_a_pause() {
        let dir = tempfile::tempdir().unwrap();
        let ahead = Arc::<AtomicI64>::default();
        let start = OffsetDateTime::now_utc();
        let clock = {
            let ahead = ahead.clone();
            move || start + time::Duration::milliseconds(ahead.load(Ordering::Relaxed))
        };
        let core = Arc::new(crate::assemble(config(dir.path()), Arc::new(clock), Default::default()).await.unwrap());
        let own = OwnSvid::new(core).await.unwrap();
        // Nine seconds before the authority's end, and nobody rotates it here: whatever it signs ends with it.
        let left = 9_000;
        let serial = || own.current.load().svid.facts().serial.clone();
        let (mut serials, end) = (BTreeSet::from([serial()]), 3_600_000);
        for at in (end - left..end - 1_000).step_by(10) {
            ahead.store(at, Ordering::Relaxed);
            own.renew_if_due().await.unwrap();
            serials.insert(serial());
        }
        assert!((2..=5).contains(&serials.len()), "{}", serials.len());
    }
}
