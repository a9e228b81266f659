//! Roots of the upstream authority: tainted, revoked, and kept out.

use std::sync::Mutex as StdMutex;

use countersign_identity::profile::{RequestedKey, issue_intermediate};

use super::*;

/// An upstream that signs below one root, and names those that it is told to.
struct Signs {
    below: StdMutex<Root>,
    named: StdMutex<Vec<X509Authority>>,
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

    async fn roots(&self) -> Result<Vec<X509Authority>, UpstreamError> {
        Ok(self.named.lock().unwrap().clone())
    }
}

impl Signs {
    fn below(root: &Root) -> Arc<Self> {
        Arc::new(Self { below: StdMutex::new(root.clone()), named: StdMutex::default() })
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
    for _ in 0..2 {
        let refused = a.prepare(Kind::X509).await.unwrap_err();
        assert!(matches!(&refused, AuthorityError::Distrusted(id) if id == first.id()), "{refused}");
        assert_eq!(statuses(&a).last(), Some(&"active"));
        // In the second turn it is revoked.
        let _ = a.revoke_root(first.id()).await;
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
