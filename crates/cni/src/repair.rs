//! Pods that wait for their redirect although the plugin was not called for them, or could not reach this process: it
//! is installed by way of the pod's own processes.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_identity::shown::sentence;
use countersign_watch::node::{NodeName, is_on, pods_of};
use countersign_watch::{Health, follow};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher::Event;
use kube::{Api, Client};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::installer::Installer;
use crate::metrics::Metrics;
use crate::namespace::{Do, Found};
use crate::pod::MeshedPod;
use crate::processes::{self, PodProcess};

/// Most pods of a node that may wait.
const MAX_PODS: usize = 4_096;
/// Delays between two looks at one pod.
const FIRST_DELAY: Duration = Duration::from_secs(1);
const LONGEST_DELAY: Duration = Duration::from_secs(10);
/// Shortest time between two looks at the node's processes.
const BREATH: Duration = Duration::from_millis(200);
/// Longest reason that is logged, in characters.
const MAX_REASON: usize = 500;

/// A pod that waits, and when it is looked at next.
struct Waiting {
    pod: MeshedPod,
    due: Instant,
    backoff: Backoff,
}

impl Waiting {
    fn new(pod: MeshedPod) -> Self {
        Self { pod, due: Instant::now(), backoff: Backoff::new(FIRST_DELAY, LONGEST_DELAY) }
    }
}

/// The pods of this node that wait.
pub struct Repair {
    node: NodeName,
    installer: Installer,
    metrics: Arc<Metrics>,
    proc: PathBuf,
    waiting: Mutex<BTreeMap<String, Waiting>>,
    /// The list that is arriving.
    fresh: Mutex<Vec<MeshedPod>>,
    changed: Notify,
}

impl Repair {
    /// Nothing is known yet.
    pub fn new(node: NodeName, installer: Installer, metrics: Arc<Metrics>) -> Self {
        Self {
            node,
            installer,
            metrics,
            proc: processes::PROC.into(),
            waiting: Mutex::default(),
            fresh: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Watches the node's pods and repairs them, without end.
    pub async fn run(&self, client: Client, health: &Health) {
        let watching = follow(Api::<Pod>::all(client), pods_of(&self.node), health, |event| self.take(event));
        let repairing = async {
            loop {
                self.next().await;
                self.pass().await;
                tokio::time::sleep(BREATH).await;
            }
        };
        tokio::join!(watching, repairing);
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<String, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, event: Event<Pod>) {
        let waits = |pod: &Pod| {
            let pod = is_on(&self.node, pod).then(|| self.installer.meshed(pod)).flatten();
            pod.filter(|pod| pod.waits)
        };
        let mut fresh = self.fresh.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Init => fresh.clear(),
            Event::InitApply(pod) if fresh.len() < MAX_PODS => fresh.extend(waits(&pod)),
            Event::InitApply(_) => {}
            Event::InitDone => {
                let all = fresh.drain(..).map(|pod| (pod.uid.clone(), Waiting::new(pod)));
                *self.waiting() = all.collect();
            }
            Event::Apply(pod) => match waits(&pod) {
                Some(pod) => self.put(pod),
                None => drop(pod.metadata.uid.map(|uid| self.waiting().remove(&uid))),
            },
            Event::Delete(pod) => drop(pod.metadata.uid.map(|uid| self.waiting().remove(&uid))),
        }
        self.metrics.waiting.set(i64::try_from(self.waiting().len()).unwrap_or(i64::MAX));
        self.changed.notify_one();
    }

    /// A change of a pod makes it due: its containers may have started, in a new namespace even.
    fn put(&self, pod: MeshedPod) {
        let mut waiting = self.waiting();
        if waiting.len() < MAX_PODS || waiting.contains_key(&pod.uid) {
            waiting.insert(pod.uid.clone(), Waiting::new(pod));
        }
    }

    /// Resolves when a pod is due.
    async fn next(&self) {
        loop {
            let due = self.waiting().values().map(|w| w.due).min();
            let sleep = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = sleep => return,
                () = self.changed.notified() => {}
            }
        }
    }

    /// Looks at every pod that is due.
    async fn pass(&self) {
        let now = Instant::now();
        let due: Vec<MeshedPod> = {
            let mut waiting = self.waiting();
            let due = waiting.values_mut().filter(|w| w.due <= now);
            let later = |waiting: &mut Waiting| {
                waiting.due = now + waiting.backoff.next_delay();
                waiting.pod.clone()
            };
            due.map(later).collect()
        };
        let uids: BTreeSet<String> = due.iter().map(|pod| pod.uid.clone()).collect();
        let proc = self.proc.clone();
        let found = tokio::task::spawn_blocking(move || processes::of_pods(&proc, &uids)).await;
        let mut found = match found.map_err(std::io::Error::other).flatten() {
            Ok(found) => found,
            Err(error) => return tracing::error!(%error, "the node's processes cannot be read"),
        };
        for pod in due {
            // Until its container runs, and the kubelet has said so, there is none to go by.
            let Some(process) = best(&pod, found.remove(&pod.uid).unwrap_or_default()) else { continue };
            match self.repair(&pod, &process).await {
                Ok(Found::Installed) => {
                    self.metrics.repaired.inc();
                    tracing::warn!(pod = pod.name, uid = pod.uid, "the redirect was missing, and is installed now");
                }
                Ok(_) => {}
                Err(why) => {
                    self.metrics.repairs_failed.inc();
                    let why = sentence(&why, MAX_REASON).to_string();
                    tracing::error!(pod = pod.name, uid = pod.uid, why, "the redirect cannot be installed");
                }
            }
        }
    }

    async fn repair(&self, pod: &MeshedPod, process: &PodProcess) -> Result<Found, String> {
        let netns = || process.netns().map_err(|e| format!("its network namespace cannot be opened: {e}"));
        let file = process.resolvers().ok().filter(|resolvers| !resolvers.is_empty());
        let mut found = Found::Missing;
        for resolvers in [None, file.clone()] {
            found = self.installer.apply(pod, netns()?, resolvers, Do::Look).await?;
            if found == Found::InForce {
                return Ok(found);
            }
        }
        // An app that ran before may have written into the file, which its pod's containers share. It counts where nobody else
        // knows the resolvers, and never in place of those that are in force.
        let by_file = self.installer.needs_nodes_resolvers(pod);
        if by_file && found == Found::Other {
            return Ok(found);
        }
        self.installer.apply(pod, netns()?, file.filter(|_| by_file), Do::Install).await
    }
}

/// The process to go by: one of the container that asks, which is ours. Others may have a network namespace of their own making.
fn best(pod: &MeshedPod, mut processes: Vec<PodProcess>) -> Option<PodProcess> {
    let at = processes.iter().position(|process| Some(process.container()) == pod.asker.as_deref())?;
    Some(processes.swap_remove(at))
}

#[cfg(test)]
mod tests;
