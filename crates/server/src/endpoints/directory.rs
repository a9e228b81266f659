//! `countersign.v1.Directory`: published by local callers, followed by agents.

use async_trait::async_trait;
use countersign_api::convert::{service_from_wire, workload_from_wire};
use countersign_api::directory;
use countersign_api::push::directory_server::Directory;
use countersign_api::push::{PublishRequest, PublishResponse, ResolveRequest, ResolveResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{BoxStream, Endpoint, invalid};
use crate::caller::{Caller, cut_off};
use crate::directory::MAX_WORKLOADS;

#[async_trait]
impl Directory for Endpoint {
    type ResolveStream = BoxStream<ResolveResponse>;

    async fn publish(&self, request: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        Caller::local(&self.0, &request)?;
        let request = request.into_inner();
        if request.upserted.len() + request.upserted_services.len() > MAX_WORKLOADS {
            return Err(invalid(format!("the directory holds at most {MAX_WORKLOADS} workloads and services")));
        }
        let upserted =
            request.upserted.into_iter().map(workload_from_wire).collect::<Result<_, _>>().map_err(invalid)?;
        let services = request.upserted_services.into_iter().map(service_from_wire);
        let services = services.collect::<Result<_, _>>().map_err(invalid)?;
        let revision = self.0.directory.publish(request.replace, upserted, services, &request.removed);
        Ok(Response::new(PublishResponse { revision }))
    }

    async fn resolve(
        &self,
        request: Request<Streaming<ResolveRequest>>,
    ) -> Result<Response<Self::ResolveStream>, Status> {
        let caller = match Caller::of(&self.0, &request)? {
            caller @ (Caller::Agent(_) | Caller::Local { .. }) => caller.to_string(),
            other => return Err(Status::permission_denied(format!("{other} may not read the directory"))),
        };
        let share = self.0.directory.followers.join(caller);
        let share = share.map_err(|refused| Status::resource_exhausted(refused.to_string()))?;
        let (tx, rx) = mpsc::channel(1);
        let cut_off = cut_off(&self.0, &request);
        let core = self.0.clone();
        self.0.tasks.spawn(async move {
            let ended = tokio::select! {
                ended = directory::serve(&core.directory, share, request.into_inner(), &tx) => ended,
                status = cut_off => Some(status),
                () = core.shutdown.cancelled() => Some(Status::unavailable("the server is shutting down")),
            };
            if let Some(status) = ended {
                // The agent may be gone, or read so slowly that it will not hear it.
                let _ = tx.try_send(Err(status));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}
