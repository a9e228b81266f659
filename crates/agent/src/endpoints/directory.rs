//! `countersign.v1.Directory` for sidecars: callers with an identity may look addresses up.

use std::fmt;

use async_trait::async_trait;
use countersign_api::directory;
use countersign_api::push::directory_server::Directory;
use countersign_api::push::{PublishRequest, PublishResponse, ResolveRequest, ResolveResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Attested, BoxStream, Endpoint, last_word};

/// The unit that followed addresses and log lines are counted for. A caller cannot become another one by opening connections or by
/// exec.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Follower {
    /// All processes of a pod, by its UID.
    Pod(String),
    /// All processes of a user outside of pods, by user ID.
    User(u32),
}

impl Follower {
    pub(super) fn of(attested: &Attested) -> Self {
        let mut selectors = attested.selectors.iter().filter(|s| s.kind() == "k8s");
        match selectors.find_map(|s| s.value().strip_prefix("pod-uid:")) {
            Some(uid) => Self::Pod(uid.to_owned()),
            None => Self::User(attested.peer.uid),
        }
    }
}

impl fmt::Display for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(uid) => write!(f, "pod {uid}"),
            Self::User(uid) => write!(f, "uid {uid}"),
        }
    }
}

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
        let share = self.0.followers.join(Follower::of(&attested));
        let share = share.map_err(|refused| Status::resource_exhausted(refused.to_string()))?;
        let (tx, rx) = mpsc::channel(1);
        let core = self.0.clone();
        self.0.tasks.spawn(async move {
            core.metrics.streams.inc();
            let ended = tokio::select! {
                ended = directory::serve(&core.directory, share, request.into_inner(), &tx) => ended,
                status = core.caller_changed(&attested) => Some(status),
                () = core.shutdown.cancelled() => Some(Status::unavailable("the agent is shutting down")),
            };
            core.metrics.streams.dec();
            if let Some(status) = ended {
                last_word(&tx, status).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}
