//! JWT-SVIDs of this node's workloads: signed by the server when they are asked for, kept until half of their life, and verified as
//! everybody else will before anyone gets them.

mod held;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use countersign_api::rate_limit::RateLimit;
use countersign_api::sampled::Sampled;
use countersign_api::spire::svid::NewJwtsvidRequest;
use countersign_api::spire::svid::svid_client::SvidClient;
use countersign_identity::jwt_svid::{JwtError, JwtSvid, verify};
use countersign_identity::profile::jwt::Audience;
use countersign_identity::rotation::renew_at;
use countersign_identity::{BundleSet, Entry, TrustBundle};
use time::OffsetDateTime;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::{Code, Status};
use zeroize::Zeroizing;

use crate::cache::Cache;
use crate::endpoints::Follower as Caller;
use crate::link::{Link, describe};
use crate::metrics::Metrics;

pub use held::Token;
use held::{Asked, Held, MAX_TOKENS};

/// Longest wait for a newer token while the one at hand is still good.
const REFRESH_PATIENCE: Duration = Duration::from_secs(2);
/// Longest wait for a token where there is none at hand. Callers wait longer, so that they hear who did not answer.
const FETCH_PATIENCE: Duration = Duration::from_secs(8);
/// Longest wait for the key of a new token to come with the bundle.
const KEY_PATIENCE: Duration = Duration::from_secs(5);

/// Tokens that the server is asked for on behalf of one caller, a second and at once. A workload chooses its audiences, and the
/// server counts what all of a node ask for, and writes each down.
const FETCHES: (u32, u32) = (20, 100);

/// The tokens, and the way to new ones.
pub struct Tokens {
    link: Arc<Link>,
    cache: Arc<Cache>,
    metrics: Arc<Metrics>,
    held: Mutex<Held>,
    /// What is being fetched now: of several who want the same, one asks the server.
    turns: Mutex<HashMap<Asked, Arc<tokio::sync::Mutex<LastFailure>>>>,
    /// Each caller has its share of calls of the server.
    fetches: RateLimit<Caller>,
    /// And of lines in the log.
    said: Sampled<Caller>,
}

/// When a fetch last failed, and why: whoever waited meanwhile has the same answer.
type LastFailure = Option<(Instant, Status)>;

/// What our bundle says of a token's key.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    Good,
    /// Its tokens are still accepted, and replaced as soon as possible.
    Tainted,
    /// Its tokens are accepted by nobody.
    Gone,
}

impl Tokens {
    /// None yet.
    pub fn new(link: Arc<Link>, cache: Arc<Cache>, metrics: Arc<Metrics>) -> Self {
        Self {
            link,
            cache,
            metrics,
            held: Mutex::new(Held::new(MAX_TOKENS)),
            turns: Mutex::default(),
            fetches: RateLimit::new(FETCHES.0, FETCHES.1),
            said: Sampled::default(),
        }
    }

    /// A token for an entry's identity, from memory or from the server. Errors: `ResourceExhausted` if too many are asked for;
    /// Unavailable, with the reason.
    pub async fn get(&self, entry: &Entry, audience: &Audience, caller: &Caller) -> Result<Arc<Token>, Status> {
        if entry.additional.jwt_svid_include_jti {
            // Each has an ID of its own: none is given out twice.
            let fetched = self.fetch_for(caller, entry, audience, FETCH_PATIENCE).await;
            return fetched.map(Arc::new).map_err(|status| told(&status));
        }
        let asked = Asked::new(&entry.id, audience);
        if let Some(token) = self.fresh(entry, &asked) {
            return Ok(token);
        }
        let (turn, came) = (Turn { tokens: self, lock: self.turn(&asked), asked: &asked }, Instant::now());
        let mut failure = turn.lock.lock().await;
        // Whoever was first has fetched it.
        if let Some(token) = self.fresh(entry, &asked) {
            return Ok(token);
        }
        let at_hand = self.good_enough(entry, &asked);
        let patience = if at_hand.is_some() { REFRESH_PATIENCE } else { FETCH_PATIENCE };
        let (fetched, at) = match failure.take().filter(|(at, _)| *at >= came) {
            Some((at, status)) => (Err(status), at),
            None => (self.fetch_for(caller, entry, audience, patience).await, Instant::now()),
        };
        // One caller's share is nothing to another who waits for the same.
        let shared = fetched.as_ref().err().filter(|status| status.code() != Code::ResourceExhausted);
        *failure = shared.map(|status| (at, status.clone()));
        drop(failure);
        match (fetched, at_hand) {
            (Ok(token), _) => {
                let token = Arc::new(token);
                self.held().put(asked.clone(), token.clone(), caller, self.link.now());
                Ok(token)
            }
            // Also with the server away it is good until it ends. What the server refuses, nobody gets.
            (Err(status), Some(token)) if is_passing(&status) => {
                if let Some(unsaid) = self.said.next(caller.clone(), "JWT-SVID not renewed", Instant::now().into_std())
                {
                    let failed = describe(&status);
                    tracing::warn!(spiffe_id = %entry.spiffe_id, failed, unsaid, "cannot renew a JWT-SVID; its workload gets the one at hand");
                }
                Ok(token)
            }
            (Err(status), _) => Err(told(&status)),
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self, asked: &Asked) -> Arc<tokio::sync::Mutex<LastFailure>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.entry(asked.clone()).or_default().clone()
    }

    /// The token at hand, if it is for the entry as it is now, before half of its life, and by a key that signs or has signed in
    /// order.
    fn fresh(&self, entry: &Entry, asked: &Asked) -> Option<Arc<Token>> {
        let token = self.held().get(asked)?;
        let is_fresh = token.revision == entry.revision && self.link.now() < token.renew_at;
        (is_fresh && token.id == entry.spiffe_id && self.key_of(&token) == Key::Good).then_some(token)
    }

    /// The token at hand, if peers still accept it.
    fn good_enough(&self, entry: &Entry, asked: &Asked) -> Option<Arc<Token>> {
        let token = self.held().get(asked)?;
        let is_good = self.link.now() < token.expires_at && self.key_of(&token) != Key::Gone;
        (is_good && token.id == entry.spiffe_id).then_some(token)
    }

    fn key_of(&self, token: &Token) -> Key {
        let Some(bundle) = self.cache.read().bundle.clone() else { return Key::Gone };
        match bundle.jwt_authorities.iter().find(|a| a.key_id() == token.key_id) {
            None => Key::Gone,
            Some(authority) if authority.is_over(self.link.now()) => Key::Gone,
            Some(authority) if authority.tainted => Key::Tainted,
            Some(_) => Key::Good,
        }
    }

    /// Fetches one within the caller's share, of which nothing is taken by a server that does not answer.
    async fn fetch_for(
        &self,
        caller: &Caller,
        entry: &Entry,
        audience: &Audience,
        patience: Duration,
    ) -> Result<Token, Status> {
        if !self.fetches.take(caller.clone(), 1, Instant::now().into_std()) {
            return Err(Status::resource_exhausted(format!(
                "{caller} has asked for too many new tokens ({} a second on average, {} at once); ask for the same audiences again",
                FETCHES.0, FETCHES.1
            )));
        }
        let fetched = self.fetch(entry, audience, patience).await;
        if matches!(&fetched, Err(s) if matches!(s.code(), Code::Unavailable | Code::DeadlineExceeded)) {
            self.fetches.give_back(caller, 1);
        }
        fetched
    }

    async fn fetch(&self, entry: &Entry, audience: &Audience, patience: Duration) -> Result<Token, Status> {
        if self.link.identity().borrow().is_none() {
            // After a ban or an eviction, too: what is at hand is nobody's any more.
            return Err(Status::failed_precondition("the agent is not attested"));
        }
        let asked = NewJwtsvidRequest { entry_id: entry.id.to_string(), audience: audience.names().to_vec() };
        let mut client = SvidClient::new(self.link.signing_channel());
        let answer = timeout(patience, client.new_jwtsvid(asked)).await;
        let answer = answer.map_err(|_| Status::deadline_exceeded("the server did not answer"))??.into_inner();
        let told = answer.svid.ok_or_else(|| Status::internal("the answer holds no token"))?.token;
        let token = Zeroizing::new(told);
        let svid = self.verified(&token, audience).await?;
        if svid.id != entry.spiffe_id {
            return Err(Status::internal(
                "it came for an identity that the entry does not say here; a change is under way",
            ));
        }
        self.metrics.tokens_signed.inc();
        let issued_at = svid.claims.get("iat").and_then(serde_json::Value::as_i64);
        let issued_at = issued_at.and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok());
        let issued_at = issued_at.unwrap_or_else(|| self.link.now());
        Ok(Token {
            text: token,
            renew_at: renew_at(issued_at, svid.expires_at, rand::random_range(-1.0..=1.0)),
            id: svid.id,
            key_id: svid.key_id,
            revision: entry.revision,
            expires_at: svid.expires_at,
        })
    }

    /// A token as our own bundle verifies it. A key that was published a moment ago is waited for. Errors: peers would refuse it.
    async fn verified(&self, token: &str, audience: &Audience) -> Result<JwtSvid, Status> {
        let mut versions = self.cache.versions();
        let until = Instant::now() + KEY_PATIENCE;
        loop {
            versions.mark_unchanged();
            let bundle = self.cache.read().bundle.clone();
            let bundles: BundleSet = bundle.iter().map(|bundle| TrustBundle::clone(bundle)).collect();
            match verify_for_all(token, audience, &bundles, self.link.now()) {
                Ok(svid) => return Ok(svid),
                Err(JwtError::UnknownKey { .. } | JwtError::NoBundle(_))
                    if timeout_at(until, versions.changed()).await.is_ok_and(|changed| changed.is_ok()) => {}
                // Our bundle may lag behind the server's, and our clock.
                Err(error) => return Err(Status::unknown(format!("the server's token is of no use here: {error}"))),
            }
        }
    }
}

/// Why there is no token, as its caller is told.
fn told(status: &Status) -> Status {
    let why = format!("could not fetch JWT-SVID: {}", describe(status));
    if status.code() == Code::ResourceExhausted { Status::resource_exhausted(why) } else { Status::unavailable(why) }
}

/// One who waits for what is being fetched. What nobody waits for any more is forgotten.
struct Turn<'a> {
    tokens: &'a Tokens,
    lock: Arc<tokio::sync::Mutex<LastFailure>>,
    asked: &'a Asked,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut turns = self.tokens.turns.lock().unwrap_or_else(PoisonError::into_inner);
        // Ours and the table's.
        if Arc::strong_count(&self.lock) <= 2 {
            turns.remove(self.asked);
        }
    }
}

/// A token as each of those verifies it that it is for.
fn verify_for_all(
    token: &str,
    audience: &Audience,
    bundles: &BundleSet,
    now: OffsetDateTime,
) -> Result<JwtSvid, JwtError> {
    let first = audience.names().first().ok_or(JwtError::NoAudience)?;
    let svid = verify(token, first, bundles, now)?;
    if audience.names().iter().all(|name| svid.is_for(name)) {
        return Ok(svid);
    }
    Err(JwtError::Claim { claim: "aud", why: "does not have all the audiences that were asked for".into() })
}

/// Whether the server may answer otherwise in a moment.
fn is_passing(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted | Code::Unknown)
}

#[cfg(test)]
mod tests;
