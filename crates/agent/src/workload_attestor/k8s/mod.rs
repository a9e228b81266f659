//! `k8s:…`: pid → cgroup → pod and container → what this node's kubelet says of them.

mod cgroup;
mod kubelet;
mod pods;

use std::time::Duration;

use async_trait::async_trait;
use countersign_api::backoff::Backoff;
use countersign_identity::selector::SelectorSet;
use tokio::time::Instant;

use self::cgroup::Container;
use self::kubelet::Client;
use super::{AttestorError, WorkloadAttestor};
use crate::config::Kubelet;
use crate::peer::Process;

pub use kubelet::SetupError;

/// How long a process may be ahead of what the kubelet knows of its container.
const PATIENCE: Duration = Duration::from_secs(30);

/// Attests by pod.
pub struct K8s {
    kubelet: Client,
}

impl K8s {
    /// Reads the CA that the kubelet's certificate must chain to.
    pub fn new(settings: Kubelet) -> Result<Self, SetupError> {
        Ok(Self { kubelet: Client::new(settings)? })
    }
}

#[async_trait]
impl WorkloadAttestor for K8s {
    async fn attest(&self, process: &Process) -> Result<SelectorSet, AttestorError> {
        let found = cgroup::container_of(&process.cgroup).map_err(|e| AttestorError(e.to_string()))?;
        // A process of the node itself is in no pod.
        let Some(Container { pod_uid, id }) = found else { return Ok(SelectorSet::new()) };
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
        let end = Instant::now() + PATIENCE;
        loop {
            let answer = self.kubelet.pods().await;
            let why = match &answer {
                Ok(pods) => match pods.selectors(&pod_uid, &id) {
                    Some(selectors) => return Ok(selectors),
                    None => format!("the kubelet does not know container {id} of pod {pod_uid}"),
                },
                Err(error) => error.to_string(),
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
