//! The life of an authority, under a clock that the test controls.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use super::*;
use crate::authority::journal::JOURNAL_LENGTH;
use crate::datastore::Sqlite;
use crate::key_manager::{KeyManager, KeyManagerError, Memory, SignError, Signer};
use crate::upstream_authority::{UpstreamBundle, UpstreamError, UpstreamSigned};
use countersign_identity::profile::{SigningAuthority, issue_root};
use countersign_identity::{KeyType, PrivateKey, SignatureAlgorithm};
use jwt::sign_token;

struct World {
    now: Arc<AtomicI64>,
    store: Arc<dyn DataStore>,
    keys: Arc<Memory>,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Sqlite::open(&dir.path().join("db"), &TrustDomain::new("td").unwrap()).await.unwrap());
        Self { now: Arc::new(AtomicI64::new(1_800_000_000)), store, keys: Arc::default(), _dir: dir }
    }

    fn settings(&self, keys: Arc<dyn KeyManager>, upstream: Option<Arc<dyn UpstreamAuthority>>) -> Settings {
        let now = self.now.clone();
        Settings {
            trust_domain: TrustDomain::new("td").unwrap(),
            issuance: tokio::sync::watch::channel(Issuance {
                ca_ttl: Duration::from_secs(600),
                svid_ttl: Duration::from_secs(60),
                agent_svid_ttl: Duration::from_secs(60),
                ca_key_type: KeyType::EcP256,
            })
            .1,
            keys: Keys::new(keys),
            upstream,
            store: self.store.clone(),
            clock: Arc::new(move || OffsetDateTime::from_unix_timestamp(now.load(Ordering::Relaxed)).unwrap()),
        }
    }

    async fn authorities(&self) -> Authorities {
        Authorities::load(self.settings(self.keys.clone(), None)).await.unwrap()
    }

    fn pass(&self, seconds: i64) {
        self.now.fetch_add(seconds, Ordering::Relaxed);
    }
}

/// The authorities of one kind, the oldest first.
fn of_kind(a: &Authorities, kind: Kind) -> Vec<Record> {
    a.journal().iter().filter(|r| r.kind() == kind).cloned().collect()
}

fn statuses(a: &Authorities) -> Vec<&'static str> {
    of_kind(a, Kind::X509).iter().map(|r| r.status.as_str()).collect()
}

#[tokio::test]
async fn an_authority_is_published_before_it_signs_and_trusted_until_its_end() {
    let world = World::new().await;
    let a = world.authorities().await;
    assert_eq!(statuses(&a), ["active"]);
    assert_eq!(a.bundle().borrow().authorities.len(), 1);
    // Lifetime 610 s (backdated): the next one is prepared when 305 s are left, active when 101.6 s are left.
    world.pass(294);
    a.rotate().await.unwrap();
    assert_eq!(statuses(&a), ["active"]);
    world.pass(2);
    a.rotate().await.unwrap();
    assert_eq!(statuses(&a), ["active", "prepared"]);
    assert_eq!(a.bundle().borrow().authorities.len(), 2, "published before first use");
    world.pass(203);
    a.rotate().await.unwrap();
    assert_eq!(statuses(&a), ["old", "active"]);
    assert_eq!(a.bundle().borrow().authorities.len(), 2, "the old one is still trusted");
    let first = a.journal()[0].id.clone();
    world.pass(102);
    a.rotate().await.unwrap();
    // The second one is past half of its life, so a third is prepared; the first has expired and is kept for a while.
    assert_eq!(statuses(&a), ["old", "active", "prepared"]);
    world.pass(3_600);
    a.rotate().await.unwrap();
    assert!(a.journal().iter().all(|r| r.id != first));
    assert!(a.bundle().borrow().authorities.iter().all(|a| a.id() != first));
}

#[tokio::test]
async fn a_restart_takes_up_the_journal_and_the_sequence() {
    let world = World::new().await;
    let first = world.authorities().await;
    first.prepare(Kind::X509).await.unwrap();
    let (journal, bundle) = (first.journal(), first.bundle().borrow().clone());
    drop(first);
    let second = world.authorities().await;
    assert_eq!(second.journal(), journal);
    assert_eq!(*second.bundle().borrow(), bundle);
}

#[tokio::test]
async fn with_its_keys_gone_a_server_makes_a_new_authority_and_still_trusts_the_old() {
    let mut world = World::new().await;
    drop(world.authorities().await);
    world.keys = Arc::default();
    let a = world.authorities().await;
    assert_eq!(statuses(&a), ["old", "active"]);
    assert_eq!(a.bundle().borrow().authorities.len(), 2);
}

#[tokio::test]
async fn taint_and_revoke_need_an_old_authority_and_say_what_to_do() {
    let world = World::new().await;
    let a = world.authorities().await;
    let first = a.journal()[0].id.clone();
    let why = a.taint(Kind::X509, &first).await.unwrap_err().to_string();
    assert!(why.contains("is active") && why.contains("prepare and activate another first"), "{why}");
    let next = a.prepare(Kind::X509).await.unwrap();
    a.activate(Kind::X509, &next.id).await.unwrap();
    a.taint(Kind::X509, &first).await.unwrap();
    assert!(a.bundle().borrow().authorities[0].tainted);
    a.revoke(Kind::X509, &first).await.unwrap();
    assert_eq!(a.bundle().borrow().authorities.len(), 1);
    assert!(a.bundle().borrow().authorities[0].id() != first);
    assert!(a.revoke(Kind::X509, "nope").await.unwrap_err().to_string().contains("there is no authority `nope`"));
}

/// A key manager whose `remove` fails on request.
#[derive(Default)]
struct Stubborn {
    keys: Memory,
    refuses: std::sync::atomic::AtomicBool,
}

#[async_trait::async_trait]
impl KeyManager for Stubborn {
    async fn generate(&self, name: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, KeyManagerError> {
        self.keys.generate(name, key_type).await
    }

    async fn get(&self, name: &str) -> Result<Option<Arc<dyn Signer>>, KeyManagerError> {
        self.keys.get(name).await
    }

    async fn names(&self) -> Result<Vec<String>, KeyManagerError> {
        self.keys.names().await
    }

    async fn remove(&self, name: &str) -> Result<(), KeyManagerError> {
        if self.refuses.load(Ordering::SeqCst) {
            let source = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
            return Err(KeyManagerError::Io { what: "remove", path: name.into(), source });
        }
        self.keys.remove(name).await
    }
}

#[tokio::test]
async fn a_dropped_key_that_cannot_be_removed_costs_the_new_one_nothing() {
    let world = World::new().await;
    let keys = Arc::new(Stubborn::default());
    let a = Authorities::load(world.settings(keys.clone(), None)).await.unwrap();
    a.prepare(Kind::X509).await.unwrap();
    keys.refuses.store(true, Ordering::SeqCst);
    let second = a.prepare(Kind::X509).await.unwrap();
    assert_eq!(keys.names().await.unwrap().len(), 4, "the dropped one is still there, beside the JWT authority's");
    a.activate(Kind::X509, &second.id).await.unwrap();
    keys.refuses.store(false, Ordering::SeqCst);
    a.rotate().await.unwrap();
    assert_eq!(keys.names().await.unwrap().len(), 3, "swept as soon as it can be");
}

#[tokio::test]
async fn the_key_of_a_crash_between_making_and_storing_is_swept_at_the_start() {
    let world = World::new().await;
    drop(world.authorities().await);
    world.keys.generate("abandoned", KeyType::EcP256).await.unwrap();
    let a = world.authorities().await;
    let of = |mut names: Vec<String>| {
        names.sort();
        names
    };
    let recorded = a.journal().iter().map(|r| r.key_name.clone()).collect();
    assert_eq!(of(world.keys.names().await.unwrap()), of(recorded));
}

#[tokio::test]
async fn a_clock_that_is_ahead_for_a_moment_costs_no_root_and_leaves_a_signer_that_is_valid() {
    let world = World::new().await;
    let a = world.authorities().await;
    let first = a.journal()[0].clone();
    world.pass(3_000);
    a.rotate().await.unwrap();
    world.pass(-3_000);
    a.rotate().await.unwrap();
    let bundle = a.bundle().borrow().clone();
    assert!(bundle.authorities.iter().any(|r| r.id() == first.id), "what it signed is still trusted");
    assert!(world.keys.get(&first.key_name).await.unwrap().is_some());
    let active = of_kind(&a, Kind::X509).into_iter().find(|r| r.status == Status::Active).unwrap();
    assert!(active.validity().0.unix_timestamp() <= world.now.load(Ordering::Relaxed), "one that is valid now signs");
}

#[tokio::test]
async fn a_server_that_was_away_until_all_had_ended_never_publishes_an_empty_bundle() {
    let world = World::new().await;
    drop(world.authorities().await);
    world.pass(10 * 86_400);
    let a = world.authorities().await;
    assert_eq!(statuses(&a), ["active"]);
    assert_eq!(a.bundle().borrow().authorities.len(), 1);
}

#[tokio::test]
async fn revoking_takes_a_taint_and_no_command_does_without_an_id() {
    let world = World::new().await;
    let a = world.authorities().await;
    let first = a.journal()[0].id.clone();
    let next = a.prepare(Kind::X509).await.unwrap();
    assert!(matches!(a.activate(Kind::X509, "").await, Err(AuthorityError::NoId)));
    assert_eq!(statuses(&a), ["active", "prepared"]);
    a.activate(Kind::X509, &next.id).await.unwrap();
    assert!(matches!(a.revoke(Kind::X509, "").await, Err(AuthorityError::NoId)));
    let why = a.revoke(Kind::X509, &first).await.unwrap_err().to_string();
    assert!(why.contains("not possible to revoke an untainted one") && why.contains("authority taint"), "{why}");
    assert_eq!(a.bundle().borrow().authorities.len(), 2);
    a.taint(Kind::X509, &first).await.unwrap();
    a.revoke(Kind::X509, &first).await.unwrap();
}

#[tokio::test]
async fn a_journal_that_another_server_has_changed_is_not_overwritten() {
    let world = World::new().await;
    let one = world.authorities().await;
    let two = world.authorities().await;
    two.prepare(Kind::X509).await.unwrap();
    let late = one.prepare(Kind::X509).await.unwrap_err().to_string();
    assert!(late.contains("another server has changed"), "{late}");
    assert_eq!(world.store.authorities().await.unwrap().value.records, *two.journal());
    // It has taken up what it had missed, and goes on from there.
    assert_eq!((one.journal(), one.bundle().borrow().clone()), (two.journal(), two.bundle().borrow().clone()));
    one.prepare(Kind::X509).await.unwrap();
}

#[tokio::test]
async fn another_servers_revocation_is_taken_up_and_its_signer_too() {
    let world = World::new().await;
    let one = world.authorities().await;
    let two = world.authorities().await;
    let first = one.journal()[0].id.clone();
    let next = two.prepare(Kind::X509).await.unwrap();
    two.activate(Kind::X509, &next.id).await.unwrap();
    two.taint(Kind::X509, &first).await.unwrap();
    two.revoke(Kind::X509, &first).await.unwrap();
    assert!(matches!(one.append(vec![], vec![]).await, Err(AuthorityError::Store(DataStoreError::Overtaken))));
    assert!(one.bundle().borrow().authorities.iter().all(|a| a.id() != first), "revoked here too");
    assert_eq!(statuses(&one), ["active"]);
    one.rotate().await.unwrap();
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let id = countersign_identity::SpiffeId::new("spiffe://td/a").unwrap();
    let csr = countersign_identity::profile::request(&key, Some(&id)).unwrap();
    let key = countersign_identity::profile::RequestedKey::from_csr(&csr).unwrap();
    let leaf = LeafRequest { id: &id, dns_names: &[], key: &key, ttl: Duration::from_secs(60) };
    assert_eq!(one.sign(&leaf).await.unwrap().facts.authority_id, next.id);
}

#[tokio::test]
async fn a_bundle_that_the_store_has_lost_is_made_again_from_the_journal() {
    let world = World::new().await;
    let before = world.authorities().await;
    let first = before.journal()[0].id.clone();
    let next = before.prepare(Kind::X509).await.unwrap();
    before.activate(Kind::X509, &next.id).await.unwrap();
    before.taint(Kind::X509, &first).await.unwrap();
    let bundle = before.bundle().borrow().clone();
    drop(before);
    world.store.delete_bundle("td").await.unwrap();
    let after = world.authorities().await;
    let again = after.bundle().borrow().clone();
    assert_eq!(again.jwt_authorities, bundle.jwt_authorities);
    assert_eq!(
        again.authorities, bundle.authorities,
        "what was signed is still trusted, what was tainted is still tainted"
    );
    assert!(again.sequence > bundle.sequence);
    assert_eq!(world.store.bundles().await.unwrap()[0].value, *again);
}

#[tokio::test]
async fn an_authority_that_is_trusted_can_be_revoked_however_many_came_after_it() {
    let world = World::new().await;
    let a = world.authorities().await;
    let first = a.journal()[0].id.clone();
    for _ in 0..JOURNAL_LENGTH + 2 {
        let next = a.prepare(Kind::X509).await.unwrap();
        a.activate(Kind::X509, &next.id).await.unwrap();
    }
    a.taint(Kind::X509, &first).await.unwrap();
    a.revoke(Kind::X509, &first).await.unwrap();
    assert!(a.bundle().borrow().authorities.iter().all(|r| r.id() != first));
}

/// An upstream that signs once and then hangs.
struct Hangs(std::sync::atomic::AtomicUsize);

#[async_trait::async_trait]
impl UpstreamAuthority for Hangs {
    fn name(&self) -> String {
        "hangs".into()
    }

    async fn sign_intermediate(
        &self,
        _: &TrustDomain,
        _: &[u8],
        _: Duration,
        _: OffsetDateTime,
    ) -> Result<UpstreamSigned, UpstreamError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        std::future::pending().await
    }

    async fn bundle(&self) -> Result<UpstreamBundle, UpstreamError> {
        Ok(UpstreamBundle::default())
    }

    async fn publish_jwt_key(&self, _: &JwtAuthority) -> Result<Option<Vec<JwtAuthority>>, UpstreamError> {
        Ok(None)
    }
}

#[tokio::test]
async fn an_upstream_that_hangs_holds_up_nobody_who_looks_or_changes_something_else() {
    let world = World::new().await;
    drop(world.authorities().await);
    let hangs = Arc::new(Hangs(Default::default()));
    let a = Authorities::load(world.settings(world.keys.clone(), Some(hangs.clone()))).await.unwrap();
    let (told, done) = tokio::sync::oneshot::channel::<()>();
    let preparing = async {
        tokio::select! {
            made = a.prepare(Kind::X509) => Some(made.map(|_| ())),
            _ = done => None,
        }
    };
    let looking = async {
        while hangs.0.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(statuses(&a), ["active"], "while the upstream is asked");
        let elsewhere = PrivateKey::generate(KeyType::EcP256).unwrap();
        let root = issue_root(&TrustDomain::new("td").unwrap(), &elsewhere, Duration::from_secs(60), a.now()).unwrap();
        let appended = a.append(vec![X509Authority::from_der(root.to_vec()).unwrap()], vec![]);
        tokio::time::timeout(Duration::from_secs(5), appended).await.expect("the journal is free").unwrap();
        assert_eq!(a.bundle().borrow().authorities.len(), 2);
        told.send(()).unwrap();
    };
    let (given_up, ()) = tokio::join!(preparing, looking);
    assert!(given_up.is_none(), "the upstream was still being asked");
    a.rotate().await.unwrap();
    assert_eq!(world.keys.names().await.unwrap().len(), 2, "no key is left behind");
}

/// An upstream that signs with a CA of its own once it is released.
struct Waits {
    asked: tokio::sync::Notify,
    released: tokio::sync::Notify,
}

#[async_trait::async_trait]
impl UpstreamAuthority for Waits {
    fn name(&self) -> String {
        "waits".into()
    }

    async fn sign_intermediate(
        &self,
        td: &TrustDomain,
        csr: &[u8],
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<UpstreamSigned, UpstreamError> {
        self.asked.notify_one();
        self.released.notified().await;
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let root = issue_root(td, &key, ttl, now).unwrap();
        let signer = SigningAuthority::new(root.clone(), vec![], &key).unwrap();
        let requested = countersign_identity::profile::RequestedKey::from_csr(csr).unwrap();
        let own = countersign_identity::profile::issue_intermediate(td, &requested, ttl, now, &signer).unwrap();
        let roots = vec![X509Authority::from_der(root.to_vec()).unwrap()];
        Ok(UpstreamSigned { chain: vec![own], roots })
    }

    async fn bundle(&self) -> Result<UpstreamBundle, UpstreamError> {
        Ok(UpstreamBundle::default())
    }

    async fn publish_jwt_key(&self, _: &JwtAuthority) -> Result<Option<Vec<JwtAuthority>>, UpstreamError> {
        Ok(None)
    }
}

/// An upstream that signs nothing, and names the roots that it is given; without any it does not answer.
#[derive(Default)]
struct Names(std::sync::Mutex<Vec<X509Authority>>);

impl Names {
    fn away(&self) -> UpstreamError {
        UpstreamError::Unreachable { upstream: self.name(), why: "no answer".into() }
    }
}

#[async_trait::async_trait]
impl UpstreamAuthority for Names {
    fn name(&self) -> String {
        "names".into()
    }

    async fn sign_intermediate(
        &self,
        _: &TrustDomain,
        _: &[u8],
        _: Duration,
        _: OffsetDateTime,
    ) -> Result<UpstreamSigned, UpstreamError> {
        Err(self.away())
    }

    async fn bundle(&self) -> Result<UpstreamBundle, UpstreamError> {
        let roots = self.0.lock().unwrap().clone();
        if roots.is_empty() { Err(self.away()) } else { Ok(UpstreamBundle { roots, ..Default::default() }) }
    }

    async fn publish_jwt_key(&self, _: &JwtAuthority) -> Result<Option<Vec<JwtAuthority>>, UpstreamError> {
        Ok(None)
    }
}

#[tokio::test]
async fn a_root_that_the_upstream_names_is_published_before_anything_is_signed_below_it_and_stays() {
    let world = World::new().await;
    drop(world.authorities().await);
    let root = |ttl: u64, at: OffsetDateTime| {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let der = issue_root(&TrustDomain::new("td").unwrap(), &key, Duration::from_secs(ttl), at).unwrap();
        X509Authority::from_der(der.to_vec()).unwrap()
    };
    let names = Arc::<Names>::default();
    let a = Authorities::load(world.settings(world.keys.clone(), Some(names.clone()))).await.unwrap();
    let before = a.bundle().borrow().clone();
    assert!(matches!(a.follow_upstream().await, Err(AuthorityError::Unsigned(UpstreamError::Unreachable { .. }))));
    let (first, second) = (root(3_600, a.now()), root(3_600, a.now()));
    let ended = root(60, a.now() - Duration::from_secs(600));
    *names.0.lock().unwrap() = vec![first.clone(), ended.clone()];
    let mut told = a.bundle();
    told.mark_unchanged();
    a.follow_upstream().await.unwrap();
    assert!(told.has_changed().unwrap(), "agents are told");
    let has =
        |a: &Authorities, root: &X509Authority| a.bundle().borrow().authorities.iter().any(|r| r.der() == root.der());
    assert!(has(&a, &first) && !has(&a, &ended) && before.authorities.iter().all(|root| has(&a, root)));
    let sequence = a.bundle().borrow().sequence;
    assert_eq!(sequence, before.sequence + 1);
    a.follow_upstream().await.unwrap();
    assert_eq!(a.bundle().borrow().sequence, sequence, "nothing has changed");
    *names.0.lock().unwrap() = vec![second.clone()];
    a.follow_upstream().await.unwrap();
    assert!(has(&a, &first) && has(&a, &second));
    assert!(has(&world.authorities().await, &second), "the store has it");
}

#[tokio::test]
async fn what_was_made_for_a_journal_that_has_changed_meanwhile_is_dropped() {
    let world = World::new().await;
    let before = world.authorities().await;
    let prepared = before.prepare(Kind::X509).await.unwrap();
    drop(before);
    let waits = Arc::new(Waits { asked: Default::default(), released: Default::default() });
    let a = Authorities::load(world.settings(world.keys.clone(), Some(waits.clone()))).await.unwrap();
    let meanwhile = async {
        waits.asked.notified().await;
        a.activate(Kind::X509, &prepared.id).await.unwrap();
        waits.released.notify_one();
    };
    let (made, ()) = tokio::join!(a.prepare(Kind::X509), meanwhile);
    assert!(matches!(made, Err(AuthorityError::Changed)), "{made:?}");
    assert_eq!(statuses(&a), ["old", "active"]);
    assert_eq!(world.keys.names().await.unwrap().len(), 3, "no key is left behind");
    waits.released.notify_one();
    a.prepare(Kind::X509).await.unwrap();
    assert_eq!(statuses(&a), ["old", "active", "prepared"]);
}

#[tokio::test]
async fn keys_of_others_are_published_until_they_end_and_an_id_names_one_key() {
    let world = World::new().await;
    let a = world.authorities().await;
    let key = |id: &str, ends: Option<i64>| {
        let public = PrivateKey::generate(KeyType::EcP256).unwrap().public_der().unwrap();
        let mut key = JwtAuthority::new(id, &public).unwrap();
        key.expires_at = ends.map(|seconds| a.now() + time::Duration::seconds(seconds));
        key
    };
    let (lasting, ended) = (key("lasting", None), key("ended", Some(-3_600)));
    let ending = key("ending", Some(-3_000));
    let before = a.bundle().borrow().sequence;
    a.append(vec![], vec![lasting.clone(), ended.clone(), ending.clone()]).await.unwrap();
    a.append(vec![], vec![lasting.clone()]).await.unwrap();
    let others = |a: &Authorities| -> Vec<JwtAuthority> {
        let own: Vec<_> = of_kind(a, Kind::Jwt).into_iter().map(|r| r.id).collect();
        let bundle = a.bundle().borrow().clone();
        bundle.jwt_authorities.iter().filter(|k| own.iter().all(|id| id != k.key_id())).cloned().collect()
    };
    assert_eq!(others(&a), [lasting.clone(), ended, ending.clone()]);
    assert_eq!(a.bundle().borrow().sequence, before + 1, "the second changed nothing");
    let other = a.append(vec![], vec![key("lasting", None)]).await.unwrap_err();
    assert!(matches!(&other, AuthorityError::KeyIdTaken(id) if id == "lasting"), "{other}");
    // Under two IDs a key would outlive its revocation: one of others as little as our own.
    let own = a.bundle().borrow().jwt_authorities.iter().find(|k| k.key_id() != "lasting").unwrap().clone();
    for known in [&own, &lasting] {
        let twin = JwtAuthority::new("twin", known.der()).unwrap();
        let refused = a.append(vec![], vec![twin]).await.unwrap_err();
        assert!(matches!(&refused, AuthorityError::KeyKnown { as_id, .. } if as_id == known.key_id()), "{refused}");
    }
    a.rotate().await.unwrap();
    // A clock that is ahead for a moment takes nothing away.
    assert_eq!(others(&a), [lasting.clone(), ending.clone()]);
    assert_eq!(others(&world.authorities().await), [lasting, ending], "the store has it");
}

/// What a key of [`Moody`] does.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Signs,
    Refuses,
    Lies,
    Hangs,
}

/// A key manager whose keys sign or not, as they are told.
struct Moody(Memory, watch::Sender<Mood>);

impl Moody {
    fn new() -> Arc<Self> {
        Arc::new(Self(Memory::default(), watch::Sender::new(Mood::Signs)))
    }

    fn given(&self, key: Arc<dyn Signer>) -> Arc<dyn Signer> {
        Arc::new(MoodyKey(key, self.1.subscribe()))
    }
}

#[async_trait::async_trait]
impl KeyManager for Moody {
    async fn generate(&self, name: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, KeyManagerError> {
        Ok(self.given(self.0.generate(name, key_type).await?))
    }

    async fn get(&self, name: &str) -> Result<Option<Arc<dyn Signer>>, KeyManagerError> {
        Ok(self.0.get(name).await?.map(|key| self.given(key)))
    }

    async fn names(&self) -> Result<Vec<String>, KeyManagerError> {
        self.0.names().await
    }

    async fn remove(&self, name: &str) -> Result<(), KeyManagerError> {
        self.0.remove(name).await
    }
}

struct MoodyKey(Arc<dyn Signer>, watch::Receiver<Mood>);

#[async_trait::async_trait]
impl Signer for MoodyKey {
    fn public_key(&self) -> &[u8] {
        self.0.public_key()
    }

    fn key_type(&self) -> KeyType {
        self.0.key_type()
    }

    async fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, SignError> {
        let mood = *self.1.borrow();
        match mood {
            Mood::Signs => self.0.sign(algorithm, message).await,
            Mood::Lies => self.0.sign(algorithm, b"something else").await,
            Mood::Refuses => Err(SignError::Failed("no such slot".into())),
            Mood::Hangs => {
                let mut moods = self.1.clone();
                moods.wait_for(|mood| *mood != Mood::Hangs).await.unwrap();
                self.0.sign(algorithm, message).await
            }
        }
    }
}

async fn sign_leaf(a: &Authorities) -> Result<Issued, AuthorityError> {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let id = countersign_identity::SpiffeId::new("spiffe://td/a").unwrap();
    let csr = countersign_identity::profile::request(&key, Some(&id)).unwrap();
    let key = countersign_identity::profile::RequestedKey::from_csr(&csr).unwrap();
    a.sign(&LeafRequest { id: &id, dns_names: &[], key: &key, ttl: Duration::from_secs(60) }).await
}

#[tokio::test]
async fn a_key_that_does_not_sign_issues_nothing_and_leaves_nothing_behind() {
    let (world, keys) = (World::new().await, Moody::new());
    let a = Authorities::load(world.settings(keys.clone(), None)).await.unwrap();
    let (journal, bundle) = (a.journal(), a.bundle().borrow().clone());
    for (mood, told) in [(Mood::Refuses, "no such slot"), (Mood::Lies, "not by its own public key")] {
        keys.1.send_replace(mood);
        for kind in [Kind::X509, Kind::Jwt] {
            let why = a.prepare(kind).await.unwrap_err();
            assert!(matches!(why, AuthorityError::Sign(_)) && why.to_string().contains(told), "{why}");
            assert_eq!((a.journal(), a.bundle().borrow().clone()), (journal.clone(), bundle.clone()));
            assert_eq!(keys.names().await.unwrap().len(), 2, "no key is left behind");
        }
    }
    keys.1.send_replace(Mood::Refuses);
    assert!(matches!(sign_leaf(&a).await, Err(AuthorityError::Sign(SignError::Failed(_)))));
    assert!(matches!(sign_token(&a, 60).await, Err(AuthorityError::Sign(SignError::Failed(_)))));
    keys.1.send_replace(Mood::Signs);
    assert_eq!(sign_leaf(&a).await.unwrap().facts.authority_id, journal[0].id);
}

#[tokio::test]
async fn a_key_that_hangs_holds_up_nobody_who_changes_something_else_and_is_given_up() {
    let (world, keys) = (World::new().await, Moody::new());
    let a = Authorities::load(world.settings(keys.clone(), None)).await.unwrap();
    let first = a.prepare(Kind::X509).await.unwrap();
    keys.1.send_replace(Mood::Hangs);
    let meanwhile = async {
        while keys.names().await.unwrap().len() < 4 {
            tokio::task::yield_now().await;
        }
        // The next authority's key is there and has not signed yet.
        let activated = a.activate(Kind::X509, &first.id);
        tokio::time::timeout(Duration::from_secs(5), activated).await.expect("the journal is free").unwrap();
        tokio::time::pause();
        let late = sign_leaf(&a).await;
        assert!(matches!(late, Err(AuthorityError::Sign(SignError::Timeout(_)))), "{late:?}");
        tokio::time::resume();
    };
    let (made, ()) = tokio::join!(a.prepare(Kind::X509), meanwhile);
    assert!(matches!(made, Err(AuthorityError::Sign(SignError::Timeout(_)))), "{made:?}");
    assert_eq!(statuses(&a), ["old", "active"]);
    assert_eq!(keys.names().await.unwrap().len(), 3, "no key is left behind");
}

mod jwt;
mod upstream_roots;
