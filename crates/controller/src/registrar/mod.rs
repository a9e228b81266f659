//! The registrar: one `SpiffeID` object per pod, and one registration entry per `SpiffeID` object.
//!
//! Level-triggered: each pass compares the complete desired state with the complete actual state, so that a pass after
//! any downtime, on either side, repairs what was missed. The actual state is known from watches and from our own
//! calls.

#[cfg(test)]
mod bench;
mod by_hand;
mod entries;
mod object;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_identity::TrustDomain;
use futures::{StreamExt, stream};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use self::by_hand::entry_by_hand;
use self::entries::{Judged, Refused};
use self::object::{Wanted, entry_of, is_ours, key_of, object_of, owner_uid, status_of};
use crate::config::RegistrarConfig;
use crate::crd::SpiffeID;
use crate::metrics::Metrics;
use crate::server_link::ServerLink;
use crate::store::{Key, ServiceIndex, Store};
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

/// The object that each pod should have.
fn desired(store: &Store, config: &RegistrarConfig, trust_domain: &TrustDomain) -> HashMap<Key, SpiffeID> {
    let services = ServiceIndex::of(store);
    let pods = store.pods.iter().filter(|(_, p)| !p.over && !config.excluded_namespaces.contains(&p.namespace));
    pods.filter_map(|(key, pod)| Some((key.clone(), object_of(pod, store, &services, config, trust_domain)?))).collect()
}

/// The changes to the objects that give each pod its own.
fn steps(desired: &HashMap<Key, SpiffeID>, actual: &HashMap<Key, SpiffeID>) -> Vec<Step> {
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
    let gone = actual.iter().filter(|(key, found)| is_ours(found) && !desired.contains_key(*key));
    steps.extend(gone.map(|(_, found)| Step::Delete(found.clone())));
    steps
}

/// One call to the API server, within [`CALL`]: the client's own bound is made for watches, and is minutes long.
async fn in_time<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, String> {
    match tokio::time::timeout(CALL, call).await {
        Ok(answer) => answer.map_err(|e| e.to_string()),
        Err(_) => Err(format!("the API server gave no answer within {CALL:?}")),
    }
}

impl Registrar {
    /// Works until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut versions = self.cluster.versions();
        let mut known: Option<HashMap<String, Wanted>> = None;
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        let work = async {
            let gone = self.server.gone();
            tokio::pin!(gone);
            loop {
                versions.mark_unchanged();
                let began = tokio::time::Instant::now();
                let done = self.pass(&mut known).await;
                let rest = (began.elapsed() * REST).clamp(TOGETHER, MAX_REST);
                self.metrics.registered.set(known.as_ref().map_or(0, |k| i64::try_from(k.len()).unwrap_or(i64::MAX)));
                let again = match done {
                    Ok(Left::Something) => {
                        backoff.reset();
                        continue;
                    }
                    Ok(Left::Nothing) => {
                        backoff.reset();
                        LOOK_AGAIN
                    }
                    Err(why) => {
                        let delay = backoff.next_delay();
                        self.metrics.registrar_errors.inc();
                        tracing::warn!(why, "registration is not complete; trying again in {delay:.1?}");
                        delay
                    }
                };
                let failed = again != LOOK_AGAIN;
                tokio::select! {
                    // After a failure, other changes do not shorten the wait for the next try.
                    changed = versions.changed(), if !failed => {
                        if changed.is_err() {
                            return;
                        }
                        tokio::time::sleep(rest).await;
                    }
                    () = tokio::time::sleep(again) => if !failed { known = None },
                    status = gone.as_mut(), if known.is_some() && !failed => {
                        gone.set(self.server.gone());
                        tracing::warn!(status = status.message(), "the server went away; its entries will be looked at anew");
                        known = None;
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

    /// Brings the actual state closer to the desired state: first some objects, then the entries of all objects, last
    /// the objects' statuses. Errors: what could not be done.
    async fn pass(&self, known: &mut Option<HashMap<String, Wanted>>) -> Result<Left, String> {
        let planned = self.cluster.store().map(|store| {
            let desired = self.desired(&store);
            let steps = steps(&desired, &store.spiffe_ids);
            (desired, steps)
        });
        let Some((desired, steps)) = planned else { return Ok(Left::Nothing) };
        let (mut left, mut failed) = self.keep_objects(steps).await;
        let Some(judged) = self.cluster.store().map(|store| self.judge(&desired, &store)) else {
            return Ok(Left::Nothing);
        };
        let said = |status: tonic::Status| format!("server at {}: {}", self.server.name(), status.message());
        match entries::keep(&self.server, judged, known).await {
            Ok(kept) => {
                failed.extend(kept.failed.into_iter().map(said));
                if left == Left::Nothing {
                    let (more, refused) = self.keep_statuses(&kept.outcome).await;
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

    /// The object that each pod should have.
    fn desired(&self, store: &Store) -> HashMap<Key, SpiffeID> {
        desired(store, &self.config, &self.trust_domain)
    }

    /// The entry of each object by ID, with the object's UID; or why it has none.
    fn judge(&self, desired: &HashMap<Key, SpiffeID>, store: &Store) -> Judged {
        let mut judged = Judged::default();
        for (key, object) in store.spiffe_ids.iter().filter(|(_, o)| o.metadata.deletion_timestamp.is_none()) {
            let Some(uid) = object.uid() else { continue };
            // For a pod's own object, its intended content counts, not its actual one: it may be outdated and will be
            // replaced.
            let own = desired.get(key).filter(|d| owner_uid(d) == owner_uid(object));
            let entry = match own {
                Some(own) => Ok(entry_of(own, None)),
                // It belongs to a pod that is gone: it will be deleted and no longer counts.
                None if is_ours(object) => continue,
                None => entry_by_hand(object, store, &self.config, &self.trust_domain),
            };
            match entry {
                Ok(entry) => drop(judged.wanted.insert(format!("{ENTRY_PREFIX}{uid}"), (uid, entry))),
                Err(why) => drop(judged.refused.insert(uid, why)),
            }
        }
        judged
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
        self.cluster.change(|store| {
            store.spiffe_ids.insert(key, object);
        });
    }

    async fn create(&self, wanted: &SpiffeID) -> Result<(), kube::Error> {
        match self.api(wanted).create(&PostParams::default(), wanted).await {
            Ok(created) => self.heard(created),
            // The watch will report it; and a pod or namespace that is being deleted needs no object.
            Err(kube::Error::Api(e))
                if e.code == 409 || e.code == 404 || e.code == 403 && e.message.contains("being terminated") => {}
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
        self.cluster.change(|store| {
            if store.spiffe_ids.get(&key).is_some_and(|now| now.uid() == uid) {
                store.spiffe_ids.remove(&key);
            }
        });
        Ok(())
    }

    /// Writes into each object what became of it.
    async fn keep_statuses(&self, outcome: &HashMap<String, Result<String, Refused>>) -> (Left, Vec<String>) {
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
            .flat_map(|store| store.spiffe_ids.values().filter_map(&stale))
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
        // Whoever asks for what is refused does not make everybody else wait for the next try.
        let failed = outcome.err().filter(|refused| !refused.by_content);
        let failed = failed.map(|Refused { why, .. }| format!("SpiffeID {namespace}/{name}: {why}"));
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
                failed
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
        let began = tokio::time::Instant::now();
        let why = in_time(std::future::pending::<Result<(), kube::Error>>()).await.unwrap_err();
        assert_eq!(why, "the API server gave no answer within 15s");
        assert_eq!(began.elapsed(), CALL);
        assert_eq!(in_time(async { Ok(1) }).await, Ok(1));
    }
}
