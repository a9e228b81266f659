//! The index against a model that is too simple to be wrong: it scans every entry each time.

use super::*;

/// Pseudo-random numbers, the same in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// SPIFFE IDs that are often each other's parents, also in circles; two agents, aliases of both.
fn random_entry(numbers: &mut Numbers, id: u64) -> Entry {
    let parent = match numbers.below(6) {
        0 => "/spire/server".to_owned(),
        1 | 2 => format!("/spire/agent/x/{}", 1 + numbers.below(2)),
        _ => format!("/w{}", numbers.below(8)),
    };
    let selector = format!("x:rack:{}", numbers.below(3));
    let mut made = entry(&format!("e{id}"), &format!("/w{}", numbers.below(8)), &parent, &selector);
    if numbers.below(3) == 0 {
        made.selectors.insert(format!("x:row:{}", numbers.below(2)).parse().unwrap());
    }
    made.admin = numbers.below(4) == 0;
    made.expires_at = (numbers.below(3) == 0).then(|| at(10 * (1 + numbers.below(50))));
    made
}

/// A point in time, in seconds after `EARLY`.
fn at(seconds: u64) -> OffsetDateTime {
    EARLY + Duration::from_secs(seconds)
}

/// The entries that an agent may serve, by repeating until nothing is added.
fn naive(all: &[Entry], agent: &AttestedAgent, now: OffsetDateTime) -> BTreeSet<EntryId> {
    let all: Vec<&Entry> = all.iter().filter(|e| !e.is_expired(now)).collect();
    let root = "spiffe://td/spire/server";
    let mut parents = BTreeSet::from([agent.id.to_string()]);
    let aliases = all.iter().filter(|e| e.parent_id.to_string() == root && e.applies_to(&agent.selectors));
    parents.extend(aliases.map(|e| e.spiffe_id.to_string()));
    loop {
        let below = all.iter().filter(|e| parents.contains(&e.parent_id.to_string()));
        let more: BTreeSet<_> = below.map(|e| e.spiffe_id.to_string()).filter(|id| !parents.contains(id)).collect();
        if more.is_empty() {
            break;
        }
        parents.extend(more);
    }
    all.iter().filter(|e| parents.contains(&e.parent_id.to_string())).map(|e| e.id.clone()).collect()
}

fn agents() -> [AttestedAgent; 3] {
    let mut both = agent("2", "x:rack:1");
    both.selectors.insert("x:row:0".parse().unwrap());
    [agent("1", "x:rack:0"), both, agent("3", "x:rack:2")]
}

async fn assert_like_the_model(e: &Entries, store: &dyn DataStore, now: OffsetDateTime) {
    let all: Vec<Entry> = store.entries().await.unwrap().into_iter().map(|v| v.value).collect();
    assert_eq!(e.len(), all.len());
    for agent in agents() {
        let wanted = naive(&all, &agent, now);
        let found: Vec<EntryId> = e.authorized(&agent, now).iter().map(|e| e.id.clone()).collect();
        assert_eq!(found.len(), wanted.len(), "nothing twice");
        assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), wanted);
        for entry in &all {
            let may = e.authorized_one(&agent, &entry.id, now).is_some();
            assert_eq!(may, wanted.contains(&entry.id), "{}", entry.id);
        }
    }
    for n in 0..8 {
        let id = SpiffeId::new(format!("spiffe://td/w{n}")).unwrap();
        let is_admin = all.iter().any(|e| e.admin && e.spiffe_id == id && !e.is_expired(now));
        assert_eq!(e.is_admin(&id, now), is_admin);
    }
}

/// One random change, and the expected effect.
async fn change(e: &Entries, numbers: &mut Numbers) {
    let id = numbers.below(40);
    let name: EntryId = format!("e{id}").parse().unwrap();
    let fresh = random_entry(numbers, id);
    match numbers.below(4) {
        0 => drop(e.delete(&[name]).await.unwrap()),
        1 => drop(e.update(&name, |_| Ok::<_, ()>(fresh.clone())).await),
        _ => drop(e.create(vec![fresh]).await.unwrap()),
    }
}

#[tokio::test]
async fn the_index_answers_as_the_model_does_and_deltas_lead_to_the_same_set() {
    let dir = tempfile::tempdir().unwrap();
    let td = TrustDomain::new("td").unwrap();
    let store: Arc<dyn DataStore> = Arc::new(Sqlite::open(&dir.path().join("db"), &td).await.unwrap());
    let e = Entries::load(store.clone(), &td, EARLY).await.unwrap();
    let mut numbers = Numbers(9);
    // What each agent holds, maintained from the updates it receives.
    let mut held = agents().map(|a| (a, None, BTreeSet::<EntryId>::new()));
    for step in 0..800 {
        change(&e, &mut numbers).await;
        // Time goes on, and at times back.
        let time = at(10 * (step / 20 + numbers.below(4)));
        for (agent, revision, set) in &mut held {
            if numbers.below(3) == 0 {
                let (now, update) = e.since(agent, *revision, time);
                *revision = Some(now);
                heard(set, update);
                assert_eq!(*set, e.authorized(agent, time).iter().map(|e| e.id.clone()).collect(), "step {step}");
            }
        }
        if step % 10 == 0 {
            assert_like_the_model(&e, store.as_ref(), time).await;
        }
    }
}

/// One of few entries in a tree that is thin enough for most changes to be no structural ones.
fn thin_entry(numbers: &mut Numbers, id: u64) -> Entry {
    let parent = match numbers.below(8) {
        0 => "/spire/server".to_owned(),
        1..=3 => format!("/spire/agent/x/{}", 1 + numbers.below(3)),
        _ => format!("/w{}", numbers.below(8)),
    };
    let mut made =
        entry(&format!("e{id}"), &format!("/w{}", numbers.below(8)), &parent, &format!("x:rack:{}", numbers.below(3)));
    made.expires_at = (numbers.below(3) == 0).then(|| at(1 + numbers.below(20_000)));
    made
}

/// What an agent holds once it has heard this.
fn heard(set: &mut BTreeSet<EntryId>, update: Update) {
    match update {
        Update::Snapshot(all) => *set = all.iter().map(|e| e.id.clone()).collect(),
        Update::Delta { upserted, removed } => {
            set.extend(upserted.iter().map(|e| e.id.clone()));
            set.retain(|id| !removed.contains(id));
        }
    }
}

#[test]
fn an_agent_that_hears_of_several_changes_at_once_holds_what_it_would_after_each() {
    let mut index = Index::new("spiffe://td/spire/server".into());
    let mut numbers = Numbers(4);
    let mut held = agents().map(|a| (a, None, BTreeSet::<EntryId>::new()));
    let mut deltas = 0;
    for round in 0..20_000 {
        // Up to six changes that nobody looks between.
        for _ in 0..=numbers.below(6) {
            let id = numbers.below(6);
            if numbers.below(2) == 0 {
                index.remove(&format!("e{id}").parse().unwrap());
            } else {
                index.insert(Arc::new(thin_entry(&mut numbers, id)));
            }
        }
        index.advance(at(round));
        for (agent, revision, set) in &mut held {
            let (now, update) = index.since(agent, *revision);
            *revision = Some(now);
            deltas += usize::from(matches!(update, Update::Delta { .. }));
            heard(set, update);
            assert_eq!(*set, index.authorized(agent).iter().map(|e| e.id.clone()).collect(), "round {round}");
        }
    }
    assert!(deltas > 10_000, "{deltas}: snapshots alone prove nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn writers_at_once_leave_index_and_store_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let td = TrustDomain::new("td").unwrap();
    let store: Arc<dyn DataStore> = Arc::new(Sqlite::open(&dir.path().join("db"), &td).await.unwrap());
    let e = Arc::new(Entries::load(store.clone(), &td, EARLY).await.unwrap());
    let writers: Vec<_> = (0..6u64)
        .map(|seed| {
            let e = e.clone();
            tokio::spawn(async move {
                let mut numbers = Numbers(seed);
                for _ in 0..60 {
                    change(&e, &mut numbers).await;
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    assert_like_the_model(&e, store.as_ref(), at(250)).await;
    assert_like_the_model(&Entries::load(store.clone(), &td, EARLY).await.unwrap(), store.as_ref(), at(250)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_updates_at_once_none_is_lost_and_each_has_a_revision_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let td = TrustDomain::new("td").unwrap();
    let store: Arc<dyn DataStore> = Arc::new(Sqlite::open(&dir.path().join("db"), &td).await.unwrap());
    let one = Arc::new(Entries::load(store.clone(), &td, EARLY).await.unwrap());
    put(&one, vec![entry("a", "/a", "/spire/agent/x/1", "unix:uid:1")]).await;
    // A second server on the same store, which sees the first one's changes only when it writes itself.
    let two = Arc::new(Entries::load(store.clone(), &td, EARLY).await.unwrap());
    let writers: Vec<_> = (0..40)
        .map(|n| {
            let server = if n % 2 == 0 { one.clone() } else { two.clone() };
            tokio::spawn(async move {
                let add = |before: &Entry| {
                    let mut entry = before.clone();
                    entry.dns_names.push(format!("n{n}"));
                    Ok::<_, ()>(entry)
                };
                server.update(&"a".parse().unwrap(), add).await.unwrap().revision
            })
        })
        .collect();
    let mut revisions = BTreeSet::new();
    for writer in writers {
        assert!(revisions.insert(writer.await.unwrap()), "a revision of its own");
    }
    assert_eq!(revisions.last(), Some(&40));
    let stored = store.entry(&"a".parse().unwrap()).await.unwrap().unwrap().value;
    assert_eq!((stored.dns_names.len(), stored.revision), (40, 40));
}

/// `cargo test --release -p countersign-server --lib -- --ignored --nocapture a_hundred_thousand` prints the figures.
#[tokio::test]
#[ignore = "a benchmark: prints figures"]
async fn a_hundred_thousand_entries() {
    use std::time::Instant;
    let dir = tempfile::tempdir().unwrap();
    let e = entries(&dir).await;
    let time = |what: &str, times: u32, start: Instant| println!("{what}: {:?} each", start.elapsed() / times);
    put(&e, vec![entry("alias", "/group", "/spire/server", "x:rack:0")]).await;
    let start = Instant::now();
    for batch in 0..10u32 {
        let of_batch = |n: u32| {
            let n = batch * 10_000 + n;
            let mut made = entry(&format!("e{n}"), &format!("/w{n}"), "/group", "unix:uid:1");
            made.admin = n == 7;
            made
        };
        let made = e.create((0..10_000).map(of_batch).collect()).await.unwrap();
        assert!(made.iter().all(|m| matches!(m, Created::New(_))));
    }
    time("create, in batches of 10,000", 100_000, start);
    let node = agent("1", "x:rack:0");
    let start = Instant::now();
    for n in 0..10_000u32 {
        assert!(e.authorized_one(&node, &format!("e{}", n * 10).parse().unwrap(), EARLY).is_some());
    }
    time("authorized_one below a node alias", 10_000, start);
    let admin = SpiffeId::new("spiffe://td/w7").unwrap();
    let start = Instant::now();
    for _ in 0..10_000 {
        assert!(e.is_admin(&admin, EARLY));
    }
    time("is_admin", 10_000, start);
    let start = Instant::now();
    assert_eq!(e.authorized(&node, EARLY).len(), 100_000);
    time("authorized, all of them", 1, start);
    let start = Instant::now();
    for n in 0..100u32 {
        assert_eq!(e.page(Some(&format!("e{n}").parse().unwrap()), 51, |_| true).len(), 51);
    }
    time("a page of 50", 100, start);
}
