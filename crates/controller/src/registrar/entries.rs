//! Registration entries at the server: made, changed and deleted until they are as they should be.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use countersign_api::spire::types::Entry;
use tonic::{Code, Status};

use super::ENTRY_PREFIX;
use super::object::{Subject, Wanted};
use crate::server_link::{Answers, Done, Entries};
use crate::store::Key;

/// What follows from the objects and pods at some keys.
#[derive(Debug, Default)]
pub struct Judged {
    /// The keys; `None` for all there are.
    pub keys: Option<HashSet<Key>>,
    /// The entries by their IDs.
    pub wanted: BTreeMap<String, Claim>,
    /// Why an object has none, by its UID.
    pub refused: HashMap<String, String>,
    /// What pods should have that have no object now.
    pub without_object: Vec<(Key, Wanted)>,
}

/// What is wanted of an entry, and for whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Where the object is, or should be.
    pub key: Key,
    /// UID of the object; empty if there is none.
    pub uid: String,
    /// What the entry should be.
    pub want: Wanted,
}

/// What the server holds of ours, and for whom.
#[derive(Debug, Default)]
pub struct Known {
    /// The entries by their IDs.
    pub held: HashMap<String, Wanted>,
    /// IDs of the entries of each key, as of the last look at it.
    of_key: HashMap<Key, BTreeSet<String>>,
    /// Keys of objects whose entry cannot be there yet: another one is in its way, or a foreign bundle is missing. Looked at with each
    /// pass.
    pub waiting: HashSet<Key>,
}

impl Known {
    fn of(listed: &[Entry]) -> Self {
        let ours = listed.iter().filter(|e| e.id.starts_with(ENTRY_PREFIX));
        Self { held: ours.map(|e| (e.id.clone(), Wanted::read(e))).collect(), ..Self::default() }
    }

    /// Forgets what the keys that are looked at again had; returns the IDs that were theirs.
    fn reopen(&mut self, keys: Option<&HashSet<Key>>) -> HashSet<String> {
        let Some(keys) = keys else {
            self.of_key.clear();
            self.waiting.clear();
            return self.held.keys().cloned().collect();
        };
        self.waiting.retain(|key| !keys.contains(key));
        keys.iter().filter_map(|key| self.of_key.remove(key)).flatten().collect()
    }
}

/// Why an object has no entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// For people.
    pub why: String,
    /// It is refused for what it says, and will be until it says something else.
    pub by_content: bool,
}

impl Refused {
    fn by_content(why: String) -> Self {
        Self { why, by_content: true }
    }
}

/// What came of one look at all entries.
#[derive(Debug, Default)]
pub struct Kept {
    /// The entry of each object by its UID, or why it has none. One whose call has failed is not among them.
    pub outcome: HashMap<String, Result<String, Refused>>,
    /// The calls that have failed, and the entries that the server could not write. Whatever is here is to be tried again.
    pub failed: Vec<Status>,
}

/// Creates, updates and deletes the entries of the keys that were judged. `known` is what the server holds, where that
/// is known; where it is not, all keys must have been judged.
pub async fn keep(server: &impl Entries, mut judged: Judged, known: &mut Option<Known>) -> Result<Kept, Status> {
    let held = match known {
        Some(held) => held,
        None => known.insert(Known::of(&server.list().await?)),
    };
    let mut kept = Kept::default();
    // What is gone goes first: its successor may want the very same.
    let theirs = held.reopen(judged.keys.as_ref());
    let orphans = orphans(&mut judged, &held.held, &theirs);
    for (id, claim) in &judged.wanted {
        held.of_key.entry(claim.key.clone()).or_default().insert(id.clone());
    }
    if !orphans.is_empty() {
        let Answers { done, failed } = server.delete(&orphans).await;
        kept.failed.extend(failed);
        let mut deleted = 0;
        for (id, done) in orphans.iter().zip(done) {
            let Some(done) = done else { continue };
            // NOT_FOUND: somebody else has deleted it.
            if done.code == 0 || done.code == Code::NotFound as i32 {
                held.held.remove(id);
                deleted += 1;
            } else {
                kept.failed.push(Status::new(done.code.into(), format!("entry {id} is not deleted: {}", done.message)));
            }
        }
        if deleted > 0 {
            tracing::info!(entries = deleted, "entries of pods that are gone are deleted");
        }
    }
    let (create, update) = plan(judged, &held.held, &mut kept.outcome);
    let mut stale = false;
    for (fresh, batch) in [(true, create), (false, update)] {
        if batch.is_empty() {
            continue;
        }
        let entries: Vec<Entry> = batch.iter().map(|change| change.entry.clone()).collect();
        let Answers { done, failed } =
            if fresh { server.create(&entries).await } else { server.update(&entries).await };
        kept.failed.extend(failed);
        for (change, done) in batch.into_iter().zip(done) {
            let Some(done) = done else { continue };
            let Change { claim, entry: Entry { id, .. } } = change;
            let code = done.code;
            let exists = code == Code::AlreadyExists as i32;
            let outcome = judge(&id, fresh, done);
            match &outcome {
                Ok(()) => {
                    tracing::info!(spiffe_id = claim.want.spiffe_id, entry = id, fresh, "pod registered");
                    held.held.insert(id.clone(), claim.want);
                }
                Err(refused) => {
                    if !refused.by_content {
                        // What we hold for the server's may not be that.
                        stale = true;
                        let (namespace, name) = &claim.key;
                        let why = format!("entry {id} of {namespace}/{name}: {}", refused.why);
                        kept.failed.push(Status::new(code.into(), why));
                    }
                    let lacks_bundle = code == Code::FailedPrecondition as i32;
                    if (exists || lacks_bundle) && refused.by_content {
                        held.waiting.insert(claim.key);
                    }
                }
            }
            kept.outcome.insert(claim.uid, outcome.map(|()| id));
        }
    }
    if stale {
        *known = None;
    }
    Ok(kept)
}

/// Those of some entries that nobody wants. One whose object is gone stays while a pod wants an entry for the same ID,
/// node and selectors: the object was deleted, and comes back unless the whole resource is gone. No pod loses its
/// identity by that. The entry follows what the pod wants meanwhile, and the pod's new object takes it over. `theirs`:
/// the IDs that the judged keys had.
fn orphans(judged: &mut Judged, held: &HashMap<String, Wanted>, theirs: &HashSet<String>) -> Vec<String> {
    let orphans = theirs.iter().filter(|id| !judged.wanted.contains_key(*id));
    let orphans: Vec<(&String, &Wanted)> = orphans.filter_map(|id| held.get_key_value(id)).collect();
    let mut by_subject: HashMap<Subject, &String> = orphans.iter().map(|(id, held)| (held.subject(), *id)).collect();
    let mut taken = BTreeMap::new();
    judged.wanted.retain(|id, claim| {
        let known = if held.contains_key(id) { None } else { by_subject.remove(&claim.want.subject()) };
        let Some(known) = known else { return true };
        taken.insert(known.clone(), claim.clone());
        false
    });
    for (key, want) in std::mem::take(&mut judged.without_object) {
        if let Some(known) = by_subject.remove(&want.subject()) {
            // Of no object: nobody asks for its outcome.
            taken.insert(known.clone(), Claim { key, uid: String::new(), want });
        }
    }
    let gone = orphans.into_iter().map(|(id, _)| id).filter(|id| !taken.contains_key(*id)).cloned().collect();
    judged.wanted.extend(taken);
    gone
}

/// An entry that is to be written.
struct Change {
    claim: Claim,
    entry: Entry,
}

/// What is to be created and what updated; what needs neither has its outcome.
fn plan(
    judged: Judged,
    held: &HashMap<String, Wanted>,
    outcome: &mut HashMap<String, Result<String, Refused>>,
) -> (Vec<Change>, Vec<Change>) {
    outcome.extend(judged.refused.into_iter().map(|(uid, why)| (uid, Err(Refused::by_content(why)))));
    let (mut create, mut update) = (vec![], vec![]);
    for (id, claim) in judged.wanted {
        let before = held.get(&id);
        if before == Some(&claim.want) {
            outcome.insert(claim.uid, Ok(id));
            continue;
        }
        match claim.want.entry(&id) {
            Err(why) => drop(outcome.insert(claim.uid, Err(Refused::by_content(why)))),
            Ok(entry) if before.is_none() => create.push(Change { claim, entry }),
            Ok(entry) => update.push(Change { claim, entry }),
        }
    }
    (create, update)
}

/// What an answer says of the entry of this ID.
fn judge(id: &str, fresh: bool, done: Done) -> Result<(), Refused> {
    let exists = fresh && done.code == Code::AlreadyExists as i32;
    match done.entry {
        _ if done.code == 0 => Ok(()),
        // The very same is there: an answer that we did not hear.
        Some(there) if exists && there == id => Ok(()),
        // It would be gone with whoever keeps that one.
        Some(there) if exists => Err(Refused::by_content(format!(
            "entry {there} registers the same SPIFFE ID, parent and selectors already; this one follows when that is gone"
        ))),
        // It federates with a trust domain whose bundle is not at the server: no failure, or one pod could hold up all others.
        _ if done.code == Code::FailedPrecondition as i32 => Err(Refused::by_content(done.message)),
        _ => Err(Refused { why: done.message, by_content: done.code == Code::InvalidArgument as i32 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_api::spire::types::{Selector, Spiffeid};

    fn done(code: Code, entry: Option<&str>) -> Done {
        Done { code: code as i32, message: "said".into(), entry: entry.map(ToOwned::to_owned) }
    }

    fn wanted(selector: &str) -> Wanted {
        named(selector, &[])
    }

    fn named(selector: &str, dns_names: &[&str]) -> Wanted {
        let id = |path: &str| Some(Spiffeid { trust_domain: "td".into(), path: path.into() });
        let dns_names = dns_names.iter().map(ToString::to_string).collect();
        let selectors = vec![Selector { r#type: "k8s".into(), value: selector.into() }];
        Wanted::read(&Entry {
            spiffe_id: id("/a"),
            parent_id: id("/spire/agent/x"),
            selectors,
            dns_names,
            ..Entry::default()
        })
    }

    #[test]
    fn an_entry_whose_object_was_deleted_stays_for_its_pod_follows_it_and_goes_to_the_pods_next_object() {
        let held: HashMap<String, Wanted> =
            ["a", "b", "c"].map(|pod| (format!("k8s.{pod}"), wanted(&format!("pod-uid:{pod}")))).into();
        // Pod a has a new object, pod b has none and a new DNS name, and pod c is gone.
        let renamed = |pod| named(pod, &["web.shop.svc"]);
        let key = |name: &str| ("shop".to_owned(), name.to_owned());
        let all: HashSet<String> = held.keys().cloned().collect();
        let claim = |want| Claim { key: key("new"), uid: "new".into(), want };
        let mut judged = Judged::default();
        judged.wanted.insert("k8s.new".into(), claim(wanted("pod-uid:a")));
        judged.without_object = vec![(key("b"), renamed("pod-uid:b"))];
        assert_eq!(orphans(&mut judged, &held, &all), ["k8s.c"]);
        let mut outcome = HashMap::new();
        let (create, update) = plan(judged, &held, &mut outcome);
        assert!(create.is_empty(), "nothing is deleted to be made again");
        assert_eq!(outcome["new"], Ok("k8s.a".to_owned()));
        let [update] = update.try_into().ok().unwrap();
        assert_eq!((update.entry.id.as_str(), update.claim.want), ("k8s.b", renamed("pod-uid:b")));
        // Another pod's: the old entries go, the new one comes.
        let mut judged = Judged::default();
        judged.wanted.insert("k8s.new".into(), claim(wanted("pod-uid:other")));
        assert_eq!(orphans(&mut judged, &held, &all).len(), 3);
        assert_eq!(judged.wanted.len(), 1);
    }

    /// A server that has one entry and a database that may refuse to be written.
    struct Server {
        entry: Entry,
        is_full: bool,
    }

    impl Server {
        fn answer(&self, ids: &[String]) -> Answers {
            assert_eq!(ids, std::slice::from_ref(&self.entry.id));
            let code = if self.is_full { Code::Internal } else { Code::Ok };
            Answers { done: vec![Some(done(code, None))], failed: vec![] }
        }
    }

    impl Entries for Server {
        async fn list(&self) -> Result<Vec<Entry>, Status> {
            Ok(vec![self.entry.clone()])
        }

        async fn create(&self, entries: &[Entry]) -> Answers {
            panic!("nothing is to be created: {entries:?}")
        }

        async fn update(&self, entries: &[Entry]) -> Answers {
            self.answer(&entries.iter().map(|entry| entry.id.clone()).collect::<Vec<_>>())
        }

        async fn delete(&self, ids: &[String]) -> Answers {
            self.answer(ids)
        }
    }

    #[tokio::test]
    async fn an_entry_that_the_server_does_not_delete_is_a_failure_and_is_tried_again() {
        let want = wanted("pod-uid:a");
        let mut server = Server { entry: want.entry("k8s.a").unwrap(), is_full: true };
        let key = ("shop".to_owned(), "a".to_owned());
        let claim = Claim { key: key.clone(), uid: "a".into(), want };
        let there = Judged { wanted: [("k8s.a".to_owned(), claim)].into(), ..Judged::default() };
        let mut known = None;
        assert!(keep(&server, there, &mut known).await.unwrap().failed.is_empty());
        // The pod goes.
        let at_key = Judged { keys: Some([key].into()), ..Judged::default() };
        let kept = keep(&server, at_key, &mut known).await.unwrap();
        let said: Vec<&str> = kept.failed.iter().map(Status::message).collect();
        assert_eq!(said, ["entry k8s.a is not deleted: said"]);
        // The next pass looks at everything, because this one has failed.
        server.is_full = false;
        assert!(keep(&server, Judged::default(), &mut known).await.unwrap().failed.is_empty());
        assert!(known.unwrap().held.is_empty());
    }

    #[tokio::test]
    async fn an_entry_that_the_server_does_not_update_is_a_failure_each_time_with_an_object_and_without() {
        let mut server = Server { entry: wanted("pod-uid:a").entry("k8s.a").unwrap(), is_full: true };
        let renamed = named("pod-uid:a", &["web.shop.svc"]);
        let key = ("shop".to_owned(), "a".to_owned());
        let claim = Claim { key: key.clone(), uid: "a".into(), want: renamed.clone() };
        let with = || Judged { wanted: [("k8s.a".to_owned(), claim.clone())].into(), ..Judged::default() };
        let without = || Judged { without_object: vec![(key.clone(), renamed.clone())], ..Judged::default() };
        let mut known = None;
        for judged in [with(), with(), without(), without()] {
            let kept = keep(&server, judged, &mut known).await.unwrap();
            let said: Vec<&str> = kept.failed.iter().map(Status::message).collect();
            assert_eq!(said, ["entry k8s.a of shop/a: said"]);
        }
        server.is_full = false;
        assert!(keep(&server, without(), &mut known).await.unwrap().failed.is_empty());
        assert_eq!(known.unwrap().held["k8s.a"], renamed);
    }

    #[test]
    fn an_entry_that_exists_is_ours_only_under_our_id() {
        assert_eq!(judge("k8s.1", true, done(Code::Ok, Some("k8s.1"))), Ok(()));
        assert_eq!(judge("k8s.1", true, done(Code::AlreadyExists, Some("k8s.1"))), Ok(()), "an answer that was lost");
        let other = judge("k8s.1", true, done(Code::AlreadyExists, Some("k8s.2"))).unwrap_err();
        assert!(other.by_content && other.why.contains("entry k8s.2"), "{other:?}");
        // Our ID with other contents: what we hold for the server's is not.
        let taken = judge("k8s.1", true, done(Code::AlreadyExists, None)).unwrap_err();
        assert!(!taken.by_content, "it is looked at anew");
    }

    #[test]
    fn what_is_refused_for_what_it_says_is_no_failure_and_what_the_server_cannot_do_is() {
        assert!(judge("k8s.1", true, done(Code::InvalidArgument, None)).unwrap_err().by_content);
        assert!(judge("k8s.1", true, done(Code::FailedPrecondition, None)).unwrap_err().by_content);
        assert!(!judge("k8s.1", false, done(Code::NotFound, None)).unwrap_err().by_content);
        assert!(!judge("k8s.1", true, done(Code::Unavailable, None)).unwrap_err().by_content);
    }
}
