//! `k8s:…`: from the process to its cgroup, to its pod and container, to what this node's kubelet says about them.

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

/// How long a process may be ahead of the kubelet's knowledge of its container.
const PATIENCE: Duration = Duration::from_secs(30);

/// Time after which a process is attested by its pod alone, if the kubelet does not know its container. The kubelet
/// reports a container only once its postStart hook has ended, and such a hook may wait for the identity. An entry that
/// requires the container applies once it is known.
const POD_ALONE: Duration = Duration::from_secs(3);

/// Attests processes by their pod.
pub struct K8s {
    kubelet: Client,
    namespaces: Option<Namespaces>,
}

impl K8s {
    /// Reads the CA of the kubelet's certificate, and connects to the API server if labels of namespaces are wanted.
    pub async fn new(settings: Kubelet) -> Result<Self, SetupError> {
        let namespaces = if settings.namespace_labels { Some(Namespaces::new().await?) } else { None };
        Ok(Self { kubelet: Client::new(settings)?, namespaces })
    }

    /// All facts about a process in this container; with `in_part`, its pod alone is enough.
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
