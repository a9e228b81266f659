//! One `SpiffeID` object a pod, and one registration entry a `SpiffeID` object.
//!
//! Level-triggered: each pass compares the whole of what should be with the whole of what is, so that a pass after any
//! downtime, on either side, mends whatever was missed. What is, is known from watches and from our own answers.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_api::spire::types::{Entry, Selector, Spiffeid};
use countersign_identity::TrustDomain;
use countersign_identity::trust_domain::{agent_id, parse_workload_id};
use futures::{StreamExt, stream};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::config::RegistrarConfig;
use crate::crd::{Condition, SpiffeID, SpiffeIdSelector, SpiffeIdSpec, SpiffeIdStatus};
use crate::facts::{FEDERATES_WITH, Facts, Key, Pod};
use crate::metrics::Metrics;
use crate::server_link::ServerLink;
use crate::watch::Cluster;

/// Prefix of the IDs of our entries; no other entry is touched.
const ENTRY_PREFIX: &str = "k8s.";
/// Label of the objects that we made.
const MADE_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "countersign");
/// Objects written at once.
const AT_ONCE: usize = 16;
/// The server's entries are looked at anew after this time, for somebody may have changed them by hand.
const LOOK_AGAIN: Duration = Duration::from_secs(300);

/// The registrar.
pub struct Registrar {
    /// Settings.
    pub config: RegistrarConfig,
    /// What the server signs for.
    pub trust_domain: TrustDomain,
    /// The API server.
    pub client: Client,
    /// What is known of the cluster.
    pub cluster: Arc<Cluster>,
    /// The server.
    pub server: ServerLink,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// Something to do with an object.
enum Step {
    Create(SpiffeID),
    Replace(SpiffeID),
    Delete(SpiffeID),
}

/// What of an entry is ours to keep.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    spiffe_id: String,
    parent_id: String,
    selectors: BTreeSet<(String, String)>,
    dns_names: Vec<String>,
    federates_with: Vec<String>,
}

impl Wanted {
    fn read(entry: &Entry) -> Self {
        let id = |id: &Option<Spiffeid>| {
            id.as_ref().map(|i| format!("spiffe://{}{}", i.trust_domain, i.path)).unwrap_or_default()
        };
        Self {
            spiffe_id: id(&entry.spiffe_id),
            parent_id: id(&entry.parent_id),
            selectors: entry.selectors.iter().map(|s| (s.r#type.clone(), s.value.clone())).collect(),
            dns_names: entry.dns_names.clone(),
            federates_with: entry.federates_with.clone(),
        }
    }

    fn entry(&self, id: &str) -> Result<Entry, String> {
        let wire = |text: &str| {
            let id = parse_workload_id(text).map_err(|e| e.to_string())?;
            Ok::<_, String>(Some(Spiffeid {
                trust_domain: id.trust_domain_name().to_owned(),
                path: id.path().to_owned(),
            }))
        };
        let selectors = self.selectors.iter().map(|(t, v)| Selector { r#type: t.clone(), value: v.clone() });
        Ok(Entry {
            id: id.to_owned(),
            spiffe_id: wire(&self.spiffe_id)?,
            parent_id: wire(&self.parent_id)?,
            selectors: selectors.collect(),
            dns_names: self.dns_names.clone(),
            federates_with: self.federates_with.clone(),
            ..Entry::default()
        })
    }
}

/// Turns the list of a `spiffe.io/federatesWith` annotation into names.
fn federates_with(pod: &Pod) -> Vec<String> {
    let listed = pod.annotations.get(FEDERATES_WITH).map(String::as_str).unwrap_or_default();
    let names: BTreeSet<&str> = listed.split(',').map(str::trim).filter(|n| !n.is_empty()).collect();
    names.into_iter().map(ToOwned::to_owned).collect()
}

impl Registrar {
    /// Works until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut versions = self.cluster.versions();
        let mut known: Option<HashMap<String, Wanted>> = None;
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        let work = async {
            loop {
                versions.mark_unchanged();
                let done = self.pass(&mut known).await;
                self.metrics.registered.set(known.as_ref().map_or(0, |k| i64::try_from(k.len()).unwrap_or(i64::MAX)));
                let again = match done {
                    Ok(()) => {
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
                    // What has failed is not tried faster because something else has changed.
                    changed = versions.changed(), if !failed => if changed.is_err() { return },
                    () = tokio::time::sleep(again) => if !failed { known = None },
                    status = self.server.gone(), if known.is_some() && !failed => {
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

    /// Makes everything as it should be, as far as it can be done; says what could not.
    async fn pass(&self, known: &mut Option<HashMap<String, Wanted>>) -> Result<(), String> {
        let Some((desired, actual)) = self.cluster.facts().map(|f| (self.desired(&f), f.spiffe_ids.clone())) else {
            return Ok(());
        };
        let mut failed = self.keep_objects(&desired, &actual).await;
        let objects = self.cluster.facts().map(|f| f.spiffe_ids.clone()).unwrap_or_default();
        let outcome = self.keep_entries(&desired, &objects, known).await;
        match outcome {
            Ok(outcome) => failed.extend(self.keep_statuses(&objects, &outcome).await),
            Err(status) => failed.push(format!("server at {}: {}", self.server.name(), status.message())),
        }
        match failed.first() {
            None => Ok(()),
            Some(first) => Err(format!(
                "{first}{}",
                if failed.len() > 1 { format!(" (and {} more)", failed.len() - 1) } else { String::new() }
            )),
        }
    }

    /// The object that each pod should have.
    fn desired(&self, facts: &Facts) -> HashMap<Key, SpiffeID> {
        let pods =
            facts.pods.iter().filter(|(_, p)| !p.over && !self.config.excluded_namespaces.contains(&p.namespace));
        pods.filter_map(|(key, pod)| Some((key.clone(), self.object_of(pod, facts)?))).collect()
    }

    fn object_of(&self, pod: &Pod, facts: &Facts) -> Option<SpiffeID> {
        let node = pod.node.clone()?;
        let node_uid = facts.nodes.get(&(String::new(), node.clone()))?;
        let id = match self.config.template.id_of(pod, &self.trust_domain)? {
            Ok(id) => id,
            Err(error) => {
                tracing::warn!(namespace = pod.namespace, pod = pod.name, %error, "no identity for this pod");
                return None;
            }
        };
        let parent = agent_id(&self.trust_domain, "k8s_psat", &format!("{}/{node_uid}", self.config.cluster)).ok()?;
        let services = facts.services.values().filter(|s| s.selects(pod));
        let dns_names: BTreeSet<String> = services.map(|s| format!("{}.{}.svc", s.name, s.namespace)).collect();
        let spec = SpiffeIdSpec {
            spiffe_id: id.to_string(),
            parent_id: parent.to_string(),
            selector: SpiffeIdSelector {
                pod_uid: Some(pod.uid.clone()),
                node_name: Some(node),
                ..SpiffeIdSelector::default()
            },
            dns_names: dns_names.into_iter().collect(),
            federates_with: federates_with(pod),
        };
        let owner = OwnerReference {
            api_version: "v1".into(),
            kind: "Pod".into(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            controller: Some(true),
            block_owner_deletion: Some(false),
        };
        let metadata = ObjectMeta {
            name: Some(pod.name.clone()),
            namespace: Some(pod.namespace.clone()),
            labels: Some([(MADE_BY.0.to_owned(), MADE_BY.1.to_owned())].into()),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        };
        Some(SpiffeID { metadata, spec, status: None })
    }

    /// Creates, replaces and deletes the objects of pods.
    async fn keep_objects(&self, desired: &HashMap<Key, SpiffeID>, actual: &HashMap<Key, SpiffeID>) -> Vec<String> {
        let mut steps = vec![];
        for (key, wanted) in desired {
            match actual.get(key) {
                None => steps.push(Step::Create(wanted.clone())),
                Some(found) if owner_uid(found) != owner_uid(wanted) => {
                    // Another pod had this name, or somebody else's object has it: that one is left alone.
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
        let run = stream::iter(steps).map(|step| self.step(step)).buffer_unordered(AT_ONCE);
        run.filter_map(std::future::ready).collect().await
    }

    async fn step(&self, step: Step) -> Option<String> {
        let result = match &step {
            Step::Create(wanted) => self.create(wanted).await,
            Step::Replace(wanted) => self.replace(wanted).await,
            Step::Delete(found) => self.delete(found).await,
        };
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
        self.cluster.change(|facts| {
            facts.spiffe_ids.insert(key, object);
        });
    }

    async fn create(&self, wanted: &SpiffeID) -> Result<(), kube::Error> {
        match self.api(wanted).create(&PostParams::default(), wanted).await {
            Ok(created) => self.heard(created),
            // The watch will tell; and a pod or namespace that is going needs nothing any more.
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
        self.cluster.change(|facts| {
            if facts.spiffe_ids.get(&key).is_some_and(|now| now.uid() == uid) {
                facts.spiffe_ids.remove(&key);
            }
        });
        Ok(())
    }

    /// Creates, updates and deletes entries; what became of each object, by its UID.
    async fn keep_entries(
        &self,
        desired: &HashMap<Key, SpiffeID>,
        objects: &HashMap<Key, SpiffeID>,
        known: &mut Option<HashMap<String, Wanted>>,
    ) -> Result<HashMap<String, Result<String, String>>, tonic::Status> {
        let mut wanted: BTreeMap<String, (String, Wanted)> = BTreeMap::new();
        for (key, object) in objects.iter().filter(|(_, o)| o.metadata.deletion_timestamp.is_none()) {
            let Some(uid) = object.uid() else { continue };
            let own = desired.get(key).is_some_and(|d| d.spec == object.spec && owner_uid(d) == owner_uid(object));
            wanted.insert(format!("{ENTRY_PREFIX}{uid}"), (uid, entry_of(object, own)));
        }
        let held = if let Some(held) = known {
            held
        } else {
            let listed = self.server.list().await?;
            let ours = listed.iter().filter(|e| e.id.starts_with(ENTRY_PREFIX));
            known.insert(ours.map(|e| (e.id.clone(), Wanted::read(e))).collect())
        };
        // What is gone goes first: its successor may want the very same.
        let orphans: Vec<String> = held.keys().filter(|id| !wanted.contains_key(*id)).cloned().collect();
        if !orphans.is_empty() {
            self.server.delete(&orphans).await?;
            orphans.iter().for_each(|id| drop(held.remove(id)));
            tracing::info!(entries = orphans.len(), "entries of pods that are gone are deleted");
        }
        let mut outcome = HashMap::new();
        let (mut create, mut update) = (vec![], vec![]);
        for (id, (uid, want)) in &wanted {
            match (held.get(id), want.entry(id)) {
                (Some(have), _) if have == want => drop(outcome.insert(uid.clone(), Ok(id.clone()))),
                (_, Err(why)) => drop(outcome.insert(uid.clone(), Err(why))),
                (None, Ok(entry)) => create.push((uid, want, entry)),
                (Some(_), Ok(entry)) => update.push((uid, want, entry)),
            }
        }
        for (fresh, batch) in [(true, create), (false, update)] {
            if batch.is_empty() {
                continue;
            }
            let entries: Vec<Entry> = batch.iter().map(|(_, _, entry)| entry.clone()).collect();
            let done = if fresh { self.server.create(&entries).await? } else { self.server.update(&entries).await? };
            for ((uid, want, entry), done) in batch.into_iter().zip(done) {
                // ALREADY_EXISTS (6) with our own ID: an answer that we did not hear.
                let good = done.code == 0 || done.code == 6 && fresh;
                if good {
                    held.insert(entry.id.clone(), want.clone());
                    tracing::info!(spiffe_id = want.spiffe_id, entry = entry.id, fresh, "pod registered");
                }
                outcome.insert(uid.clone(), if good { Ok(entry.id) } else { Err(done.message) });
            }
        }
        Ok(outcome)
    }

    /// Writes into each object what became of it.
    async fn keep_statuses(
        &self,
        objects: &HashMap<Key, SpiffeID>,
        outcome: &HashMap<String, Result<String, String>>,
    ) -> Vec<String> {
        let stale = objects.values().filter_map(|object| {
            let outcome = outcome.get(&object.uid()?)?;
            let before = object.status.as_ref().and_then(|s| s.conditions.first().map(|c| (s.entry_id.as_ref(), c)));
            let same = match (before, outcome) {
                (Some((id, c)), Ok(entry)) => id == Some(entry) && c.status == "True",
                (Some((_, c)), Err(why)) => c.status == "False" && c.message == *why,
                (None, _) => false,
            };
            (!same).then(|| (object.clone(), outcome.clone()))
        });
        let stale: Vec<_> = stale.collect();
        let run = stream::iter(stale).map(|(object, outcome)| self.write_status(object, outcome));
        run.buffer_unordered(AT_ONCE).filter_map(std::future::ready).collect().await
    }

    async fn write_status(&self, object: SpiffeID, outcome: Result<String, String>) -> Option<String> {
        let (namespace, name) = key_of(&object);
        let patch = json!({ "status": status_of(&outcome) });
        let failed = outcome.err().map(|why| format!("SpiffeID {namespace}/{name}: {why}"));
        match self.api(&object).patch_status(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(written) => {
                self.heard(written);
                failed
            }
            Err(kube::Error::Api(e)) if e.code == 404 => None,
            Err(error) => Some(format!("status of SpiffeID {namespace}/{name}: {error}")),
        }
    }
}

fn status_of(outcome: &Result<String, String>) -> SpiffeIdStatus {
    let now = time::OffsetDateTime::now_utc().replace_nanosecond(0).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    let (status, reason, message) = match outcome {
        Ok(_) => ("True", "EntryKept", "the registration entry is as it should be"),
        Err(why) => ("False", "Refused", why.as_str()),
    };
    let condition = Condition {
        kind: "Registered".into(),
        status: status.into(),
        reason: reason.into(),
        message: message.into(),
        last_transition_time: now.format(&time::format_description::well_known::Rfc3339).unwrap_or_default(),
    };
    SpiffeIdStatus { entry_id: outcome.as_ref().ok().cloned(), conditions: vec![condition] }
}

/// The entry of an object. One that is not as we make them speaks for pods of its own namespace alone.
fn entry_of(object: &SpiffeID, own: bool) -> Wanted {
    let mut selectors: BTreeSet<_> = object.spec.selector.selectors().into_iter().collect();
    if !own {
        selectors.insert(("k8s".into(), format!("ns:{}", object.namespace().unwrap_or_default())));
    }
    Wanted {
        spiffe_id: object.spec.spiffe_id.clone(),
        parent_id: object.spec.parent_id.clone(),
        selectors,
        dns_names: object.spec.dns_names.clone(),
        federates_with: object.spec.federates_with.clone(),
    }
}

fn key_of(object: &SpiffeID) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

fn is_ours(object: &SpiffeID) -> bool {
    object.labels().get(MADE_BY.0).map(String::as_str) == Some(MADE_BY.1)
}

fn owner_uid(object: &SpiffeID) -> Option<&str> {
    object.owner_references().iter().find(|o| o.kind == "Pod").map(|o| o.uid.as_str())
}
