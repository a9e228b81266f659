//! Publishes the trust bundle, so that a starting agent can authenticate the server before it has an identity.

mod k8s_configmap;
mod k8s_webhook;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use countersign_api::backoff::Backoff;
use countersign_identity::TrustBundle;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use k8s_configmap::K8sConfigMap;
pub use k8s_webhook::K8sWebhook;

/// Longest attempt at one publication.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(30);
/// The place is published to anew after this time, whatever is heard of it.
const LOOK_AGAIN: Duration = Duration::from_secs(300);
/// Pauses before a place that others have changed is published to again. They grow while somebody undoes each publication.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A publication that stood for this long was not undone.
const CALM: Duration = Duration::from_secs(10);

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
    async fn publish(&self, bundle: &TrustBundle) -> Result<(), PublishError>;
    /// Returns once others may have changed or removed the place, or after a while. It is then published again.
    async fn disturbed(&self) -> Result<(), PublishError>;
}

/// What comes after a publication.
enum Next {
    /// The bundle has changed.
    Publish,
    /// The publication stood for this long.
    Restore(Duration),
    /// There will be no other bundle.
    End,
}

/// Publishes at start, after each change of the bundle, and whenever others have changed the place, until `shutdown`.
pub async fn keep(
    publisher: Arc<dyn BundlePublisher>,
    mut bundles: watch::Receiver<Arc<TrustBundle>>,
    shutdown: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(30));
    let mut pauses = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
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
                let published = Instant::now();
                tokio::select! {
                    changed = bundles.changed() => Ok(if changed.is_ok() { Next::Publish } else { Next::End }),
                    disturbed = tokio::time::timeout(LOOK_AGAIN, publisher.disturbed()) => {
                        disturbed.unwrap_or(Ok(())).map(|()| Next::Restore(published.elapsed()))
                    }
                }
            };
            match step.await {
                Ok(Next::Publish) => backoff.reset(),
                Ok(Next::Restore(stood)) => {
                    backoff.reset();
                    if stood >= CALM {
                        pauses.reset();
                    }
                    // Whoever removes the mesh takes our permissions first: a moment later nothing comes back.
                    tokio::time::sleep(pauses.next_delay()).await;
                }
                Ok(Next::End) => return,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A place that somebody else changes back as soon as it is written.
    #[derive(Default)]
    struct Fought(AtomicUsize);

    #[async_trait]
    impl BundlePublisher for Fought {
        fn name(&self) -> String {
            "a place".into()
        }

        async fn publish(&self, _: &TrustBundle) -> Result<(), PublishError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }

        async fn disturbed(&self) -> Result<(), PublishError> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_undoes_each_publication_does_not_make_us_publish_without_end() {
        let (place, shutdown) = (Arc::new(Fought::default()), CancellationToken::new());
        let (_bundles, receiver) = watch::channel(Arc::new(testing::bundle()));
        let keeping = tokio::spawn(keep(place.clone(), receiver, shutdown.clone()));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(place.0.load(Ordering::Relaxed) >= 3, "the first times it is back within two seconds");
        tokio::time::sleep(Duration::from_secs(600)).await;
        let published = place.0.load(Ordering::Relaxed);
        assert!(published < 60, "{published} times in ten minutes");
        shutdown.cancel();
        keeping.await.unwrap();
    }
}
