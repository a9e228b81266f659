//! What callers are told of agents and join tokens.

use countersign_api::spire::agent::list_agents_request;
use tonic::Code;

use super::*;
use crate::testing::{agent_call, local, server};

#[test]
fn what_a_node_sent_comes_back_escaped_and_cut() {
    let sent = format!("k8s_psat payload: unknown field `{}\u{1b}[2J\n`", "a".repeat(60_000));
    for error in [
        AttestError::Malformed(sent.clone()),
        AttestError::Refused(sent.clone()),
        AttestError::Unavailable(format!("\u{1b}{sent}")),
    ] {
        let status = attest_status(error);
        assert!(status.message().len() < MAX_REASON + 100, "{}", status.message().len());
        assert!(!status.message().contains(char::is_control));
    }
    let plain = AttestError::Refused("service account `a:b` may not attest nodes".into());
    assert_eq!(attest_status(plain).message(), "service account `a:b` may not attest nodes");
}
#[tokio::test]
async fn agents_are_listed_as_spires_clients_read_them() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let endpoint = Endpoint(core.clone());
    let (id, _) = agent_call(&core, "1").await;
    let known = core.agents.get(&id).unwrap();
    let mut agent = AttestedAgent::clone(&known);
    agent.serial = "ff".into();
    agent.selectors = own_id_selector(&id).into_iter().chain(["a:b".parse().unwrap()]).collect();
    core.agents.attested(agent.clone()).await.unwrap();
    let list = |by_expires_before: &str, selectors: Vec<types::Selector>| {
        let by_selector_match = (!selectors.is_empty()).then_some(types::SelectorMatch { selectors, r#match: 0 });
        let by_expires_before = by_expires_before.to_owned();
        let filter = list_agents_request::Filter { by_expires_before, by_selector_match, ..Default::default() };
        let request = local(ListAgentsRequest { filter: Some(filter), ..Default::default() });
        async { endpoint.list_agents(request).await.map(|found| found.into_inner().agents) }
    };
    let selector = types::Selector { r#type: "a".into(), value: "b".into() };
    let found = list("", vec![selector.clone()]).await.unwrap();
    // A big number in decimal, and no selector that SPIRE has not.
    assert_eq!((found[0].x509svid_serial_number.as_str(), &found[0].selectors), ("255", &vec![selector]));
    let at = |offset: i64| {
        let time = agent.expires_at + time::Duration::seconds(offset);
        format!("{} {:02}:{:02}:{:02} +0000 +00", time.date(), time.hour(), time.minute(), time.second())
    };
    assert_eq!(list(&at(1), vec![]).await.unwrap().len(), 1);
    assert_eq!(list(&at(-1), vec![]).await.unwrap().len(), 0, "whoever purges by it must not find it");
    assert_eq!(list("2900-01-01 00:00:00 -0330 -03", vec![]).await.unwrap().len(), 1);
    for malformed in ["yesterday", "2900-01-01", "2900-01-01 00:00:00 +0000", "2900-01-01 00:00:00 +0000 +01", " "] {
        let refused = list(malformed, vec![]).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{malformed}");
    }
}

#[tokio::test]
async fn a_join_token_has_a_life_and_is_known_by_spires_words_once_it_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let endpoint = Endpoint(core.clone());
    for ttl in [0, -1] {
        let request = local(CreateJoinTokenRequest { ttl, ..Default::default() });
        let refused = endpoint.create_join_token(request).await.unwrap_err();
        assert!(
            refused.code() == Code::InvalidArgument && refused.message().starts_with("ttl is required"),
            "{refused}"
        );
    }
    let attestor = core.attestors.iter().find(|a| a.kind() == "join_token").unwrap();
    let attest = |token: String| async move {
        struct Nobody;
        #[async_trait]
        impl Challenger for Nobody {
            async fn challenge(&mut self, _: Vec<u8>) -> Result<Vec<u8>, AttestError> {
                Err(AttestError::NoAnswer)
            }
        }
        attestor.attest(token.as_bytes(), &mut Nobody).await.map_err(attest_status)
    };
    let made = endpoint.create_join_token(local(CreateJoinTokenRequest { ttl: 60, ..Default::default() })).await;
    let token = made.unwrap().into_inner().value;
    assert!(attest(token.clone()).await.is_ok());
    for used in [token, "no-such".into()] {
        let refused = attest(used).await.err().unwrap();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().starts_with("join token does not exist or has already been used"), "{refused}");
    }
    let over = JoinToken { token: "over".into(), expires_at: core.now() - Duration::from_secs(1), agent_id: None };
    core.store.put_token(&over, core.now() - Duration::from_secs(60)).await.unwrap();
    let refused = attest("over".into()).await.err().unwrap();
    assert!(refused.message().starts_with("join token expired"), "{refused}");
}
