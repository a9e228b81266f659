//! The service on the socket: the plugin's requests. Only a process of root's outside of pods may connect, as the
//! container runtime is.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use countersign_api::accept::Door;
use countersign_api::peer::UnixPeer;
use countersign_api::peer_credentials::peer_credentials;
use countersign_identity::shown::sentence;
use countersign_watch::cgroup::container_of;
use countersign_watch::node::{NodeName, is_on};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::installer::Installer;
use crate::metrics::Metrics;
use crate::namespace::{Do, Found};
use crate::plugin::PodName;
use crate::wire::{self, Answer, Operation, Request};

/// Most requests at once; the next ones wait in the socket's queue.
const AT_ONCE: usize = 64;
/// Time for a request to arrive.
const RECEIVING: Duration = Duration::from_secs(2);
/// Time for the API server to answer. All together the plugin waits for ten seconds.
const LOOKING_UP: Duration = Duration::from_secs(3);
/// Time for the plugin to read its answer.
const ANSWERING: Duration = Duration::from_secs(2);
/// Longest reason that is passed on, in characters.
const MAX_REASON: usize = 500;

/// Answers the plugin's requests.
#[derive(Clone)]
pub struct Service {
    client: Client,
    node: NodeName,
    installer: Installer,
    metrics: Arc<Metrics>,
    /// Whether what is left out here is done by way of the pod's processes.
    repairs: bool,
}

impl Service {
    /// Looks pods of this node up by this client. `repairs`: whether [`crate::repair`] runs.
    pub fn new(client: Client, node: NodeName, installer: Installer, metrics: Arc<Metrics>, repairs: bool) -> Self {
        Self { client, node, installer, metrics, repairs }
    }

    /// Serves until `shutdown`, and then answers what is there.
    pub async fn serve(self, listener: UnixListener, shutdown: CancellationToken) {
        let (mut door, seats, tasks) = (Door::new(listener), Arc::new(Semaphore::new(AT_ONCE)), TaskTracker::new());
        loop {
            let next = async {
                let seat = seats.clone().acquire_owned().await;
                (seat, door.next(|| false).await.0)
            };
            let (seat, stream) = tokio::select! {
                () = shutdown.cancelled() => break,
                next = next => next,
            };
            let service = self.clone();
            tasks.spawn(async move {
                let _seat = seat;
                if let Err(error) = service.one(stream).await {
                    tracing::warn!(%error, "a request of the plugin failed");
                }
            });
        }
        tasks.close();
        tasks.wait().await;
    }

    async fn one(&self, mut stream: UnixStream) -> io::Result<()> {
        admit(&peer_credentials(&stream).map_err(io::Error::other)?).map_err(io::Error::other)?;
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        let (request, netns) = tokio::time::timeout(RECEIVING, wire::receive(&stream)).await.map_err(late)??;
        let answer = self.answer(&request, netns).await;
        self.metrics.answered(request.operation, &answer);
        let answer = serde_json::to_vec(&answer)?;
        let answered = async {
            stream.write_all(&answer).await?;
            stream.shutdown().await
        };
        tokio::time::timeout(ANSWERING, answered).await.map_err(late)?
    }

    /// The answer to a request.
    async fn answer(&self, request: &Request, netns: OwnedFd) -> Answer {
        let pod = match self.look_up(&request.pod).await {
            Ok(pod) => pod,
            Err(why) => {
                let why = sentence(&why, MAX_REASON).to_string();
                tracing::warn!(pod = request.pod.name, namespace = request.pod.namespace, why, "a pod is not known");
                return Answer::Unknown { why };
            }
        };
        let Some(pod) = self.installer.meshed(&pod) else { return Answer::Nothing };
        if self.repairs && request.resolvers.is_none() && self.installer.needs_nodes_resolvers(&pod) {
            let why =
                "the runtime does not name the pod's resolvers: its redirect is installed once its containers run";
            return Answer::Unknown { why: why.into() };
        }
        let what = if request.operation == Operation::Add { Do::Install } else { Do::Look };
        match self.installer.apply(&pod, netns, request.resolvers.clone(), what).await {
            Ok(Found::Installed | Found::InForce) => {
                tracing::info!(pod = pod.name, uid = pod.uid, "the redirect is in force");
                Answer::InForce
            }
            // The pod began with an earlier version of us, or before its resolvers changed.
            Ok(Found::Other) => Answer::Unknown { why: "another redirect than the one of now is in force".into() },
            Ok(Found::Missing) => Answer::Failed { why: "the redirect is not in force".into() },
            Err(why) => {
                let why = sentence(&why, MAX_REASON).to_string();
                tracing::error!(pod = pod.name, uid = pod.uid, why, "the redirect cannot be installed");
                Answer::Failed { why: format!("the redirect cannot be installed: {why}") }
            }
        }
    }

    /// The pod of this name and UID.
    ///
    /// # Errors
    /// It is not known, in words.
    async fn look_up(&self, name: &PodName) -> Result<Pod, String> {
        let pods = Api::<Pod>::namespaced(self.client.clone(), &name.namespace);
        let asked = tokio::time::timeout(LOOKING_UP, pods.get_opt(&name.name)).await;
        let asked = asked.map_err(|_| format!("the API server has not answered for {} s", LOOKING_UP.as_secs()))?;
        let of = || format!("pod {}/{}", name.namespace, name.name);
        match asked {
            Err(error) => Err(format!("the API server says nothing about {}: {error}", of())),
            Ok(None) => Err(format!("the API server does not know {}", of())),
            // Deleted and made anew under the same name, or a mirror of one that the kubelet has from a file.
            Ok(Some(pod)) if pod.metadata.uid.as_deref() != Some(&name.uid) => {
                Err(format!("the API server knows {} by another UID than {}", of(), name.uid))
            }
            Ok(Some(pod)) if !is_on(&self.node, &pod) => Err(format!("{} is not on this node", of())),
            Ok(Some(pod)) => Ok(pod),
        }
    }
}

/// Whether a peer may be the plugin, by what the kernel said of it when it connected. A pod that reaches the socket could
/// have another pod's redirect installed in its own network namespace.
///
/// # Errors
/// It may not, in words.
fn admit(peer: &UnixPeer) -> Result<(), String> {
    // The socket's mode says the same; a mode is easily changed.
    if peer.uid != 0 {
        return Err("the peer is not root's".into());
    }
    let seen = peer.at_accept.as_ref().filter(|_| peer.pid > 0).ok_or("the peer's process is not visible")?;
    let container = container_of(&seen.cgroup).map_err(|e| format!("the peer's process {}: {e}", peer.pid))?;
    // Only of one that is still alive is known whose cgroup was read.
    if !peer.is_there() {
        return Err(format!("the peer's process {} has ended", peer.pid));
    }
    match container {
        Some(container) => Err(format!("the peer's process {} belongs to pod {}", peer.pid, container.pod_uid)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use countersign_api::process::{Snapshot, start_time};

    use super::*;
    use crate::testing::UID;

    fn peer(uid: u32, cgroup: Option<&str>) -> UnixPeer {
        let pid = i32::try_from(std::process::id()).unwrap();
        let seen = Snapshot::read(pid).unwrap();
        let at_accept = cgroup.map(|cgroup| Arc::new(Snapshot { cgroup: cgroup.into(), ..seen }));
        UnixPeer { pid, uid, gid: 0, pidfd: None, started: start_time(pid), at_accept }
    }

    #[test]
    fn only_roots_live_processes_outside_of_pods_are_admitted() {
        const RUNTIME: &str = "0::/system.slice/containerd.service\n";
        admit(&peer(0, Some(RUNTIME))).unwrap();
        admit(&peer(0, Some("0::/../../../system.slice/crio.service\n"))).unwrap();
        let why = |peer: UnixPeer| admit(&peer).unwrap_err();
        assert!(why(peer(1, Some(RUNTIME))).contains("not root's"));
        let id = "a".repeat(64);
        for pods in [format!("0::/kubepods/pod{UID}/{id}\n"), format!("0::/../../pod{UID}/{id}\n")] {
            assert!(why(peer(0, Some(&pods))).contains(UID), "{pods}");
        }
        let spelled = format!("0::/user.slice/kubepods/pod{UID}/{id}\n");
        assert!(why(peer(0, Some(&spelled))).contains("below the kubelet's root"));
        assert!(why(peer(0, None)).contains("not visible"));
        assert!(why(UnixPeer { pid: 0, ..peer(0, Some(RUNTIME)) }).contains("not visible"));
        let successor = peer(0, Some(RUNTIME));
        assert!(why(UnixPeer { started: successor.started.map(|at| at + 1), ..successor }).contains("has ended"));
    }
}
