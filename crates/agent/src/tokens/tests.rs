//! Which token a workload gets, and when the server is asked for another one.

use std::sync::atomic::{AtomicI64, Ordering};

use super::*;
use crate::testing::{FakeServer, Jwt, config, entry, id, join_token};

const CALLER: Caller = Caller::User(1);

/// An attested agent, and its server with one JWT authority.
struct World {
    server: FakeServer,
    tokens: Tokens,
    cache: Arc<Cache>,
    ahead: Arc<AtomicI64>,
    jwt: Jwt,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let (dir, server, jwt) = (tempfile::tempdir().unwrap(), FakeServer::start().await, Jwt::new("k1"));
        let config = Arc::new(config(dir.path(), server.address.clone(), &server.bundle(), join_token()));
        let ahead = Arc::<AtomicI64>::default();
        let clock = {
            let ahead = ahead.clone();
            move || OffsetDateTime::now_utc() + time::Duration::seconds(ahead.load(Ordering::Relaxed))
        };
        let link = Arc::new(Link::new(config, Arc::new(clock)).unwrap());
        link.attest().await.unwrap();
        let cache = Arc::<Cache>::default();
        let tokens = Tokens::new(link, cache.clone(), Arc::default());
        let world = Self { server, tokens, cache, ahead, jwt, _dir: dir };
        world.publish(vec![world.jwt.authority()]);
        world.sign("/web", 300);
        world
    }

    fn publish(&self, jwt_authorities: Vec<countersign_identity::JwtAuthority>) {
        let bundle = TrustBundle { jwt_authorities, ..self.server.bundle() };
        self.cache.change(|state| state.bundle = Some(Arc::new(bundle)));
    }

    /// Lets the server sign for this identity, with this lifetime in seconds.
    fn sign(&self, path: &str, ttl: u64) {
        let (jwt, id, ahead) = (self.jwt.clone(), id(path), self.ahead.clone());
        self.server.answer_tokens(move |asked| {
            let now = OffsetDateTime::now_utc() + time::Duration::seconds(ahead.load(Ordering::Relaxed));
            Ok(jwt.token(&id, &asked.audience, Duration::from_secs(ttl), now))
        });
    }

    async fn get(&self, name: &str) -> Result<Arc<Token>, Status> {
        self.tokens.get(&entry("web", 1), &Audience::new(vec![name.into()]).unwrap(), &CALLER).await
    }

    fn pass(&self, seconds: i64) {
        self.ahead.fetch_add(seconds, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn a_token_is_asked_for_once_until_half_of_its_life_and_for_each_audience() {
    let world = World::new().await;
    let first = world.get("db").await.unwrap();
    assert_eq!(first.id, id("/web"));
    assert!(Arc::ptr_eq(&first, &world.get("db").await.unwrap()));
    // Half of it is 150 s, with a jitter of 15 s.
    world.pass(130);
    assert!(Arc::ptr_eq(&first, &world.get("db").await.unwrap()));
    assert_eq!(world.server.token_calls(), 1);
    assert!(!Arc::ptr_eq(&first, &world.get("cache").await.unwrap()));
    world.pass(40);
    let second = world.get("db").await.unwrap();
    assert!(second.expires_at > first.expires_at);
    assert_eq!(world.server.token_calls(), 3);
}

#[tokio::test]
async fn a_token_with_an_id_of_its_own_is_given_out_once() {
    let world = World::new().await;
    let mut entry = entry("web", 1);
    entry.additional.jwt_svid_include_jti = true;
    let audience = Audience::new(vec!["db".into()]).unwrap();
    for calls in 1..=3 {
        world.tokens.get(&entry, &audience, &CALLER).await.unwrap();
        assert_eq!(world.server.token_calls(), calls);
    }
    world.server.answer_tokens(|_| Err(Status::unavailable("away")));
    let refused = world.tokens.get(&entry, &audience, &CALLER).await.err().unwrap();
    assert_eq!(refused.code(), Code::Unavailable, "none is kept");
}

#[tokio::test]
async fn of_many_who_want_the_same_one_asks_the_server() {
    let world = World::new().await;
    let all = futures::future::join_all((0..50).map(|_| world.get("db"))).await;
    assert!(all.iter().all(Result::is_ok));
    assert_eq!(world.server.token_calls(), 1);
    assert!(world.tokens.turns.lock().unwrap().is_empty(), "nothing is left of the turns");
}

#[tokio::test]
async fn of_many_who_wait_for_a_server_that_fails_one_asks_and_all_know() {
    let world = World::new().await;
    world.server.answer_tokens(|_| Err(Status::unavailable("away")));
    let all = futures::future::join_all((0..50).map(|_| world.get("db"))).await;
    assert!(all.iter().all(|got| got.as_ref().is_err_and(|status| status.message().contains("away"))));
    assert_eq!(world.server.token_calls(), 1);
    assert!(world.get("db").await.is_err());
    assert_eq!(world.server.token_calls(), 2, "who comes later asks again");
}

#[tokio::test]
async fn a_good_token_is_given_out_where_the_new_one_does_not_verify_here() {
    let world = World::new().await;
    let first = world.get("db").await.unwrap();
    let other = Jwt::new("k1");
    world.server.answer_tokens(move |asked| {
        Ok(other.token(&id("/web"), &asked.audience, Duration::from_secs(300), OffsetDateTime::now_utc()))
    });
    world.pass(200);
    assert!(Arc::ptr_eq(&first, &world.get("db").await.unwrap()));
    world.pass(100);
    assert_eq!(world.get("db").await.err().unwrap().code(), Code::Unavailable, "it has ended");
}

#[tokio::test]
async fn a_token_for_an_entry_that_has_changed_is_replaced() {
    let world = World::new().await;
    let audience = Audience::new(vec!["db".into()]).unwrap();
    world.get("db").await.unwrap();
    let changed = entry("web", 2);
    world.tokens.get(&changed, &audience, &CALLER).await.unwrap();
    assert_eq!(world.server.token_calls(), 2);
    // One that has another identity now gets no token of the former.
    let mut moved = entry("web", 2);
    moved.spiffe_id = id("/moved");
    assert_eq!(world.tokens.get(&moved, &audience, &CALLER).await.err().unwrap().code(), Code::Unavailable);
}

#[tokio::test]
async fn with_the_server_away_a_token_is_good_until_it_ends_and_what_the_server_refuses_nobody_gets() {
    let world = World::new().await;
    let first = world.get("db").await.unwrap();
    world.server.answer_tokens(|_| Err(Status::unavailable("away")));
    world.pass(200);
    assert!(Arc::ptr_eq(&first, &world.get("db").await.unwrap()));
    world.server.answer_tokens(|_| Err(Status::permission_denied("banned")));
    let refused = world.get("db").await.err().unwrap();
    assert!(refused.message().contains("could not fetch JWT-SVID") && refused.message().contains("banned"));
    world.server.answer_tokens(|_| Err(Status::unavailable("away")));
    world.pass(100);
    assert_eq!(world.get("db").await.err().unwrap().code(), Code::Unavailable, "it has ended");
}

#[tokio::test]
async fn a_token_of_a_tainted_key_is_replaced_at_once_and_of_a_revoked_one_given_to_nobody() {
    let world = World::new().await;
    let first = world.get("db").await.unwrap();
    let mut tainted = world.jwt.authority();
    tainted.tainted = true;
    let next = Jwt::new("k2");
    world.publish(vec![tainted.clone(), next.authority()]);
    world.server.answer_tokens(|_| Err(Status::unavailable("away")));
    assert!(Arc::ptr_eq(&first, &world.get("db").await.unwrap()), "peers still accept it");
    let signer = next.clone();
    world.server.answer_tokens(move |asked| {
        Ok(signer.token(&id("/web"), &asked.audience, Duration::from_secs(300), OffsetDateTime::now_utc()))
    });
    assert_eq!(world.get("db").await.unwrap().key_id, "k2");
    world.publish(vec![]);
    world.server.answer_tokens(|_| Err(Status::unavailable("away")));
    assert_eq!(world.get("db").await.err().unwrap().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_token_that_peers_would_refuse_is_given_to_nobody() {
    let world = World::new().await;
    let stranger = Jwt::new("k1");
    let forged = stranger.token(&id("/web"), &["db".into()], Duration::from_secs(300), OffsetDateTime::now_utc());
    world.sign("/other", 300);
    let other = world.get("db").await.err().unwrap();
    assert!(other.message().contains("a change is under way"), "{other}");
    for answer in [forged, "garbage".to_owned(), String::new()] {
        world.server.answer_tokens(move |_| Ok(answer.clone()));
        let refused = world.get("db").await.err().unwrap();
        assert!(refused.message().contains("of no use"), "{refused}");
    }
    // For another audience than was asked for.
    let jwt = world.jwt.clone();
    world.server.answer_tokens(move |_| {
        Ok(jwt.token(&id("/web"), &["web".into()], Duration::from_secs(300), OffsetDateTime::now_utc()))
    });
    assert!(world.get("db").await.err().unwrap().message().contains("`aud`"));
}

#[tokio::test]
async fn a_key_that_comes_with_the_next_bundle_is_waited_for() {
    let world = World::new().await;
    world.publish(vec![]);
    let mut got = std::pin::pin!(world.get("db"));
    // The server's answer has long been here by then.
    assert!(timeout(Duration::from_millis(500), &mut got).await.is_err(), "it waits");
    assert_eq!(world.server.token_calls(), 1);
    world.publish(vec![world.jwt.authority()]);
    got.await.unwrap();
    assert_eq!(world.server.token_calls(), 1, "for the key, and asks for no other token");
}

#[tokio::test]
async fn who_asks_for_ever_new_audiences_is_held_up_alone() {
    let world = World::new().await;
    let mut refused = None;
    for n in 0..1_000 {
        if let Err(status) = world.get(&n.to_string()).await {
            refused = Some(status);
            break;
        }
    }
    let refused = refused.expect("no bound");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("ask for the same audiences again"), "{refused}");
    let calls = world.server.token_calls();
    let bound = usize::try_from(FETCHES.1).unwrap();
    assert!(calls >= bound && calls < 3 * bound, "{calls}");
    // Whoever else has the same identity is not.
    let audience = Audience::new(vec!["other".into()]).unwrap();
    world.tokens.get(&entry("web", 1), &audience, &Caller::User(2)).await.unwrap();
    // Nor is he told so where the server is away, however often he asks.
    world.server.answer_tokens(|_| Err(Status::unavailable("away")));
    for _ in 0..150 {
        let away =
            world.tokens.get(&entry("web", 1), &Audience::new(vec!["x".into()]).unwrap(), &Caller::User(3)).await;
        assert_eq!(away.err().unwrap().code(), Code::Unavailable);
    }
}

#[tokio::test]
async fn a_token_has_to_be_for_all_whom_it_was_asked_for() {
    let world = World::new().await;
    let jwt = world.jwt.clone();
    world.server.answer_tokens(move |_| {
        Ok(jwt.token(&id("/web"), &["db".into()], Duration::from_secs(300), OffsetDateTime::now_utc()))
    });
    let both = Audience::new(vec!["db".into(), "cache".into()]).unwrap();
    let refused = world.tokens.get(&entry("web", 1), &both, &CALLER).await.err().unwrap();
    assert!(refused.message().contains("`aud`"), "{refused}");
}
