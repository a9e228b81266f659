//! `countersign.v1.Push`: sends each agent the changes that concern it, at once.

mod federating;

use std::sync::Arc;

use async_trait::async_trait;
use aws_lc_rs::digest;
use countersign_api::convert::{bundle_to_wire, entry_to_wire};
use countersign_api::portions::first_portion;
use countersign_api::push::push_server::Push;
use countersign_api::push::{WatchRequest, WatchResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use self::federating::Federating;
use super::{BoxStream, Endpoint};
use crate::agents::AttestedAgent;
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
        let revision = (request.epoch == epoch_of(&self.0, &agent)).then_some(request.revision);
        let epoch = request.epoch;
        let (tx, rx) = mpsc::channel(1);
        let core = self.0.clone();
        self.0.tasks.spawn(async move {
            core.metrics.push_streams.inc();
            let stream = Stream { core: core.clone(), id: agent.id.clone(), epoch, revision, tx: tx.clone() };
            let ended = tokio::select! {
                ended = stream.run() => ended,
                status = cut_off => Some(status),
                () = core.shutdown.cancelled() => Some(Status::unavailable("the server is shutting down")),
            };
            if let Some(status) = ended {
                // The agent may be gone, or read so slowly that it will not hear it.
                let _ = tx.try_send(Err(status));
            }
            core.metrics.push_streams.dec();
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

/// The name of an agent's sequence of revisions. Those of another run, of another agent, or of the same one with other selectors
/// are not comparable: other entries were its own then, and no change of an entry tells of that.
fn epoch_of(core: &Core, agent: &AttestedAgent) -> String {
    let mut facts = digest::Context::new(&digest::SHA256);
    let texts = std::iter::once(agent.id.to_string()).chain(agent.selectors.iter().map(ToString::to_string));
    for text in texts {
        facts.update(&text.len().to_be_bytes());
        facts.update(text.as_bytes());
    }
    format!("{}-{}", core.epoch, hex::encode(facts.finish()))
}

/// Cuts a message whose entries do not fit into one. Where the agent stands afterwards comes with the last part.
fn parts(mut whole: WatchResponse) -> Vec<WatchResponse> {
    let mut parts = vec![];
    loop {
        let rest = whole.upserted.split_off(first_portion(&whole.upserted, usize::MAX));
        if rest.is_empty() {
            parts.push(whole);
            return parts;
        }
        let upserted = std::mem::replace(&mut whole.upserted, rest);
        // The first says that all else is gone: an agent that does not know of parts then adds the others to it.
        let snapshot = std::mem::take(&mut whole.snapshot);
        parts.push(WatchResponse { snapshot, upserted, more: true, ..WatchResponse::default() });
    }
}

struct Stream {
    core: Arc<Core>,
    id: countersign_identity::SpiffeId,
    /// The epoch that `revision` is of.
    epoch: String,
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
        let (mut first, mut bundle_changed) = (true, true);
        let mut federating = Federating::default();
        loop {
            // Marked as seen before reading: a change in between is seen again and never lost.
            revisions.mark_unchanged();
            // Asked anew each time: it may have attested again, with other selectors.
            let agent = match core.agents.standing(&self.id) {
                Ok(agent) => agent,
                Err(denied) => return Some(denied_status(denied, &self.id)),
            };
            let epoch = epoch_of(&core, &agent);
            if self.epoch != epoch {
                (self.epoch, self.revision) = (epoch, None);
            }
            let (revision, update) = core.entries.since(&agent, self.revision, core.now());
            let (snapshot, upserted, removed) = match update {
                Update::Snapshot(entries) => (true, entries, vec![]),
                Update::Delta { upserted, removed } => (false, upserted, removed),
            };
            self.revision = Some(revision);
            let bundle = bundle_changed.then(|| bundle_to_wire(&bundles.borrow_and_update()));
            if snapshot {
                federating.replace(&upserted);
            } else if first {
                // The agent knows its entries from an earlier stream, of which nothing is remembered here.
                federating.replace(&core.entries.authorized(&agent, core.now()));
            } else {
                federating.change(&upserted, &removed);
            }
            let foreign_news = federating.news(&foreign.borrow_and_update());
            // A stream begins with all of them, be it none: others that the agent holds are gone.
            let federated_whole = first || foreign_news.is_some();
            let federated_bundles = foreign_news.unwrap_or_default().iter().map(|b| bundle_to_wire(b)).collect();
            if first || snapshot || bundle.is_some() || federated_whole || !upserted.is_empty() || !removed.is_empty() {
                let message = WatchResponse {
                    epoch: self.epoch.clone(),
                    revision,
                    snapshot,
                    upserted: upserted.iter().map(|e| entry_to_wire(e)).collect(),
                    removed_ids: removed.iter().map(ToString::to_string).collect(),
                    bundle,
                    federated_bundles,
                    more: false,
                    federated_whole,
                };
                for part in parts(message) {
                    self.tx.send(Ok(part)).await.ok()?;
                }
            }
            (first, bundle_changed) = (false, false);
            tokio::select! {
                changed = revisions.changed() => changed.ok()?,
                changed = bundles.changed() => {
                    changed.ok()?;
                    bundle_changed = true;
                }
                changed = foreign.changed() => changed.ok()?,
                () = self.tx.closed() => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use countersign_api::portions::PORTION_BYTES;
    use countersign_api::spire::types::Entry;
    use futures::StreamExt;

    use super::*;
    use crate::testing::{agent_call, server};

    #[tokio::test]
    async fn an_agent_that_has_attested_with_other_selectors_gets_all_entries_and_not_the_changes_since() {
        let dir = tempfile::tempdir().unwrap();
        let core = server(&dir).await;
        let (id, call) = agent_call(&core, "1").await;
        let extensions = call.into_parts().1;
        let watch = async |epoch: &str, revision| {
            let request = WatchRequest { epoch: epoch.to_owned(), revision };
            let request = Request::from_parts(Default::default(), extensions.clone(), request);
            let mut stream = Endpoint(core.clone()).watch(request).await.unwrap().into_inner();
            (stream.next().await.unwrap().unwrap(), stream)
        };
        let (first, _) = watch("", 0).await;
        assert!(first.snapshot);
        let (again, mut open) = watch(&first.epoch, first.revision).await;
        assert!(!again.snapshot, "nothing has changed");
        let known = AttestedAgent::clone(&core.agents.get(&id).unwrap());
        let selectors = std::iter::once("k8s_psat:agent_node_label:zone:b".parse().unwrap()).collect();
        core.agents.attested(AttestedAgent { selectors, ..known }).await.unwrap();
        let (other, _) = watch(&first.epoch, first.revision).await;
        assert!(other.snapshot && other.epoch != first.epoch);
        // The stream that was open hears of it with the next change.
        let bundle = countersign_identity::TrustBundle::clone(&core.authorities.bundle().borrow());
        let trust_domain = countersign_identity::TrustDomain::new("partner").unwrap();
        let foreign = countersign_identity::TrustBundle { trust_domain, ..bundle };
        core.federated.set(foreign, crate::federation::bundles::Expect::Any).await.unwrap();
        assert!(open.next().await.unwrap().unwrap().snapshot);
    }

    #[tokio::test]
    async fn an_agent_is_told_the_bundles_that_its_own_entries_federate_with_and_no_others() {
        use countersign_identity::{TrustBundle, TrustDomain};
        let dir = tempfile::tempdir().unwrap();
        let core = server(&dir).await;
        let set = async |name: &str| {
            let trust_domain = TrustDomain::new(name).unwrap();
            let bundle = TrustBundle { trust_domain, ..crate::testing::bundle() };
            core.federated.set(bundle, crate::federation::bundles::Expect::Any).await.unwrap();
        };
        let (agent, call) = agent_call(&core, "1").await;
        let (other, _) = agent_call(&core, "2").await;
        let entry = |id: &str, parent: &countersign_identity::SpiffeId, with: &[&str]| countersign_identity::Entry {
            id: id.parse().unwrap(),
            parent_id: parent.clone(),
            federates_with: with.iter().map(|td| TrustDomain::new(td).unwrap()).collect(),
            ..crate::endpoints::tests::entry()
        };
        set("partner").await;
        set("another").await;
        core.entries.create(vec![entry("a", &agent, &[]), entry("b", &other, &["another"])]).await.unwrap();
        let extensions = call.into_parts().1;
        let watch = async |epoch: &str, revision| {
            let request = WatchRequest { epoch: epoch.to_owned(), revision };
            let request = Request::from_parts(Default::default(), extensions.clone(), request);
            let mut stream = Endpoint(core.clone()).watch(request).await.unwrap().into_inner();
            (stream.next().await.unwrap().unwrap(), stream)
        };
        let names = |told: &WatchResponse| -> (bool, Vec<String>) {
            (told.federated_whole, told.federated_bundles.iter().map(|b| b.trust_domain.clone()).collect())
        };
        let (first, mut stream) = watch("", 0).await;
        assert_eq!(names(&first), (true, vec![]));
        let update = async |with: &[&str]| {
            let id = "a".parse().unwrap();
            core.entries.update(&id, |_| Ok::<_, ()>(entry("a", &agent, with))).await.unwrap();
        };
        // With the entry comes the bundle that it needs.
        update(&["partner"]).await;
        let told = stream.next().await.unwrap().unwrap();
        assert_eq!((told.upserted.len(), names(&told)), (1, (true, vec!["partner".to_owned()])));
        // Another one's bundle is not its business; the next message is of its own.
        set("another").await;
        set("partner").await;
        assert_eq!(names(&stream.next().await.unwrap().unwrap()), (true, vec!["partner".to_owned()]));
        let (again, _) = watch(&told.epoch, told.revision).await;
        assert_eq!(
            (again.snapshot, names(&again)),
            (false, (true, vec!["partner".to_owned()])),
            "a stream that goes on"
        );
        update(&[]).await;
        assert_eq!(names(&stream.next().await.unwrap().unwrap()), (true, vec![]));
    }

    #[test]
    fn a_snapshot_that_fits_into_no_message_comes_in_parts_and_its_position_with_the_last() {
        let large = |n: usize| Entry { id: n.to_string(), hint: "x".repeat(PORTION_BYTES / 2), ..Entry::default() };
        let whole = WatchResponse {
            epoch: "e".into(),
            revision: 7,
            snapshot: true,
            upserted: (0..3).map(large).collect(),
            removed_ids: vec!["gone".into()],
            federated_whole: true,
            ..WatchResponse::default()
        };
        let told = parts(whole);
        let shape: Vec<_> = told.iter().map(|p| (p.epoch.as_str(), p.revision, p.snapshot, p.more)).collect();
        assert_eq!(shape, [("", 0, true, true), ("", 0, false, true), ("e", 7, false, false)]);
        let ids: Vec<&str> = told.iter().flat_map(|p| &p.upserted).map(|e| e.id.as_str()).collect();
        assert_eq!(ids, ["0", "1", "2"]);
        assert_eq!((told[2].removed_ids.len(), told[2].federated_whole), (1, true));
        assert_eq!(parts(WatchResponse::default()), [WatchResponse::default()], "nothing to cut");
    }
}
