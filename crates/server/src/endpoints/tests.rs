//! What an operator's calls leave in store and memory.

use std::sync::Arc;
use std::time::Duration;

use countersign_api::convert::{bundle_to_wire, entry_to_wire};
use countersign_api::spire::agent::agent_server::Agent;
use countersign_api::spire::agent::{BanAgentRequest, DeleteAgentRequest};
use countersign_api::spire::bundle::batch_delete_federated_bundle_request::Mode;
use countersign_api::spire::bundle::bundle_server::Bundle;
use countersign_api::spire::bundle::{
    AppendBundleRequest, BatchDeleteFederatedBundleRequest, BatchSetFederatedBundleRequest,
};
use countersign_api::spire::entry::entry_server::Entry as EntryService;
use countersign_api::spire::entry::{BatchCreateEntryRequest, BatchDeleteEntryRequest, BatchUpdateEntryRequest};
use countersign_api::spire::localauthority::local_authority_server::LocalAuthority;
use countersign_api::spire::localauthority::{
    ActivateJwtAuthorityRequest, ActivateX509AuthorityRequest, PrepareJwtAuthorityRequest, PrepareX509AuthorityRequest,
    RevokeJwtAuthorityRequest, RevokeX509AuthorityRequest, TaintJwtAuthorityRequest, TaintX509AuthorityRequest,
};
use countersign_api::spire::trustdomain::trust_domain_server::TrustDomain as TrustDomainService;
use countersign_api::spire::trustdomain::{
    BatchCreateFederationRelationshipRequest, BatchDeleteFederationRelationshipRequest,
    BatchUpdateFederationRelationshipRequest,
};
use countersign_api::spire::types;
use countersign_api::spire::types::federation_relationship::BundleEndpointProfile;
use countersign_identity::{Entry, KeyType, PrivateKey, SpiffeId, TrustBundle, TrustDomain, X509Authority};

use super::*;
use crate::authority::Kind;
use crate::datastore::{DataStore, Held};
use crate::testing::{agent_call, local, server, server_on, store, td};

fn foreign_bundle() -> TrustBundle {
    let partner = TrustDomain::new("partner").unwrap();
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let now = time::OffsetDateTime::now_utc();
    let root = countersign_identity::profile::issue_root(&partner, &key, Duration::from_secs(3_600), now).unwrap();
    let authorities = vec![X509Authority::from_der(root.to_vec()).unwrap()];
    TrustBundle { authorities, sequence: 1, ..TrustBundle::empty(partner) }
}

pub fn entry() -> Entry {
    Entry {
        id: "e".parse().unwrap(),
        spiffe_id: SpiffeId::new("spiffe://td/e").unwrap(),
        parent_id: SpiffeId::new("spiffe://td/spire/agent/x/1").unwrap(),
        selectors: ["unix:uid:1".parse().unwrap()].into(),
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        federates_with: [TrustDomain::new("partner").unwrap()].into(),
        admin: false,
        downstream: false,
        dns_names: vec![],
        expires_at: None,
        hint: String::new(),
        store_svid: false,
        additional: Default::default(),
        revision: 0,
        created_at: time::OffsetDateTime::UNIX_EPOCH,
    }
}

/// Whether memory holds what the store does.
async fn agree(core: &Core, store: &dyn DataStore) -> bool {
    let agents: Vec<_> = store.agents().await.unwrap().into_iter().map(|a| Arc::new(a.value)).collect();
    // The store keeps whole seconds.
    let mut entries: Vec<_> = store.entries().await.unwrap().iter().map(|e| entry_to_wire(&e.value)).collect();
    entries.sort_by(|a, b| a.id.cmp(&b.id));
    let known: Vec<_> = core.entries.page(None, usize::MAX, |_| true).iter().map(|e| entry_to_wire(e)).collect();
    let stored = store.bundles().await.unwrap().into_iter().map(|b| b.value);
    let (own, foreign): (Vec<_>, Vec<_>) = stored.partition(|b| b.trust_domain == td());
    let federated: Vec<_> = core.federated.all().values().map(|b| TrustBundle::clone(b)).collect();
    let bundle = TrustBundle::clone(&core.authorities.bundle().borrow());
    let journal = store.authorities().await.unwrap().value.records;
    let relationships = store.relationships().await.unwrap().into_iter().map(|r| r.value).collect::<Vec<_>>();
    let related: Vec<_> = core.relationships.all().values().map(|r| r.as_ref().clone()).collect();
    relationships == related
        && agents == core.agents.list()
        && entries == known
        && foreign == federated
        && own == [bundle]
        && journal == *core.authorities.journal()
}

/// A server, and a client that goes away each time when its change has just been committed.
struct World {
    core: Arc<Core>,
    held: Arc<Held>,
    store: Arc<dyn DataStore>,
    endpoint: Endpoint,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn DataStore> = store(&dir).await;
        let held = Arc::new(Held::new(store.clone()));
        let core = server_on(held.clone(), &dir).await;
        Self { endpoint: Endpoint(core.clone()), core, held, store, _dir: dir }
    }

    async fn cut_off(&self, what: &str, call: impl Future) {
        self.held.drop_at_commit(call).await;
        let agreed = async {
            while !self.core.tasks.is_empty() || !agree(&self.core, self.store.as_ref()).await {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), agreed)
            .await
            .unwrap_or_else(|_| panic!("{what}: memory is behind"));
    }
}

#[tokio::test]
async fn a_call_that_is_cut_off_at_its_commit_leaves_memory_as_the_store_is() {
    let world = World::new().await;
    let endpoint = &world.endpoint;
    let (banned, _) = agent_call(&world.core, "1").await;
    let (evicted, _) = agent_call(&world.core, "2").await;
    let wire = |id: &SpiffeId| Some(countersign_api::convert::id_to_wire(id));
    world.cut_off("ban", endpoint.ban_agent(local(BanAgentRequest { id: wire(&banned) }))).await;
    world.cut_off("evict", endpoint.delete_agent(local(DeleteAgentRequest { id: wire(&evicted) }))).await;
    let bundle = vec![bundle_to_wire(&foreign_bundle())];
    let set = BatchSetFederatedBundleRequest { bundle, ..Default::default() };
    world.cut_off("set bundle", endpoint.batch_set_federated_bundle(local(set))).await;
    let create = BatchCreateEntryRequest { entries: vec![entry_to_wire(&entry())], ..Default::default() };
    world.cut_off("create", endpoint.batch_create_entry(local(create))).await;
    let changed = entry_to_wire(&Entry { dns_names: vec!["n".into()], ..entry() });
    let update = BatchUpdateEntryRequest { entries: vec![changed], ..Default::default() };
    world.cut_off("update", endpoint.batch_update_entry(local(update))).await;
    let delete =
        BatchDeleteFederatedBundleRequest { trust_domains: vec!["partner".into()], mode: Mode::Dissociate.into() };
    world.cut_off("dissociate, delete bundle", endpoint.batch_delete_federated_bundle(local(delete))).await;
    assert!(world.core.entries.get(&entry().id).unwrap().federates_with.is_empty());
    let delete = BatchDeleteEntryRequest { ids: vec!["e".into()] };
    world.cut_off("delete", endpoint.batch_delete_entry(local(delete))).await;
    assert!(world.core.entries.is_empty() && world.core.agents.standing(&banned).is_err());
}

#[tokio::test]
async fn a_relationships_change_that_is_cut_off_holds_with_its_bundle() {
    let world = World::new().await;
    let endpoint = &world.endpoint;
    let relationship = |bundle: Option<TrustBundle>| types::FederationRelationship {
        trust_domain: "partner".into(),
        bundle_endpoint_url: "https://partner.test/".into(),
        bundle_endpoint_profile: Some(BundleEndpointProfile::HttpsWeb(types::HttpsWebProfile {})),
        trust_domain_bundle: bundle.map(|b| bundle_to_wire(&b)),
    };
    let one = vec![relationship(Some(foreign_bundle()))];
    let create = BatchCreateFederationRelationshipRequest { federation_relationships: one, output_mask: None };
    world.cut_off("create", endpoint.batch_create_federation_relationship(local(create))).await;
    assert_eq!((world.core.relationships.all().len(), world.core.federated.all().len()), (1, 1));
    let next = foreign_bundle();
    let one = vec![relationship(Some(next.clone()))];
    let update = BatchUpdateFederationRelationshipRequest { federation_relationships: one, ..Default::default() };
    world.cut_off("update", endpoint.batch_update_federation_relationship(local(update))).await;
    assert_eq!(world.core.federated.get("partner").unwrap().authorities, next.authorities);
    let delete = BatchDeleteFederationRelationshipRequest { trust_domains: vec!["partner".into()] };
    world.cut_off("delete", endpoint.batch_delete_federation_relationship(local(delete))).await;
    assert!(world.core.relationships.all().is_empty());
}

#[tokio::test]
async fn an_authoritys_change_that_is_cut_off_holds_and_the_next_one_goes_through() {
    let world = World::new().await;
    let endpoint = &world.endpoint;
    let authority = |kind: Kind, at: usize| {
        let journal = world.core.authorities.journal();
        journal.iter().filter(|r| r.kind() == kind).nth(at).unwrap().id.clone()
    };
    let first = authority(Kind::X509, 0);
    world.cut_off("prepare", endpoint.prepare_x509_authority(local(PrepareX509AuthorityRequest {}))).await;
    let activate = ActivateX509AuthorityRequest { authority_id: authority(Kind::X509, 1) };
    world.cut_off("activate", endpoint.activate_x509_authority(local(activate))).await;
    let taint = TaintX509AuthorityRequest { authority_id: first.clone() };
    world.cut_off("taint", endpoint.taint_x509_authority(local(taint))).await;
    let revoke = RevokeX509AuthorityRequest { authority_id: first.clone() };
    world.cut_off("revoke", endpoint.revoke_x509_authority(local(revoke))).await;
    assert!(world.core.authorities.bundle().borrow().authorities.iter().all(|a| a.id() != first));
    let first = authority(Kind::Jwt, 0);
    world.cut_off("prepare JWT", endpoint.prepare_jwt_authority(local(PrepareJwtAuthorityRequest {}))).await;
    let activate = ActivateJwtAuthorityRequest { authority_id: authority(Kind::Jwt, 1) };
    world.cut_off("activate JWT", endpoint.activate_jwt_authority(local(activate))).await;
    let taint = TaintJwtAuthorityRequest { authority_id: first.clone() };
    world.cut_off("taint JWT", endpoint.taint_jwt_authority(local(taint))).await;
    let revoke = RevokeJwtAuthorityRequest { authority_id: first.clone() };
    world.cut_off("revoke JWT", endpoint.revoke_jwt_authority(local(revoke))).await;
    assert!(world.core.authorities.bundle().borrow().jwt_authorities.iter().all(|a| a.key_id() != first));
    let asn1 = foreign_bundle().authorities[0].der().to_vec();
    let certificate = types::X509Certificate { asn1, ..Default::default() };
    let append = AppendBundleRequest { x509_authorities: vec![certificate], ..Default::default() };
    world.cut_off("append", endpoint.append_bundle(local(append))).await;
    world.core.authorities.rotate().await.unwrap();
}

#[tokio::test]
async fn our_own_bundle_cannot_be_deleted_as_a_foreign_one() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let own = core.authorities.bundle().borrow().clone();
    for mode in [Mode::Restrict, Mode::Delete, Mode::Dissociate] {
        let delete = BatchDeleteFederatedBundleRequest { trust_domains: vec!["td".into()], mode: mode.into() };
        let answer = Endpoint(core.clone()).batch_delete_federated_bundle(local(delete)).await.unwrap().into_inner();
        assert_eq!(answer.results[0].status.as_ref().unwrap().code, i32::from(Code::InvalidArgument));
        assert_eq!(core.store.bundles().await.unwrap()[0].value, *own);
    }
    let stolen = TrustBundle { trust_domain: td(), ..foreign_bundle() };
    assert!(core.federated.set(stolen, crate::federation::bundles::Expect::Any).await.is_err());
    assert_eq!(core.store.bundles().await.unwrap().len(), 1);
}

#[tokio::test]
async fn refused_attestations_of_one_network_leave_one_short_line_and_a_count() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    for n in 0..1_000u128 {
        let address = std::net::IpAddr::V6((n | (0x2001_0db8 << 96)).into());
        let quoted = "\u{1b}a".repeat(30_000);
        core.refuse_counted("agent_svid", "anonymous", Some(address), crate::core::ATTESTATION, &quoted);
    }
    core.tell_all_refusals();
    let audit = std::fs::read_to_string(dir.path().join("audit.log")).unwrap();
    let told: Vec<_> = audit.lines().filter(|l| l.contains("refused")).collect();
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].len() < 8_000, "{}", told[0].len());
    assert!(told[1].contains("999 more refused attestations") && told[1].contains("2001:db8::/64"), "{}", told[1]);
}

#[tokio::test]
async fn an_entry_federates_only_with_trust_domains_whose_bundle_is_here() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let endpoint = Endpoint(core.clone());
    let create = async || {
        let request = BatchCreateEntryRequest { entries: vec![entry_to_wire(&entry())], ..Default::default() };
        let answer = endpoint.batch_create_entry(local(request)).await.unwrap().into_inner();
        answer.results[0].status.clone().unwrap()
    };
    let refused = create().await;
    assert_eq!(refused.code, i32::from(Code::FailedPrecondition));
    assert!(refused.message.contains("no bundle of `partner`") && core.entries.is_empty(), "{}", refused.message);
    core.federated.set(foreign_bundle(), crate::federation::bundles::Expect::New).await.unwrap();
    assert_eq!(create().await.code, 0);
    let update = async |change: Entry, mask: Option<types::EntryMask>| {
        let entries = vec![entry_to_wire(&change)];
        let request = BatchUpdateEntryRequest { entries, input_mask: mask, ..Default::default() };
        let answer = endpoint.batch_update_entry(local(request)).await.unwrap().into_inner();
        answer.results[0].status.clone().unwrap().code
    };
    let more = ["partner", "unknown"].map(|td| TrustDomain::new(td).unwrap()).into();
    let with_more = Entry { federates_with: more, ..entry() };
    assert_eq!(update(with_more.clone(), None).await, i32::from(Code::FailedPrecondition));
    assert_eq!(core.entries.get(&entry().id).unwrap().federates_with, entry().federates_with);
    // What is not being changed is not judged.
    let hint = types::EntryMask { hint: true, ..Default::default() };
    assert_eq!(update(Entry { hint: "h".into(), ..with_more }, Some(hint)).await, 0);
}
