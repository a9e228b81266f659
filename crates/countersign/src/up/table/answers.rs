//! What the sidecars say of themselves: all are asked at once, each with a deadline, and the last answer is kept.

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

/// How long a sidecar may take for an answer.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// Pause between two rounds.
const PAUSE: Duration = Duration::from_secs(1);

/// Answers by workload.
#[derive(Default)]
pub struct Answers(RefCell<BTreeMap<String, Asked>>);

/// A sidecar that is asked.
struct Asked {
    /// One connection for all questions: a frozen sidecar does not gather a new one each second.
    channel: Channel,
    /// Since when it has been asked.
    since: Instant,
    last: Option<(Instant, GetStatusResponse)>,
}

impl Answers {
    /// Asks again and again, until it is dropped.
    pub async fn keep(&self, mesh: &Rc<Mesh>) {
        loop {
            self.ask_all(mesh).await;
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Asks every sidecar once, side by side; takes [`PATIENCE`] at most.
    pub async fn ask_all(&self, mesh: &Rc<Mesh>) {
        let workloads = mesh.workloads();
        let mut round = tokio::task::JoinSet::new();
        {
            let mut all = self.0.borrow_mut();
            all.retain(|name, _| workloads.contains_key(name));
            for (name, running) in &workloads {
                let asked = all.entry(name.clone()).or_insert_with(|| Asked {
                    channel: unix_channel(running.admin_socket()),
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

    /// A workload's last answer, and for how long none has come.
    pub fn of(&self, name: &str) -> (Option<GetStatusResponse>, Duration) {
        let all = self.0.borrow();
        let Some(asked) = all.get(name) else { return (None, Duration::ZERO) };
        match &asked.last {
            Some((at, answer)) => (Some(answer.clone()), at.elapsed()),
            None => (None, asked.since.elapsed()),
        }
    }
}
