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
pub use self::cgroup::container_of;
use self::kubelet::Client;
use self::namespaces::Namespaces;
use super::{AttestorError, Proof, WorkloadAttestor};
use crate::config::Kubelet;
use crate::peer::Process;

pub use kubelet::SetupError;

/// How long a process may be ahead of what the kubelet knows of its container.
const PATIENCE: Duration = Duration::from_secs(30);

/// After this time a process is attested by its pod alone, whose container the kubelet does not know: it tells of containers
/// only when their postStart hooks have ended, and such a hook may wait for the identity. An entry that asks for a container
/// applies when the container is known.
const POD_ALONE: Duration = Duration::from_secs(3);

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

    /// Everything that can be known of a process in this container now; with `in_part`, of its pod alone too.
    async fn look(&self, Container { pod_uid, id }: &Container, in_part: bool) -> Result<Proof, String> {
        let pods = self.kubelet.pods().await.map_err(|e| e.to_string())?;
        let pod = pods.get(pod_uid).ok_or_else(|| format!("the kubelet does not know pod {pod_uid}"))?;
        let container = pod.container(id);
        if container.is_none() && !in_part {
            return Err(format!("the kubelet does not know container {id} of pod {pod_uid}"));
        }
        let mut selectors: SelectorSet = pod.selectors.iter().chain(container.into_iter().flatten()).cloned().collect();
        if let Some(namespaces) = &self.namespaces {
            selectors.extend(namespaces.labels(&pod.namespace).await?);
        }
        Ok(Proof { selectors, in_part: container.is_none() })
    }
}

#[async_trait]
impl WorkloadAttestor for K8s {
    async fn attest(&self, process: &Process) -> Result<Proof, AttestorError> {
        let found = container_of(&process.cgroup).map_err(|e| AttestorError(e.to_string()))?;
        // A process of the node itself is in no pod.
        let Some(container) = found else { return Ok(Proof::default()) };
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
        let (end, alone) = (Instant::now() + PATIENCE, Instant::now() + POD_ALONE);
        loop {
            let why = match self.look(&container, Instant::now() >= alone).await {
                Ok(proof) => return Ok(proof),
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
