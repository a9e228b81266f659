//! The answering side of `Directory.Resolve`: a server for its agents, an agent for its sidecars.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::time::Duration;

use countersign_identity::directory::Answer;
use prost::Message;
use tokio::sync::{mpsc, watch};
use tonic::{Status, Streaming};

use super::quota::Share;
use crate::convert::{address_from_wire, answer_to_wire};
use crate::push::{ResolveRequest, ResolveResponse};

/// Interval between two checks for room, while addresses wait for it.
const LOOK_FOR_ROOM: Duration = Duration::from_secs(1);
/// Most bytes of answers per message before the next one starts: readers bound their messages.
const MESSAGE_BYTES: usize = 1024 * 1024;

/// Source of the answers.
pub trait Source: Send + Sync {
    /// Kept while an address is followed.
    type Handle: Send;
    /// Starts following an address.
    fn follow(&self, address: IpAddr) -> Self::Handle;
    /// The current answer; `None` means unknown, which is never sent.
    fn answer(&self, address: IpAddr, handle: &Self::Handle) -> Option<Answer>;
    /// Notifies whenever an answer may have changed.
    fn revisions(&self) -> watch::Receiver<u64>;
}

/// The addresses of one follower.
struct Followed<H> {
    /// Followed addresses with the answer that was sent last.
    now: HashMap<IpAddr, (H, Option<Answer>)>,
    /// Addresses without room. They stay unknown to the follower, and cost others nothing.
    waiting: BTreeSet<IpAddr>,
}

/// Answers one follower until it disconnects (`None`) or breaks a rule (its status). Addresses beyond its share are
/// answered once there is room.
pub async fn serve<S: Source, C: Clone + Eq + Hash>(
    source: &S,
    mut share: Share<C>,
    mut requests: Streaming<ResolveRequest>,
    tx: &mpsc::Sender<Result<ResolveResponse, Status>>,
) -> Option<Status> {
    let mut followed = Followed { now: HashMap::new(), waiting: BTreeSet::new() };
    let mut revisions = source.revisions();
    loop {
        while !followed.waiting.is_empty() && share.follow() {
            if let Some(address) = followed.waiting.pop_first() {
                followed.now.insert(address, (source.follow(address), None));
            }
        }
        // Marked as seen before reading: a change in between is seen again and never lost.
        revisions.mark_unchanged();
        let mut answers = vec![];
        let mut bytes = 0;
        for (address, (handle, told)) in &mut followed.now {
            let known = source.answer(*address, handle);
            if let Some(answer) = known.as_ref().filter(|_| known != *told) {
                let answer = answer_to_wire(*address, answer);
                bytes += answer.encoded_len();
                if bytes > MESSAGE_BYTES && !answers.is_empty() {
                    let full = std::mem::take(&mut answers);
                    tx.send(Ok(ResolveResponse { answers: full })).await.ok()?;
                    bytes = answer.encoded_len();
                }
                answers.push(answer);
                *told = known;
            }
        }
        if !answers.is_empty() {
            tx.send(Ok(ResolveResponse { answers })).await.ok()?;
        }
        tokio::select! {
            changed = revisions.changed() => changed.ok()?,
            request = requests.message() => {
                if let Err(status) = followed.apply(request.ok()??, &mut share) {
                    return Some(status);
                }
            }
            () = tokio::time::sleep(LOOK_FOR_ROOM), if !followed.waiting.is_empty() => {}
            () = tx.closed() => return None,
        }
    }
}

impl<H> Followed<H> {
    fn apply<C: Clone + Eq + Hash>(&mut self, request: ResolveRequest, share: &mut Share<C>) -> Result<(), Status> {
        let parsed = |all: &[Vec<u8>]| {
            let parsed = all.iter().map(|address| address_from_wire(address));
            parsed.collect::<Result<Vec<IpAddr>, _>>().map_err(|e| Status::invalid_argument(e.to_string()))
        };
        for address in parsed(&request.unsubscribe)? {
            if self.now.remove(&address).is_some() {
                share.leave(true);
            } else if self.waiting.remove(&address) {
                share.leave(false);
            }
        }
        for address in parsed(&request.subscribe)? {
            if !self.now.contains_key(&address) && !self.waiting.contains(&address) {
                share.name().map_err(|e| Status::resource_exhausted(e.to_string()))?;
                self.waiting.insert(address);
            }
        }
        Ok(())
    }
}
