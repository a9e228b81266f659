//! `k8s:…`: from the process to its cgroup, to its pod and container, to what a verified source says about them.

mod api_server;
mod kubelet;
mod namespaces;
mod pods;
mod source;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use countersign_api::backoff::Backoff;
use countersign_watch::Watches;
use countersign_watch::cgroup::{Container, container_of};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::api_server::ApiServer;
use self::kubelet::Client;
use self::namespaces::Namespaces;
use self::pods::may_follow;
use self::source::{Found, Missing, PodSources};
use super::{AttestorError, Proof, Purpose, WorkloadAttestor};
use crate::config::{self, Sources};
use crate::metrics::Metrics;
use crate::peer::Process;

pub use kubelet::SetupError;

/// How long a process may be ahead of what the sources know of its container.
const PATIENCE: Duration = Duration::from_secs(30);

/// Time after which a process is attested by its pod alone, if no source knows its container, whatever entries there are. The
/// kubelet reports a container only once its postStart hook has ended, and such a hook may wait for the identity. An entry that
/// requires the container applies once it is known.
const POD_ALONE: Duration = Duration::from_secs(3);

/// Attests processes by their pod.
pub struct K8s {
    sources: PodSources,
    namespaces: Option<Namespaces>,
}

impl K8s {
    /// Reads the CA of the kubelet's certificate, and sets up a client of the API server if it is asked. Nobody is
    /// asked yet: [`WorkloadAttestor::keep`] does.
    pub async fn new(settings: config::PodSources, metrics: &Arc<Metrics>) -> Result<Self, SetupError> {
        let (node, kubelet) = match settings.sources {
            Sources::ApiServer(node) => (Some(node), None),
            Sources::Kubelet(kubelet) => (None, Some(kubelet)),
            Sources::Both(node, kubelet) => (Some(node), Some(kubelet)),
        };
        let client = match (&node, settings.namespace_labels) {
            (None, false) => None,
            _ => Some(countersign_watch::client().await?),
        };
        let namespaces = client.clone().filter(|_| settings.namespace_labels).map(Namespaces::new);
        let watches = Watches::of(metrics.watch_errors.clone());
        let api_server = node.zip(client).map(|(node, client)| ApiServer::new(node, client, watches.health("pods")));
        let kubelet = kubelet.map(|kubelet| Client::new(kubelet, api_server.is_some())).transpose()?;
        Ok(Self { sources: PodSources::new(api_server, kubelet, metrics.clone()), namespaces })
    }

    /// All facts about a process in this container, or those of its pod if they meet the purpose; with `alone`, they are enough
    /// in any case.
    async fn look(&self, of: &Container, purpose: &dyn Purpose, alone: bool) -> Result<Proof, Missing> {
        let meets = |proof: &Proof| !proof.in_part || purpose.is_met_by(&proof.selectors, may_follow);
        // The kubelet is spared where what is at hand is enough: it learns of a container up to a second after its start.
        if let Some(found) = self.sources.at_hand(of)? {
            let source = found.source;
            let proof = self.proof(found).await?;
            if meets(&proof) {
                self.sources.served(source);
                return Ok(proof);
            }
        }
        let found = self.sources.find(of).await?;
        let source = found.source;
        let proof = self.proof(found).await?;
        if !alone && !meets(&proof) {
            return Err(Missing::Yet(format!("container {} of pod {} is not known yet", of.id, of.pod_uid)));
        }
        self.sources.served(source);
        Ok(proof)
    }

    async fn proof(&self, found: Found) -> Result<Proof, Missing> {
        let Found { pod, container, .. } = found;
        let mut selectors = pod.selectors.clone();
        if let Some(namespaces) = &self.namespaces {
            selectors.extend(namespaces.labels(&pod.namespace).await.map_err(Missing::Yet)?);
        }
        let Some(container) = container else { return Ok(Proof { selectors, in_part: true }) };
        selectors.extend(pod.images.iter().cloned().chain(container));
        Ok(Proof { selectors, in_part: false })
    }
}

#[async_trait]
impl WorkloadAttestor for K8s {
    async fn attest(&self, process: &Process, purpose: &dyn Purpose) -> Result<Proof, AttestorError> {
        let found = container_of(&process.cgroup).map_err(|e| AttestorError(e.to_string()))?;
        // A process of the node itself is in no pod.
        let Some(container) = found else { return Ok(Proof::default()) };
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
        let (end, alone) = (Instant::now() + PATIENCE, Instant::now() + POD_ALONE);
        loop {
            let why = match self.look(&container, purpose, Instant::now() >= alone).await {
                Ok(proof) => return Ok(proof),
                Err(Missing::Deleted) => {
                    return Err(AttestorError(format!("pod {} has been deleted", container.pod_uid)));
                }
                Err(Missing::Yet(why)) => why,
            };
            let delay = backoff.next_delay();
            if Instant::now() + delay > end {
                return Err(AttestorError(why));
            }
            tracing::debug!(pid = process.pid, why, "not attested by pod yet; asking again in {delay:.1?}");
            let _ = tokio::time::timeout(delay, self.sources.known(&container)).await;
        }
    }

    async fn keep(&self, shutdown: CancellationToken) {
        self.sources.keep(shutdown).await;
    }

    fn missing(&self) -> Option<String> {
        self.sources.missing()
    }

    fn facts(&self) -> Vec<(String, String)> {
        self.sources.facts()
    }

    fn observe(&self) {
        self.sources.observe();
    }
}
