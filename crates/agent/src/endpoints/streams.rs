//! Streams to callers. Each ends with the reason once its caller has changed, has no identity any more, or the agent stops.

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Attested, BoxStream, Core, Endpoint, last_word};

/// The content of a stream.
#[async_trait]
pub trait Feed: Send + 'static {
    /// What is sent.
    type Message: Send + 'static;

    /// Sends messages until the caller disconnects (`None`) or may have no more (the reason). It may be cancelled and called again
    /// once more is known of the caller: what was sent is kept in `self`.
    async fn feed(
        &mut self,
        core: &Core,
        attested: &Attested,
        tx: &mpsc::Sender<Result<Self::Message, Status>>,
    ) -> Option<Status>;
}

impl Endpoint {
    /// Opens a stream to an attested caller.
    pub fn stream<F: Feed>(&self, mut attested: Attested, mut feed: F) -> BoxStream<F::Message> {
        let (tx, rx) = mpsc::channel(1);
        let core = self.0.clone();
        self.0.tasks.spawn(async move {
            core.metrics.streams.inc();
            let ended = loop {
                tokio::select! {
                    ended = feed.feed(&core, &attested, &tx) => break ended,
                    status = core.caller_changed(&attested) => break Some(status),
                    whole = core.completed(&attested) => match whole {
                        Ok(whole) => attested = whole,
                        Err(status) => break Some(status),
                    },
                    () = core.shutdown.cancelled() => break Some(Status::unavailable("the agent is shutting down")),
                }
            };
            core.metrics.streams.dec();
            if let Some(status) = ended {
                last_word(&tx, status).await;
            }
        });
        Box::pin(ReceiverStream::new(rx))
    }
}
