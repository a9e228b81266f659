//! The subset rule, and the message for a caller without an identity.

use std::collections::BTreeSet;

use super::*;
use countersign_identity::SpiffeId;

fn set(selectors: &[&str]) -> SelectorSet {
    selectors.iter().map(|s| s.parse().unwrap()).collect()
}

fn cache(entries: &[(&str, &[&str])]) -> Cache {
    let cache = Cache::default();
    cache.change(|state| {
        state.synced = true;
        for (name, selectors) in entries {
            let entry = Entry {
                id: name.parse().unwrap(),
                spiffe_id: SpiffeId::new(format!("spiffe://td/{name}")).unwrap(),
                parent_id: SpiffeId::new("spiffe://td/spire/agent/x/1").unwrap(),
                selectors: set(selectors),
                x509_svid_ttl: None,
                jwt_svid_ttl: None,
                federates_with: BTreeSet::new(),
                admin: false,
                downstream: false,
                dns_names: vec![],
                expires_at: (*name == "ended").then_some(OffsetDateTime::UNIX_EPOCH),
                hint: String::new(),
                store_svid: false,
                additional: Default::default(),
                revision: 0,
                created_at: OffsetDateTime::UNIX_EPOCH,
            };
            state.entries.insert(
                entry.id.clone(),
                Cached {
                    entry: entry.into(),
                    svid: None,
                    stale: false,
                    obtained: OffsetDateTime::UNIX_EPOCH,
                    jitter: 0.0,
                },
            );
        }
    });
    cache
}

fn names(found: Result<Vec<Cached>, NoIdentity>) -> Vec<String> {
    found.unwrap().iter().map(|c| c.entry.id.to_string()).collect()
}

#[test]
fn a_caller_gets_exactly_the_entries_whose_selectors_it_has_all() {
    let c = cache(&[
        ("a", &["unix:uid:1"]),
        ("b", &["unix:uid:1", "unix:gid:1"]),
        ("c", &["unix:uid:2"]),
        ("ended", &["unix:uid:1"]),
    ]);
    let now = OffsetDateTime::now_utc();
    assert_eq!(names(c.matching(&set(&["unix:uid:1", "unix:gid:9"]), now)), ["a"]);
    assert_eq!(names(c.matching(&set(&["unix:uid:1", "unix:gid:1"]), now)), ["a", "b"]);
}

#[test]
fn a_caller_without_an_entry_learns_what_it_lacks() {
    let c = cache(&[("a", &["unix:uid:1", "unix:gid:1"]), ("b", &["unix:uid:3", "unix:gid:3", "unix:user:x"])]);
    let Err(NoIdentity::NoEntry(why)) = c.matching(&set(&["unix:uid:1"]), OffsetDateTime::now_utc()) else { panic!() };
    assert_eq!(why, "attested unix:uid:1; the closest entry, `spiffe://td/a`, also needs unix:gid:1");
    let fresh = Cache::default();
    assert_eq!(fresh.matching(&set(&["unix:uid:1"]), OffsetDateTime::now_utc()).err(), Some(NoIdentity::NotSynced));
}

#[test]
fn what_a_caller_is_called_forges_no_log_line() {
    let c = cache(&[("a", &["unix:uid:1"])]);
    let path = countersign_identity::Selector::new("unix", "path:/tmp/x\n2026 WARN forged\u{1b}[2J").unwrap();
    let Err(NoIdentity::NoEntry(why)) = c.matching(&std::iter::once(path).collect(), OffsetDateTime::now_utc()) else {
        panic!()
    };
    assert!(why.contains("path:/tmp/x\\n2026") && !why.contains(['\n', '\u{1b}']), "{why}");
}

#[test]
fn a_caller_is_settled_once_it_has_an_identity_and_no_entry_lacks_only_what_may_follow() {
    let now = OffsetDateTime::now_utc();
    let settled = |entries: &[(&str, &[&str])], has: &[&str]| {
        cache(entries).is_settled(&set(has), |s| s.value().starts_with("container-"), now)
    };
    let (own, app) = (("own", &["k8s:pod-uid:u"][..]), "k8s:container-name:app");
    assert!(settled(&[own], &["k8s:pod-uid:u"]));
    assert!(!settled(&[own], &["k8s:pod-uid:v"]), "it has none");
    assert!(!settled(&[own, ("more", &["k8s:ns:a", app])], &["k8s:pod-uid:u", "k8s:ns:a"]));
    assert!(!settled(&[own, ("alone", &[app])], &["k8s:pod-uid:u"]), "every pod has containers");
    assert!(settled(&[own, ("other", &["k8s:ns:b", app])], &["k8s:pod-uid:u", "k8s:ns:a"]), "of no matter here");
    assert!(settled(&[own, ("ended", &["k8s:ns:a", app])], &["k8s:pod-uid:u", "k8s:ns:a"]));
    assert!(settled(&[own, ("whole", &["k8s:ns:a", app])], &["k8s:pod-uid:u", "k8s:ns:a", app]));
    assert!(!Cache::default().is_settled(&set(&["k8s:pod-uid:u"]), |_| true, now), "the entries are not there yet");
}
