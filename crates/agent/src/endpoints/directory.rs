//! `countersign.v1.Directory` for sidecars: callers with an identity may ask who is at an address.

use async_trait::async_trait;
use countersign_api::directory;
use countersign_api::push::directory_server::Directory;
use countersign_api::push::{PublishRequest, PublishResponse, ResolveRequest, ResolveResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{BoxStream, Endpoint};

/// Addresses that one sidecar may follow.
const MAX_FOLLOWED: usize = 10_000;

#[async_trait]
impl Directory for Endpoint {
    type ResolveStream = BoxStream<ResolveResponse>;

    async fn publish(&self, _: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        Err(Status::permission_denied("the directory is fed at the server, not here"))
    }

    async fn resolve(
        &self,
        request: Request<Streaming<ResolveRequest>>,
    ) -> Result<Response<Self::ResolveStream>, Status> {
        let attested = self.0.attest(&request).await?;
        self.0.identities(&attested)?;
        let (tx, rx) = mpsc::channel(1);
        let core = self.0.clone();
        self.0.tasks.spawn(async move {
            core.metrics.streams.inc();
            let ended = tokio::select! {
                ended = directory::serve(&core.directory, MAX_FOLLOWED, request.into_inner(), &tx) => ended,
                () = core.shutdown.cancelled() => Some(Status::unavailable("the agent is shutting down")),
            };
            core.metrics.streams.dec();
            if let Some(status) = ended {
                let _ = tx.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}
