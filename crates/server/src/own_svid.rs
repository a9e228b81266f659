//! The server's own SVID, `spiffe://<td>/spire/server`, and the TLS configuration for agents.

use std::sync::Arc;

use arc_swap::ArcSwap;
use countersign_api::tls::{ServerTls, SvidVerifier, TlsError, certified_key};
use countersign_identity::profile::request;
use countersign_identity::trust_domain::server_id;
use countersign_identity::{BundleSet, KeyType, PrivateKey, X509Svid};

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
    jitter: f64,
}

impl OwnSvid {
    /// Issues the first SVID.
    pub fn new(core: Arc<Core>) -> Result<Self, ServerError> {
        let current = ArcSwap::from_pointee(issue(&core)?);
        Ok(Self { core, current })
    }

    /// The current TLS configuration.
    pub fn tls(&self) -> Arc<ServerTls> {
        self.current.load().tls.clone()
    }

    /// When the current SVID expires.
    pub fn ends_at(&self) -> time::OffsetDateTime {
        self.current.load().svid.facts().not_after
    }

    /// Issues a new SVID at half of its lifetime, or at once if its authority is tainted or gone.
    pub fn renew_if_due(&self) -> Result<(), ServerError> {
        let current = self.current.load();
        let bundle = self.core.authorities.bundle().borrow().clone();
        let authority = &current.svid.facts().authority_id;
        let under_upstream = self.core.config.upstream.is_some();
        let gone = !under_upstream && !bundle.authorities.iter().any(|a| a.id() == authority && !a.tainted);
        if gone || current.svid.renew_at(current.jitter) <= self.core.now() {
            self.current.store(Arc::new(issue(&self.core)?));
        }
        Ok(())
    }
}

fn issue(core: &Arc<Core>) -> Result<Current, ServerError> {
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
        .map_err(|e| failed(e.message().to_owned()))?;
    let svid = X509Svid::new(issued.chain, key).map_err(|e| failed(e.to_string()))?;
    let tls = tls_of(core, &svid)?;
    Ok(Current { svid, tls, jitter: rand::random_range(-1.0..=1.0) })
}

/// A TLS configuration for clients with an SVID of our trust domain or without a certificate (agents before
/// attestation).
fn tls_of(core: &Arc<Core>, svid: &X509Svid) -> Result<Arc<ServerTls>, TlsError> {
    let bundles = {
        let bundle = core.authorities.bundle();
        move || {
            Arc::new(std::iter::once(countersign_identity::X509Bundle::clone(&bundle.borrow())).collect::<BundleSet>())
        }
    };
    let verifier = SvidVerifier::new(bundles, |_| Ok(())).client_may_be_anonymous();
    Ok(Arc::new(ServerTls::new(certified_key(svid)?, verifier, &[b"h2"])?))
}
