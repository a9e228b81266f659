//! From the agent's Workload API. An agent that is away costs nothing: the last identity stands until it expires.

use std::sync::Arc;

use countersign_api::workload_api::{Told, follow};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::{Current, Identity};

/// Follows the agent until `shutdown`.
pub async fn follow_agent(current: Arc<Current>, channel: Channel, shutdown: CancellationToken) {
    let told = |told| match told {
        Told::Update(update) => match Identity::new(update.svid, update.bundles) {
            Ok(identity) => current.set(identity),
            Err(error) => tracing::error!(%error, "the agent's answer cannot be used; the identity stays as it is"),
        },
        // Withdrawn is withdrawn; an agent that is only away leaves us who we are.
        Told::Withdrawn => current.clear(),
        Told::Ended(status) => current.refused_by_agent(&format!("{:?}", status.code()), status.message()),
    };
    follow(channel, shutdown, told).await;
}
