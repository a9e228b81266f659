//! Publishes the trust bundle, so that a starting agent can authenticate the server before it has an identity.

mod k8s_configmap;
mod k8s_webhook;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use countersign_api::backoff::Backoff;
use countersign_identity::X509Bundle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use k8s_configmap::K8sConfigMap;
pub use k8s_webhook::K8sWebhook;

/// Longest attempt at one publication.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(30);

/// Why the bundle could not be published.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct PublishError(pub String);

/// A place where the bundle is published.
#[async_trait]
pub trait BundlePublisher: Send + Sync {
    /// Name of the place, for logs.
    fn name(&self) -> String;
    /// Writes this bundle to the place.
    async fn publish(&self, bundle: &X509Bundle) -> Result<(), PublishError>;
    /// Returns once others may have changed the place. It is then published again.
    async fn disturbed(&self) -> Result<(), PublishError>;
}

/// Publishes at start, after each change of the bundle, and whenever others have changed the place, until `shutdown`.
pub async fn keep(
    publisher: Arc<dyn BundlePublisher>,
    mut bundles: watch::Receiver<Arc<X509Bundle>>,
    shutdown: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(30));
    let work = async {
        loop {
            let bundle = bundles.borrow_and_update().clone();
            let step = async {
                if bundle.authorities.is_empty() {
                    // With an empty bundle, agents would trust no server. Whatever is published now is better.
                    return Err(PublishError("the bundle is empty; what is published stays as it is".into()));
                }
                tokio::time::timeout(PUBLISH_DEADLINE, publisher.publish(&bundle))
                    .await
                    .map_err(|_| PublishError(format!("no answer for {} seconds", PUBLISH_DEADLINE.as_secs())))??;
                tracing::debug!(to = publisher.name(), authorities = bundle.authorities.len(), "bundle published");
                tokio::select! {
                    changed = bundles.changed() => Ok(changed.is_ok()),
                    disturbed = publisher.disturbed() => disturbed.map(|()| true),
                }
            };
            match step.await {
                Ok(true) => backoff.reset(),
                Ok(false) => return,
                Err(PublishError(error)) => {
                    let delay = backoff.next_delay();
                    tracing::error!(
                        to = publisher.name(),
                        error,
                        "cannot publish the bundle; trying again in {delay:.1?}"
                    );
                    tokio::time::sleep(delay).await;
                }
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = shutdown.cancelled() => {}
    }
}
