//! Gets each entry's SVID signed before it is requested, and renews it at half of its lifetime or when its authority is
//! tainted.
//!
//! A failed call delays all signing; a refused entry delays only itself.

use std::sync::Arc;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_api::spire::svid::svid_client::SvidClient;
use countersign_api::spire::svid::{BatchNewX509svidRequest, NewX509svidParams};
use countersign_api::transport::MAX_MESSAGE_BYTES;
use countersign_identity::profile::request;
use countersign_identity::{EntryId, KeyType, PrivateKey, X509Svid};
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::cache::{Cache, Cached, State};
use crate::link::{CALL_TIMEOUT, Link, describe, svid_from_wire};
use crate::metrics::Metrics;
use crate::refusal::Refusal;
use crate::renewal;
use crate::retries::Retries;

/// Most requests per call (SPIRE: 500).
const BATCH: usize = 500;
/// Interval between two checks of the clock, so that a jump of the clock is noticed.
const LOOK: Duration = Duration::from_secs(1);

/// Keeps all entries signed until `shutdown`.
pub struct Signing {
    /// Connection to the server.
    pub link: Arc<Link>,
    /// Entries and their SVIDs.
    pub cache: Arc<Cache>,
    /// Receives the server's refusals of this agent.
    pub refusals: mpsc::Sender<Refusal>,
    /// Key type of new SVIDs of workloads.
    pub key_type: watch::Receiver<KeyType>,
    /// The agent's metrics.
    pub metrics: Arc<Metrics>,
}

impl Signing {
    /// Signs what is due, until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        tokio::select! {
            () = self.keep_signed() => {}
            () = shutdown.cancelled() => {}
        }
    }

    async fn keep_signed(&self) {
        let mut versions = self.cache.versions();
        let mut identity = self.link.identity();
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        let mut retries = Retries::default();
        loop {
            versions.mark_unchanged();
            let now = self.link.now();
            let due = {
                let state = self.cache.read();
                retries.forget_removed(&state);
                retries.pick(state.entries.values().filter(|c| is_due(c, &state, now)), BATCH, Instant::now())
            };
            if due.is_empty() {
                tokio::select! {
                    changed = versions.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(LOOK) => {}
                }
                continue;
            }
            if identity.borrow_and_update().is_none() {
                if identity.changed().await.is_err() {
                    return;
                }
                continue;
            }
            let status = match self.sign(&due, &mut retries).await {
                Ok(0) => {
                    backoff.reset();
                    continue;
                }
                Ok(refused) => {
                    backoff.reset();
                    self.metrics.signing_failures.inc();
                    tracing::warn!(
                        refused,
                        of = due.len(),
                        "the server did not sign all; each that is refused is tried again by itself"
                    );
                    continue;
                }
                Err(status) => status,
            };
            if let Some(refusal) = Refusal::of(&status) {
                // Whoever hears of them has several waiting already, and will act on those.
                let _ = self.refusals.try_send(refusal);
            }
            self.metrics.signing_failures.inc();
            let delay = backoff.next_delay();
            tracing::warn!(
                failed = describe(&status),
                due = due.len(),
                "cannot get SVIDs signed; those at hand stay until they expire; trying again in {delay:.1?}"
            );
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                // Another identity may be accepted. A change of the cache is no reason to retry, because our own work
                // causes changes.
                changed = identity.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Gets a batch signed; returns how many of it were refused. Errors: the call failed as a whole.
    async fn sign(&self, due: &[EntryId], retries: &mut Retries) -> Result<usize, Status> {
        let (count, key_type) = (due.len(), *self.key_type.borrow());
        // RSA keys take long to generate, so this must not block other tasks.
        let keys = tokio::task::spawn_blocking(move || {
            let one = || {
                let key = PrivateKey::generate(key_type).map_err(|e| e.to_string())?;
                let csr = request(&key, None).map_err(|e| e.to_string())?;
                Ok::<_, String>((key, csr))
            };
            (0..count).map(|_| one()).collect::<Result<Vec<_>, _>>()
        });
        let keys = keys.await.map_err(|e| Status::internal(e.to_string()))?.map_err(Status::internal)?;
        let (keys, csrs): (Vec<_>, Vec<_>) = keys.into_iter().unzip();
        let params = due.iter().zip(csrs).map(|(id, csr)| NewX509svidParams { entry_id: id.to_string(), csr });
        let request = BatchNewX509svidRequest { params: params.collect() };
        let mut client = SvidClient::new(self.link.signing_channel()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.batch_new_x509svid(request)).await;
        let results = answer.map_err(|_| Status::deadline_exceeded("the server did not answer"))??.into_inner().results;
        if results.len() != count {
            return Err(Status::internal(format!("asked for {count} SVIDs, got {} results", results.len())));
        }
        let (mut refused, mut signed) = (vec![], vec![]);
        for ((id, key), result) in due.iter().zip(keys).zip(results) {
            let status = result.status.unwrap_or_default();
            let why = if status.code == i32::from(Code::Ok) {
                match svid_from_wire(result.svid, key) {
                    Ok(svid) if self.is_for(id, &svid) => {
                        signed.push((id, Arc::new(svid)));
                        continue;
                    }
                    // Counted as refused: otherwise it would be requested again at once, in a loop.
                    Ok(svid) => {
                        format!("it came for `{}`, which the entry does not say here; a change is under way", svid.id())
                    }
                    Err(error) => error.to_string(),
                }
            } else {
                format!("the server refused to sign: {}", status.message)
            };
            tracing::warn!(entry = %id, why, "no SVID for an entry");
            refused.push(id);
        }
        self.metrics.svids_signed.inc_by(signed.len() as u64);
        for id in &refused {
            // An entry that was removed meanwhile needs no retry.
            if let Some(cached) = self.cache.read().entries.get(*id) {
                retries.refused(&cached.entry, Instant::now());
            }
        }
        signed.iter().for_each(|(id, _)| retries.signed(id));
        // Only a change of the cache wakes watchers; a refusal must not.
        if !signed.is_empty() {
            self.put(signed);
        }
        Ok(refused.len())
    }

    fn is_for(&self, id: &EntryId, svid: &X509Svid) -> bool {
        self.cache.read().entries.get(id).is_none_or(|c| c.entry.spiffe_id == *svid.id())
    }

    fn put(&self, signed: Vec<(&EntryId, Arc<X509Svid>)>) {
        let now = self.link.now();
        self.cache.change(|state| {
            for (id, svid) in signed {
                // The entry may have been removed, or have got another SPIFFE ID, during the call.
                if let Some(cached) = state.entries.get_mut(id).filter(|c| c.entry.spiffe_id == *svid.id()) {
                    tracing::debug!(entry = %id, spiffe_id = %svid.id(), serial = svid.facts().serial, "SVID ready");
                    cached.svid = Some(svid);
                    cached.stale = false;
                    cached.obtained = now;
                    cached.jitter = rand::random_range(-1.0..=1.0);
                }
            }
        });
    }
}

/// Whether an entry needs a new SVID now.
fn is_due(cached: &Cached, state: &State, now: OffsetDateTime) -> bool {
    if cached.entry.is_expired(now) || cached.entry.store_svid {
        return false;
    }
    let Some(svid) = &cached.svid else { return true };
    cached.stale || renewal::is_due(svid, cached.obtained, cached.jitter, state.bundle.as_deref(), now)
}
