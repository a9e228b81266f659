//! The services on the driver's socket: who it is, and the volumes of this node.

use std::sync::Arc;
use std::time::Duration;

use countersign_api::csi::identity_server::Identity;
use countersign_api::csi::node_server::Node;
use countersign_api::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse,
    ProbeRequest, ProbeResponse,
};
use tokio::sync::Mutex;
use tonic::{Request, Response, Status};

use crate::config::Config;
use crate::metrics::Metrics;
use crate::mounts::{MountError, Mounts};
use crate::request::{Publish, Refused, unpublished};

/// Longest work on a volume, including the wait for its turn. Mounting takes microseconds; a file system that hangs may take for
/// ever, and the kubelet asks again.
const WORK: Duration = Duration::from_secs(30);

/// The services.
#[derive(Clone)]
pub struct Driver {
    config: Arc<Config>,
    metrics: Arc<Metrics>,
    mounts: Mounts,
    /// One volume at a time: what is looked at must not change before it is mounted on.
    turn: Arc<Mutex<()>>,
}

impl Driver {
    /// The services of a driver with these settings.
    pub fn new(config: Arc<Config>, metrics: Arc<Metrics>) -> Self {
        let mounts = Mounts { pods: config.kubelet.pods(), agent: config.agent_dir.clone() };
        Self { config, metrics, mounts, turn: Arc::default() }
    }

    /// Whether the agent's folder is there.
    pub fn agent_is_there(&self) -> bool {
        self.mounts.agent_is_there()
    }

    fn refused(&self, why: Refused) -> Status {
        self.metrics.failed("refused");
        tracing::warn!(%why, "a volume is refused");
        Status::invalid_argument(why.to_string())
    }

    /// Does something with the mounts, beside the threads that serve.
    async fn work(&self, work: impl FnOnce(&Mounts) -> Result<(), MountError> + Send + 'static) -> Result<(), Status> {
        let done = async {
            let turn = self.turn.clone().lock_owned().await;
            let mounts = self.mounts.clone();
            // The turn goes along: who gives up waiting must not let another in beside the work.
            let working = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                work(&mounts)
            });
            working.await
        };
        let Ok(done) = tokio::time::timeout(WORK, done).await else {
            self.metrics.failed("late");
            tracing::error!("a volume is not done within {WORK:?}: does a file system of this node hang?");
            return Err(Status::deadline_exceeded(format!("not done within {WORK:?}; does a file system hang?")));
        };
        let why = match done {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => return Err(Status::internal("the work on the volume ended without an answer")),
        };
        tracing::warn!(%why, "a volume is not as the kubelet asked");
        match why {
            MountError::Agent { .. } => {
                self.metrics.failed("agent");
                Err(Status::unavailable(why.to_string()))
            }
            MountError::NoVolume(_) | MountError::Layers(_) => {
                self.metrics.failed("mount");
                Err(Status::failed_precondition(why.to_string()))
            }
            MountError::Kernel { .. } => {
                self.metrics.failed("mount");
                Err(Status::internal(why.to_string()))
            }
        }
    }
}

#[tonic::async_trait]
impl Identity for Driver {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: self.config.driver.as_str().to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(GetPluginCapabilitiesResponse {}))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse { ready: Some(self.agent_is_there()) }))
    }
}

#[tonic::async_trait]
impl Node for Driver {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let asked = Publish::parse(request.get_ref(), &self.mounts.pods).map_err(|why| self.refused(why))?;
        let Publish { target, pod } = asked;
        let at = target.clone();
        self.work(move |mounts| mounts.publish(&at)).await?;
        self.metrics.published.inc();
        tracing::info!(pod, volume = %target, "the agent's folder is in a pod");
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let target = unpublished(request.get_ref(), &self.mounts.pods).map_err(|why| self.refused(why))?;
        let at = target.clone();
        self.work(move |mounts| mounts.unpublish(&at)).await?;
        self.metrics.unpublished.inc();
        tracing::info!(volume = %target, "the agent's folder is out of a pod");
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        Ok(Response::new(NodeGetCapabilitiesResponse {}))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse { node_id: self.config.node.as_str().to_owned() }))
    }
}
