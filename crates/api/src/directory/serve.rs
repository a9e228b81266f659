//! The answering side of `Directory.Resolve`: a server's towards its agents, an agent's towards its sidecars.

use std::collections::HashMap;
use std::net::IpAddr;

use countersign_identity::directory::Answer;
use tokio::sync::{mpsc, watch};
use tonic::{Status, Streaming};

use crate::convert::{address_from_wire, answer_to_wire};
use crate::push::{ResolveRequest, ResolveResponse};

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

/// Answers one follower until it leaves (`None`) or breaks a rule.
pub async fn serve<S: Source>(
    source: &S,
    most: usize,
    mut requests: Streaming<ResolveRequest>,
    tx: &mpsc::Sender<Result<ResolveResponse, Status>>,
) -> Option<Status> {
    let mut followed: HashMap<IpAddr, (S::Handle, Option<Answer>)> = HashMap::new();
    let mut revisions = source.revisions();
    loop {
        // Marked as seen before it is read: a change in between is seen again, never lost.
        revisions.mark_unchanged();
        let mut answers = vec![];
        for (address, (handle, told)) in &mut followed {
            let known = source.answer(*address, handle);
            if known.is_some() && known != *told {
                answers.extend(known.as_ref().map(|a| answer_to_wire(*address, a)));
                *told = known;
            }
        }
        if !answers.is_empty() {
            tx.send(Ok(ResolveResponse { answers })).await.ok()?;
        }
        tokio::select! {
            changed = revisions.changed() => changed.ok()?,
            request = requests.message() => {
                let request = request.ok()??;
                for address in &request.unsubscribe {
                    followed.remove(&address_from_wire(address).ok()?);
                }
                for address in &request.subscribe {
                    match address_from_wire(address) {
                        Ok(address) => {
                            followed.entry(address).or_insert_with(|| (source.follow(address), None));
                        }
                        Err(e) => return Some(Status::invalid_argument(e.to_string())),
                    }
                }
                if followed.len() > most {
                    return Some(Status::resource_exhausted(format!("more than {most} addresses followed")));
                }
            }
            () = tx.closed() => return None,
        }
    }
}
