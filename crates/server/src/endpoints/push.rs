//! `countersign.v1.Push`: each agent is told at once what changes for it.

use std::sync::Arc;

use async_trait::async_trait;
use countersign_api::convert::{bundle_to_wire, entry_to_wire};
use countersign_api::push::push_server::Push;
use countersign_api::push::{WatchRequest, WatchResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{BoxStream, Endpoint};
use crate::caller::{Caller, cut_off, denied_status};
use crate::core::Core;
use crate::entries::Update;

#[async_trait]
impl Push for Endpoint {
    type WatchStream = BoxStream<WatchResponse>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let agent = Caller::agent(&self.0, &request)?;
        let cut_off = cut_off(&self.0, &request);
        let request = request.into_inner();
        let revision = (request.epoch == self.0.epoch).then_some(request.revision);
        let (tx, rx) = mpsc::channel(1);
        let core = self.0.clone();
        self.0.tasks.spawn(async move {
            core.metrics.push_streams.inc();
            let stream = Stream { core: core.clone(), id: agent.id.clone(), revision, tx: tx.clone() };
            let ended = tokio::select! {
                ended = stream.run() => ended,
                status = cut_off => Some(status),
                () = core.shutdown.cancelled() => Some(Status::unavailable("the server is shutting down")),
            };
            if let Some(status) = ended {
                let _ = tx.try_send(Err(status));
            }
            core.metrics.push_streams.dec();
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

struct Stream {
    core: Arc<Core>,
    id: countersign_identity::SpiffeId,
    revision: Option<u64>,
    tx: mpsc::Sender<Result<WatchResponse, Status>>,
}

impl Stream {
    /// Sends until the agent is gone (`None`) or is not admitted any more.
    async fn run(mut self) -> Option<Status> {
        let core = self.core.clone();
        let mut revisions = core.entries.revisions();
        let mut bundles = core.authorities.bundle();
        let mut foreign = core.federated.watch();
        let mut first = true;
        let (mut bundle_changed, mut foreign_changed) = (true, true);
        loop {
            // Marked as seen before it is read: a change in between is seen again, never lost.
            revisions.mark_unchanged();
            // Asked anew each time: it may have attested again, with other selectors.
            let agent = match core.agents.standing(&self.id) {
                Ok(agent) => agent,
                Err(denied) => return Some(denied_status(denied, &self.id)),
            };
            let (revision, update) = core.entries.since(&agent, self.revision);
            let (snapshot, upserted, removed) = match update {
                Update::Snapshot(entries) => (true, entries, vec![]),
                Update::Delta { upserted, removed } => (false, upserted, removed),
            };
            self.revision = Some(revision);
            let bundle = bundle_changed.then(|| bundle_to_wire(&bundles.borrow_and_update()));
            let federated_bundles = if foreign_changed {
                foreign.borrow_and_update().values().map(|b| bundle_to_wire(b)).collect()
            } else {
                vec![]
            };
            if first || snapshot || bundle.is_some() || foreign_changed || !upserted.is_empty() || !removed.is_empty() {
                let message = WatchResponse {
                    epoch: core.epoch.clone(),
                    revision,
                    snapshot,
                    upserted: upserted.iter().map(|e| entry_to_wire(e)).collect(),
                    removed_ids: removed.iter().map(ToString::to_string).collect(),
                    bundle,
                    federated_bundles,
                };
                self.tx.send(Ok(message)).await.ok()?;
            }
            first = false;
            (bundle_changed, foreign_changed) = (false, false);
            tokio::select! {
                changed = revisions.changed() => changed.ok()?,
                changed = bundles.changed() => {
                    changed.ok()?;
                    bundle_changed = true;
                }
                changed = foreign.changed() => {
                    changed.ok()?;
                    foreign_changed = true;
                }
                () = self.tx.closed() => return None,
            }
        }
    }
}
