//! Which changes each agent learns, and when.

use std::time::Duration;

use std::collections::BTreeSet;

use super::*;
use crate::datastore::Sqlite;
use countersign_identity::SpiffeId;
use time::OffsetDateTime;

/// Before any entry of these tests expires.
const EARLY: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

fn entry(id: &str, spiffe: &str, parent: &str, selector: &str) -> Entry {
    Entry {
        id: id.parse().unwrap(),
        spiffe_id: SpiffeId::new(format!("spiffe://td{spiffe}")).unwrap(),
        parent_id: SpiffeId::new(format!("spiffe://td{parent}")).unwrap(),
        selectors: [selector.parse().unwrap()].into(),
        x509_svid_ttl: Some(Duration::from_secs(60)),
        jwt_svid_ttl: None,
        federates_with: BTreeSet::new(),
        admin: false,
        downstream: false,
        dns_names: vec![],
        expires_at: None,
        hint: String::new(),
        store_svid: false,
        additional: Default::default(),
        revision: 0,
        created_at: OffsetDateTime::UNIX_EPOCH,
    }
}

fn agent(name: &str, selector: &str) -> AttestedAgent {
    AttestedAgent {
        id: SpiffeId::new(format!("spiffe://td/spire/agent/x/{name}")).unwrap(),
        attestation_type: "x".into(),
        selectors: [selector.parse().unwrap()].into(),
        serial: "1".into(),
        previous_serial: String::new(),
        expires_at: OffsetDateTime::UNIX_EPOCH,
        banned: false,
        can_reattest: true,
        evidence: None,
    }
}

/// Adds entries, or replaces those with the same ID.
async fn put(entries: &Entries, list: Vec<Entry>) {
    for entry in list {
        if entries.get(&entry.id).is_some() {
            entries.update(&entry.id, |_| Ok::<_, ()>(entry.clone())).await.unwrap();
        } else {
            assert!(matches!(entries.create(vec![entry]).await.unwrap()[0], Created::New(_)));
        }
    }
}

async fn entries(dir: &tempfile::TempDir) -> Entries {
    let store = Arc::new(Sqlite::open(&dir.path().join("db"), &TrustDomain::new("td").unwrap()).await.unwrap());
    Entries::load(store, &TrustDomain::new("td").unwrap(), EARLY).await.unwrap()
}

fn ids(mut list: Vec<Arc<Entry>>) -> Vec<String> {
    list.sort_by(|a, b| a.id.cmp(&b.id));
    list.iter().map(|e| e.id.to_string()).collect()
}

#[tokio::test]
async fn an_agent_gets_its_own_entries_its_aliases_and_what_hangs_below() {
    let dir = tempfile::tempdir().unwrap();
    let e = entries(&dir).await;
    put(
        &e,
        vec![
            entry("own", "/a", "/spire/agent/x/1", "unix:uid:1"),
            entry("below", "/b", "/a", "unix:uid:2"),
            entry("alias", "/group", "/spire/server", "x:rack:7"),
            entry("grouped", "/c", "/group", "unix:uid:3"),
            entry("other", "/d", "/spire/agent/x/2", "unix:uid:4"),
        ],
    )
    .await;
    assert_eq!(ids(e.authorized(&agent("1", "x:rack:7"), EARLY)), ["below", "grouped", "own"]);
    assert_eq!(ids(e.authorized(&agent("1", "x:rack:8"), EARLY)), ["below", "own"]);
    assert_eq!(ids(e.authorized(&agent("2", "x:rack:8"), EARLY)), ["other"]);
}

#[tokio::test]
async fn a_change_reaches_the_agent_it_concerns_and_costs_what_was_missed() {
    let dir = tempfile::tempdir().unwrap();
    let e = entries(&dir).await;
    let (one, two) = (agent("1", "x:y:z"), agent("2", "x:y:z"));
    let (start, first) = e.since(&one, None, EARLY);
    assert_eq!(first, Update::Snapshot(vec![]));
    put(&e, vec![entry("a", "/a", "/spire/agent/x/1", "unix:uid:1")]).await;
    let (rev, update) = e.since(&one, Some(start), EARLY);
    assert!(
        matches!(update, Update::Delta { upserted, removed } if ids(upserted.clone()) == ["a"] && removed.is_empty())
    );
    let nothing = Update::Delta { upserted: vec![], removed: vec![] };
    assert_eq!(e.since(&two, Some(start), EARLY).1, nothing, "another agent learns nothing of it");
    assert_eq!(e.since(&one, Some(rev), EARLY).1, nothing);
    // It moves to the other agent: one loses it, two gains it.
    put(&e, vec![entry("a", "/a", "/spire/agent/x/2", "unix:uid:1")]).await;
    assert!(
        matches!(e.since(&one, Some(rev), EARLY).1, Update::Delta { upserted, removed } if upserted.is_empty() && removed.len() == 1)
    );
    assert!(
        matches!(e.since(&two, Some(rev), EARLY).1, Update::Delta { upserted, removed } if upserted.len() == 1 && removed.is_empty())
    );
    e.delete(&["a".parse().unwrap()]).await.unwrap();
    assert!(matches!(e.since(&two, Some(rev), EARLY).1, Update::Delta { removed, .. } if removed.len() == 1));
    assert!(
        matches!(e.since(&one, Some(rev + 1_000_000), EARLY).1, Update::Snapshot(_)),
        "a revision from another world"
    );
}

#[tokio::test]
async fn an_entry_goes_with_its_parent_in_whatever_order_they_are_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let e = entries(&dir).await;
    let one = agent("1", "x:y:z");
    let (parent, child): (EntryId, EntryId) = ("parent".parse().unwrap(), "child".parse().unwrap());
    for order in [[&child, &parent], [&parent, &child]] {
        put(
            &e,
            vec![entry("parent", "/a", "/spire/agent/x/1", "unix:uid:1"), entry("child", "/b", "/a", "unix:uid:2")],
        )
        .await;
        let (revision, _) = e.since(&one, None, EARLY);
        e.delete(&order.map(Clone::clone)).await.unwrap();
        match e.since(&one, Some(revision), EARLY).1 {
            Update::Snapshot(all) => assert!(all.is_empty()),
            Update::Delta { removed, .. } => {
                assert!(removed.contains(&child) && removed.contains(&parent), "{removed:?}");
            }
        }
    }
    // The same when the parent stays and goes by another name.
    put(&e, vec![entry("parent", "/a", "/spire/agent/x/1", "unix:uid:1"), entry("child", "/b", "/a", "unix:uid:2")])
        .await;
    let (revision, _) = e.since(&one, None, EARLY);
    e.delete(std::slice::from_ref(&child)).await.unwrap();
    put(&e, vec![entry("parent", "/c", "/spire/agent/x/1", "unix:uid:1")]).await;
    assert!(matches!(e.since(&one, Some(revision), EARLY).1, Update::Delta { removed, .. } if removed == [child]));
}

#[tokio::test]
async fn what_was_stored_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let before = entry("a", "/a", "/spire/agent/x/1", "unix:uid:1");
    put(&entries(&dir).await, vec![before.clone()]).await;
    assert_eq!(*entries(&dir).await.get(&"a".parse().unwrap()).unwrap(), before);
}

#[tokio::test]
async fn an_expired_entry_is_served_to_nobody_and_leads_to_none() {
    let dir = tempfile::tempdir().unwrap();
    let e = entries(&dir).await;
    let one = agent("1", "x:rack:7");
    let end = EARLY + Duration::from_secs(60);
    let ends = |entry| Entry { expires_at: Some(end), ..entry };
    put(
        &e,
        vec![
            ends(entry("alias", "/group", "/spire/server", "x:rack:7")),
            entry("grouped", "/c", "/group", "unix:uid:3"),
            ends(entry("parent", "/a", "/spire/agent/x/1", "unix:uid:1")),
            entry("below", "/b", "/a", "unix:uid:2"),
            entry("own", "/d", "/spire/agent/x/1", "unix:uid:4"),
        ],
    )
    .await;
    let served = |now| ids(e.authorized(&one, now));
    let one_by_one = |now| {
        let mut found = e.page(None, 9, |_| true);
        found.retain(|entry| e.authorized_one(&one, &entry.id, now).is_some());
        ids(found)
    };
    let before = end - Duration::from_nanos(1);
    assert_eq!(served(before), ["below", "grouped", "own", "parent"]);
    assert_eq!(one_by_one(before), served(before));
    let (revision, _) = e.since(&one, None, before);
    let mut told = e.revisions();
    told.mark_unchanged();
    e.expire(before);
    assert!(!told.has_changed().unwrap(), "nothing has expired yet");
    e.expire(end);
    assert!(told.has_changed().unwrap(), "agents are told at once");
    assert_eq!(served(end), ["own"]);
    assert_eq!(one_by_one(end), ["own"]);
    // Who looked at the clock a moment earlier takes nothing back, but a clock that was set back does.
    assert_eq!(served(before), ["own"]);
    let mut held = e.authorized(&one, EARLY);
    assert_eq!(held.len(), 4);
    match e.since(&one, Some(revision), end).1 {
        Update::Snapshot(all) => held = all,
        Update::Delta { removed, .. } => held.retain(|entry| !removed.contains(&entry.id)),
    }
    assert_eq!(ids(held), ["own"]);
    // So it is after a restart, and what has changed since is not all that ever expired.
    let again = Entries::load(e.store.clone(), &TrustDomain::new("td").unwrap(), end).await.unwrap();
    assert_eq!(ids(again.authorized(&one, end)), ["own"]);
    assert!(matches!(again.since(&one, Some(*again.revisions().borrow()), end).1, Update::Delta { .. }));
    // One that is prolonged leads on.
    let later =
        |before: &Entry| Ok::<_, ()>(Entry { expires_at: Some(end + Duration::from_secs(1)), ..before.clone() });
    e.update(&"alias".parse().unwrap(), later).await.unwrap();
    assert_eq!(served(end), ["grouped", "own"]);
    // What has expired is deleted, and nothing else.
    assert_eq!(e.prune(end - Duration::from_secs(1)).await.unwrap(), 0);
    assert_eq!(e.prune(end).await.unwrap(), 1);
    assert!(e.get(&"parent".parse().unwrap()).is_none() && e.len() == 4);
    assert_eq!(e.store.entries().await.unwrap().len(), 4);
}

#[test]
fn when_more_expire_at_once_than_is_remembered_agents_get_what_is_left() {
    let mut index = Index::new("spiffe://td/spire/server".into());
    let one = agent("1", "x:y:z");
    for n in 0..=20_000 {
        let mut made = entry(&format!("e{n}"), "/a", "/spire/agent/x/1", &format!("unix:uid:{n}"));
        made.expires_at = (n > 0).then_some(EARLY + Duration::from_secs(60));
        index.insert(Arc::new(made));
    }
    let mut made = entry("last", "/a", "/spire/agent/x/1", "unix:gid:1");
    made.expires_at = Some(EARLY + Duration::from_secs(60));
    index.insert(Arc::new(made));
    let (revision, _) = index.since(&one, None);
    index.advance(EARLY + Duration::from_secs(60));
    let (now, update) = index.since(&one, Some(revision));
    assert!(now > revision);
    assert!(matches!(update, Update::Snapshot(all) if ids(all.clone()) == ["e0"]));
    assert!(matches!(index.since(&one, Some(now)).1, Update::Delta { upserted, .. } if upserted.is_empty()));
}

mod model;
