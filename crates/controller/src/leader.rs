//! Leader election among replicas by a Lease (coordination.k8s.io/v1): the holder renews it, and once it has expired
//! another replica takes it. The API server's version check lets only one of two candidates succeed.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::time::Instant;

/// A lease that was not renewed for this long has expired.
const LEASE: Duration = Duration::from_secs(15);
/// Interval at which the holder renews the lease and others check it.
const RENEW: Duration = Duration::from_secs(3);
/// A holder that could not renew for this long stops working, before another replica may start.
const GIVE_UP: Duration = Duration::from_secs(10);

/// A lease that this replica tries to hold.
pub struct Leader {
    api: Api<Lease>,
    name: &'static str,
    me: String,
    seen: Mutex<Option<Seen>>,
}

/// A lease as we saw it last. Two machines' clocks are never compared: how old a renewal is, counts from when we saw it.
struct Seen {
    holder: String,
    renewed: Option<Timestamp>,
    since: Instant,
}

impl Seen {
    /// Takes a look at who holds the lease and when that one renewed it by its own clock; for how long it has been so.
    fn look(seen: &mut Option<Self>, holder: &str, renewed: Option<Timestamp>, now: Instant) -> Duration {
        match seen {
            Some(seen) if seen.holder == holder && seen.renewed == renewed => now.saturating_duration_since(seen.since),
            _ => {
                *seen = Some(Self { holder: holder.to_owned(), renewed, since: now });
                Duration::ZERO
            }
        }
    }
}

impl Leader {
    /// A candidate for the lease `name` in a namespace, with `me` as its identity.
    pub fn new(client: kube::Client, namespace: &str, name: &'static str, me: String) -> Self {
        Self { api: Api::namespaced(client, namespace), name, me, seen: Mutex::default() }
    }

    /// Waits until the lease is ours. Returns the time from which it counts.
    pub async fn wait(&self) -> Instant {
        loop {
            let began = Instant::now();
            match tokio::time::timeout(RENEW, self.try_hold()).await {
                Ok(Ok(true)) => {
                    tracing::info!(lease = self.name, holder = self.me, "we hold the lease");
                    return began;
                }
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::warn!(lease = self.name, %error, "cannot look at the lease; trying again"),
                Err(_) => tracing::warn!(lease = self.name, "the lease was not answered for in time; trying again"),
            }
            tokio::time::sleep(RENEW).await;
        }
    }

    /// Renews the lease, which counts from `since`, until it is lost.
    pub async fn hold(&self, since: Instant) {
        keep(since, || self.try_hold(), self.name).await;
        tracing::warn!(lease = self.name, holder = self.me, "the lease is lost");
    }

    /// Gives the lease back, so that another replica can take it at once. If that fails, it expires.
    pub async fn release(&self) {
        let give = async {
            let Some(mut found) = self.api.get_opt(self.name).await? else { return Ok(()) };
            let Some(spec) = found.spec.as_mut().filter(|s| s.holder_identity.as_deref() == Some(&self.me)) else {
                return Ok(());
            };
            spec.holder_identity = Some(String::new());
            won(self.api.replace(self.name, &PostParams::default(), &found).await).map(drop)
        };
        match tokio::time::timeout(RENEW, give).await {
            Ok(Ok(())) => tracing::info!(lease = self.name, holder = self.me, "the lease is given back"),
            Ok(Err(error)) => tracing::warn!(lease = self.name, %error, "cannot give the lease back; it runs out"),
            Err(_) => tracing::warn!(lease = self.name, "the lease was not given back in time; it runs out"),
        }
    }

    async fn try_hold(&self) -> Result<bool, kube::Error> {
        let now = Timestamp::now();
        let spec = |transitions, acquired| LeaseSpec {
            holder_identity: Some(self.me.clone()),
            lease_duration_seconds: Some(i32::try_from(LEASE.as_secs()).unwrap_or(i32::MAX)),
            acquire_time: Some(acquired),
            renew_time: Some(MicroTime(now)),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        };
        let Some(mut found) = self.api.get_opt(self.name).await? else {
            let metadata = ObjectMeta { name: Some(self.name.to_owned()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(spec(0, MicroTime(now))) };
            return won(self.api.create(&PostParams::default(), &lease).await);
        };
        let held = found.spec.take().unwrap_or_default();
        let mine = held.holder_identity.as_deref() == Some(&self.me);
        let life = Duration::from_secs(held.lease_duration_seconds.and_then(|s| s.try_into().ok()).unwrap_or(1).max(1));
        let holder = held.holder_identity.as_deref().unwrap_or_default();
        let unchanged = {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            Seen::look(&mut seen, holder, held.renew_time.as_ref().map(|t| t.0), Instant::now())
        };
        let free = holder.is_empty() || unchanged > life;
        if !mine && !free {
            return Ok(false);
        }
        let transitions = held.lease_transitions.unwrap_or_default() + i32::from(!mine);
        let acquired = held.acquire_time.filter(|_| mine).unwrap_or(MicroTime(now));
        found.spec = Some(spec(transitions, acquired));
        won(self.api.replace(self.name, &PostParams::default(), &found).await)
    }
}

/// Renews until another replica has the lease, or until it was not renewed for [`GIVE_UP`]. A renewal counts from the
/// time of its request, because that is the time that others read in the lease.
async fn keep<E, F>(since: Instant, renew: impl Fn() -> F, lease: &str)
where
    E: std::fmt::Display,
    F: Future<Output = Result<bool, E>>,
{
    let mut renewed = since;
    loop {
        let attempt = async {
            tokio::time::sleep(RENEW).await;
            (Instant::now(), tokio::time::timeout(RENEW, renew()).await)
        };
        match tokio::time::timeout_at(renewed + GIVE_UP, attempt).await {
            Ok((began, Ok(Ok(true)))) => renewed = began,
            Ok((_, Ok(Ok(false)))) | Err(_) => return,
            Ok((_, Ok(Err(error)))) => tracing::warn!(lease, %error, "cannot renew the lease; trying again"),
            Ok((_, Err(_))) => tracing::warn!(lease, "the lease was not renewed in time; trying again"),
        }
    }
}

/// Whether our write was first: the API server rejects a second one with 409.
fn won(result: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match result {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_free_when_nobody_has_renewed_it_for_its_life_whatever_the_holders_clock_says() {
        let mut seen = None;
        let by_its_clock = |second: i64| Some(Timestamp::from_second(second).unwrap());
        let mut look = |holder: &str, renewed| Seen::look(&mut seen, holder, renewed, Instant::now());
        // The holder's clock is hours behind ours; it renews all the same.
        for second in 0..10 {
            assert_eq!(look("a", by_its_clock(second)), Duration::ZERO, "somebody new, or renewed");
            tokio::time::advance(RENEW).await;
        }
        assert_eq!(look("a", by_its_clock(9)), RENEW);
        tokio::time::advance(LEASE).await;
        assert!(look("a", by_its_clock(9)) > LEASE);
        assert_eq!(look("b", by_its_clock(9)), Duration::ZERO, "another one has taken it");
    }

    #[tokio::test(start_paused = true)]
    async fn a_holder_stops_before_another_may_begin_however_the_api_server_stalls() {
        let nobody_answers = std::future::pending::<Result<bool, Infallible>>;
        // From just renewed to renewed by a slow call.
        for age in [Duration::ZERO, Duration::from_secs(3), Duration::from_secs(9)] {
            let since = Instant::now();
            tokio::time::advance(age).await;
            keep(since, nobody_answers, "test").await;
            assert!(since.elapsed() + RENEW < LEASE, "{:?}", since.elapsed());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_is_renewed_is_held_and_one_that_another_took_is_not() {
        let began = Instant::now();
        let for_a_minute = || async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            Ok::<_, Infallible>(began.elapsed() < Duration::from_secs(60))
        };
        keep(began, for_a_minute, "test").await;
        assert!((60..70).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    }
}
