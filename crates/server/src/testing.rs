//! A whole server for tests, and its callers.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use countersign_api::peer::{TlsPeer, UnixPeer};
use countersign_identity::profile::request as csr;
use countersign_identity::verify::{PeerRole, VerifiedPeer, verify_chain};
use countersign_identity::{BundleSet, KeyType, PrivateKey, SpiffeId, TrustBundle, TrustDomain};
use tonic::Request;

use crate::agents::AttestedAgent;
use crate::config::{Config, Issuance, KeyManagerKind};
use crate::core::{Core, SigningRequest};
use crate::datastore::{DataStore, Sqlite};

/// The trust domain of all of them.
pub fn td() -> TrustDomain {
    TrustDomain::new("td").unwrap()
}

/// A trust bundle with one root.
pub fn bundle() -> TrustBundle {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let now = time::OffsetDateTime::now_utc();
    let root = countersign_identity::profile::issue_root(&td(), &key, Duration::from_secs(3_600), now).unwrap();
    let pem = countersign_identity::bundle::certificates_to_pem([root.as_ref()]);
    TrustBundle::from_pem(td(), pem.as_bytes()).unwrap()
}

/// The store of one.
pub async fn store(dir: &tempfile::TempDir) -> Arc<Sqlite> {
    Arc::new(Sqlite::open(&dir.path().join("server.sqlite"), &td()).await.unwrap())
}

/// A server with all its data in `dir`.
pub async fn server(dir: &tempfile::TempDir) -> Arc<Core> {
    server_on(store(dir).await, dir).await
}

/// Settings of a server with all its data in `dir`.
pub fn config(dir: &Path) -> Config {
    let hour = Duration::from_secs(3_600);
    let issuance = Issuance { ca_ttl: hour, svid_ttl: hour, agent_svid_ttl: hour, ca_key_type: KeyType::EcP256 };
    Config {
        trust_domain: td(),
        bind: "127.0.0.1:0".parse().unwrap(),
        admin_socket: dir.join("server.sock"),
        data_dir: dir.to_owned(),
        issuance: tokio::sync::watch::channel(issuance).1,
        jwt_issuer: None,
        key_manager: KeyManagerKind::Memory,
        upstream: None,
        x509pop_ca: None,
        k8s_psat: None,
        k8s_bundle: None,
        k8s_webhook_label: None,
        bundle_endpoint: None,
        audit_log: Some(dir.join("audit.log")),
        metrics: None,
        log_levels: countersign_api::log_levels::LogLevels::new(tracing::Level::INFO, |_| Ok(())),
        reopen: Default::default(),
    }
}

/// A server on this store.
pub async fn server_on(store: Arc<dyn DataStore>, dir: &tempfile::TempDir) -> Arc<Core> {
    let clock = countersign_api::clock::system_clock();
    Arc::new(crate::assemble_on(store, config(dir.path()), clock, Default::default()).await.unwrap())
}

/// An operator's call on the server's own socket.
pub fn local<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let peer =
        UnixPeer { pid: 1, uid: nix::unistd::geteuid().as_raw(), gid: 0, pidfd: None, started: None, at_accept: None };
    request.extensions_mut().insert(peer);
    request
}

async fn svid(core: &Core, id: &SpiffeId) -> VerifiedPeer {
    let csr = csr(&PrivateKey::generate(KeyType::EcP256).unwrap(), Some(id)).unwrap();
    let ttl = Duration::from_secs(600);
    let asked = SigningRequest { kind: "x509_svid", caller: "test", entry_id: "", id, dns_names: &[], ttl, csr: &csr };
    let issued = core.sign(&asked).await.unwrap();
    let bundles: BundleSet = std::iter::once(TrustBundle::clone(&core.authorities.bundle().borrow())).collect();
    verify_chain(&issued.chain, &bundles, core.now(), PeerRole::Client).unwrap()
}

/// A call with an SVID of this ID, on a connection whose handshake is over.
pub async fn call(core: &Core, id: &SpiffeId) -> Request<()> {
    let mut request = Request::new(());
    let peer = TlsPeer { address: "127.0.0.1:9".parse().unwrap(), svid: Some(Arc::new(svid(core, id).await)) };
    request.extensions_mut().insert(peer);
    request
}

/// A call of an agent that has attested itself.
pub async fn agent_call(core: &Core, name: &str) -> (SpiffeId, Request<()>) {
    let id = SpiffeId::new(format!("spiffe://td/spire/agent/x/{name}")).unwrap();
    let request = call(core, &id).await;
    let svid = request.extensions().get::<TlsPeer>().and_then(|p| p.svid.clone()).unwrap();
    let agent = AttestedAgent {
        id: id.clone(),
        attestation_type: "x".into(),
        selectors: Default::default(),
        serial: svid.facts.serial.clone(),
        previous_serial: String::new(),
        expires_at: svid.facts.not_after,
        banned: false,
        can_reattest: true,
        evidence: None,
    };
    core.agents.attested(agent).await.unwrap();
    (id, request)
}
