//! Gets each entry its SVID before anybody asks, and a new one at half life or when its authority is tainted.

use std::sync::Arc;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_api::denied::{Reason, reason_of};
use countersign_api::spire::svid::svid_client::SvidClient;
use countersign_api::spire::svid::{BatchNewX509svidRequest, NewX509svidParams};
use countersign_api::transport::MAX_MESSAGE_BYTES;
use countersign_identity::profile::request;
use countersign_identity::{EntryId, KeyType, PrivateKey};
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::cache::{Cache, Cached, State};
use crate::link::{CALL_TIMEOUT, Link, describe, svid_from_wire};
use crate::metrics::Metrics;

/// Requests in one call (SPIRE: 500).
const BATCH: usize = 500;
/// The time is looked at this often, so that a clock that jumps is noticed.
const LOOK: Duration = Duration::from_secs(1);

/// Signs what is due until `shutdown`.
pub struct Signing {
    /// The way to the server.
    pub link: Arc<Link>,
    /// Entries and their SVIDs.
    pub cache: Arc<Cache>,
    /// Where refusals of this agent go.
    pub denials: mpsc::Sender<Reason>,
    /// Key type of workloads' SVIDs, from now on.
    pub key_type: watch::Receiver<KeyType>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

impl Signing {
    /// Runs until `shutdown`.
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
        loop {
            versions.mark_unchanged();
            let now = self.link.now();
            let due: Vec<EntryId> = {
                let state = self.cache.read();
                state
                    .entries
                    .values()
                    .filter(|c| is_due(c, &state, now))
                    .map(|c| c.entry.id.clone())
                    .take(BATCH)
                    .collect()
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
            let failed = match self.sign(&due).await {
                Ok(0) => {
                    backoff.reset();
                    continue;
                }
                Ok(refused) => format!("{refused} of {} requests were refused", due.len()),
                Err(status) => {
                    if let Some(reason) = reason_of(&status) {
                        let _ = self.denials.try_send(reason);
                    }
                    describe(&status)
                }
            };
            self.metrics.signing_failures.inc();
            let delay = backoff.next_delay();
            tracing::warn!(
                failed,
                due = due.len(),
                "cannot get SVIDs signed; those at hand stay until they expire; trying again in {delay:.1?}"
            );
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                // Something new may have come that can be signed.
                _ = versions.changed() => {}
            }
        }
    }

    /// Gets a batch signed; how many of it were refused.
    async fn sign(&self, due: &[EntryId]) -> Result<usize, Status> {
        let (count, key_type) = (due.len(), *self.key_type.borrow());
        // RSA keys take long to make; nobody else is to wait for them.
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
        let mut refused = 0;
        let mut signed = vec![];
        for ((id, key), result) in due.iter().zip(keys).zip(results) {
            let status = result.status.unwrap_or_default();
            if status.code != i32::from(Code::Ok) {
                refused += 1;
                tracing::warn!(entry = %id, reason = status.message, "the server refused to sign");
                continue;
            }
            match svid_from_wire(result.svid, key) {
                Ok(svid) => signed.push((id, Arc::new(svid))),
                Err(error) => {
                    refused += 1;
                    tracing::warn!(entry = %id, %error, "the server's SVID cannot be used");
                }
            }
        }
        self.metrics.svids_signed.inc_by(signed.len() as u64);
        let now = self.link.now();
        self.cache.change(|state| {
            for (id, svid) in signed {
                // The entry may have gone, or become another identity's, while the request was under way.
                if let Some(cached) = state.entries.get_mut(id).filter(|c| c.entry.spiffe_id == *svid.id()) {
                    tracing::debug!(entry = %id, spiffe_id = %svid.id(), serial = svid.facts().serial, "SVID ready");
                    cached.svid = Some(svid);
                    cached.stale = false;
                    cached.obtained = now;
                    cached.jitter = rand::random_range(-1.0..=1.0);
                }
            }
        });
        Ok(refused)
    }
}

/// Whether an entry needs an SVID now.
fn is_due(cached: &Cached, state: &State, now: OffsetDateTime) -> bool {
    if cached.entry.is_expired(now) || cached.entry.store_svid {
        return false;
    }
    let Some(svid) = &cached.svid else { return true };
    // Half of a life that began before the signature may be over at once: a quarter of what was left is waited for.
    let earliest = cached.obtained + svid.remaining(cached.obtained) / 4;
    if cached.stale || svid.renew_at(cached.jitter).max(earliest) <= now {
        return true;
    }
    // Directly below a root: tainted, or gone from the bundle, means that a new one is needed at once.
    let below_root = svid.chain().len() == 1;
    let id = &svid.facts().authority_id;
    below_root && state.bundle.as_ref().is_some_and(|b| !b.authorities.iter().any(|a| a.id() == id && !a.tainted))
}
