//! Status of the sidecars: all are queried at once, each with a deadline, and the last answer is kept.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use countersign_api::push::status_client::StatusClient;
use countersign_api::push::{GetStatusRequest, GetStatusResponse};
use countersign_api::transport::unix_channel;
use tokio::time::Instant;
use tonic::transport::Channel;

use super::super::mesh::Mesh;
use crate::clients::client;

/// Longest query of a sidecar.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// Pause between two rounds of queries.
const PAUSE: Duration = Duration::from_secs(1);

/// The last answers by workload.
#[derive(Default)]
pub struct Answers(RefCell<BTreeMap<String, Asked>>);

/// The state of queries to one sidecar.
struct Asked {
    /// One connection for all queries, so that a frozen sidecar does not accumulate a new one each second.
    channel: Channel,
    /// Time of the first query.
    since: Instant,
    last: Option<(Instant, GetStatusResponse)>,
}

impl Answers {
    /// Queries all sidecars repeatedly, until dropped.
    pub async fn keep(&self, mesh: &Rc<Mesh>) {
        loop {
            self.ask_all(mesh).await;
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Queries every sidecar once, in parallel; takes at most [`PATIENCE`].
    pub async fn ask_all(&self, mesh: &Rc<Mesh>) {
        let workloads = mesh.workloads();
        let mut round = tokio::task::JoinSet::new();
        {
            let mut all = self.0.borrow_mut();
            all.retain(|name, _| workloads.contains_key(name));
            for (name, running) in &workloads {
                let asked = all.entry(name.clone()).or_insert_with(|| Asked {
                    channel: unix_channel(&running.admin_socket),
                    since: Instant::now(),
                    last: None,
                });
                let (name, channel) = (name.clone(), asked.channel.clone());
                round.spawn(async move {
                    let mut client = client!(StatusClient, channel);
                    let answer = tokio::time::timeout(PATIENCE, client.get_status(GetStatusRequest {})).await;
                    answer.ok().and_then(Result::ok).map(|a| (name, a.into_inner()))
                });
            }
        }
        while let Some(one) = round.join_next().await {
            if let Ok(Some((name, answer))) = one
                && let Some(asked) = self.0.borrow_mut().get_mut(&name)
            {
                asked.last = Some((Instant::now(), answer));
            }
        }
    }

    /// A workload's last answer, and the time since then.
    pub fn of(&self, name: &str) -> (Option<GetStatusResponse>, Duration) {
        let all = self.0.borrow();
        let Some(asked) = all.get(name) else { return (None, Duration::ZERO) };
        match &asked.last {
            Some((at, answer)) => (Some(answer.clone()), at.elapsed()),
            None => (None, asked.since.elapsed()),
        }
    }
}
