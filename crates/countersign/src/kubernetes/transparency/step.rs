//! One step of a mesh on its way to plaintext: every sidecar is asked until it has taken it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_controller::injector::SIDECAR;
use countersign_controller::store::Transparency;
use futures::stream::{self, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::kubernetes::cluster::{SIDECAR_PORT, is_meshed, is_ready, listed, name_of, page};
use crate::kubernetes::pod_state;
use crate::kubernetes::without::{Without, is_without};
use crate::settings::words::count;

/// Interval between two polls.
const LOOK: Duration = Duration::from_millis(500);
/// Sidecars that are asked at once: each one that is broken takes seconds.
const AT_ONCE: usize = 16;
/// Most sidecars that an error names.
const NAMED: usize = 3;

/// One step on the way.
pub struct Step {
    /// Value of `transparent` in the mesh's ConfigMap.
    pub setting: Transparency,
    /// What every sidecar then does.
    does: &'static str,
    /// The modes that a sidecar may have once it does.
    modes: &'static [&'static str],
}

pub const INBOUND: Step =
    Step { setting: Transparency::Inbound, does: "accept plaintext", modes: &["permissive", "off"] };
pub const FULL: Step = Step { setting: Transparency::Full, does: "send plaintext", modes: &["off"] };

/// Sidecars that are not waited for.
pub struct Passed<'a> {
    /// Those that the administrator leaves out.
    pub by_leave: &'a [Without],
    /// Those that did not answer in an earlier step. Who answers since is waited for again.
    pub silent: BTreeSet<Incarnation>,
}

/// A pod, which another one of its name is not.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Incarnation {
    name: String,
    uid: Option<String>,
}

impl Incarnation {
    fn of(pod: &Pod) -> Self {
        Self { name: name_of(pod), uid: pod.uid() }
    }
}

/// What is known of one sidecar on the way.
enum Progress {
    /// It has taken the step.
    Taken,
    /// It answers, and has not; why, in words.
    Behind(String),
    /// It does not answer; why, in words.
    Silent(String),
}

/// A sidecar that a step has to wait for, and what it lacks.
struct Lagging {
    pod: Incarnation,
    why: String,
}

/// The sidecars that a step has to wait for.
#[derive(Default)]
struct Waiting {
    behind: Vec<Lagging>,
    /// Those that work, as far as their kubelets know, and do not answer: only the way to them may be broken, so that they may be strict.
    unreachable: Vec<Lagging>,
    broken: Vec<Lagging>,
}

impl Waiting {
    fn add(&mut self, pod: &Pod, progress: Progress, passed: &Passed<'_>) {
        let (which, why) = match progress {
            Progress::Taken => return,
            Progress::Behind(why) => (&mut self.behind, why),
            Progress::Silent(why) if is_ready(pod) => (&mut self.unreachable, why),
            Progress::Silent(_) if passed.silent.contains(&Incarnation::of(pod)) => return,
            Progress::Silent(why) => (&mut self.broken, why),
        };
        which.push(Lagging { pod: Incarnation::of(pod), why });
    }

    fn all(&self) -> impl Iterator<Item = &Lagging> {
        self.behind.iter().chain(&self.unreachable).chain(&self.broken)
    }

    /// Why the step has to stop, in words; `None` if those that are left are broken, and nobody else.
    fn stops(&self, step: &Step) -> Option<String> {
        let names = |all: &[&Lagging]| {
            let names: Vec<&str> = all.iter().take(NAMED).map(|one| one.pod.name.as_str()).collect();
            let why = all.first().map_or("", |one| one.why.as_str());
            format!("{} among them ({why})", names.join(", "))
        };
        if !self.behind.is_empty() {
            let all: Vec<&Lagging> = self.all().collect();
            return Some(format!(
                "{} yet to {}, {}: restart or delete these pods, give more --patience, or leave them out by --without NAMESPACE/POD",
                have(all.len()),
                step.does,
                names(&all)
            ));
        }
        let unreachable: Vec<&Lagging> = self.unreachable.iter().collect();
        (!unreachable.is_empty()).then(|| {
            format!(
                "{} of pods that are ready cannot be asked whether they {}, {}: they work, and may refuse plaintext; see whether the \
                 API server reaches port {SIDECAR_PORT} of these pods (a NetworkPolicy?), restart them, or leave them out by --without \
                 NAMESPACE/POD",
                count(unreachable.len(), "sidecar"),
                step.does,
                names(&unreachable)
            )
        })
    }
}

impl Step {
    /// Waits until every running sidecar has taken it, but those in `passed`, to which it adds those that do not answer and whose pods are
    /// not ready. Error: which have not until then, and why. An interruption is answered at once, also while a sidecar that does not answer is asked.
    pub async fn wait(
        &self,
        client: &Client,
        patience: Duration,
        passed: &mut Passed<'_>,
        stop: &CancellationToken,
    ) -> Result<()> {
        tokio::select! {
            taken = self.taken(client, patience, passed) => taken,
            () = stop.cancelled() => Err(anyhow!("interrupted before all sidecars {}", self.does)),
        }
    }

    async fn taken(&self, client: &Client, patience: Duration, passed: &mut Passed<'_>) -> Result<()> {
        let until = Instant::now() + patience;
        eprintln!("the sidecars are told to {}", self.does);
        let mut said = usize::MAX;
        loop {
            let waiting = self.look(client, passed).await?;
            let Some(first) = waiting.all().next() else {
                eprintln!("all sidecars {}", self.does);
                return Ok(());
            };
            let left = waiting.all().count();
            if left != said {
                said = left;
                eprintln!("waiting for {}, {} among them", count(said, "sidecar"), first.pod.name);
            }
            if Instant::now() <= until {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            if let Some(why) = waiting.stops(self) {
                return Err(anyhow!(why));
            }
            let silent: Vec<_> = waiting.broken.iter().map(|one| (one.pod.name.clone(), one.why.clone())).collect();
            eprintln!("{}", gone_past(&silent));
            passed.silent.extend(waiting.broken.into_iter().map(|one| one.pod));
            eprintln!("all other sidecars {}", self.does);
            return Ok(());
        }
    }

    /// Asks the sidecars of all running pods, [`AT_ONCE`] at a time.
    async fn look(&self, client: &Client, passed: &Passed<'_>) -> Result<Waiting> {
        let pods: Api<Pod> = Api::all(client.clone());
        let pods = pods.list(&ListParams::default()).await.context("cannot list pods")?.items;
        let is_left_out = |pod: &Pod| is_without(passed.by_leave, &name_of(pod));
        let asked = pods.iter().filter(|pod| has_running_sidecar(pod) && !is_left_out(pod));
        let answers = stream::iter(asked).map(|pod| async move {
            let answer = page(client, pod, SIDECAR_PORT, "/mode").await;
            let progress = match answer {
                Err(why) => Progress::Silent(why),
                Ok(modes) => self.lacks(&modes).map_or(Progress::Taken, Progress::Behind),
            };
            (pod, progress)
        });
        let answers: Vec<(&Pod, Progress)> = answers.buffered(AT_ONCE).collect().await;
        let mut waiting = Waiting::default();
        answers.into_iter().for_each(|(pod, progress)| waiting.add(pod, progress, passed));
        Ok(waiting)
    }

    /// What a sidecar lacks of this step by its page of modes: its own on the first line, then ports that have another one. A port
    /// that is still strict refuses plaintext, whatever the workload's mode is.
    pub fn lacks(&self, modes: &str) -> Option<String> {
        let mut lines = modes.lines().map(str::trim);
        let own = lines.next().unwrap_or_default();
        if !self.modes.contains(&own) {
            return Some(format!("its mode is {own}"));
        }
        let strict = |line: &str| line.strip_suffix(" strict").map(|port| format!("its port {port} is strict"));
        lines.find_map(strict)
    }
}

/// What is said of sidecars that nobody waits for any longer.
pub fn gone_past(silent: &[(String, String)]) -> String {
    let names: Vec<String> = silent.iter().map(|(name, _)| name.clone()).collect();
    let why = silent.first().map_or("", |(_, why)| why);
    format!(
        "going on without {} that cannot be asked: {} ({why}); if they run they may refuse plaintext until they are restarted",
        count(silent.len(), "sidecar"),
        listed(&names)
    )
}

/// Whether a pod has a sidecar that can be told anything. One whose container waits to be started anew learns of the step when it is.
fn has_running_sidecar(pod: &Pod) -> bool {
    let is_down = pod_state::container(pod, SIDECAR).is_some() && !pod_state::is_container_running(pod, SIDECAR);
    is_running(pod) && pod.metadata.deletion_timestamp.is_none() && is_meshed(pod) && !is_down
}

pub fn is_running(pod: &Pod) -> bool {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running")
}

/// `1 sidecar has`, `2 sidecars have`.
fn have(sidecars: usize) -> String {
    format!("{} {}", count(sidecars, "sidecar"), if sidecars == 1 { "has" } else { "have" })
}
