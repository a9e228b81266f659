//! The subscriber's side of the directory: an agent's towards its server, a sidecar's towards its agent.
//!
//! Answers outlive the connection they came over: while nobody is there to ask, the last answer stands. An address that
//! was never answered stays unknown, and whoever waits for it gives up: nothing is guessed.

use std::collections::HashMap;
use std::net::IpAddr;
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

/// Addresses followed at once; the least recently used that nobody watches go first.
const MAX_ADDRESSES: usize = 10_000;
/// Addresses named in one message.
const BATCH: usize = 1_000;

/// Follows the addresses that somebody asked for.
#[derive(Clone)]
pub struct Subscriptions(Arc<Shared>);

struct Shared {
    known: Mutex<HashMap<IpAddr, Subscription>>,
    /// Tells the connection that there is something to subscribe or unsubscribe.
    wake: watch::Sender<u64>,
    /// Ticks with each changed answer.
    changes: watch::Sender<u64>,
}

struct Subscription {
    answer: watch::Sender<Option<Answer>>,
    last_used: Instant,
}

impl Default for Subscriptions {
    fn default() -> Self {
        Self(Arc::new(Shared { known: Mutex::default(), wake: watch::Sender::new(0), changes: watch::Sender::new(0) }))
    }
}

impl Subscriptions {
    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, Subscription>> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows an address: the answer of the moment (`None`: not known yet), and each change.
    pub fn follow(&self, address: IpAddr) -> watch::Receiver<Option<Answer>> {
        let address = address.to_canonical();
        let mut known = self.known();
        if let Some(subscription) = known.get_mut(&address) {
            subscription.last_used = Instant::now();
            return subscription.answer.subscribe();
        }
        if known.len() >= MAX_ADDRESSES {
            let unused = known.iter().filter(|(_, s)| s.answer.is_closed()).min_by_key(|(_, s)| s.last_used);
            if let Some(oldest) = unused.map(|(a, _)| *a) {
                known.remove(&oldest);
            }
        }
        let (answer, receiver) = watch::channel(None);
        known.insert(address, Subscription { answer, last_used: Instant::now() });
        drop(known);
        self.0.wake.send_modify(|n| *n += 1);
        receiver
    }

    /// The answer for an address, waiting for it up to `patience`.
    pub async fn resolve(&self, address: IpAddr, patience: Duration) -> Option<Answer> {
        let mut receiver = self.follow(address);
        let known = tokio::time::timeout(patience, receiver.wait_for(Option::is_some)).await.ok()?.ok()?;
        known.clone()
    }

    /// What is known now, without asking.
    pub fn peek(&self, address: IpAddr) -> Option<Answer> {
        self.known().get(&address.to_canonical()).and_then(|s| s.answer.borrow().clone())
    }

    /// How many addresses are followed.
    pub fn len(&self) -> usize {
        self.known().len()
    }

    /// Whether none is followed.
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

    /// Keeps a connection over `channel`, subscribing anew after each loss, until `shutdown`.
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

    async fn follow_over(&self, channel: Channel, backoff: &mut Backoff) -> tonic::Status {
        let (tx, rx) = mpsc::channel(4);
        let mut wake = self.0.wake.subscribe();
        let mut client = DirectoryClient::new(channel).max_decoding_message_size(crate::transport::MAX_MESSAGE_BYTES);
        let mut answers = match client.resolve(ReceiverStream::new(rx)).await {
            Ok(response) => response.into_inner(),
            Err(status) => return status,
        };
        let mut subscribed = std::collections::HashSet::new();
        loop {
            let (fresh, gone): (Vec<IpAddr>, Vec<IpAddr>) = {
                let known = self.known();
                let fresh = known.keys().filter(|a| !subscribed.contains(*a)).copied().take(BATCH).collect();
                let gone = subscribed.iter().filter(|a| !known.contains_key(*a)).copied().take(BATCH).collect();
                (fresh, gone)
            };
            if !fresh.is_empty() || !gone.is_empty() {
                subscribed.extend(fresh.iter().copied());
                subscribed.retain(|a| !gone.contains(a));
                let wire = |all: Vec<IpAddr>| all.into_iter().map(address_to_wire).collect();
                if tx.send(ResolveRequest { subscribe: wire(fresh), unsubscribe: wire(gone) }).await.is_err() {
                    return tonic::Status::unavailable("the directory closed the stream");
                }
                continue;
            }
            tokio::select! {
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
