//! `k8s:…`: pid → cgroup → pod and container → what this node's kubelet says of them.

mod cgroup;
mod kubelet;
mod namespaces;
mod pods;

use std::time::Duration;

use async_trait::async_trait;
use countersign_api::backoff::Backoff;
use countersign_identity::selector::SelectorSet;
use tokio::time::Instant;

use self::cgroup::Container;
use self::kubelet::Client;
use self::namespaces::Namespaces;
use super::{AttestorError, WorkloadAttestor};
use crate::config::Kubelet;
use crate::peer::Process;

pub use kubelet::SetupError;

/// How long a process may be ahead of what the kubelet knows of its container.
const PATIENCE: Duration = Duration::from_secs(30);

/// Attests by pod.
pub struct K8s {
    kubelet: Client,
    namespaces: Option<Namespaces>,
}

impl K8s {
    /// Reads the CA that the kubelet's certificate must chain to, and finds the API server where namespaces are asked for.
    pub async fn new(settings: Kubelet) -> Result<Self, SetupError> {
        let namespaces = if settings.namespace_labels { Some(Namespaces::new().await?) } else { None };
        Ok(Self { kubelet: Client::new(settings)?, namespaces })
    }

    /// Everything that can be known of a process in this container now.
    async fn look(&self, Container { pod_uid, id }: &Container) -> Result<SelectorSet, String> {
        let pods = self.kubelet.pods().await.map_err(|e| e.to_string())?;
        let unknown = || format!("the kubelet does not know container {id} of pod {pod_uid}");
        let (namespace, mut selectors) = pods.selectors(pod_uid, id).ok_or_else(unknown)?;
        if let Some(namespaces) = &self.namespaces {
            selectors.extend(namespaces.labels(namespace).await?);
        }
        Ok(selectors)
    }
}

#[async_trait]
impl WorkloadAttestor for K8s {
    async fn attest(&self, process: &Process) -> Result<SelectorSet, AttestorError> {
        let found = cgroup::container_of(&process.cgroup).map_err(|e| AttestorError(e.to_string()))?;
        // A process of the node itself is in no pod.
        let Some(container) = found else { return Ok(SelectorSet::new()) };
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
        let end = Instant::now() + PATIENCE;
        loop {
            let why = match self.look(&container).await {
                Ok(selectors) => return Ok(selectors),
                Err(why) => why,
            };
            let delay = backoff.next_delay();
            if Instant::now() + delay > end {
                return Err(AttestorError(why));
            }
            tracing::debug!(pid = process.pid, why, "not attested by pod yet; asking again in {delay:.1?}");
            tokio::time::sleep(delay).await;
        }
    }
}
