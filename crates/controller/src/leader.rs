//! Leader election among replicas by a Lease (coordination.k8s.io/v1): the holder renews it, and once it has expired
//! another replica takes it. The API server's version check lets only one of two candidates succeed.
//!
//! No machine's clock counts but the own one, and of it only how much time passes: a lease expires when this replica
//! has not seen it change for its life, as in client-go. Its times are for people.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use countersign_watch::in_words;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::time::Instant;

/// A lease that was not renewed for this long has expired.
const LEASE: Duration = Duration::from_secs(15);
/// Interval at which the holder renews the lease and others check it.
const RENEW: Duration = Duration::from_secs(3);
/// Longest life of a lease that is respected, whatever it says of itself.
const MAX_LIFE: Duration = Duration::from_secs(60);
/// A holder that could not renew for this long stops working, before another replica may start.
const GIVE_UP: Duration = Duration::from_secs(10);

/// A lease that this replica tries to hold.
pub struct Leader {
    api: Api<Lease>,
    name: &'static str,
    me: String,
    seen: Mutex<Option<Seen>>,
}

/// A version of the lease, and since when we see it.
struct Seen {
    version: Option<String>,
    since: Instant,
}

impl Seen {
    /// Takes a look at a version of the lease; returns for how long it has been this one.
    fn look(seen: &mut Option<Self>, version: Option<&str>, now: Instant) -> Duration {
        match seen {
            Some(seen) if seen.version.as_deref() == version => now.saturating_duration_since(seen.since),
            _ => {
                *seen = Some(Self { version: version.map(ToOwned::to_owned), since: now });
                Duration::ZERO
            }
        }
    }
}

/// A candidate at a moment: its name, its clock, and how far its time has come.
struct Candidate<'a> {
    me: &'a str,
    /// For people, who read it in the lease. Nothing is decided by it.
    clock: Timestamp,
    now: Instant,
}

impl Candidate<'_> {
    /// What it writes into the lease to hold it; `None` while the lease is another's.
    fn bid(&self, found: &Lease, seen: &mut Option<Seen>) -> Option<LeaseSpec> {
        let unchanged = Seen::look(seen, found.metadata.resource_version.as_deref(), self.now);
        let held = found.spec.clone().unwrap_or_default();
        let holder = held.holder_identity.as_deref().unwrap_or_default();
        let life = held.lease_duration_seconds.and_then(|s| s.try_into().ok()).unwrap_or(1).max(1);
        let life = Duration::from_secs(life).min(MAX_LIFE);
        let mine = holder == self.me;
        if !mine && !holder.is_empty() && unchanged <= life {
            return None;
        }
        let transitions = held.lease_transitions.unwrap_or_default().saturating_add(i32::from(!mine));
        Some(self.spec(transitions, held.acquire_time.filter(|_| mine)))
    }

    fn spec(&self, transitions: i32, acquired: Option<MicroTime>) -> LeaseSpec {
        let now = MicroTime(self.clock);
        LeaseSpec {
            holder_identity: Some(self.me.to_owned()),
            lease_duration_seconds: Some(i32::try_from(LEASE.as_secs()).unwrap_or(i32::MAX)),
            acquire_time: Some(acquired.unwrap_or_else(|| now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
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
                Ok(Err(error)) => tracing::warn!(
                    lease = self.name,
                    error = in_words(&error),
                    "cannot look at the lease; trying again"
                ),
                Err(_) => tracing::warn!(lease = self.name, "the lease was not answered for in time; trying again"),
            }
            tokio::time::sleep(RENEW).await;
        }
    }

    /// Renews the lease, which counts from `since`, until it is lost.
    pub async fn hold(&self, since: Instant) {
        keep(since, || async { self.try_hold().await.map_err(|e| in_words(&e)) }, self.name).await;
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
            Ok(Err(error)) => {
                tracing::warn!(lease = self.name, error = in_words(&error), "cannot give the lease back; it runs out");
            }
            Err(_) => tracing::warn!(lease = self.name, "the lease was not given back in time; it runs out"),
        }
    }

    async fn try_hold(&self) -> Result<bool, kube::Error> {
        let found = self.api.get_opt(self.name).await?;
        let candidate = Candidate { me: &self.me, clock: Timestamp::now(), now: Instant::now() };
        let Some(mut found) = found else {
            let metadata = ObjectMeta { name: Some(self.name.to_owned()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(candidate.spec(0, None)) };
            return won(self.api.create(&PostParams::default(), &lease).await);
        };
        let bid = candidate.bid(&found, &mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        let Some(bid) = bid else { return Ok(false) };
        found.spec = Some(bid);
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

    /// The lease at an API server: every write makes a new version.
    struct Server {
        lease: Lease,
        version: u64,
    }

    impl Server {
        fn write(&mut self, spec: LeaseSpec) {
            self.version += 1;
            self.lease.metadata.resource_version = Some(self.version.to_string());
            self.lease.spec = Some(spec);
        }

        fn holder(&self) -> &str {
            self.lease.spec.as_ref().and_then(|s| s.holder_identity.as_deref()).unwrap_or_default()
        }
    }

    /// A replica whose clock is this many hours off.
    struct Replica {
        me: &'static str,
        hours: i64,
        seen: Option<Seen>,
    }

    impl Replica {
        fn new(me: &'static str, hours: i64) -> Self {
            Self { me, hours, seen: None }
        }

        /// Tries to hold the lease; whether it does.
        fn tries(&mut self, server: &mut Server, start: Instant) -> bool {
            let now = Instant::now();
            let seconds = self.hours * 3_600 + i64::try_from(now.duration_since(start).as_secs()).unwrap();
            let clock = Timestamp::from_second(1_700_000_000 + seconds).unwrap();
            let bid = Candidate { me: self.me, clock, now }.bid(&server.lease, &mut self.seen);
            bid.map(|spec| server.write(spec)).is_some()
        }
    }

    fn free() -> Server {
        Server { lease: Lease::default(), version: 0 }
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_hours_off_neither_loses_nor_takes_a_lease_that_is_renewed() {
        for hours in [-5, 0, 5] {
            let (mut server, start) = (free(), Instant::now());
            let (mut holder, mut other) = (Replica::new("holder", hours), Replica::new("other", 0));
            assert!(holder.tries(&mut server, start));
            for _ in 0..1_000 {
                tokio::time::advance(RENEW).await;
                assert!(holder.tries(&mut server, start), "{hours} h");
                assert!(!other.tries(&mut server, start), "{hours} h");
                assert!(!Replica::new("new", -hours).tries(&mut server, start), "one that has just started");
            }
            assert_eq!(server.lease.spec.unwrap().lease_transitions, Some(1));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_nobody_renews_is_taken_after_its_life_whatever_the_clocks_say() {
        for (hours, others) in [(-5, 5), (5, -5)] {
            let (mut server, start) = (free(), Instant::now());
            let (mut holder, mut other) = (Replica::new("holder", hours), Replica::new("other", others));
            assert!(holder.tries(&mut server, start) && !other.tries(&mut server, start));
            let seen = Instant::now();
            while !other.tries(&mut server, start) {
                tokio::time::advance(RENEW).await;
                assert!(seen.elapsed() <= LEASE + RENEW, "{:?}", seen.elapsed());
            }
            assert!(seen.elapsed() > LEASE, "{:?}", seen.elapsed());
            assert!(!holder.tries(&mut server, start), "it is the other one's now");
            assert_eq!(server.holder(), "other");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_counts_as_a_renewal_even_if_it_says_the_same_and_a_life_has_a_bound() {
        let (mut server, start) = (free(), Instant::now());
        let mut holder = Replica::new("holder", 0);
        assert!(holder.tries(&mut server, start));
        let mut same = server.lease.spec.clone().unwrap();
        same.lease_duration_seconds = Some(i32::MAX);
        let mut other = Replica::new("other", 0);
        for _ in 0..100 {
            tokio::time::advance(LEASE).await;
            server.write(same.clone());
            assert!(!other.tries(&mut server, start), "the holder's clock stands still");
        }
        tokio::time::advance(MAX_LIFE + RENEW).await;
        assert!(other.tries(&mut server, start));
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
