//! From the agent's Workload API. An agent that is away costs nothing: the last identity stands until it expires.

use std::sync::Arc;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_api::workload_api;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::Channel;

use super::{Current, Identity};

/// Follows the agent until `shutdown`.
pub async fn follow_agent(current: Arc<Current>, channel: Channel, shutdown: CancellationToken) {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    loop {
        let heard = |update: workload_api::Update| match Identity::new(update.svid, update.bundles) {
            Ok(identity) => {
                backoff.reset();
                current.set(identity);
            }
            Err(error) => tracing::error!(%error, "the agent's answer cannot be used; the identity stays as it is"),
        };
        let ended = tokio::select! {
            ended = workload_api::follow(channel.clone(), heard) => ended,
            () = shutdown.cancelled() => return,
        };
        // Withdrawn is withdrawn; an agent that is only away leaves us who we are.
        if ended.code() == Code::PermissionDenied {
            current.clear();
        }
        let delay = backoff.next_delay();
        tracing::warn!(status = ended.message(), "no identity from the agent; trying again in {delay:.1?}");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = shutdown.cancelled() => return,
        }
    }
}
