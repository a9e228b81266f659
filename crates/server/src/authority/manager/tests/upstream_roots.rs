//! Roots of the upstream authority: tainted, revoked, and kept out.

use std::sync::Mutex as StdMutex;

use countersign_identity::profile::{RequestedKey, issue_intermediate};

use super::*;

/// An upstream that signs below one root, and names those that it is told to.
struct Signs {
    below: StdMutex<Root>,
    named: StdMutex<Vec<X509Authority>>,
    keys: StdMutex<Vec<JwtAuthority>>,
    is_whole: bool,
    /// Whether it publishes nothing.
    refuses: std::sync::atomic::AtomicBool,
    /// IDs of keys that it takes from nobody.
    revoked: StdMutex<Vec<String>>,
}

#[derive(Clone)]
struct Root {
    key: Arc<PrivateKey>,
    authority: X509Authority,
}

impl Root {
    fn new(at: OffsetDateTime) -> Self {
        Self::of(Arc::new(PrivateKey::generate(KeyType::EcP256).unwrap()), at)
    }

    /// A root for this key, with a certificate of its own.
    fn of(key: Arc<PrivateKey>, at: OffsetDateTime) -> Self {
        let der = issue_root(&TrustDomain::new("td").unwrap(), &key, Duration::from_secs(36_000), at).unwrap();
        Self { key, authority: X509Authority::from_der(der.to_vec()).unwrap() }
    }

    fn id(&self) -> &str {
        self.authority.id()
    }
}

#[async_trait::async_trait]
impl UpstreamAuthority for Signs {
    fn name(&self) -> String {
        "signs".into()
    }

    async fn sign_intermediate(
        &self,
        td: &TrustDomain,
        csr: &[u8],
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<UpstreamSigned, UpstreamError> {
        let root = self.below.lock().unwrap().clone();
        let signer = SigningAuthority::new(root.authority.der().clone(), vec![], &root.key).unwrap();
        let requested = RequestedKey::from_csr(csr).unwrap();
        let own = issue_intermediate(td, &requested, ttl, now, &signer).unwrap();
        Ok(UpstreamSigned { chain: vec![own], roots: vec![root.authority] })
    }

    async fn bundle(&self) -> Result<UpstreamBundle, UpstreamError> {
        let (roots, keys) = (self.named.lock().unwrap().clone(), self.keys.lock().unwrap().clone());
        Ok(UpstreamBundle { roots, keys, is_whole: self.is_whole })
    }

    fn has_whole_bundle(&self) -> bool {
        self.is_whole
    }

    async fn publish_jwt_key(&self, key: &JwtAuthority) -> Result<Option<Vec<JwtAuthority>>, UpstreamError> {
        if !self.is_whole {
            return Ok(None);
        }
        if self.refuses.load(Ordering::SeqCst) {
            return Err(UpstreamError::Unreachable { upstream: self.name(), why: "no answer".into() });
        }
        if self.revoked.lock().unwrap().iter().any(|id| id == key.key_id()) {
            return Err(UpstreamError::Refused { upstream: self.name(), why: "it was revoked".into() });
        }
        let mut keys = self.keys.lock().unwrap();
        keys.push(key.clone());
        Ok(Some(keys.clone()))
    }
}

impl Signs {
    fn below(root: &Root) -> Arc<Self> {
        Arc::new(Self {
            below: StdMutex::new(root.clone()),
            named: StdMutex::default(),
            keys: StdMutex::default(),
            is_whole: false,
            refuses: Default::default(),
            revoked: Default::default(),
        })
    }

    fn switch(&self, root: &Root) {
        *self.below.lock().unwrap() = root.clone();
    }
}

/// IDs of the roots of the bundle; of a tainted one with a mark behind.
fn roots(a: &Authorities) -> Vec<String> {
    let shown = |root: &X509Authority| format!("{}{}", root.id(), if root.tainted { "!" } else { "" });
    a.bundle().borrow().authorities.iter().map(shown).collect()
}

/// A server that has moved from its upstream's first root to the second.
async fn moved(world: &World) -> (Authorities, Arc<Signs>, Root, Root) {
    let at = OffsetDateTime::from_unix_timestamp(world.now.load(Ordering::Relaxed)).unwrap();
    let (first, second) = (Root::new(at), Root::new(at));
    let upstream = Signs::below(&first);
    let a = Authorities::load(world.settings(world.keys.clone(), Some(upstream.clone()))).await.unwrap();
    upstream.switch(&second);
    let next = a.prepare(Kind::X509).await.unwrap();
    for root in [&first, &second] {
        // One is below the active authority, the other below the prepared one.
        let refused = a.taint_root(root.id()).await.unwrap_err();
        assert!(matches!(&refused, AuthorityError::RootInUse { root: id, .. } if id == root.id()), "{refused}");
    }
    a.activate(Kind::X509, &next.id).await.unwrap();
    assert_eq!(a.root_above(&next).as_deref(), Some(second.id()));
    (a, upstream, first, second)
}

#[tokio::test]
async fn a_root_that_was_revoked_does_not_come_back_whoever_names_it() {
    let world = World::new().await;
    let (a, upstream, first, second) = moved(&world).await;
    assert_eq!(statuses(&a), ["old", "active"]);
    assert!(
        matches!(a.revoke_root(first.id()).await, Err(AuthorityError::Untainted(_))),
        "what is below is not renewed"
    );
    a.taint_root(&first.id().to_uppercase()).await.unwrap();
    a.taint_root(first.id()).await.unwrap();
    assert_eq!(
        (roots(&a), statuses(&a)),
        (vec![format!("{}!", first.id()), second.id().into()], vec!["tainted", "active"])
    );
    // Under another certificate for the same key, it is tainted as well.
    let again = Root::of(first.key.clone(), a.now() + Duration::from_secs(1));
    *upstream.named.lock().unwrap() = vec![again.authority.clone()];
    assert!(a.follow_upstream().await.unwrap().is_empty());
    assert_eq!(roots(&a).iter().filter(|id| **id == format!("{}!", first.id())).count(), 2);

    let revoked = a.revoke_root(first.id()).await.unwrap();
    assert_eq!((revoked.id(), roots(&a)), (first.id(), vec![second.id().to_owned()]));
    assert_eq!(statuses(&a), ["active"], "nobody takes up what is below it");
    assert_eq!(world.keys.names().await.unwrap().len(), 2, "nor its key");
    *upstream.named.lock().unwrap() = vec![first.authority.clone(), again.authority.clone(), second.authority.clone()];
    let after = Authorities::load(world.settings(world.keys.clone(), Some(upstream.clone()))).await.unwrap();
    for a in [&a, &after] {
        assert_eq!(a.follow_upstream().await.unwrap(), [first.id(), again.id()]);
        let appended = a.append(vec![again.authority.clone()], vec![]).await.unwrap_err();
        assert!(matches!(appended, AuthorityError::Revoked(_)), "{appended}");
        assert_eq!(roots(a), [second.id()]);
    }
    assert!(matches!(a.revoke_root(first.id()).await, Err(AuthorityError::UnknownRoot(_))));
}

#[tokio::test]
async fn an_upstream_that_still_signs_below_a_distrusted_root_signs_nothing_for_us() {
    let world = World::new().await;
    let (a, upstream, first, second) = moved(&world).await;
    a.taint_root(first.id()).await.unwrap();
    upstream.switch(&first);
    for is_revoked in [false, true] {
        if is_revoked {
            a.revoke_root(first.id()).await.unwrap();
        }
        let refused = a.prepare(Kind::X509).await.unwrap_err();
        assert!(matches!(&refused, AuthorityError::Distrusted(id) if id == first.id()), "{refused}");
        assert_eq!(statuses(&a).last(), Some(&"active"));
    }
    assert_eq!(world.keys.names().await.unwrap().len(), 2, "no key is left behind");
    upstream.switch(&second);
    a.prepare(Kind::X509).await.unwrap();
}

#[tokio::test]
async fn roots_are_named_by_an_id_of_the_bundle() {
    let world = World::new().await;
    let (a, upstream, _, second) = moved(&world).await;
    let own = a.journal().last().unwrap().id.clone();
    assert!(matches!(a.taint_root("").await, Err(AuthorityError::NoId)));
    assert!(matches!(a.revoke_root("").await, Err(AuthorityError::NoId)));
    for id in ["no such", own.as_str()] {
        assert!(matches!(a.taint_root(id).await, Err(AuthorityError::UnknownRoot(_))));
    }
    // Without an upstream the authorities are roots themselves, and what the former one left can still be taken out.
    drop((a, upstream));
    let alone = world.authorities().await;
    let next = alone.prepare(Kind::X509).await.unwrap();
    alone.activate(Kind::X509, &next.id).await.unwrap();
    for id in ["no such", next.id.as_str()] {
        assert!(matches!(alone.taint_root(id).await, Err(AuthorityError::NoUpstream(_))));
    }
    alone.taint_root(second.id()).await.unwrap();
    alone.revoke_root(second.id()).await.unwrap();
    assert!(!roots(&alone).contains(&second.id().to_owned()));
}

#[tokio::test]
async fn an_authority_of_ours_that_was_revoked_is_not_taken_up_again() {
    let world = World::new().await;
    let a = world.authorities().await;
    let first = a.bundle().borrow().authorities[0].clone();
    let key = a.bundle().borrow().jwt_authorities[0].clone();
    for (kind, id) in [(Kind::X509, first.id()), (Kind::Jwt, key.key_id())] {
        let next = a.prepare(kind).await.unwrap();
        a.activate(kind, &next.id).await.unwrap();
        a.taint(kind, id).await.unwrap();
        a.revoke(kind, id).await.unwrap();
    }
    // The store remembers it, whoever asks: somebody with an old copy of the bundle.
    let again = world.authorities().await;
    let before = again.bundle().borrow().clone();
    let under_another_id = JwtAuthority::new("other", key.der()).unwrap();
    for (roots, keys) in [(vec![first.clone()], vec![]), (vec![], vec![key.clone()]), (vec![], vec![under_another_id])]
    {
        let refused = again.append(roots, keys).await.unwrap_err();
        assert!(matches!(refused, AuthorityError::Revoked(_)), "{refused}");
    }
    assert_eq!(*again.bundle().borrow(), before);
}

/// A server below another one of its trust domain, with that server's root.
async fn below(world: &World) -> (Authorities, Arc<Signs>, Root) {
    let root = Root::new(OffsetDateTime::from_unix_timestamp(world.now.load(Ordering::Relaxed)).unwrap());
    let upstream = Arc::new(Signs {
        below: StdMutex::new(root.clone()),
        named: StdMutex::new(vec![root.authority.clone()]),
        keys: StdMutex::default(),
        is_whole: true,
        refuses: Default::default(),
        revoked: Default::default(),
    });
    let a = Authorities::load(world.settings(world.keys.clone(), Some(upstream.clone()))).await.unwrap();
    (a, upstream, root)
}

fn tainted(root: &Root) -> X509Authority {
    let mut authority = root.authority.clone();
    authority.tainted = true;
    authority
}

#[tokio::test]
async fn a_server_below_another_moves_from_a_root_that_is_tainted_above_and_drops_it_once_it_is_revoked_there() {
    let world = World::new().await;
    let (a, upstream, first) = below(&world).await;
    assert_eq!((roots(&a), a.follow_upstream().await.unwrap().len()), (vec![first.id().to_owned()], 0));
    let second = Root::new(a.now());
    // The other signs below the second root by now, and has tainted the first.
    upstream.switch(&second);
    *upstream.named.lock().unwrap() = vec![tainted(&first), second.authority.clone()];
    a.follow_upstream().await.unwrap();
    a.rotate().await.unwrap();
    assert_eq!(statuses(&a), ["old", "active"]);
    let active = of_kind(&a, Kind::X509).pop().unwrap();
    assert_eq!(a.root_above(&active).unwrap(), second.id());
    a.rotate().await.unwrap();
    assert_eq!(statuses(&a), ["old", "active"], "once");
    *upstream.named.lock().unwrap() = vec![second.authority.clone()];
    a.follow_upstream().await.unwrap();
    assert_eq!(roots(&a), [second.id()]);
    // Revoked without a warning, what we sign below stays until we sign below another: but everybody renews.
    let third = Root::new(a.now());
    *upstream.named.lock().unwrap() = vec![third.authority.clone()];
    a.follow_upstream().await.unwrap();
    assert_eq!(roots(&a), [format!("{}!", second.id()), third.id().into()]);
    // Should it have been a mistake, all is as before.
    *upstream.named.lock().unwrap() = vec![second.authority.clone(), third.authority.clone()];
    a.follow_upstream().await.unwrap();
    a.rotate().await.unwrap();
    assert_eq!((roots(&a), statuses(&a)), (vec![second.id().into(), third.id().into()], vec!["old", "active"]));
    let refused = a.taint_root(third.id()).await.unwrap_err();
    assert!(matches!(&refused, AuthorityError::Above(name) if name == "signs"), "{refused}");
    *upstream.named.lock().unwrap() = vec![third.authority.clone()];
    a.follow_upstream().await.unwrap();
    upstream.switch(&third);
    a.rotate().await.unwrap();
    a.follow_upstream().await.unwrap();
    assert_eq!(roots(&a), [third.id()]);
    // An answer without any root is none.
    upstream.named.lock().unwrap().clear();
    a.follow_upstream().await.unwrap();
    assert_eq!(roots(&a), [third.id()]);
}

#[tokio::test]
async fn keys_of_tokens_are_published_above_first_and_come_from_there() {
    let world = World::new().await;
    let (a, upstream, _) = below(&world).await;
    let ids = |a: &Authorities| -> Vec<String> {
        a.bundle().borrow().jwt_authorities.iter().map(|k| k.key_id().to_owned()).collect()
    };
    let own = ids(&a);
    assert_eq!(upstream.keys.lock().unwrap().iter().map(JwtAuthority::key_id).collect::<Vec<_>>(), own);
    let key = |id: &str, seconds: i64| {
        let public = PrivateKey::generate(KeyType::EcP256).unwrap().public_der().unwrap();
        let mut key = JwtAuthority::new(id, &public).unwrap();
        key.expires_at = Some(a.now() + time::Duration::seconds(seconds));
        key
    };
    // Of a server beside ours.
    let (sibling, ended) = (key("sibling", 600), key("ended", -1));
    upstream.keys.lock().unwrap().extend([sibling.clone(), ended]);
    a.follow_upstream().await.unwrap();
    assert_eq!(ids(&a), [&own[0], "sibling"]);
    // Of a server below ours, whose key goes up; whoever has only seen a key changes nothing of it.
    let all = a.publish_jwt_key(key("below", 600)).await.unwrap();
    assert_eq!(all.iter().map(JwtAuthority::key_id).collect::<Vec<_>>(), [own[0].as_str(), "sibling", "below"]);
    assert!(upstream.keys.lock().unwrap().iter().any(|k| k.key_id() == "below"));
    let mut longer = sibling.clone();
    longer.expires_at = Some(a.now() + time::Duration::seconds(9_000));
    a.publish_jwt_key(longer).await.unwrap();
    let known = |id: &str| a.bundle().borrow().jwt_authorities.iter().find(|k| k.key_id() == id).cloned();
    assert_eq!(known("sibling").unwrap().expires_at, sibling.expires_at);
    assert!(matches!(a.publish_jwt_key(key("sibling", 600)).await, Err(AuthorityError::KeyIdTaken(_))));
    // What cannot be taken here is not handed on either.
    let before = upstream.keys.lock().unwrap().len();
    let twin = JwtAuthority::new("twin", sibling.der()).unwrap();
    assert!(matches!(a.publish_jwt_key(twin).await, Err(AuthorityError::KeyKnown { .. })));
    assert_eq!(upstream.keys.lock().unwrap().len(), before);
    // One that was revoked here and that the other still has holds up nobody.
    a.taint(Kind::Jwt, "sibling").await.unwrap();
    a.revoke(Kind::Jwt, "sibling").await.unwrap();
    assert!(known("sibling").is_none());
    a.publish_jwt_key(key("later", 600)).await.unwrap();
    assert_eq!(a.follow_upstream().await.unwrap(), ["sibling"], "it is said once more");
    assert!(known("sibling").is_none() && known("later").is_some());
    // Tainted above, then revoked there; ours stays whatever is said above, for we sign with it, and it is published again.
    upstream.keys.lock().unwrap().retain(|k| k.key_id() == "below");
    upstream.keys.lock().unwrap()[0].tainted = true;
    a.follow_upstream().await.unwrap();
    assert_eq!(ids(&a), [&own[0], "below"]);
    assert!(known("below").unwrap().tainted);
    assert!(upstream.keys.lock().unwrap().iter().any(|k| k.key_id() == own[0]));
}

#[tokio::test]
async fn a_key_that_was_published_above_signs_once_it_is_there_and_is_tried_again_with_itself() {
    let world = World::new().await;
    let (a, upstream, _) = below(&world).await;
    upstream.refuses.store(true, Ordering::SeqCst);
    let next = a.prepare(Kind::Jwt).await.unwrap();
    for _ in 0..2 {
        assert!(a.activate(Kind::Jwt, &next.id).await.is_err());
    }
    upstream.refuses.store(false, Ordering::SeqCst);
    a.activate(Kind::Jwt, &next.id).await.unwrap();
    let above: Vec<_> = upstream.keys.lock().unwrap().iter().map(|k| k.key_id().to_owned()).collect();
    assert_eq!(above.iter().filter(|id| **id == next.id).count(), 1);
    assert_eq!(above.len(), 2, "no other was made");
}

#[tokio::test]
async fn a_key_of_ours_that_was_revoked_above_is_replaced() {
    let world = World::new().await;
    let (a, upstream, _) = below(&world).await;
    let first = of_kind(&a, Kind::Jwt)[0].id.clone();
    upstream.keys.lock().unwrap().clear();
    upstream.revoked.lock().unwrap().push(first.clone());
    a.follow_upstream().await.unwrap();
    a.rotate().await.unwrap();
    let active = of_kind(&a, Kind::Jwt).pop().unwrap();
    assert!(active.id != first && active.status == Status::Active);
    a.follow_upstream().await.unwrap();
    let keys = a.bundle().borrow().jwt_authorities.clone();
    assert_eq!(keys.iter().map(JwtAuthority::key_id).collect::<Vec<_>>(), [active.id.as_str()]);
    assert_eq!(upstream.keys.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_server_that_was_its_own_root_moves_below_the_other_one_at_once() {
    let world = World::new().await;
    let own = roots(&world.authorities().await)[0].clone();
    let (a, _, root) = below(&world).await;
    assert_eq!((roots(&a), statuses(&a)), (vec![own.clone()], vec!["active"]));
    a.follow_upstream().await.unwrap();
    a.rotate().await.unwrap();
    assert_eq!(statuses(&a), ["old", "active"]);
    // What the old one signed is good until it ends, and renewed now.
    assert_eq!(roots(&a), [format!("{own}!"), root.id().into()]);
}
