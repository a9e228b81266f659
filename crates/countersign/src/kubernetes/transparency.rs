//! The way of a whole mesh to plaintext, without a request that fails: what sends plaintext before all accept it is refused, so each
//! step waits until every sidecar has taken the one before.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_controller::injector::SIDECAR;
use countersign_controller::store::Transparency;
use futures::stream::{self, StreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::cluster::{NoPage, SIDECAR_PORT, ask, is_meshed, is_ready, listed, page, pods};
use super::live_settings::{NAME as SETTINGS, TRANSPARENT as KEY, way_back};
use super::pod_state;
use super::without::{Without, is_without};
use crate::settings::Mistake;
use crate::settings::words::count;

/// Interval between two polls.
const LOOK: Duration = Duration::from_millis(500);
/// Sidecars that are asked at once: each one that is broken takes seconds.
const AT_ONCE: usize = 16;
/// Most sidecars that an error names.
const NAMED: usize = 3;
/// Port of the pages of the controller beside the server.
const CONTROLLER_PAGES: u16 = 9465;
/// One step on the way.
struct Step {
    /// Value of `transparent` in the mesh's ConfigMap.
    setting: Transparency,
    /// What every sidecar then does.
    does: &'static str,
    /// The modes that a sidecar may have once it does.
    modes: &'static [&'static str],
}

const INBOUND: Step = Step { setting: Transparency::Inbound, does: "accept plaintext", modes: &["permissive", "off"] };
const FULL: Step = Step { setting: Transparency::Full, does: "send plaintext", modes: &["off"] };

/// How the mesh becomes transparent.
pub struct Way {
    /// Namespace of the installation.
    pub namespace: String,
    /// How long each step may take.
    pub patience: Duration,
    /// Leave out the first step, which older control planes do not know.
    pub at_once: bool,
    /// Pods that are not waited for.
    pub without: Vec<Without>,
}

impl Way {
    /// Goes all of it, in the end past sidecars that do not answer while others do. Errors: a step is unknown to the control plane, or
    /// some sidecars do not take it. After the first step the mesh
    /// is what it was before; after the second it stays as transparent as it is, because sidecars that are strict again would refuse
    /// those that are not yet.
    ///
    /// `stop` ends either wait, with the same outcome: whoever interrupts the command does not want to leave a strict mesh open.
    pub async fn go(&self, client: &Client, stop: &CancellationToken) -> Result<()> {
        let namespace = &self.namespace;
        let mut passed = Passed { by_leave: &self.without, silent: BTreeSet::new() };
        let before = Present::read(client, namespace).await?;
        let mut now = before.says();
        if now != Transparency::Full && !self.at_once {
            knows_steps(client, namespace).await?;
            before.change(client, namespace, Some(&INBOUND.setting.to_string())).await?;
            if let Err(why) = INBOUND.wait(client, self.patience, &mut passed, stop).await {
                return Err(anyhow!("{why:#}; {}", before.restore(client, namespace).await));
            }
            now = INBOUND.setting;
        }
        let present = Present::read(client, namespace).await?;
        if present.says() != now {
            return Err(anyhow!(
                "somebody else has set `{KEY}` of ConfigMap {SETTINGS} to {} meanwhile; nothing was removed",
                present.says()
            ));
        }
        present.change(client, namespace, Some(&FULL.setting.to_string())).await?;
        FULL.wait(client, self.patience, &mut passed, stop).await.map_err(|why| {
            anyhow!(
                "{why:#}; nothing was removed, and the mesh stays transparent as far as it is: run it again, or to go back: {}",
                way_back(namespace)
            )
        })
    }
}

/// Why strict has no effect now; `None` if it has, or if nobody may tell.
pub async fn without_effect(client: &Client, namespace: &str) -> Option<String> {
    let open = open(client, namespace).await?;
    Some(format!("strict has no effect: {open}"))
}

/// Why sidecars are opener than their modes, and the command that takes it back; `None` if they are not, or if nobody may tell.
pub async fn open(client: &Client, namespace: &str) -> Option<String> {
    let present = Present::read(client, namespace).await.ok()?;
    told(present.says()).map(|open| format!("{open}. To go back: {}", way_back(namespace)))
}

/// What a mesh on its way out is, in words; `None` if it is on none.
pub fn told(says: Transparency) -> Option<String> {
    let does = match says {
        Transparency::No => return None,
        Transparency::Inbound => "every sidecar accepts plaintext, whatever its mode is",
        Transparency::Full => "every sidecar accepts and sends plaintext, whatever its mode is: nothing is encrypted",
    };
    Some(format!(
        "the mesh is transparent, because an uninstall was begun (`{KEY}: {says}` in ConfigMap {SETTINGS}): {does}"
    ))
}

/// What the mesh's ConfigMap says now.
struct Present {
    value: Option<String>,
    version: Option<String>,
}

impl Present {
    async fn read(client: &Client, namespace: &str) -> Result<Self> {
        let found = Api::<ConfigMap>::namespaced(client.clone(), namespace).get_opt(SETTINGS).await;
        let Some(map) = found.context("cannot read the mesh's settings")? else {
            let why = format!(
                "there is no ConfigMap {SETTINGS} in namespace `{namespace}`, by which sidecars are told: apply the manifests of \
                 `countersign install` first"
            );
            return Err(Mistake(why).into());
        };
        let value = map.data.as_ref().and_then(|data| data.get(KEY)).cloned();
        Ok(Self { value, version: map.resource_version() })
    }

    /// How far the mesh is on its way, as the control plane reads it.
    fn says(&self) -> Transparency {
        self.value.as_deref().and_then(|text| text.trim().parse().ok()).unwrap_or_default()
    }

    /// Writes another value, unless the ConfigMap has changed since. `None` removes it.
    async fn change(&self, client: &Client, namespace: &str, to: Option<&str>) -> Result<()> {
        let patch = json!({ "metadata": { "resourceVersion": self.version }, "data": { KEY: to } });
        let api = Api::<ConfigMap>::namespaced(client.clone(), namespace);
        match api.patch(SETTINGS, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(e)) if e.code == 409 => Err(anyhow!(
                "ConfigMap {SETTINGS} was changed by somebody else meanwhile: look at it, and run this again"
            )),
            Err(error) => Err(error).context("cannot change the mesh's settings"),
        }
    }

    /// Writes this value again, if the first step's still stands; what became of it, in words.
    async fn restore(&self, client: &Client, namespace: &str) -> String {
        let open = format!(
            "nothing was removed, and every sidecar is still told to accept plaintext. To go back: {}",
            way_back(namespace)
        );
        if self.says() == INBOUND.setting {
            return open;
        }
        let back = async {
            let now = Self::read(client, namespace).await?;
            if now.says() != INBOUND.setting {
                return Ok(false);
            }
            now.change(client, namespace, self.value.as_deref()).await?;
            anyhow::Ok(true)
        };
        match back.await {
            Ok(true) => "nothing was removed, and the mesh is what it was".into(),
            Ok(false) => {
                format!("nothing was removed; somebody else has changed `{KEY}` of ConfigMap {SETTINGS} meanwhile")
            }
            Err(why) => format!("{open} ({why:#})"),
        }
    }
}

/// Checks that every controller beside a server knows the steps, which its page on the mesh shows: an older one would take the first
/// for a mistake, and change nothing.
async fn knows_steps(client: &Client, namespace: &str) -> Result<()> {
    let silent = |why: String| {
        anyhow!(
            "the control plane does not say whether it knows the first step, and nothing was changed: {why}; see `countersign check`, \
             or use --at-once, with which some connections may be refused for a moment"
        )
    };
    let mut servers = pods(client, namespace, "app.kubernetes.io/component=server").await.map_err(silent)?;
    // One that was evicted stays, and answers nobody.
    servers.retain(is_running);
    if servers.is_empty() {
        return Err(silent(format!("no pod of the server runs in namespace {namespace}")));
    }
    for pod in servers {
        match ask(client, &pod, CONTROLLER_PAGES, "/mesh").await {
            Ok(_) => {}
            Err(NoPage::Unknown) => {
                return Err(Mistake(format!(
                    "the control plane (pod {}) is of an older version, which cannot make all sidecars accept plaintext before they send \
                     it, and nothing was changed: install this version first, or use --at-once, with which some connections may be refused \
                     for a moment",
                    pod.name_any()
                ))
                .into());
            }
            Err(NoPage::Unanswered(why)) => return Err(silent(format!("pod {}: {why}", pod.name_any()))),
        }
    }
    Ok(())
}

/// Sidecars that are not waited for.
struct Passed<'a> {
    /// Those that the administrator leaves out.
    by_leave: &'a [Without],
    /// Those that did not answer in an earlier step, `NAMESPACE/NAME`.
    silent: BTreeSet<String>,
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
    async fn wait(
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
    fn lacks(&self, modes: &str) -> Option<String> {
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
fn gone_past(silent: &[(String, String)]) -> String {
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

fn name_of(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any())
}

fn is_running(pod: &Pod) -> bool {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running")
}

/// `1 sidecar has`, `2 sidecars have`.
fn have(sidecars: usize) -> String {
    format!("{} {}", count(sidecars, "sidecar"), if sidecars == 1 { "has" } else { "have" })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::kubernetes::check::fake_api::{Answer, Asked, client, list, refused};
    use serde_json::Value;

    #[test]
    fn a_sidecar_has_taken_a_step_once_no_port_of_it_is_strict() {
        assert_eq!(INBOUND.lacks("permissive\n"), None);
        assert_eq!(INBOUND.lacks("off\n"), None);
        assert_eq!(INBOUND.lacks("permissive\n9443 off\n"), None);
        assert_eq!(INBOUND.lacks("strict\n").as_deref(), Some("its mode is strict"));
        assert_eq!(INBOUND.lacks("permissive\n9443 off\n8080 strict\n").as_deref(), Some("its port 8080 is strict"));
        assert_eq!(FULL.lacks("permissive\n").as_deref(), Some("its mode is permissive"));
        assert_eq!(FULL.lacks("off\n"), None);
        assert!(FULL.lacks("").is_some());
    }

    /// A cluster with meshed pods and its ConfigMap.
    struct World {
        client: Client,
        /// Each value that was written.
        written: Arc<Mutex<Vec<Value>>>,
    }

    fn pod(name: &str, container: &str) -> Value {
        json!({ "metadata": { "namespace": "shop", "name": name }, "spec": { "containers": [{ "name": container }] },
                "status": { "phase": "Running" } })
    }

    /// With one pod, whose sidecar has one mode whatever it is told.
    fn world(present: Option<&'static str>, mode: &'static str, mesh: fn() -> Answer) -> World {
        world_of(present, vec![pod("web", SIDECAR)], move |_| Answer::Now(200, json!(mode)), mesh)
    }

    fn world_of(
        present: Option<&'static str>,
        pods: Vec<Value>,
        mode: impl Fn(&str) -> Answer + Send + Sync + 'static,
        mesh: fn() -> Answer,
    ) -> World {
        let written = Arc::<Mutex<Vec<Value>>>::default();
        let seen = written.clone();
        let client = client(move |asked: &Asked| match asked.path.as_str() {
            path if path.ends_with("/configmaps/countersign-mesh") => {
                let mut now = json!(present);
                let mut seen = seen.lock().unwrap();
                if asked.body["data"].is_object() {
                    assert_eq!(asked.body["metadata"]["resourceVersion"], "7", "what it was when it was read");
                    seen.push(asked.body["data"][KEY].clone());
                }
                if let Some(last) = seen.last() {
                    now = last.clone();
                }
                let data = if now.is_null() { json!({}) } else { json!({ KEY: now }) };
                Answer::Now(200, json!({ "metadata": { "name": "m", "resourceVersion": "7" }, "data": data }))
            }
            "/api/v1/namespaces/mesh/pods" => list("PodList", vec![pod("countersign-server-0", "server")]),
            "/api/v1/pods" => list("PodList", pods.clone()),
            path if path.ends_with(":9465/proxy/mesh") => mesh(),
            path if path.ends_with("/proxy/mode") => mode(path),
            path => panic!("{path}"),
        });
        World { client, written }
    }

    async fn go(world: &World, at_once: bool) -> Result<()> {
        go_without(world, at_once, &[]).await
    }

    async fn go_without(world: &World, at_once: bool, without: &[&str]) -> Result<()> {
        let without = without.iter().map(|text| text.parse().unwrap()).collect();
        let way = Way { namespace: "mesh".into(), patience: Duration::from_secs(5), at_once, without };
        way.go(&world.client, &CancellationToken::new()).await
    }

    fn new() -> Answer {
        Answer::Now(200, json!({ "mode": "strict" }))
    }

    /// What a page that is not there says through the API server's proxy.
    fn old() -> Answer {
        Answer::Now(404, json!("not found\n"))
    }

    #[tokio::test(start_paused = true)]
    async fn an_older_control_plane_is_told_nothing_that_it_does_not_know() {
        let world = world(None, "strict\n", old);
        let why = go(&world, false).await.unwrap_err().to_string();
        assert!(why.contains("pod countersign-server-0") && why.contains("--at-once"), "{why}");
        assert!(world.written.lock().unwrap().is_empty());
        let silent = self::world(None, "off\n", || refused(404, "pods \"countersign-server-0\" not found"));
        let why = go(&silent, false).await.unwrap_err().to_string();
        assert!(why.contains("does not say whether") && why.contains("--at-once") && !why.contains("older"), "{why}");
        let asked = self::world(None, "off\n", old);
        go(&asked, true).await.unwrap();
        assert_eq!(*asked.written.lock().unwrap(), [json!("true")]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_mesh_whose_sidecars_do_not_take_the_first_step_is_what_it_was() {
        let stays = world(Some("false"), "strict\n", new);
        let why = go(&stays, false).await.unwrap_err().to_string();
        assert!(why.contains("shop/web among them (its mode is strict)"), "{why}");
        assert!(why.ends_with("nothing was removed, and the mesh is what it was"), "{why}");
        assert_eq!(*stays.written.lock().unwrap(), [json!("inbound"), json!("false")]);
        let interrupted = world(None, "strict\n", new);
        let way = Way { namespace: "mesh".into(), patience: Duration::from_secs(60), at_once: false, without: vec![] };
        let stop = CancellationToken::new();
        stop.cancel();
        let why = way.go(&interrupted.client, &stop).await.unwrap_err().to_string();
        assert!(why.starts_with("interrupted before all sidecars accept plaintext"), "{why}");
        assert_eq!(*interrupted.written.lock().unwrap(), [json!("inbound"), Value::Null]);
        // Of an earlier run that was killed: nobody knows what it was before.
        let left = world(Some("inbound"), "strict\n", new);
        let why = go(&left, false).await.unwrap_err().to_string();
        assert!(why.contains("still told to accept plaintext") && !why.contains("what it was"), "{why}");
        let unset = world(None, "permissive\n8080 strict\n", new);
        let why = go(&unset, false).await.unwrap_err().to_string();
        assert!(why.contains("its port 8080 is strict"), "{why}");
        assert_eq!(*unset.written.lock().unwrap(), [json!("inbound"), Value::Null]);
    }

    /// Of two pods, one whose sidecar does not answer.
    fn one_is_silent(path: &str) -> Answer {
        if path.contains("/broken:") { Answer::Never } else { Answer::Now(200, json!("off\n")) }
    }

    fn ready(mut pod: Value) -> Value {
        pod["status"]["conditions"] = json!([{ "type": "Ready", "status": "True" }]);
        pod
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_does_not_answer_holds_nobody_up_for_ever() {
        let pods = vec![ready(pod("web", SIDECAR)), ready(pod("broken", SIDECAR))];
        let world = world_of(None, pods, one_is_silent, new);
        let began = Instant::now();
        go(&world, false).await.unwrap();
        assert_eq!(*world.written.lock().unwrap(), [json!("inbound"), json!("true")]);
        // Once for its patience and a look's own time, and not again in the second step.
        assert!(began.elapsed() < Duration::from_secs(13), "{:?}", began.elapsed());
        let silent = [("shop/broken".to_owned(), "no answer within 5 s".to_owned())];
        let said = gone_past(&silent);
        assert!(said.starts_with("going on without 1 sidecar that cannot be asked: shop/broken (no answer"), "{said}");
        // The only one, which its kubelet finds broken too.
        let alone = world_of(None, vec![pod("broken", SIDECAR)], one_is_silent, new);
        go(&alone, false).await.unwrap();
        // Not its own fault: nobody can be asked, and the kubelet finds it well.
        let unreachable = world_of(None, vec![ready(pod("broken", SIDECAR))], one_is_silent, new);
        let why = go(&unreachable, false).await.unwrap_err().to_string();
        assert!(why.contains("shop/broken among them (no answer within 5 s)"), "{why}");
        assert_eq!(*unreachable.written.lock().unwrap(), [json!("inbound"), Value::Null], "it is what it was");
    }

    #[tokio::test(start_paused = true)]
    async fn a_sidecar_that_is_down_is_not_waited_for_and_one_that_is_strict_is() {
        let mut down = pod("broken", SIDECAR);
        let waits = json!({ "waiting": { "reason": "CrashLoopBackOff" } });
        down["status"]["containerStatuses"] = json!([{ "name": SIDECAR, "state": waits, "ready": false, "restartCount": 9,
                                                       "image": "", "imageID": "" }]);
        let world = world_of(None, vec![pod("web", SIDECAR), down], one_is_silent, new);
        let began = Instant::now();
        go(&world, false).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        let strict =
            |path: &str| if path.contains("/broken:") { Answer::Never } else { Answer::Now(200, json!("strict\n")) };
        let stays = world_of(None, vec![pod("web", SIDECAR), pod("broken", SIDECAR)], strict, new);
        let why = go(&stays, false).await.unwrap_err().to_string();
        assert!(why.contains("2 sidecars have yet to accept plaintext, shop/web, shop/broken"), "{why}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_answers_and_never_does_what_it_is_told_can_be_left_out() {
        let stubborn =
            |path: &str| Answer::Now(200, if path.contains("/broken:") { json!("strict\n") } else { json!("off\n") });
        let pods = || vec![pod("web", SIDECAR), pod("broken", SIDECAR)];
        let why = go(&world_of(None, pods(), stubborn, new), false).await.unwrap_err().to_string();
        assert!(why.contains("shop/broken among them (its mode is strict)") && why.contains("--without"), "{why}");
        let left_out = world_of(None, pods(), stubborn, new);
        go_without(&left_out, false, &["shop/broken"]).await.unwrap();
        assert_eq!(*left_out.written.lock().unwrap(), [json!("inbound"), json!("true")]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_mesh_that_is_on_its_way_takes_no_step_back() {
        let first = world(None, "off\n", new);
        go(&first, false).await.unwrap();
        assert_eq!(*first.written.lock().unwrap(), [json!("inbound"), json!("true")]);
        let again = world(Some("true"), "off\n", old);
        let why = without_effect(&again.client, "mesh").await.unwrap();
        assert!(why.contains("`transparent: true`") && why.contains(r#""path":"/data/transparent"}]'"#), "{why}");
        assert_eq!(without_effect(&world(None, "off\n", old).client, "mesh").await, None);
        go(&again, false).await.unwrap();
        assert_eq!(*again.written.lock().unwrap(), [json!("true")]);
        let stuck = world(Some("inbound"), "permissive\n", new);
        let why = go(&stuck, false).await.unwrap_err().to_string();
        assert!(why.contains("1 sidecar has yet to send plaintext") && why.contains("to go back"), "{why}");
        assert_eq!(*stuck.written.lock().unwrap(), [json!("inbound"), json!("true")]);
    }
}
