//! Copies entries and bundles from the server into the cache: pushed if the server supports it, polled otherwise.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_api::convert::{bundle_without_unknown_keys, entry_from_wire};
use countersign_api::push::push_client::PushClient;
use countersign_api::push::{WatchRequest, WatchResponse};
use countersign_api::spire::bundle::bundle_client::BundleClient;
use countersign_api::spire::bundle::{GetBundleRequest, GetFederatedBundleRequest};
use countersign_api::spire::entry::GetAuthorizedEntriesRequest;
use countersign_api::spire::entry::entry_client::EntryClient;
use countersign_api::spire::types;
use countersign_api::transport::MAX_MESSAGE_BYTES;
use countersign_identity::{Entry, EntryId, SpiffeId, TrustBundle, TrustDomain};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::cache::{Cache, Cached, Position, State};
use crate::link::{CALL_TIMEOUT, Link, describe};
use crate::refusal::{Refusal, was_cut};

/// Keeps the cache up to date until `shutdown`.
pub struct Sync {
    /// Connection to the server.
    pub link: Arc<Link>,
    /// The cache that is kept up to date.
    pub cache: Arc<Cache>,
    /// Receives the server's refusals of this agent.
    pub refusals: mpsc::Sender<Refusal>,
    /// Interval between two polls of a server without push.
    pub interval: Duration,
    /// The trust domain whose bundle authenticates the server.
    pub trust_domain: TrustDomain,
}

/// The parts of a message that has not ended.
#[derive(Default)]
struct Parts {
    snapshot: bool,
    upserted: Vec<types::Entry>,
}

impl Parts {
    /// Takes a part; the whole, once its last is there.
    fn join(&mut self, mut part: WatchResponse) -> Option<WatchResponse> {
        self.snapshot |= part.snapshot;
        self.upserted.append(&mut part.upserted);
        if part.more {
            return None;
        }
        let whole = std::mem::take(self);
        Some(WatchResponse { snapshot: whole.snapshot, upserted: whole.upserted, ..part })
    }
}

/// All that a poll asks for.
struct Polled {
    entries: Vec<Entry>,
    bundle: Option<TrustBundle>,
    federated: BTreeMap<String, Arc<TrustBundle>>,
}

/// The status of a stream whose messages do not count any more.
fn withdrawn() -> Status {
    Status::cancelled("the entries were withdrawn meanwhile")
}

/// Connections in a row that were cut without a word before the server is taken to refuse our SVID. One that restarts cuts
/// one or two.
const CUTS: u32 = 3;

/// Recent history of the connection.
struct Line {
    backoff: Backoff,
    /// Connections that were reset since the last message from the server.
    cuts: u32,
}

impl Line {
    fn heard(&mut self) {
        self.backoff.reset();
        self.cuts = 0;
    }
}

impl Sync {
    /// Keeps the cache up to date, until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        tokio::select! {
            () = self.follow() => {}
            () = shutdown.cancelled() => {}
        }
    }

    async fn follow(&self) {
        let mut identity = self.link.identity();
        let mut line = Line { backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(5)), cuts: 0 };
        loop {
            let Some(svid) = identity.borrow_and_update().clone() else {
                if identity.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let withdrawals = self.cache.read().withdrawals();
            let channel = self.link.channel_as(Some(svid.clone()));
            let ended = tokio::select! {
                ended = self.pushed(channel.clone(), svid.id(), withdrawals, &mut line) => ended,
                // A new SVID needs a new connection; the position makes that cheap.
                _ = identity.changed() => continue,
            };
            let ended = if ended.code() == Code::Unimplemented {
                tracing::info!("the server does not push; polling it every {:?}", self.interval);
                tokio::select! {
                    ended = self.polled(channel, withdrawals, &mut line) => ended,
                    _ = identity.changed() => continue,
                }
            } else {
                ended
            };
            line.cuts += u32::from(was_cut(&ended));
            let refusal = Refusal::of(&ended).or((line.cuts >= CUTS).then_some(Refusal::Svid));
            if let Some(refusal) = refusal {
                // Whoever hears of them has several waiting already, and will act on those.
                let _ = self.refusals.try_send(refusal);
            }
            self.link.look_at_given();
            let delay = line.backoff.next_delay();
            tracing::warn!(
                status = describe(&ended),
                "lost the server; serving from memory, trying again in {delay:.1?}"
            );
            tokio::time::sleep(delay).await;
        }
    }

    async fn pushed(&self, channel: Channel, agent: &SpiffeId, withdrawals: u64, line: &mut Line) -> Status {
        let mut client = PushClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let Position { epoch, revision, .. } = self.cache.read().position(agent);
        let request = WatchRequest { epoch, revision };
        let mut stream = match client.watch(request).await {
            Ok(stream) => stream.into_inner(),
            Err(status) => return status,
        };
        let mut parts = Parts::default();
        loop {
            match stream.message().await {
                Ok(Some(message)) => {
                    line.heard();
                    let Some(message) = parts.join(message) else { continue };
                    if !self.take_push(message, agent, withdrawals) {
                        return withdrawn();
                    }
                }
                Ok(None) => return Status::unavailable("the server closed the stream"),
                Err(status) => return status,
            }
        }
    }

    /// Takes up a message from a stream that began after so many withdrawals; `false`, and the entries stay as they are, if there
    /// was another one since.
    fn take_push(&self, message: WatchResponse, agent: &SpiffeId, withdrawals: u64) -> bool {
        let bundle = message.bundle.and_then(read_bundle);
        let federated: Vec<TrustBundle> = message.federated_bundles.into_iter().filter_map(read_bundle).collect();
        let upserted: Vec<Entry> = message.upserted.into_iter().filter_map(read_entry).collect();
        if let Some(own) = bundle.as_ref().filter(|b| b.trust_domain == self.trust_domain) {
            self.link.set_bundle(own);
        }
        self.cache.change(|state| {
            if state.withdrawals() != withdrawals {
                return false;
            }
            if message.snapshot {
                let named: std::collections::HashSet<&EntryId> = upserted.iter().map(|e| &e.id).collect();
                state.entries.retain(|id, _| named.contains(id));
            }
            for id in message.removed_ids {
                if let Ok(id) = id.parse::<EntryId>() {
                    state.entries.remove(&id);
                }
            }
            upserted.into_iter().for_each(|e| put_entry(state, e));
            if let Some(bundle) = bundle {
                state.bundle = Some(Arc::new(bundle));
            }
            if message.federated_whole {
                // One that the server has deleted may be one that somebody has stolen a key of.
                state.federated.clear();
            }
            for bundle in federated {
                state.federated.insert(bundle.trust_domain.to_string(), Arc::new(bundle));
            }
            state.set_position(Position {
                agent: Some(agent.clone()),
                epoch: message.epoch,
                revision: message.revision,
            });
            state.synced = true;
            true
        })
    }

    async fn polled(&self, channel: Channel, withdrawals: u64, line: &mut Line) -> Status {
        let mut entries = EntryClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let mut bundles = BundleClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        loop {
            let ask = async {
                let all = entries.get_authorized_entries(GetAuthorizedEntriesRequest::default()).await?.into_inner();
                let all: Vec<Entry> = all.entries.into_iter().filter_map(read_entry).collect();
                let own = bundles.get_bundle(GetBundleRequest::default()).await?.into_inner();
                let mut federated = BTreeMap::new();
                for td in all.iter().flat_map(|e| e.federates_with.iter().map(ToString::to_string)) {
                    if !federated.contains_key(&td) {
                        let request = GetFederatedBundleRequest { trust_domain: td.clone(), output_mask: None };
                        match bundles.get_federated_bundle(request).await {
                            Ok(bundle) => federated.extend(read_bundle(bundle.into_inner()).map(|b| (td, Arc::new(b)))),
                            Err(status) if status.code() == Code::NotFound => {}
                            Err(status) => return Err(status),
                        }
                    }
                }
                Ok((all, read_bundle(own), federated))
            };
            match tokio::time::timeout(CALL_TIMEOUT, ask).await {
                Err(_) => return Status::deadline_exceeded("the server did not answer"),
                Ok(Err(status)) => return status,
                Ok(Ok((all, own, federated))) => {
                    line.heard();
                    if !self.take_poll(Polled { entries: all, bundle: own, federated }, withdrawals) {
                        return withdrawn();
                    }
                }
            }
            tokio::time::sleep(self.interval).await;
        }
    }

    /// Takes up an answer to a poll, as [`Self::take_push`] does.
    fn take_poll(&self, polled: Polled, withdrawals: u64) -> bool {
        let Polled { entries: all, bundle: own, federated } = polled;
        if let Some(own) = &own {
            self.link.set_bundle(own);
        }
        let same = {
            let state = self.cache.read();
            state.synced
                && state.entries.len() == all.len()
                && all.iter().all(|e| state.entries.get(&e.id).is_some_and(|c| *c.entry == *e))
                && state.bundle.as_deref() == own.as_ref()
                && state.federated == federated
        };
        if same {
            return true;
        }
        self.cache.change(|state| {
            if state.withdrawals() != withdrawals {
                return false;
            }
            let named: std::collections::HashSet<&EntryId> = all.iter().map(|e| &e.id).collect();
            state.entries.retain(|id, _| named.contains(id));
            all.into_iter().for_each(|e| put_entry(state, e));
            state.bundle = own.map(Arc::new).or(state.bundle.take());
            state.federated = federated;
            // A server without push tells no position.
            state.set_position(Position::default());
            state.synced = true;
            true
        })
    }
}

/// Inserts an entry. The SVID of another SPIFFE ID is dropped at once; one with other DNS names or another lifetime is
/// used until its successor is signed.
fn put_entry(state: &mut State, entry: Entry) {
    let before = state.entries.remove(&entry.id);
    let kept = before.filter(|b| b.entry.spiffe_id == entry.spiffe_id);
    let changed = kept
        .as_ref()
        .is_some_and(|b| b.entry.dns_names != entry.dns_names || b.entry.x509_svid_ttl != entry.x509_svid_ttl);
    let cached = Cached {
        stale: changed || kept.as_ref().is_some_and(|b| b.stale),
        jitter: kept.as_ref().map_or(0.0, |b| b.jitter),
        obtained: kept.as_ref().map_or(time::OffsetDateTime::UNIX_EPOCH, |b| b.obtained),
        svid: kept.and_then(|b| b.svid),
        entry: Arc::new(entry),
    };
    state.entries.insert(cached.entry.id.clone(), cached);
}

fn read_entry(wire: types::Entry) -> Option<Entry> {
    let id = wire.id.clone();
    if id.is_empty() {
        tracing::warn!("the server sent an entry without an ID; it is left out");
        return None;
    }
    let read = entry_from_wire(wire, || unreachable!("an entry with an ID needs no fresh one"));
    read.map_err(
        |error| tracing::warn!(entry = id, %error, "the server sent an entry that cannot be read; it is left out"),
    )
    .ok()
}

fn read_bundle(wire: types::Bundle) -> Option<TrustBundle> {
    let td = wire.trust_domain.clone();
    let read = bundle_without_unknown_keys(wire);
    let (bundle, left_out) = read.map_err(|error| tracing::warn!(trust_domain = td, %error, "the server sent a bundle that cannot be read; it is left out")).ok()?;
    for error in left_out {
        // Each poll brings it again.
        tracing::debug!(trust_domain = td, %error, "the server sent a key that cannot be used; it is left out");
    }
    Some(bundle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Ca, config, entry, id, join_token, td};
    use countersign_api::convert::entry_to_wire;

    #[tokio::test]
    async fn what_a_stream_says_after_the_entries_were_withdrawn_is_not_taken_up() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Ca::new(time::OffsetDateTime::now_utc()).bundle();
        let config = config(dir.path(), "127.0.0.1:1".into(), &bundle, join_token());
        let link = Arc::new(Link::new(Arc::new(config), countersign_api::clock::system_clock()).unwrap());
        let (cache, (refusals, _heard)) = (Arc::<Cache>::default(), mpsc::channel(1));
        let interval = Duration::from_secs(1);
        let sync = Sync { link, cache: cache.clone(), refusals, interval, trust_domain: td() };
        let message = |snapshot| WatchResponse {
            epoch: "e".into(),
            revision: 3,
            snapshot,
            upserted: vec![entry_to_wire(&entry("a", 1))],
            ..WatchResponse::default()
        };
        let (agent, other) = (id("/spire/agent/test/1"), id("/spire/agent/test/2"));
        let position = |agent| cache.read().position(agent);
        assert!(sync.take_push(message(true), &agent, 0));
        assert_eq!((position(&agent).epoch.as_str(), position(&agent).revision), ("e", 3));
        assert_eq!(position(&other), Position::default(), "another agent's entries are others");
        cache.change(State::withdraw);
        assert_eq!(position(&agent), Position::default());
        for snapshot in [true, false] {
            assert!(!sync.take_push(message(snapshot), &agent, 0));
        }
        let polled = Polled { entries: vec![entry("a", 1)], bundle: None, federated: BTreeMap::new() };
        assert!(!sync.take_poll(polled, 0));
        assert!(cache.read().entries.is_empty() && position(&agent) == Position::default());
        assert!(sync.take_push(message(true), &agent, 1) && cache.read().entries.len() == 1);
    }

    #[test]
    fn parts_become_one_message_when_the_last_is_there() {
        let mut parts = Parts::default();
        let part = |id: &str, snapshot, more| WatchResponse {
            snapshot,
            upserted: vec![types::Entry { id: id.into(), ..types::Entry::default() }],
            more,
            revision: if more { 0 } else { 7 },
            ..WatchResponse::default()
        };
        assert_eq!(parts.join(part("a", true, true)), None);
        assert_eq!(parts.join(part("b", false, true)), None);
        let whole = parts.join(part("c", false, false)).unwrap();
        let ids: Vec<&str> = whole.upserted.iter().map(|e| e.id.as_str()).collect();
        assert_eq!((ids, whole.snapshot, whole.revision), (vec!["a", "b", "c"], true, 7));
        let next = parts.join(part("d", false, false)).unwrap();
        assert_eq!((next.upserted.len(), next.snapshot), (1, false), "nothing is left of the one before");
    }
}
