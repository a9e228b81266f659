//! Several replicas agree who works, by a Lease (coordination.k8s.io/v1): whoever holds it renews it; when it runs out,
//! another takes it. The API server's version check lets only one of two takers through.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::time::Instant;

/// A lease that is not renewed for this long is free.
const LEASE: Duration = Duration::from_secs(15);
/// How often the holder renews it, and others look.
const RENEW: Duration = Duration::from_secs(3);
/// A holder that could not renew it for this long stops working, before another may begin.
const GIVE_UP: Duration = Duration::from_secs(10);

/// A lease that we try to hold.
pub struct Leader {
    api: Api<Lease>,
    name: &'static str,
    me: String,
}

impl Leader {
    /// Stands for `name` in a namespace, as `me`.
    pub fn new(client: kube::Client, namespace: &str, name: &'static str, me: String) -> Self {
        Self { api: Api::namespaced(client, namespace), name, me }
    }

    /// Returns once the lease is ours.
    pub async fn wait(&self) {
        loop {
            match self.try_hold().await {
                Ok(true) => return tracing::info!(lease = self.name, holder = self.me, "we hold the lease"),
                Ok(false) => {}
                Err(error) => tracing::warn!(lease = self.name, %error, "cannot look at the lease; trying again"),
            }
            tokio::time::sleep(RENEW).await;
        }
    }

    /// Renews the lease; returns when it is lost.
    pub async fn hold(&self) {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(RENEW).await;
            match tokio::time::timeout(RENEW, self.try_hold()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => break,
                Ok(Err(error)) => tracing::warn!(lease = self.name, %error, "cannot renew the lease; trying again"),
                Err(_) => tracing::warn!(lease = self.name, "the lease was not renewed in time; trying again"),
            }
            if renewed.elapsed() > GIVE_UP {
                break;
            }
        }
        tracing::warn!(lease = self.name, holder = self.me, "the lease is lost");
    }

    /// Gives the lease back, so that another takes it at once; when that fails it runs out.
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
        let seconds = held.lease_duration_seconds.unwrap_or_default().max(1);
        let renewed = held.renew_time.as_ref().map_or(0, |t| t.0.as_second());
        let free = held.holder_identity.as_deref().unwrap_or_default().is_empty()
            || renewed + i64::from(seconds) < now.as_second();
        if !mine && !free {
            return Ok(false);
        }
        let transitions = held.lease_transitions.unwrap_or_default() + i32::from(!mine);
        let acquired = held.acquire_time.filter(|_| mine).unwrap_or(MicroTime(now));
        found.spec = Some(spec(transitions, acquired));
        won(self.api.replace(self.name, &PostParams::default(), &found).await)
    }
}

/// Whether we were the first: the API server refuses a second one with 409.
fn won(result: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match result {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}
