//! The life of an authority, with the time in our hands.

use std::sync::atomic::{AtomicI64, Ordering};

use super::*;
use crate::datastore::Sqlite;
use crate::key_manager::Memory;
use countersign_identity::KeyType;

struct World {
    now: Arc<AtomicI64>,
    store: Arc<dyn DataStore>,
    keys: Arc<Memory>,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Sqlite::open(&dir.path().join("db")).await.unwrap());
        Self { now: Arc::new(AtomicI64::new(1_800_000_000)), store, keys: Arc::default(), _dir: dir }
    }

    async fn authorities(&self) -> Authorities {
        let now = self.now.clone();
        Authorities::load(Settings {
            trust_domain: TrustDomain::new("td").unwrap(),
            issuance: tokio::sync::watch::channel(Issuance {
                ca_ttl: Duration::from_secs(600),
                svid_ttl: Duration::from_secs(60),
                agent_svid_ttl: Duration::from_secs(60),
                ca_key_type: KeyType::EcP256,
            })
            .1,
            keys: self.keys.clone(),
            upstream: None,
            store: self.store.clone(),
            clock: Arc::new(move || OffsetDateTime::from_unix_timestamp(now.load(Ordering::Relaxed)).unwrap()),
        })
        .await
        .unwrap()
    }

    fn pass(&self, seconds: i64) {
        self.now.fetch_add(seconds, Ordering::Relaxed);
    }
}

async fn statuses(a: &Authorities) -> Vec<&'static str> {
    a.journal().await.iter().map(|r| r.status.as_str()).collect()
}

#[tokio::test]
async fn an_authority_is_published_before_it_signs_and_trusted_until_its_end() {
    let world = World::new().await;
    let a = world.authorities().await;
    assert_eq!(statuses(&a).await, ["active"]);
    assert_eq!(a.bundle().borrow().authorities.len(), 1);
    // Lifetime 610 s (backdated): the next is prepared when 305 s are left, active when 101.6 s are left.
    world.pass(294);
    a.rotate().await.unwrap();
    assert_eq!(statuses(&a).await, ["active"]);
    world.pass(2);
    a.rotate().await.unwrap();
    assert_eq!(statuses(&a).await, ["active", "prepared"]);
    assert_eq!(a.bundle().borrow().authorities.len(), 2, "published before first use");
    world.pass(203);
    a.rotate().await.unwrap();
    assert_eq!(statuses(&a).await, ["old", "active"]);
    assert_eq!(a.bundle().borrow().authorities.len(), 2, "the old one is still trusted");
    let first = a.journal().await[0].id.clone();
    world.pass(102);
    a.rotate().await.unwrap();
    // The second one is past its own half by now, so a third stands ready; the first has ended and is gone.
    assert_eq!(statuses(&a).await, ["active", "prepared"]);
    let trusted = a.bundle().borrow().clone();
    assert_eq!(trusted.authorities.len(), 2);
    assert!(trusted.authorities.iter().all(|a| a.id() != first));
}

#[tokio::test]
async fn a_restart_takes_up_the_journal_and_the_sequence() {
    let world = World::new().await;
    let first = world.authorities().await;
    first.prepare().await.unwrap();
    let (journal, bundle) = (first.journal().await, first.bundle().borrow().clone());
    drop(first);
    let second = world.authorities().await;
    assert_eq!(second.journal().await, journal);
    assert_eq!(*second.bundle().borrow(), bundle);
}

#[tokio::test]
async fn with_its_keys_gone_a_server_makes_a_new_authority_and_still_trusts_the_old() {
    let mut world = World::new().await;
    drop(world.authorities().await);
    world.keys = Arc::default();
    let a = world.authorities().await;
    assert_eq!(statuses(&a).await, ["old", "active"]);
    assert_eq!(a.bundle().borrow().authorities.len(), 2);
}

#[tokio::test]
async fn taint_and_revoke_need_an_old_authority_and_say_what_to_do() {
    let world = World::new().await;
    let a = world.authorities().await;
    let first = a.journal().await[0].id.clone();
    let why = a.taint(&first).await.unwrap_err().to_string();
    assert!(why.contains("is active") && why.contains("prepare and activate another first"), "{why}");
    assert!(a.activate("").await.is_err());
    a.prepare().await.unwrap();
    a.activate("").await.unwrap();
    a.taint(&first).await.unwrap();
    assert!(a.bundle().borrow().authorities[0].tainted);
    a.revoke(&first).await.unwrap();
    assert_eq!(a.bundle().borrow().authorities.len(), 1);
    assert!(a.bundle().borrow().authorities[0].id() != first);
    assert!(a.revoke("nope").await.unwrap_err().to_string().contains("there is no authority `nope`"));
}
