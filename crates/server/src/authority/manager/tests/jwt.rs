//! The life of a JWT authority, and what it signs.

use countersign_identity::jwt_svid::{self, JwtError};
use countersign_identity::profile::jwt::Audience;
use countersign_identity::{BundleSet, SpiffeId};

use super::*;

/// A token for `db` with this lifetime in seconds.
pub async fn sign_token(a: &Authorities, ttl: u64) -> Result<IssuedToken, AuthorityError> {
    let (id, audience) = (SpiffeId::new("spiffe://td/web").unwrap(), Audience::new(vec!["db".into()]).unwrap());
    let ttl = Duration::from_secs(ttl);
    a.sign_token(&TokenRequest { id: &id, audience: &audience, ttl, issuer: None, token_id: None }).await
}

/// How somebody with our bundle of the moment judges a token.
fn judge(a: &Authorities, token: &IssuedToken) -> Result<String, JwtError> {
    let bundles: BundleSet = std::iter::once(TrustBundle::clone(&a.bundle().borrow())).collect();
    jwt_svid::verify(&token.token, "db", &bundles, a.now()).map(|svid| svid.id.to_string())
}

fn jwt_statuses(a: &Authorities) -> Vec<&'static str> {
    of_kind(a, Kind::Jwt).iter().map(|r| r.status.as_str()).collect()
}

fn published(a: &Authorities) -> Vec<String> {
    a.bundle().borrow().jwt_authorities.iter().map(|k| k.key_id().to_owned()).collect()
}

#[tokio::test]
async fn a_key_is_published_before_it_signs_and_its_tokens_are_good_until_they_end() {
    let world = World::new().await;
    let a = world.authorities().await;
    let first = of_kind(&a, Kind::Jwt)[0].id.clone();
    assert_eq!((jwt_statuses(&a), published(&a)), (vec!["active"], vec![first.clone()]));
    // Lifetime 610 s (backdated): the next one is prepared when 305 s are left, active when 101.6 s are left.
    world.pass(296);
    a.rotate().await.unwrap();
    assert_eq!(jwt_statuses(&a), ["active", "prepared"]);
    assert_eq!(published(&a).len(), 2, "published before first use");
    world.pass(202);
    let last = sign_token(&a, 90).await.unwrap();
    world.pass(1);
    a.rotate().await.unwrap();
    assert_eq!(jwt_statuses(&a), ["old", "active"]);
    let next = sign_token(&a, 90).await.unwrap();
    assert!(last.authority_id == first && next.authority_id == of_kind(&a, Kind::Jwt)[1].id);
    for token in [&last, &next] {
        assert_eq!(judge(&a, token).unwrap(), "spiffe://td/web", "of the old key and of the new");
    }
    world.pass(89);
    assert!(matches!(judge(&a, &last), Err(JwtError::Expired { .. })) && judge(&a, &next).is_ok());
    world.pass(3_700);
    a.rotate().await.unwrap();
    assert!(!published(&a).contains(&first), "gone once it has ended");
    assert!(of_kind(&a, Kind::Jwt).iter().all(|r| r.id != first));
}

#[tokio::test]
async fn a_token_ends_with_its_authority_at_the_latest() {
    let world = World::new().await;
    let a = world.authorities().await;
    let end = of_kind(&a, Kind::Jwt)[0].validity().1;
    assert_eq!(sign_token(&a, 86_400).await.unwrap().expires_at, end);
    // Nobody rotates here: with the authority over, nothing is signed.
    world.pass(600);
    assert!(matches!(sign_token(&a, 60).await, Err(AuthorityError::Issue(_))));
}

#[tokio::test]
async fn a_restarted_server_signs_with_the_same_key_and_one_that_lost_its_keys_with_another() {
    let mut world = World::new().await;
    let before = world.authorities().await;
    let token = sign_token(&before, 60).await.unwrap();
    let journal = before.journal();
    drop(before);
    let again = world.authorities().await;
    assert_eq!(again.journal(), journal);
    assert_eq!(sign_token(&again, 60).await.unwrap().authority_id, token.authority_id);
    drop(again);
    world.keys = Arc::default();
    let other = world.authorities().await;
    assert_eq!(jwt_statuses(&other), ["old", "active"]);
    assert_ne!(sign_token(&other, 60).await.unwrap().authority_id, token.authority_id);
    assert!(judge(&other, &token).is_ok(), "what was signed before is still good");
}

#[tokio::test]
async fn a_tainted_key_signs_nothing_and_a_revoked_one_is_trusted_by_nobody() {
    let world = World::new().await;
    let a = world.authorities().await;
    let first = of_kind(&a, Kind::Jwt)[0].id.clone();
    let old = sign_token(&a, 60).await.unwrap();
    assert!(matches!(a.taint(Kind::Jwt, &first).await, Err(AuthorityError::State { .. })), "it is active");
    let next = a.prepare(Kind::Jwt).await.unwrap();
    assert_eq!(sign_token(&a, 60).await.unwrap().authority_id, first, "a prepared one does not sign");
    a.activate(Kind::Jwt, &next.id).await.unwrap();
    assert!(matches!(a.revoke(Kind::Jwt, &first).await, Err(AuthorityError::Untainted(_))));
    a.taint(Kind::Jwt, &first).await.unwrap();
    let tainted = |a: &Authorities| a.bundle().borrow().jwt_authorities.iter().find(|k| k.tainted).cloned();
    assert_eq!(tainted(&a).unwrap().key_id(), first);
    assert_eq!(sign_token(&a, 60).await.unwrap().authority_id, next.id);
    assert!(judge(&a, &old).is_ok());
    assert!(a.activate(Kind::Jwt, &first).await.is_err(), "there is no way back");
    // A restart knows of the taint.
    assert_eq!(tainted(&world.authorities().await).unwrap().key_id(), first);
    let key_name = of_kind(&a, Kind::Jwt)[0].key_name.clone();
    a.revoke(Kind::Jwt, &first).await.unwrap();
    assert!(matches!(judge(&a, &old), Err(JwtError::UnknownKey { .. })));
    assert!(world.keys.get(&key_name).await.unwrap().is_none(), "its key is gone");
    assert_eq!((jwt_statuses(&a), published(&a)), (vec!["active"], vec![next.id]));
}

#[tokio::test]
async fn an_authority_of_one_kind_is_not_found_as_one_of_the_other() {
    let world = World::new().await;
    let a = world.authorities().await;
    let (x509, jwt) = (a.prepare(Kind::X509).await.unwrap(), a.prepare(Kind::Jwt).await.unwrap());
    assert!(matches!(a.activate(Kind::Jwt, &x509.id).await, Err(AuthorityError::Unknown(_))));
    assert!(matches!(a.activate(Kind::X509, &jwt.id).await, Err(AuthorityError::Unknown(_))));
    a.activate(Kind::Jwt, &jwt.id).await.unwrap();
    assert_eq!((statuses(&a), jwt_statuses(&a)), (vec!["active", "prepared"], vec!["old", "active"]));
}

#[tokio::test]
async fn under_an_upstream_jwt_authorities_are_tainted_and_revoked_here() {
    let world = World::new().await;
    drop(world.authorities().await);
    let upstream = Arc::new(Hangs(Default::default()));
    let a = Authorities::load(world.settings(world.keys.clone(), Some(upstream))).await.unwrap();
    let (x509, jwt) = (of_kind(&a, Kind::X509)[0].id.clone(), of_kind(&a, Kind::Jwt)[0].id.clone());
    assert!(matches!(a.taint(Kind::X509, &x509).await, Err(AuthorityError::Upstream)));
    let next = a.prepare(Kind::Jwt).await.unwrap();
    a.activate(Kind::Jwt, &next.id).await.unwrap();
    a.taint(Kind::Jwt, &jwt).await.unwrap();
    a.revoke(Kind::Jwt, &jwt).await.unwrap();
}

#[tokio::test]
async fn a_clock_that_is_ahead_for_a_moment_takes_no_key_of_ours_out_of_the_bundle() {
    let world = World::new().await;
    let a = world.authorities().await;
    let (first, token) = (of_kind(&a, Kind::Jwt)[0].id.clone(), sign_token(&a, 300).await.unwrap());
    world.pass(3_000);
    a.rotate().await.unwrap();
    world.pass(-3_000);
    a.rotate().await.unwrap();
    assert!(published(&a).contains(&first) && judge(&a, &token).is_ok());
    assert!(sign_token(&a, 60).await.is_ok());
}

#[tokio::test]
async fn nobody_changes_our_keys_by_appending_them() {
    let world = World::new().await;
    let a = world.authorities().await;
    let before = a.bundle().borrow().clone();
    let mut own = before.jwt_authorities[0].clone();
    own.expires_at = None;
    own.tainted = true;
    a.append(vec![], vec![own]).await.unwrap();
    assert_eq!(*a.bundle().borrow(), before);
}

/// Leaves the store as a server without JWT authorities had it.
async fn forget_jwt(world: &World, a: &Authorities) -> Vec<Record> {
    let (x509, version) = (of_kind(a, Kind::X509), world.store.authorities().await.unwrap().version);
    let bundle = TrustBundle { jwt_authorities: vec![], ..TrustBundle::clone(&a.bundle().borrow()) };
    assert!(matches!(
        world
            .store
            .put_authorities(&StoredJournal { records: x509.clone(), ..Default::default() }, &bundle, version)
            .await
            .unwrap(),
        Written::Stored(_)
    ));
    x509
}

#[tokio::test]
async fn a_server_from_before_there_were_jwt_authorities_gets_one_and_keeps_the_others() {
    let world = World::new().await;
    let x509 = forget_jwt(&world, &world.authorities().await).await;
    let a = world.authorities().await;
    assert_eq!(of_kind(&a, Kind::X509), x509);
    assert_eq!((jwt_statuses(&a), published(&a).len()), (vec!["active"], 1));
    assert!(judge(&a, &sign_token(&a, 60).await.unwrap()).is_ok());
}

#[tokio::test]
async fn a_jwt_authority_that_cannot_be_made_keeps_no_server_from_signing_certificates() {
    let (world, keys) = (World::new().await, Moody::new());
    let first = Authorities::load(world.settings(keys.clone(), None)).await.unwrap();
    forget_jwt(&world, &first).await;
    keys.1.send_replace(Mood::Refuses);
    let a = Authorities::load(world.settings(keys.clone(), None)).await.unwrap();
    assert!(matches!(sign_token(&a, 60).await, Err(AuthorityError::NotReady)));
    assert!(published(&a).is_empty());
    keys.1.send_replace(Mood::Signs);
    sign_leaf(&a).await.unwrap();
    a.rotate().await.unwrap();
    assert!(judge(&a, &sign_token(&a, 60).await.unwrap()).is_ok());
}

#[tokio::test]
async fn with_the_upstream_away_tokens_are_signed_on_and_on() {
    let world = World::new().await;
    drop(world.authorities().await);
    let a = Authorities::load(world.settings(world.keys.clone(), Some(Arc::<Names>::default()))).await.unwrap();
    world.pass(296);
    assert!(a.rotate().await.is_err(), "no CA is signed");
    assert_eq!((statuses(&a), jwt_statuses(&a)), (vec!["active"], vec!["active", "prepared"]));
    world.pass(203);
    assert!(a.rotate().await.is_err());
    assert_eq!(jwt_statuses(&a), ["old", "active"]);
    world.pass(112);
    assert!(judge(&a, &sign_token(&a, 60).await.unwrap()).is_ok(), "the first one has ended");
}

/// A key manager one of whose keys cannot be had.
struct Withholds(Arc<Memory>, String);

#[async_trait::async_trait]
impl KeyManager for Withholds {
    async fn generate(&self, name: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, KeyManagerError> {
        self.0.generate(name, key_type).await
    }

    async fn get(&self, name: &str) -> Result<Option<Arc<dyn Signer>>, KeyManagerError> {
        if name == self.1 { Err(KeyManagerError::BrokenOff("slot 3".into())) } else { self.0.get(name).await }
    }

    async fn names(&self) -> Result<Vec<String>, KeyManagerError> {
        self.0.names().await
    }

    async fn remove(&self, name: &str) -> Result<(), KeyManagerError> {
        self.0.remove(name).await
    }
}

#[tokio::test]
async fn a_jwt_key_that_cannot_be_read_stops_no_server_and_is_replaced() {
    let world = World::new().await;
    let record = of_kind(&world.authorities().await, Kind::Jwt)[0].clone();
    let withholds = Arc::new(Withholds(world.keys.clone(), record.key_name));
    let a = Authorities::load(world.settings(withholds, None)).await.unwrap();
    assert_eq!((statuses(&a), jwt_statuses(&a)), (vec!["active"], vec!["old", "active"]));
    assert!(published(&a).contains(&record.id), "its tokens are good until they end");
    assert_ne!(sign_token(&a, 60).await.unwrap().authority_id, record.id);
    let of_ca = of_kind(&a, Kind::X509)[0].key_name.clone();
    let withholds = Arc::new(Withholds(world.keys.clone(), of_ca));
    assert!(Authorities::load(world.settings(withholds, None)).await.is_err(), "without its CA a server says why");
}
