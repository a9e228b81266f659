//! Which writes may replace which versions.

use super::*;
use crate::node_attestor::EvidenceKey;

fn td(name: &str) -> TrustDomain {
    TrustDomain::new(name).unwrap()
}

async fn open(dir: &tempfile::TempDir, domain: &str) -> Result<Sqlite, DataStoreError> {
    Sqlite::open(&dir.path().join("db"), &td(domain)).await
}

fn agent(name: &str, evidence: Option<&str>, banned: bool) -> AttestedAgent {
    AttestedAgent {
        id: SpiffeId::new(format!("spiffe://td/spire/agent/x/{name}")).unwrap(),
        attestation_type: "x".into(),
        selectors: Default::default(),
        serial: "1".into(),
        previous_serial: String::new(),
        expires_at: OffsetDateTime::UNIX_EPOCH,
        banned,
        can_reattest: true,
        evidence: evidence.map(|e| EvidenceKey::stored(e.into())),
    }
}

#[tokio::test]
async fn another_trust_domain_is_refused_by_both_names_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(&dir, "td").await.unwrap();
    assert!(matches!(first.put_agent(&agent("a", None, false), None).await.unwrap(), Written::Stored(_)));
    first.0.close().await;
    let refused = open(&dir, "other").await.err().unwrap().to_string();
    assert!(refused.contains("`td`") && refused.contains("`other`"), "{refused}");
    let again = open(&dir, "td").await.unwrap();
    assert_eq!(again.agents().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_store_that_does_not_say_whose_it_is_is_known_by_what_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(&dir, "td").await.unwrap();
    let _ = first.put_agent(&agent("a", None, false), None).await.unwrap();
    sqlx::query("DELETE FROM facts").execute(&first.0).await.unwrap();
    first.0.close().await;
    assert!(matches!(open(&dir, "other").await, Err(DataStoreError::TrustDomain { .. })));
    assert!(open(&dir, "td").await.is_ok());
}

#[tokio::test]
async fn a_row_that_changed_since_it_was_read_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, "td").await.unwrap();
    let Written::Stored(first) = store.put_agent(&agent("a", None, false), None).await.unwrap() else { panic!() };
    assert_eq!(store.put_agent(&agent("a", None, false), None).await.unwrap(), Written::Stale, "it is there");
    let banned = store.put_agent(&agent("a", None, true), Some(first)).await.unwrap();
    assert!(matches!(banned, Written::Stored(_)));
    assert_eq!(store.put_agent(&agent("a", None, false), Some(first)).await.unwrap(), Written::Stale);
    store.delete_agent(&agent("a", None, false).id).await.unwrap();
    assert_eq!(store.put_agent(&agent("a", None, false), Some(first)).await.unwrap(), Written::Stale, "it is gone");
}

#[tokio::test]
async fn evidence_of_a_banned_agent_is_refused_under_every_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, "td").await.unwrap();
    assert!(matches!(store.put_agent(&agent("a", Some("key"), true), None).await.unwrap(), Written::Stored(_)));
    assert_eq!(store.put_agent(&agent("b", Some("key"), false), None).await.unwrap(), Written::Banned);
    assert!(matches!(store.put_agent(&agent("c", Some("other"), false), None).await.unwrap(), Written::Stored(_)));
}

#[tokio::test]
async fn no_bundle_is_replaced_by_an_empty_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, "td").await.unwrap();
    let empty = TrustBundle { sequence: 1, ..TrustBundle::empty(td("td")) };
    assert!(matches!(store.put_bundle(&empty, None).await, Err(DataStoreError::EmptyBundle(_))));
    let own = store.put_authorities(&StoredJournal::default(), &empty, Version::FIRST).await;
    assert!(matches!(own, Err(DataStoreError::EmptyBundle(_))));
}

#[tokio::test]
async fn a_relationship_and_its_bundle_are_written_together_or_not_at_all() {
    use crate::federation::relationship::{Profile, Relationship};
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, "td").await.unwrap();
    let web = Relationship {
        trust_domain: td("partner"),
        url: "https://partner.test/bundle".parse().unwrap(),
        profile: Profile::HttpsWeb,
    };
    let id = SpiffeId::new("spiffe://partner/spire/server").unwrap();
    let spiffe = Relationship { profile: Profile::HttpsSpiffe(id), ..web.clone() };
    let bundle = TrustBundle { trust_domain: td("partner"), ..crate::testing::bundle() };
    let empty = TrustBundle::empty(td("partner"));
    assert!(matches!(
        store.put_relationship(&web, None, Some((&empty, None))).await,
        Err(DataStoreError::EmptyBundle(_))
    ));
    assert!(store.relationships().await.unwrap().is_empty());
    let Written::Stored(first) = store.put_relationship(&web, None, Some((&bundle, None))).await.unwrap() else {
        panic!()
    };
    assert_eq!(store.relationships().await.unwrap(), [Versioned { value: web.clone(), version: first }]);
    assert_eq!(store.bundles().await.unwrap(), [Versioned { value: bundle.clone(), version: first }]);
    assert_eq!(store.put_relationship(&spiffe, None, None).await.unwrap(), Written::Stale, "it is there");
    let over = Some((&bundle, None));
    assert_eq!(
        store.put_relationship(&spiffe, Some(first), over).await.unwrap(),
        Written::Stale,
        "the bundle is there"
    );
    assert_eq!(store.relationships().await.unwrap()[0].value, web);
    let second = store.put_relationship(&spiffe, Some(first), None).await.unwrap();
    assert!(matches!(second, Written::Stored(_)));
    assert_eq!(store.put_relationship(&web, Some(first), None).await.unwrap(), Written::Stale, "it has changed");
    assert_eq!(store.relationships().await.unwrap()[0].value, spiffe);
    store.delete_relationship(&td("partner")).await.unwrap();
    assert!(store.relationships().await.unwrap().is_empty());
    assert_eq!(store.bundles().await.unwrap().len(), 1, "the bundle stays");
}
