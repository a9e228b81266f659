//! The answering side of `Directory.Resolve`: a server's towards its agents, an agent's towards its sidecars.

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

/// How often it is looked whether there is room for addresses that wait for it.
const LOOK_FOR_ROOM: Duration = Duration::from_secs(1);
/// Bytes of answers after which another message begins: readers bound theirs.
const MESSAGE_BYTES: usize = 1024 * 1024;

/// Where answers come from.
pub trait Source: Send + Sync {
    /// Held while an address is followed.
    type Handle: Send;
    /// Begins to follow an address.
    fn follow(&self, address: IpAddr) -> Self::Handle;
    /// What is known now; `None` is "not known", which is never told.
    fn answer(&self, address: IpAddr, handle: &Self::Handle) -> Option<Answer>;
    /// Ticks whenever an answer may have changed.
    fn revisions(&self) -> watch::Receiver<u64>;
}

/// What one follower named.
struct Followed<H> {
    /// Followed, and what was told last.
    now: HashMap<IpAddr, (H, Option<Answer>)>,
    /// Named, for which there is no room. They stay unknown to the follower, and harm nobody else.
    waiting: BTreeSet<IpAddr>,
}

/// Answers one follower until it leaves (`None`) or breaks a rule. What it named beyond its share is answered once there is
/// room.
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
        // Marked as seen before it is read: a change in between is seen again, never lost.
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
