//! A ban is final, whatever other calls are in progress.

use super::*;
use crate::datastore::Sqlite;
use countersign_identity::TrustDomain;

const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

fn id(name: &str) -> SpiffeId {
    SpiffeId::new(format!("spiffe://td/spire/agent/x/{name}")).unwrap()
}

fn agent(name: &str, evidence: &str) -> AttestedAgent {
    AttestedAgent {
        id: id(name),
        attestation_type: "x".into(),
        selectors: Default::default(),
        serial: "0".into(),
        previous_serial: String::new(),
        expires_at: NOW,
        banned: false,
        can_reattest: true,
        evidence: Some(EvidenceKey::stored(evidence.into())),
    }
}

fn node(name: &str, x509pop: &[&str], evidence: Option<&str>) -> AttestedNode {
    let selector = |value: &&str| countersign_identity::Selector::new("x509pop", *value).unwrap();
    AttestedNode {
        id: id(name),
        selectors: x509pop.iter().map(selector).collect(),
        can_reattest: true,
        alias: None,
        evidence: evidence.map(|e| EvidenceKey::stored(e.into())),
    }
}

/// An agent as the version before evidence was kept has left it.
fn old(name: &str, x509pop: &[&str]) -> AttestedAgent {
    let AttestedNode { selectors, .. } = node(name, x509pop, None);
    AttestedAgent { attestation_type: "x509pop".into(), selectors, evidence: None, ..agent(name, "") }
}

async fn store(dir: &tempfile::TempDir) -> Arc<Sqlite> {
    Arc::new(Sqlite::open(&dir.path().join("db"), &TrustDomain::new("td").unwrap()).await.unwrap())
}

fn admitted(agents: &Agents, name: &str) -> Result<Arc<AttestedAgent>, Denied> {
    let serial = agents.get(&id(name)).map(|a| a.serial.clone()).unwrap_or_default();
    agents.admit(&id(name), &serial, NOW + time::Duration::HOUR, NOW)
}

/// Renews with the agent's current SVID again and again, as an agent with several concurrent calls does.
async fn renew_for_ever(agents: Arc<Agents>, name: String) {
    for n in 1.. {
        let Ok(now) = admitted(&agents, &name) else { return };
        tokio::task::yield_now().await;
        let renewal = Renewal { in_use: now.serial.clone(), serial: format!("{n}"), expires_at: NOW };
        let _ = agents.renewed(&now.id, &renewal).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_ban_and_an_eviction_hold_against_eight_renewals_under_way() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let agents = Arc::new(Agents::load(store.clone()).await.unwrap());
    for round in 0..25 {
        let name = format!("n{round}");
        agents.attested(agent(&name, &name)).await.unwrap();
        let renewals: Vec<_> = (0..8).map(|_| tokio::spawn(renew_for_ever(agents.clone(), name.clone()))).collect();
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        let denied = if round % 2 == 0 {
            agents.ban(&id(&name)).await.unwrap();
            Denied::Banned
        } else {
            assert!(agents.evict(&id(&name)).await.unwrap());
            Denied::NotAttested
        };
        for renewal in renewals {
            renewal.await.unwrap();
        }
        assert_eq!(admitted(&agents, &name), Err(denied), "round {round}");
        let stored = store.agent(&id(&name)).await.unwrap().map(|a| a.value.banned);
        assert_eq!(stored, (denied == Denied::Banned).then_some(true), "round {round}");
    }
}

#[tokio::test]
async fn another_servers_ban_is_not_written_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let one = Agents::load(store.clone()).await.unwrap();
    one.attested(agent("a", "key")).await.unwrap();
    one.attested(agent("b", "key-b")).await.unwrap();
    let two = Agents::load(store.clone()).await.unwrap();
    two.ban(&id("a")).await.unwrap();
    two.evict(&id("b")).await.unwrap();
    // The first server has seen neither change.
    let renewal = Renewal { in_use: "0".into(), serial: "1".into(), expires_at: NOW };
    assert!(matches!(one.renewed(&id("a"), &renewal).await, Err(ChangeError::Denied(Denied::Banned))));
    assert!(matches!(one.renewed(&id("b"), &renewal).await, Err(ChangeError::Denied(Denied::NotAttested))));
    assert!(store.agent(&id("a")).await.unwrap().unwrap().value.banned);
    assert!(store.agent(&id("b")).await.unwrap().is_none());
    assert_eq!(admitted(&one, "a"), Err(Denied::Banned), "it has learnt of it");
}

#[tokio::test]
async fn a_banned_node_does_not_come_back_under_another_name_nor_act_under_one_that_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let agents = Agents::load(store.clone()).await.unwrap();
    agents.attested(agent("first", "key")).await.unwrap();
    agents.attested(agent("second", "key")).await.unwrap();
    agents.ban(&id("first")).await.unwrap();
    assert_eq!(admitted(&agents, "second"), Err(Denied::Banned));
    let third = agents.may_attest(&node("third", &[], Some("key")));
    assert!(matches!(third, Err(ChangeError::Denied(Denied::Banned))));
    assert!(matches!(agents.attested(agent("third", "key")).await, Err(ChangeError::Denied(Denied::Banned))));
    agents.evict(&id("second")).await.unwrap();
    assert!(agents.may_attest(&node("third", &[], Some("key"))).is_err(), "the other record's eviction lifts no ban");
    // After a restart too; and the operator's eviction of the banned record lifts it.
    let agents = Agents::load(store).await.unwrap();
    assert!(agents.may_attest(&node("third", &[], Some("key"))).is_err());
    agents.evict(&id("first")).await.unwrap();
    agents.attested(agent("third", "key")).await.unwrap();
}

#[tokio::test]
async fn a_token_that_works_once_attests_one_of_two_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let agents = Agents::load(store(&dir).await).await.unwrap();
    let once = AttestedAgent { can_reattest: false, evidence: None, ..agent("a", "") };
    let (one, two) = tokio::join!(agents.attested(once.clone()), agents.attested(once.clone()));
    assert!(one.is_ok() != two.is_ok());
}

#[tokio::test]
async fn a_ban_from_before_evidence_was_kept_holds_for_the_certificate_however_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let shown = ["ca:fingerprint:c1", "ca:fingerprint:c2", "serialnumber:01", "subject:cn:n1"];
    assert!(matches!(store.put_agent(&old("a", &shown), None).await.unwrap(), Written::Stored(_)));
    assert!(matches!(store.put_agent(&old("other-name", &shown), None).await.unwrap(), Written::Stored(_)));
    let agents = Agents::load(store.clone()).await.unwrap();
    agents.ban(&id("a")).await.unwrap();
    for agents in [agents, Agents::load(store).await.unwrap()] {
        // The CA that was sent may be written in another way too; the configured one is ours.
        let again =
            node("b", &["ca:fingerprint:c3", "ca:fingerprint:c2", "serialnumber:01", "subject:cn:n1"], Some("k"));
        assert!(matches!(agents.may_attest(&again), Err(ChangeError::Denied(Denied::Banned))));
        let AttestedNode { selectors, evidence, .. } = again;
        let again = AttestedAgent { selectors, evidence, ..old("b", &[]) };
        assert!(matches!(agents.attested(again).await, Err(ChangeError::Denied(Denied::Banned))));
        assert_eq!(admitted(&agents, "other-name"), Err(Denied::Banned), "nor under a name that it took before");
        for others in [
            ["ca:fingerprint:c9", "serialnumber:01", "subject:cn:n1"],
            ["ca:fingerprint:c2", "serialnumber:02", "subject:cn:n1"],
            ["ca:fingerprint:c2", "serialnumber:01", "subject:cn:n2"],
        ] {
            agents.may_attest(&node("c", &others, Some("k2"))).unwrap();
        }
        agents.may_attest(&node("d", &[], None)).unwrap();
    }
}

#[tokio::test]
async fn an_agent_whose_evidence_was_not_kept_shows_it_again_instead_of_renewing() {
    let dir = tempfile::tempdir().unwrap();
    let agents = Agents::load(store(&dir).await).await.unwrap();
    let shown = ["ca:fingerprint:c1", "serialnumber:01"];
    agents.attested(old("a", &shown)).await.unwrap();
    let renewal = Renewal { in_use: "0".into(), serial: "1".into(), expires_at: NOW };
    assert!(matches!(agents.renewed(&id("a"), &renewal).await, Err(ChangeError::Denied(Denied::NotActive))));
    let AttestedNode { evidence, .. } = node("a", &shown, Some("key"));
    agents.attested(AttestedAgent { evidence, ..old("a", &shown) }).await.unwrap();
    agents.renewed(&id("a"), &renewal).await.unwrap();
}
