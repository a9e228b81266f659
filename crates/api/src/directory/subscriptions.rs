//! The following side of the directory: an agent at its server, a sidecar at its agent.
//!
//! Answers outlive the connection that they came over: while the directory is unreachable, the last answer holds. An
//! address that was never answered stays unknown, and waiting for it times out: nothing is guessed.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use countersign_identity::directory::Answer;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::backoff::Backoff;
use crate::convert::{address_to_wire, answer_from_wire};
use crate::push::directory_client::DirectoryClient;
use crate::push::{ResolveRequest, ResolveResponse};
use crate::sampled::Sampled;

/// Most addresses that a sidecar follows at once.
const MAX_ADDRESSES: usize = 10_000;
/// When there is no room, one in this many unwatched addresses is forgotten at once, because finding them scans all.
const FORGET_ONE_OF: usize = 16;
/// Most addresses per message.
const BATCH: usize = 1_000;

/// Follows addresses on behalf of its users. Clones share one set.
#[derive(Clone)]
pub struct Subscriptions(Arc<Shared>);

struct Shared {
    most: usize,
    /// Number of the next subscription.
    next: AtomicU64,
    known: Mutex<HashMap<IpAddr, Subscription>>,
    /// Notifies the connection that there is something to subscribe or unsubscribe.
    wake: watch::Sender<u64>,
    /// Notifies of each changed answer.
    changes: watch::Sender<u64>,
    /// Rate limit for log lines about addresses without room: an app dials whatever it likes.
    refusals: Sampled,
}

struct Subscription {
    /// Distinguishes it from an earlier subscription of the same address, whose answer was sent and then forgotten.
    number: u64,
    answer: watch::Sender<Option<Answer>>,
    last_used: Instant,
}

/// Room for as many addresses as one sidecar needs.
impl Default for Subscriptions {
    fn default() -> Self {
        Self::with_room_for(MAX_ADDRESSES)
    }
}

impl Subscriptions {
    /// Follows at most `most` addresses at once. Without room for another one, the least recently used addresses that
    /// nothing watches are forgotten.
    pub fn with_room_for(most: usize) -> Self {
        let (wake, changes) = (watch::Sender::new(0), watch::Sender::new(0));
        let (next, known) = (AtomicU64::new(0), Mutex::default());
        Self(Arc::new(Shared { most, next, known, wake, changes, refusals: Sampled::default() }))
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, Subscription>> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows an address: the current answer (`None` if unknown) and each change. If there is no room because every
    /// address is watched, this one is not followed: its receiver closes without an answer.
    pub fn follow(&self, address: IpAddr) -> watch::Receiver<Option<Answer>> {
        let address = address.to_canonical();
        let mut known = self.known();
        if let Some(subscription) = known.get_mut(&address) {
            subscription.last_used = Instant::now();
            return subscription.answer.subscribe();
        }
        let (answer, receiver) = watch::channel(None);
        if known.len() >= self.0.most && !forget_some(&mut known) {
            if let Some(unsaid) = self.0.refusals.next((), "no room", Instant::now()) {
                let most = self.0.most;
                tracing::warn!(%address, most, unsaid, "no room to follow another address; it stays unknown");
            }
            return receiver;
        }
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        known.insert(address, Subscription { number, answer, last_used: Instant::now() });
        drop(known);
        self.0.wake.send_modify(|n| *n += 1);
        receiver
    }

    /// The answer for an address, waiting up to `patience` for it; `None` if there is none by then.
    pub async fn resolve(&self, address: IpAddr, patience: Duration) -> Option<Answer> {
        let mut receiver = self.follow(address);
        let known = tokio::time::timeout(patience, receiver.wait_for(Option::is_some)).await.ok()?.ok()?;
        known.clone()
    }

    /// The current answer, without following the address; `None` if unknown.
    pub fn peek(&self, address: IpAddr) -> Option<Answer> {
        let mut known = self.known();
        let subscription = known.get_mut(&address.to_canonical())?;
        // Using an answer keeps it from being forgotten.
        subscription.last_used = Instant::now();
        subscription.answer.borrow().clone()
    }

    /// Number of addresses that are followed.
    pub fn len(&self) -> usize {
        self.known().len()
    }

    /// Whether no address is followed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn apply(&self, response: ResolveResponse) {
        let mut any = false;
        for answer in response.answers {
            match answer_from_wire(answer) {
                Ok((address, answer)) => {
                    if let Some(subscription) = self.known().get(&address) {
                        subscription.answer.send_if_modified(|known| {
                            let changed = known.as_ref() != Some(&answer);
                            if changed {
                                *known = Some(answer);
                            }
                            any |= changed;
                            changed
                        });
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the directory sent an answer that cannot be read; it is left out");
                }
            }
        }
        if any {
            self.0.changes.send_modify(|n| *n += 1);
        }
    }

    /// Keeps a connection over `channel` until `shutdown`, and subscribes again after each loss.
    pub async fn run(&self, channel: Channel, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            let ended = tokio::select! {
                () = shutdown.cancelled() => return,
                ended = self.follow_over(channel.clone(), &mut backoff) => ended,
            };
            tracing::debug!(status = %ended, "directory stream ended; what is known stands, trying again");
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(backoff.next_delay()) => {}
            }
        }
    }

    /// One batch of addresses to subscribe and to unsubscribe. An address that was forgotten and is followed again is
    /// in both, because the directory sends what it knows once per subscription.
    fn differences(&self, subscribed: &HashMap<IpAddr, u64>) -> (Vec<(IpAddr, u64)>, Vec<IpAddr>) {
        let known = self.known();
        let fresh = known.iter().filter(|(a, s)| subscribed.get(*a) != Some(&s.number));
        let fresh: Vec<(IpAddr, u64)> = fresh.map(|(a, s)| (*a, s.number)).take(BATCH).collect();
        let again = fresh.iter().map(|(a, _)| *a).filter(|a| subscribed.contains_key(a));
        let gone = subscribed.keys().filter(|a| !known.contains_key(*a)).copied().take(BATCH);
        let gone = again.chain(gone).collect();
        (fresh, gone)
    }

    async fn follow_over(&self, channel: Channel, backoff: &mut Backoff) -> tonic::Status {
        let (tx, rx) = mpsc::channel(4);
        let mut wake = self.0.wake.subscribe();
        let mut client = DirectoryClient::new(channel).max_decoding_message_size(crate::transport::MAX_MESSAGE_BYTES);
        let mut answers = match client.resolve(ReceiverStream::new(rx)).await {
            Ok(response) => response.into_inner(),
            Err(status) => return status,
        };
        let mut subscribed: HashMap<IpAddr, u64> = HashMap::new();
        loop {
            let (fresh, gone) = self.differences(&subscribed);
            let more = !fresh.is_empty() || !gone.is_empty();
            // Reads answers meanwhile: a directory that waits for us to read them does not read requests.
            if more && let Ok(room) = tx.try_reserve() {
                for address in &gone {
                    subscribed.remove(address);
                }
                subscribed.extend(fresh.iter().copied());
                let subscribe = fresh.into_iter().map(|(a, _)| address_to_wire(a)).collect();
                let unsubscribe = gone.into_iter().map(address_to_wire).collect();
                room.send(ResolveRequest { subscribe, unsubscribe });
                continue;
            }
            tokio::select! {
                room = tx.reserve(), if more => if room.is_err() {
                    return tonic::Status::unavailable("the directory closed the stream");
                },
                message = answers.message() => match message {
                    Ok(Some(response)) => {
                        backoff.reset();
                        self.apply(response);
                    }
                    Ok(None) => return tonic::Status::unavailable("the directory closed the stream"),
                    Err(status) => return status,
                },
                changed = wake.changed() => if changed.is_err() {
                    return tonic::Status::cancelled("no one is subscribed any more");
                },
            }
        }
    }
}

/// Forgets the least recently used addresses that nothing watches. `false` if all are watched.
fn forget_some(known: &mut HashMap<IpAddr, Subscription>) -> bool {
    let unwatched = known.iter().filter(|(_, s)| s.answer.is_closed());
    let mut unwatched: Vec<(Instant, IpAddr)> = unwatched.map(|(a, s)| (s.last_used, *a)).collect();
    let count = unwatched.len().div_ceil(FORGET_ONE_OF);
    if count == 0 {
        return false;
    }
    unwatched.select_nth_unstable(count - 1);
    unwatched[..count].iter().for_each(|(_, address)| drop(known.remove(address)));
    true
}

impl super::Source for Subscriptions {
    type Handle = watch::Receiver<Option<Answer>>;

    fn follow(&self, address: IpAddr) -> Self::Handle {
        Self::follow(self, address)
    }

    fn answer(&self, _: IpAddr, handle: &Self::Handle) -> Option<Answer> {
        handle.borrow().clone()
    }

    fn revisions(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_addresses_without_room_leaves_a_few_log_lines_and_a_count() {
        let subscriptions = Subscriptions::with_room_for(1);
        let _watched = subscriptions.follow("192.0.2.1".parse().unwrap());
        for n in 0..1_000u32 {
            drop(subscriptions.follow(IpAddr::from((0x0a00_0000 + n).to_be_bytes())));
        }
        let unsaid = subscriptions.0.refusals.over(Instant::now() + std::time::Duration::from_secs(3_600));
        assert!(matches!(&unsaid[..], [unsaid] if (900..=980).contains(&unsaid.count)), "{unsaid:?}");
    }
}
