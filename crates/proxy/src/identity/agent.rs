//! Identity from the agent's Workload API. If the agent is away, the last identity is used until it expires.

use std::sync::Arc;

use countersign_api::workload_api::{Told, follow};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::{Current, Identity};

/// Follows the agent's updates until `shutdown`.
pub async fn follow_agent(current: Arc<Current>, channel: Channel, shutdown: CancellationToken) {
    let told = |told| match told {
        Told::Update(update) => match Identity::new(update.svid, update.bundles) {
            Ok(identity) => current.set(identity),
            Err(error) => tracing::error!(%error, "the agent's answer cannot be used; the identity stays as it is"),
        },
        // Only the agent's explicit answer withdraws an identity. While the agent is unreachable, the last one is kept.
        Told::Withdrawn => current.clear(),
        Told::Ended(status) => current.refused_by_agent(&format!("{:?}", status.code()), status.message()),
    };
    follow(channel, shutdown, told).await;
}
