//! A caller whose authority was revoked is rejected, however old its connection.

use std::path::Path;
use std::time::Duration;

use super::*;
use crate::config::{Config, Issuance, KeyManagerKind};
use crate::core::SigningRequest;
use countersign_identity::profile::request as csr;
use countersign_identity::verify::{PeerRole, verify_chain};
use countersign_identity::{BundleSet, Entry, KeyType, PrivateKey, TrustDomain, X509Bundle};

/// Settings of a server in a folder of its own.
pub fn config(dir: &Path) -> Config {
    let hour = Duration::from_secs(3_600);
    let issuance = Issuance { ca_ttl: hour, svid_ttl: hour, agent_svid_ttl: hour, ca_key_type: KeyType::EcP256 };
    Config {
        trust_domain: TrustDomain::new("td").unwrap(),
        bind: "127.0.0.1:0".parse().unwrap(),
        admin_socket: dir.join("server.sock"),
        data_dir: dir.to_owned(),
        issuance: tokio::sync::watch::channel(issuance).1,
        key_manager: KeyManagerKind::Memory,
        upstream: None,
        x509pop_ca: None,
        k8s_psat: None,
        k8s_bundle: None,
        k8s_webhook_label: None,
        audit_log: None,
        metrics: None,
        reopen: Default::default(),
    }
}

/// Its core; nothing listens.
pub async fn server(dir: &tempfile::TempDir) -> Core {
    crate::assemble(config(dir.path()), countersign_api::clock::system_clock(), Default::default()).await.unwrap()
}

fn admin_entry(id: &SpiffeId) -> Entry {
    Entry {
        id: "admin".parse().unwrap(),
        spiffe_id: id.clone(),
        parent_id: SpiffeId::new("spiffe://td/spire/agent/x/1").unwrap(),
        selectors: ["unix:uid:0".parse().unwrap()].into(),
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        federates_with: Default::default(),
        admin: true,
        downstream: false,
        dns_names: vec![],
        expires_at: None,
        hint: String::new(),
        store_svid: false,
        revision: 0,
        created_at: time::OffsetDateTime::UNIX_EPOCH,
    }
}

/// A call on a connection whose handshake has finished.
fn call(core: &Core, id: &SpiffeId) -> Request<()> {
    let csr = csr(&PrivateKey::generate(KeyType::EcP256).unwrap(), Some(id)).unwrap();
    let ttl = Duration::from_secs(600);
    let asked = SigningRequest { kind: "x509_svid", caller: "test", entry_id: "", id, dns_names: &[], ttl, csr: &csr };
    let issued = core.sign(&asked).unwrap();
    let bundles: BundleSet = std::iter::once(X509Bundle::clone(&core.authorities.bundle().borrow())).collect();
    let peer = verify_chain(&issued.chain, &bundles, core.now(), PeerRole::Client).unwrap();
    let mut request = Request::new(());
    let address = "127.0.0.1:9".parse().unwrap();
    request.extensions_mut().insert(TlsPeer { address, svid: Some(Arc::new(peer)) });
    request
}

#[tokio::test]
async fn an_administrator_whose_authority_is_revoked_is_refused_and_its_streams_end() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let id = SpiffeId::new("spiffe://td/admin").unwrap();
    core.entries.create(vec![admin_entry(&id)]).await.unwrap();
    let request = call(&core, &id);
    assert!(matches!(Caller::operator(&core, &request), Ok(Caller::Admin(_))));
    let revoked = revoked(&core, &request);
    tokio::pin!(revoked);
    let first = core.authorities.journal()[0].id.clone();
    let next = core.authorities.prepare().await.unwrap();
    core.authorities.activate(&next.id).await.unwrap();
    core.authorities.taint(&first).await.unwrap();
    assert!(Caller::operator(&core, &request).is_ok(), "a taint asks for renewal and cuts nobody");
    tokio::select! {
        biased;
        _ = &mut revoked => panic!("not revoked yet"),
        () = std::future::ready(()) => {}
    }
    core.authorities.revoke(&first).await.unwrap();
    let refused = Caller::of(&core, &request).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    let ended = tokio::time::timeout(Duration::from_secs(5), revoked).await.unwrap();
    assert_eq!(ended.code(), tonic::Code::Unauthenticated);
    assert!(Caller::operator(&core, &call(&core, &id)).is_ok(), "under the new authority it is who it was");
}
