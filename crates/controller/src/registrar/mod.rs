//! The registrar: one `SpiffeID` object per pod, and one registration entry per `SpiffeID` object.
//!
//! Level-triggered: a pass compares the desired state with the actual state, so that it repairs whatever was missed
//! during any downtime, on either side. The actual state is known from watches and from our own calls. A pass looks at
//! the keys (namespace and name) whose pods or objects have changed, or at all keys: in the beginning, after a failure,
//! when something has changed that many pods depend on, and every few minutes.

#[cfg(test)]
mod bench;
mod by_hand;
mod entries;
#[cfg(test)]
mod incremental;
mod object;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_identity::TrustDomain;
use countersign_watch::in_words;
use futures::{StreamExt, stream};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::by_hand::entry_by_hand;
use self::entries::{Claim, Judged, Known, Refused};
pub use self::object::is_ours;
use self::object::{entry_of, key_of, object_of, owner_uid, status_of};
use crate::changed::{Changed, Reader};
use crate::config::RegistrarConfig;
use crate::crd::SpiffeID;
use crate::metrics::Metrics;
use crate::server_link::ServerLink;
use crate::store::{Key, Pod, ServiceIndex, Store};
use crate::watch::Cluster;

/// Prefix of the IDs of our entries. Other entries are never touched.
const ENTRY_PREFIX: &str = "k8s.";
/// Most objects written concurrently.
const AT_ONCE: usize = 16;
/// Most objects written per pass, so that entries of the first pods do not wait for objects of the last.
const A_PASS: usize = 48;
/// Changes within this time are handled together.
const TOGETHER: Duration = Duration::from_millis(50);
/// A pass is followed by a pause of this many times its duration, so that a busy cluster does not occupy a core.
const REST: u32 = 3;
/// Longest pause: no pod waits longer for its turn.
const MAX_REST: Duration = Duration::from_secs(1);
/// A call to the API server takes no longer.
const CALL: Duration = Duration::from_secs(15);
/// The server's entries are looked at anew after this time, for somebody may have changed them by hand.
const LOOK_AGAIN: Duration = Duration::from_secs(300);

/// Maintains the `SpiffeID` objects and registration entries of all pods.
pub struct Registrar {
    /// Settings of the registrar.
    pub config: RegistrarConfig,
    /// The trust domain of the server.
    pub trust_domain: TrustDomain,
    /// Client of the API server.
    pub client: Client,
    /// The view of the cluster.
    pub cluster: Arc<Cluster>,
    /// Connection to the server.
    pub server: ServerLink,
    /// The controller's metrics.
    pub metrics: Arc<Metrics>,
}

/// A change of one object.
enum Step {
    Create(SpiffeID),
    Replace(SpiffeID),
    Delete(SpiffeID),
}

/// Whether a pass has left work for the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Nothing,
    Something,
}

impl Left {
    /// Truncates a list to what one pass does; returns whether more is left.
    fn cut<T>(all: &mut Vec<T>) -> Self {
        let left = if all.len() > A_PASS { Self::Something } else { Self::Nothing };
        all.truncate(A_PASS);
        left
    }
}

/// The keys that a pass looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Scope {
    All,
    Keys(HashSet<Key>),
}

impl Scope {
    /// Adds what has changed. Namespaces, slices and the mesh's settings make no identities.
    fn add(&mut self, changed: Changed) {
        if changed.everything || changed.services || changed.nodes {
            *self = Self::All;
        }
        if let Self::Keys(keys) = self {
            keys.extend(changed.pods);
            keys.extend(changed.spiffe_ids);
        }
    }

    /// The keys, if they are not all.
    fn keys(&self) -> Option<&HashSet<Key>> {
        match self {
            Self::All => None,
            Self::Keys(keys) => Some(keys),
        }
    }

    /// The objects at these keys, among all objects.
    fn of<'a, V>(&self, all: &'a HashMap<Key, V>) -> Vec<(&'a Key, &'a V)> {
        match self {
            Self::All => all.iter().collect(),
            Self::Keys(keys) => keys.iter().filter_map(|key| all.get_key_value(key)).collect(),
        }
    }
}

/// What is kept from one pass to the next.
struct Progress {
    scope: Scope,
    services: ServiceIndex,
    /// What the server holds, where that is known.
    known: Option<Known>,
}

impl Progress {
    /// Nothing is known yet.
    fn new() -> Self {
        Self { scope: Scope::All, services: ServiceIndex::default(), known: None }
    }

    /// What the server holds is looked at anew.
    fn forget(&mut self) {
        self.known = None;
        self.scope = Scope::All;
    }

    /// Takes what has changed into the scope.
    fn hear(&mut self, store: &Store, changed: Changed) {
        self.scope.add(changed);
        let Some(known) = &self.known else {
            self.scope = Scope::All;
            self.services = ServiceIndex::of(store);
            return;
        };
        match &mut self.scope {
            Scope::All => self.services = ServiceIndex::of(store),
            // The entry that keeps theirs from being created may be among those that go.
            Scope::Keys(keys) => keys.extend(known.waiting.iter().cloned()),
        }
    }
}

/// What identities are made by.
struct Rules<'a> {
    config: &'a RegistrarConfig,
    trust_domain: &'a TrustDomain,
}

impl Rules<'_> {
    /// The object that each pod of the scope should have.
    fn desired(&self, store: &Store, progress: &Progress) -> HashMap<Key, SpiffeID> {
        let excluded = |pod: &Pod| pod.over || self.config.excluded_namespaces.contains(&pod.namespace);
        let pods = progress.scope.of(&store.pods).into_iter().filter(|(_, pod)| !excluded(pod));
        let object = |pod| object_of(pod, store, &progress.services, self.config, self.trust_domain);
        pods.filter_map(|(key, pod)| Some((key.clone(), object(pod)?))).collect()
    }

    /// The entry of each object of the scope by ID; or why it has none.
    fn judge(&self, desired: &HashMap<Key, SpiffeID>, store: &Store, scope: &Scope) -> Judged {
        let mut judged = Judged { keys: scope.keys().cloned(), ..Judged::default() };
        let objects = scope.of(&store.spiffe_ids).into_iter();
        for (key, object) in objects.filter(|(_, object)| object.metadata.deletion_timestamp.is_none()) {
            let Some(uid) = object.uid() else { continue };
            // For a pod's own object, its intended content counts, not its actual one: it may be outdated and will be
            // replaced.
            let own = desired.get(key).filter(|d| owner_uid(d) == owner_uid(object));
            let entry = match own {
                Some(own) => Ok(entry_of(own, None)),
                // It belongs to a pod that is gone: it will be deleted and no longer counts.
                None if is_ours(object) => continue,
                None => entry_by_hand(object, store, self.config, self.trust_domain),
            };
            match entry {
                Ok(want) => {
                    let id = format!("{ENTRY_PREFIX}{uid}");
                    judged.wanted.insert(id, Claim { key: key.clone(), uid, want });
                }
                Err(why) => drop(judged.refused.insert(uid, why)),
            }
        }
        let has_object = |(key, wanted): &(&Key, &SpiffeID)| {
            let found = store.spiffe_ids.get(*key).filter(|found| found.metadata.deletion_timestamp.is_none());
            found.is_some_and(|found| owner_uid(found) == owner_uid(wanted))
        };
        let lacking = desired.iter().filter(|of_pod| !has_object(of_pod));
        judged.without_object = lacking.map(|(key, wanted)| (key.clone(), entry_of(wanted, None))).collect();
        judged
    }
}

/// The changes to the objects of the scope that give each pod its own.
fn steps(desired: &HashMap<Key, SpiffeID>, actual: &HashMap<Key, SpiffeID>, scope: &Scope) -> Vec<Step> {
    let mut steps = vec![];
    for (key, wanted) in desired {
        match actual.get(key) {
            None => steps.push(Step::Create(wanted.clone())),
            Some(found) if owner_uid(found) != owner_uid(wanted) => {
                // An object of an earlier pod with this name, or of another owner, which is left alone.
                if is_ours(found) {
                    steps.push(Step::Delete(found.clone()));
                }
            }
            Some(found) if found.spec != wanted.spec => steps.push(Step::Replace(wanted.clone())),
            Some(_) => {}
        }
    }
    let objects = scope.of(actual).into_iter();
    let gone = objects.filter(|(key, found)| is_ours(found) && !desired.contains_key(*key));
    steps.extend(gone.map(|(_, found)| Step::Delete(found.clone())));
    steps
}

/// One call to the API server, within [`CALL`]: the client's own bound is made for watches, and is minutes long.
async fn in_time<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, String> {
    match tokio::time::timeout(CALL, call).await {
        // 405: it is being deleted.
        Ok(Err(kube::Error::Api(e))) if e.code == 404 || e.code == 405 => {
            Err("the resource is not defined; apply the manifests of `countersign install`".into())
        }
        Ok(answer) => answer.map_err(|e| in_words(&e)),
        Err(_) => Err(format!("the API server gave no answer within {CALL:?}")),
    }
}

impl Registrar {
    /// Works until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut reader = self.cluster.reader();
        let mut progress = Progress::new();
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        let mut anew = Instant::now() + LOOK_AGAIN;
        let work = async {
            let gone = self.server.gone();
            tokio::pin!(gone);
            loop {
                let began = Instant::now();
                if anew <= began {
                    anew = began + LOOK_AGAIN;
                    progress.forget();
                }
                let done = self.pass(&mut reader, &mut progress).await;
                let rest = (began.elapsed() * REST).clamp(TOGETHER, MAX_REST);
                let known = progress.known.as_ref();
                self.metrics.registered.set(known.map_or(0, |k| i64::try_from(k.held.len()).unwrap_or(i64::MAX)));
                let again = match done {
                    Ok(Left::Something) => {
                        backoff.reset();
                        continue;
                    }
                    Ok(Left::Nothing) => {
                        backoff.reset();
                        progress.scope = Scope::Keys(HashSet::new());
                        None
                    }
                    Err(why) => {
                        let delay = backoff.next_delay();
                        progress.scope = Scope::All;
                        self.metrics.registrar_errors.inc();
                        tracing::warn!(why, "registration is not complete; trying again in {delay:.1?}");
                        Some(Instant::now() + delay)
                    }
                };
                let failed = again.is_some();
                tokio::select! {
                    // After a failure, other changes do not shorten the wait for the next try.
                    changed = reader.changed(), if !failed => {
                        if changed.is_err() {
                            return;
                        }
                        tokio::time::sleep(rest).await;
                    }
                    () = tokio::time::sleep_until(again.unwrap_or(anew)) => {}
                    status = gone.as_mut(), if progress.known.is_some() && !failed => {
                        gone.set(self.server.gone());
                        tracing::warn!(status = status.message(), "the server went away; its entries will be looked at anew");
                        progress.forget();
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                }
            }
        };
        tokio::select! {
            () = work => {}
            () = shutdown.cancelled() => {}
        }
    }

    /// Brings the actual state closer to the desired state: first some objects, then the entries of all objects of the
    /// scope, last the objects' statuses. Errors: what could not be done.
    async fn pass(&self, reader: &mut Reader, progress: &mut Progress) -> Result<Left, String> {
        let rules = Rules { config: &self.config, trust_domain: &self.trust_domain };
        let planned = self.cluster.look(reader).map(|(store, changed)| {
            progress.hear(&store, changed);
            let desired = rules.desired(&store, progress);
            let steps = steps(&desired, &store.spiffe_ids, &progress.scope);
            (desired, steps)
        });
        let Some((desired, steps)) = planned else { return Ok(Left::Nothing) };
        let (mut left, mut failed) = self.keep_objects(steps).await;
        let judged = self.cluster.store().map(|store| rules.judge(&desired, &store, &progress.scope));
        let Some(judged) = judged else { return Ok(Left::Nothing) };
        let said = |status: tonic::Status| format!("server at {}: {}", self.server.name(), status.message());
        match entries::keep(&self.server, judged, &mut progress.known).await {
            Ok(kept) => {
                failed.extend(kept.failed.into_iter().map(said));
                if left == Left::Nothing {
                    let (more, refused) = self.keep_statuses(&kept.outcome, &progress.scope).await;
                    left = more;
                    failed.extend(refused);
                }
            }
            Err(status) => failed.push(said(status)),
        }
        match failed.first() {
            None => Ok(left),
            Some(first) => Err(format!(
                "{first}{}",
                if failed.len() > 1 { format!(" (and {} more)", failed.len() - 1) } else { String::new() }
            )),
        }
    }

    /// Creates, replaces and deletes the objects of pods.
    async fn keep_objects(&self, mut steps: Vec<Step>) -> (Left, Vec<String>) {
        let left = Left::cut(&mut steps);
        let run = stream::iter(steps).map(|step| self.step(step)).buffer_unordered(AT_ONCE);
        (left, run.filter_map(std::future::ready).collect().await)
    }

    async fn step(&self, step: Step) -> Option<String> {
        let result = in_time(async {
            match &step {
                Step::Create(wanted) => self.create(wanted).await,
                Step::Replace(wanted) => self.replace(wanted).await,
                Step::Delete(found) => self.delete(found).await,
            }
        })
        .await;
        let (Step::Create(object) | Step::Replace(object) | Step::Delete(object)) = &step;
        let (namespace, name) = key_of(object);
        result.err().map(|e| format!("SpiffeID {namespace}/{name}: {e}"))
    }

    fn api(&self, object: &SpiffeID) -> Api<SpiffeID> {
        Api::namespaced(self.client.clone(), &object.namespace().unwrap_or_default())
    }

    fn heard(&self, mut object: SpiffeID) {
        object.metadata.managed_fields = None;
        let key = key_of(&object);
        let mark = |changed: &mut Changed| changed.spiffe_ids.extend([key.clone()]);
        self.cluster.change(mark, |store| drop(store.spiffe_ids.insert(key.clone(), object)));
    }

    async fn create(&self, wanted: &SpiffeID) -> Result<(), kube::Error> {
        match self.api(wanted).create(&PostParams::default(), wanted).await {
            Ok(created) => self.heard(created),
            // 409: the watch will report it, or that it is gone if it is being deleted. A pod or namespace that is being
            // deleted needs no object.
            Err(kube::Error::Api(e))
                if e.code == 409
                    || e.code == 404 && e.message.starts_with("namespaces ")
                    || e.code == 403 && e.message.contains("being terminated") => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn replace(&self, wanted: &SpiffeID) -> Result<(), kube::Error> {
        let patch = json!({ "spec": wanted.spec });
        match self.api(wanted).patch(&wanted.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(replaced) => self.heard(replaced),
            Err(kube::Error::Api(e)) if e.code == 404 => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn delete(&self, found: &SpiffeID) -> Result<(), kube::Error> {
        let only_this = Preconditions { uid: found.uid(), resource_version: None };
        let params = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
        match self.api(found).delete(&found.name_any(), &params).await {
            Ok(_) => {}
            Err(kube::Error::Api(e)) if e.code == 404 || e.code == 409 => {}
            Err(error) => return Err(error),
        }
        let (key, uid) = (key_of(found), found.uid());
        let mark = |changed: &mut Changed| changed.spiffe_ids.extend([key.clone()]);
        self.cluster.change(mark, |store| {
            if store.spiffe_ids.get(&key).is_some_and(|now| now.uid() == uid) {
                store.spiffe_ids.remove(&key);
            }
        });
        Ok(())
    }

    /// Writes into each object of the scope what became of it.
    async fn keep_statuses(
        &self,
        outcome: &HashMap<String, Result<String, Refused>>,
        scope: &Scope,
    ) -> (Left, Vec<String>) {
        let stale = |object: &SpiffeID| {
            let outcome = outcome.get(&object.uid()?)?;
            let before = object.status.as_ref().and_then(|s| s.conditions.first().map(|c| (s.entry_id.as_ref(), c)));
            let same = match (before, outcome) {
                (Some((id, c)), Ok(entry)) => id == Some(entry) && c.status == "True",
                (Some((_, c)), Err(why)) => c.status == "False" && c.message == why.why,
                (None, _) => false,
            };
            (!same).then(|| (object.clone(), outcome.clone()))
        };
        let mut stale: Vec<_> = self
            .cluster
            .store()
            .iter()
            .flat_map(|store| scope.of(&store.spiffe_ids).into_iter().filter_map(|(_, object)| stale(object)))
            .take(A_PASS + 1)
            .collect();
        let left = Left::cut(&mut stale);
        let run = stream::iter(stale).map(|(object, outcome)| self.write_status(object, outcome));
        (left, run.buffer_unordered(AT_ONCE).filter_map(std::future::ready).collect().await)
    }

    async fn write_status(&self, object: SpiffeID, outcome: Result<String, Refused>) -> Option<String> {
        let (namespace, name) = key_of(&object);
        let patch = json!({ "status": status_of(&outcome) });
        if let Err(Refused { why, by_content: true }) = &outcome {
            tracing::warn!(namespace, name, why, "a SpiffeID is refused for what it says");
        }
        let (api, params, patch) = (self.api(&object), PatchParams::default(), Patch::Merge(patch));
        let written = in_time(async {
            match api.patch_status(&name, &params, &patch).await {
                Ok(written) => Ok(Some(written)),
                Err(kube::Error::Api(e)) if e.code == 404 => Ok(None),
                Err(error) => Err(error),
            }
        });
        match written.await {
            Ok(Some(written)) => {
                self.heard(written);
                None
            }
            Ok(None) => None,
            Err(error) => Some(format!("status of SpiffeID {namespace}/{name}: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_api_server_that_does_not_answer_does_not_hold_up_a_pass() {
        let began = Instant::now();
        let why = in_time(std::future::pending::<Result<(), kube::Error>>()).await.unwrap_err();
        assert_eq!(why, "the API server gave no answer within 15s");
        assert_eq!(began.elapsed(), CALL);
        assert_eq!(in_time(async { Ok(1) }).await, Ok(1));
    }
}
