//! Registration entries at the server: made, changed and deleted until they are as they should be.

use std::collections::{BTreeMap, HashMap};

use countersign_api::spire::types::Entry;
use tonic::{Code, Status};

use super::ENTRY_PREFIX;
use super::object::Wanted;
use crate::server_link::{Answers, Done, ServerLink};

/// What follows from the objects.
#[derive(Debug, Default)]
pub struct Judged {
    /// The entries by their IDs, each with the UID of its object.
    pub wanted: BTreeMap<String, (String, Wanted)>,
    /// Why an object has none, by its UID.
    pub refused: HashMap<String, String>,
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
    /// The calls that have failed.
    pub failed: Vec<Status>,
}

/// Creates, updates and deletes entries. `known` is what the server holds, by ID, where that is known.
pub async fn keep(
    server: &ServerLink,
    judged: Judged,
    known: &mut Option<HashMap<String, Wanted>>,
) -> Result<Kept, Status> {
    let held = if let Some(held) = known {
        held
    } else {
        let listed = server.list().await?;
        let ours = listed.iter().filter(|e| e.id.starts_with(ENTRY_PREFIX));
        known.insert(ours.map(|e| (e.id.clone(), Wanted::read(e))).collect())
    };
    let mut kept = Kept::default();
    // What is gone goes first: its successor may want the very same.
    let orphans: Vec<String> = held.keys().filter(|id| !judged.wanted.contains_key(*id)).cloned().collect();
    if !orphans.is_empty() {
        let Answers { done, failed } = server.delete(&orphans).await;
        kept.failed.extend(failed);
        // NOT_FOUND: somebody else has deleted it.
        let gone = |done: &Option<Done>| done.as_ref().is_some_and(|d| d.code == 0 || d.code == Code::NotFound as i32);
        let deleted: Vec<_> = orphans.iter().zip(&done).filter(|(_, done)| gone(done)).collect();
        deleted.iter().for_each(|(id, _)| drop(held.remove(*id)));
        tracing::info!(entries = deleted.len(), "entries of pods that are gone are deleted");
    }
    let (create, update) = plan(judged, held, &mut kept.outcome);
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
            let id = change.entry.id;
            let outcome = judge(&id, fresh, done);
            match &outcome {
                Ok(()) => {
                    tracing::info!(spiffe_id = change.want.spiffe_id, entry = id, fresh, "pod registered");
                    held.insert(id.clone(), change.want);
                }
                // Ours, and not what we took it for.
                Err(refused) => stale |= !refused.by_content,
            }
            kept.outcome.insert(change.uid, outcome.map(|()| id));
        }
    }
    if stale {
        *known = None;
    }
    Ok(kept)
}

/// An entry that is to be written, for the object of this UID.
struct Change {
    uid: String,
    want: Wanted,
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
    for (id, (uid, want)) in judged.wanted {
        let before = held.get(&id);
        if before == Some(&want) {
            outcome.insert(uid, Ok(id));
            continue;
        }
        match want.entry(&id) {
            Err(why) => drop(outcome.insert(uid, Err(Refused::by_content(why)))),
            Ok(entry) if before.is_none() => create.push(Change { uid, want, entry }),
            Ok(entry) => update.push(Change { uid, want, entry }),
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
        _ => Err(Refused { why: done.message, by_content: done.code == Code::InvalidArgument as i32 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(code: Code, entry: Option<&str>) -> Done {
        Done { code: code as i32, message: "said".into(), entry: entry.map(ToOwned::to_owned) }
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
        assert!(!judge("k8s.1", false, done(Code::NotFound, None)).unwrap_err().by_content);
        assert!(!judge("k8s.1", true, done(Code::Unavailable, None)).unwrap_err().by_content);
    }
}
