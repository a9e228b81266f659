//! One step of a mesh on its way to plaintext: every sidecar is asked until it has taken it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_controller::injector::SIDECAR;
use countersign_controller::store::Transparency;
use futures::stream::{self, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, ListParams};
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
    /// Those that did not answer in an earlier step, `NAMESPACE/NAME`.
    pub silent: BTreeSet<String>,
}

impl Passed<'_> {
    fn has(&self, pod: &str) -> bool {
        self.silent.contains(pod) || is_without(self.by_leave, pod)
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

/// The sidecars that a step has to wait for, `NAMESPACE/NAME`, and what each lacks.
#[derive(Default)]
struct Waiting {
    behind: Vec<(String, String)>,
    silent: Vec<(String, String)>,
    /// Whether the kubelet takes one of the silent ones for ready.
    is_silent_one_ready: bool,
    /// Whether any sidecar has answered.
    has_answer: bool,
}

impl Waiting {
    fn add(&mut self, pod: &Pod, progress: Progress) {
        let name = name_of(pod);
        self.has_answer |= !matches!(progress, Progress::Silent(_));
        match progress {
            Progress::Taken => {}
            Progress::Behind(why) => self.behind.push((name, why)),
            Progress::Silent(why) => {
                self.is_silent_one_ready |= is_ready(pod);
                self.silent.push((name, why));
            }
        }
    }

    fn all(&self) -> impl Iterator<Item = &(String, String)> {
        self.behind.iter().chain(&self.silent)
    }

    /// Whether those that are left are broken, and nobody else. Where no sidecar at all answers, although the kubelets find them well,
    /// it is the way to them that is broken: they may be strict, and others would be refused.
    fn are_broken(&self) -> bool {
        self.behind.is_empty() && (self.has_answer || !self.is_silent_one_ready)
    }
}

impl Step {
    /// Waits until every running sidecar has taken it, but those in `passed`, to which it adds those that do not answer. Error: which
    /// have not until then, and why. An interruption is answered at once, also while a sidecar that does not answer is asked.
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
            let Some((first, why)) = waiting.all().next() else {
                eprintln!("all sidecars {}", self.does);
                return Ok(());
            };
            let left = waiting.all().count();
            if left != said {
                said = left;
                eprintln!("waiting for {}, {first} among them", count(said, "sidecar"));
            }
            if Instant::now() <= until {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            if waiting.are_broken() {
                eprintln!("{}", gone_past(&waiting.silent));
                passed.silent.extend(waiting.silent.into_iter().map(|(name, _)| name));
                eprintln!("all other sidecars {}", self.does);
                return Ok(());
            }
            let names: Vec<&str> = waiting.all().take(NAMED).map(|(name, _)| name.as_str()).collect();
            return Err(anyhow!(
                "{} yet to {}, {} among them ({why}): restart or delete these pods, give more --patience, or leave them \
                 out by --without NAMESPACE/POD",
                have(left),
                self.does,
                names.join(", ")
            ));
        }
    }

    /// Asks the sidecars of all running pods, [`AT_ONCE`] at a time.
    async fn look(&self, client: &Client, passed: &Passed<'_>) -> Result<Waiting> {
        let pods: Api<Pod> = Api::all(client.clone());
        let pods = pods.list(&ListParams::default()).await.context("cannot list pods")?.items;
        let asked = pods.iter().filter(|pod| has_running_sidecar(pod) && !passed.has(&name_of(pod)));
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
        answers.into_iter().for_each(|(pod, progress)| waiting.add(pod, progress));
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
