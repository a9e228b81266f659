//! `spire.api.server.agent.v1`: node attestation, renewal, nodes, join tokens.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use countersign_api::convert::{id_from_wire, id_to_wire, selectors_from_wire, selectors_to_wire, serial_to_wire};
use countersign_api::peer::TlsPeer;
use countersign_api::spire::agent::agent_server::Agent;
use countersign_api::spire::agent::attest_agent_request::Step as Asked;
use countersign_api::spire::agent::attest_agent_response::{Result as Attested, Step as Answered};
use countersign_api::spire::agent::{
    AttestAgentRequest, AttestAgentResponse, BanAgentRequest, CountAgentsRequest, CountAgentsResponse,
    CreateJoinTokenRequest, DeleteAgentRequest, GetAgentRequest, ListAgentsRequest, ListAgentsResponse,
    PostStatusRequest, PostStatusResponse, RenewAgentRequest, RenewAgentResponse, attest_agent_request,
};
use countersign_api::spire::types;
use countersign_identity::selector::SelectorSet;
use countersign_identity::shown::{sentence, shown};
use countersign_identity::trust_domain::{agent_id, server_id};
use countersign_identity::{Entry, Selector, SpiffeId};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::svid::svid_to_wire;
use super::{BoxStream, Endpoint, invalid, masks, paging};
use crate::agents::{AttestedAgent, ChangeError, Denied, Renewal};
use crate::attempts::Attempt;
use crate::caller::{Caller, denied_status};
use crate::core::{ATTESTATION, Core, MAX_REASON, SigningRequest, store_status};
use crate::datastore::JoinToken;
use crate::entries::fresh_entry_id;
use crate::node_attestor::{AttestError, AttestedNode, Challenger, MAX_PAYLOAD_BYTES};

/// Longest attestation, including challenges.
const ATTESTATION_TIMEOUT: Duration = Duration::from_secs(30);
struct StreamChallenger {
    attempt: Attempt,
    requests: Streaming<AttestAgentRequest>,
    responses: mpsc::Sender<Result<AttestAgentResponse, Status>>,
}

#[async_trait]
impl Challenger for StreamChallenger {
    async fn challenge(&mut self, challenge: Vec<u8>) -> Result<Vec<u8>, AttestError> {
        let step = AttestAgentResponse { step: Some(Answered::Challenge(challenge)) };
        self.attempt.pause();
        self.responses.send(Ok(step)).await.map_err(|_| AttestError::NoAnswer)?;
        let answer = match self.requests.message().await {
            Ok(Some(AttestAgentRequest { step: Some(Asked::ChallengeResponse(answer)) }))
                if answer.len() <= MAX_PAYLOAD_BYTES =>
            {
                answer
            }
            _ => return Err(AttestError::NoAnswer),
        };
        tokio::select! {
            () = self.attempt.resume() => Ok(answer),
            () = self.responses.closed() => Err(AttestError::NoAnswer),
        }
    }
}

impl StreamChallenger {
    /// Waits until evidence of this kind may be judged. Errors: Cancelled once the caller is gone, whose place in the line is
    /// another's then.
    async fn take_turn(&mut self, kind: &'static str) -> Result<(), Status> {
        tokio::select! {
            () = self.attempt.take_turn(kind) => Ok(()),
            () = self.responses.closed() => Err(Status::cancelled("the caller is gone")),
        }
    }
}

/// What attestation found out. An agent's own ID is a selector too, for its aliases, of which SPIRE's API has nothing.
fn node_selectors(agent: &AttestedAgent) -> SelectorSet {
    agent.selectors.difference(&own_id_selector(&agent.id)).cloned().collect()
}

fn agent_to_wire(agent: &AttestedAgent) -> types::Agent {
    types::Agent {
        id: Some(id_to_wire(&agent.id)),
        attestation_type: agent.attestation_type.clone(),
        x509svid_serial_number: serial_to_wire(&agent.serial),
        x509svid_expires_at: agent.expires_at.unix_timestamp(),
        selectors: selectors_to_wire(&node_selectors(agent)),
        banned: agent.banned,
        can_reattest: agent.can_reattest,
    }
}

async fn attest(
    core: &Arc<Core>,
    params: attest_agent_request::Params,
    challenger: &mut StreamChallenger,
    caller: &str,
) -> Result<Attested, Status> {
    let data = params.data.ok_or_else(|| invalid("data is missing"))?;
    let csr = params.params.ok_or_else(|| invalid("params is missing"))?.csr;
    if data.payload.len() > MAX_PAYLOAD_BYTES {
        return Err(invalid(format!("payload is longer than {MAX_PAYLOAD_BYTES} bytes")));
    }
    let attestor = core.attestors.iter().find(|a| a.kind() == data.r#type);
    challenger.take_turn(attestor.map_or("", |a| a.kind())).await?;
    let attestor = attestor.ok_or_else(|| {
        let known: Vec<_> = core.attestors.iter().map(|a| a.kind()).collect();
        Status::failed_precondition(format!(
            "no node attestor `{}` is configured here, only {}",
            shown(&data.r#type),
            known.join(", ")
        ))
    })?;
    let node = attestor.attest(&data.payload, challenger).await.map_err(attest_status)?;
    // Of the agent alone: nobody else can use it up.
    if !core.attest_limit.take(node.id.clone(), 1, Instant::now()) {
        return Err(Status::resource_exhausted(format!("agent `{}` attests too often; wait a second", node.id)));
    }
    // Before anything is signed; looked at once more when the agent is stored.
    core.agents.may_attest(&node).map_err(|e| change_status(e, &node.id))?;
    let issued = core
        .sign(&SigningRequest {
            kind: "agent_svid",
            caller,
            entry_id: "",
            id: &node.id,
            dns_names: &[],
            ttl: core.issuance().agent_svid_ttl,
            csr: &csr,
        })
        .await?;
    let AttestedNode { id, selectors, can_reattest, alias, evidence } = node;
    let agent = AttestedAgent {
        id: id.clone(),
        attestation_type: data.r#type,
        selectors: own_id_selector(&id).into_iter().chain(selectors).collect(),
        serial: issued.facts.serial.clone(),
        previous_serial: String::new(),
        expires_at: issued.facts.not_after,
        banned: false,
        can_reattest,
        evidence,
    };
    let take_up = |core: Arc<Core>| async move {
        let id = agent.id.clone();
        core.agents.attested(agent).await.map_err(|e| change_status(e, &id))?;
        if let Some(alias) = alias {
            // The entry's selector is the agent's own ID, which no other node can attest to.
            let entry = alias_entry(&core, alias, &id)?;
            core.entries.create(vec![entry]).await.map_err(|e| store_status(&e))?;
        }
        tracing::info!(agent = %id, "agent attested");
        Ok(())
    };
    core.to_the_end(take_up).await?;
    Ok(Attested { svid: Some(svid_to_wire(&id, &issued, "")), reattestable: can_reattest })
}

/// Why a node was not believed, as a gRPC status. Parsers quote what anybody has sent: the text is escaped and cut.
fn attest_status(error: AttestError) -> Status {
    let text = sentence(&error.to_string(), MAX_REASON).to_string();
    match error {
        AttestError::Malformed(_) => Status::invalid_argument(text),
        AttestError::Store(error) => store_status(&error),
        AttestError::Unavailable(_) => Status::unavailable(text),
        AttestError::Refused(_) | AttestError::NoAnswer => Status::permission_denied(text),
    }
}

/// Why an agent's record was not changed, as a gRPC status.
fn change_status(error: ChangeError, id: &SpiffeId) -> Status {
    match error {
        ChangeError::Denied(denied) => denied_status(denied, id),
        ChangeError::AttestedOnce => Status::permission_denied(format!("agent `{id}`: {error}")),
        ChangeError::Store(error) => store_status(&error),
    }
}

fn own_id_selector(id: &SpiffeId) -> SelectorSet {
    Selector::new("spiffe_id", id.to_string()).into_iter().collect()
}

fn alias_entry(core: &Core, alias: SpiffeId, agent: &SpiffeId) -> Result<Entry, Status> {
    let entry = Entry {
        id: fresh_entry_id(),
        spiffe_id: alias,
        parent_id: server_id(core.trust_domain()),
        selectors: own_id_selector(agent),
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        federates_with: Default::default(),
        admin: false,
        downstream: false,
        dns_names: vec![],
        expires_at: None,
        hint: String::new(),
        store_svid: false,
        additional: Default::default(),
        revision: 0,
        created_at: core.now(),
    };
    entry.check(core.trust_domain()).map_err(invalid)?;
    Ok(entry)
}

/// Filter of CountAgents and ListAgents, whose wire messages are alike.
#[derive(Default)]
struct Filter {
    attestation_type: String,
    selectors: Option<(SelectorSet, i32)>,
    banned: Option<bool>,
    can_reattest: Option<bool>,
    expires_before: Option<OffsetDateTime>,
}

/// Parses the filter of either message.
macro_rules! filter {
    ($f:expr) => {
        $f.map(|f| {
            let selectors = f
                .by_selector_match
                .map(|m| Ok::<_, Status>((selectors_from_wire(m.selectors).map_err(invalid)?, m.r#match)));
            Ok::<_, Status>(Filter {
                attestation_type: f.by_attestation_type,
                selectors: selectors.transpose()?,
                banned: f.by_banned,
                can_reattest: f.by_can_reattest,
                expires_before: expires_before(&f.by_expires_before)?,
            })
        })
        .transpose()
        .map(Option::unwrap_or_default)
    };
}

/// Parses a time as SPIRE writes it here: date, time, offset, and the offset's hours once more. SPIRE takes what it cannot read for no
/// filter; whoever purges by it would evict every agent.
fn expires_before(text: &str) -> Result<Option<OffsetDateTime>, Status> {
    let malformed = || invalid("by_expires_before: write a time as in `2026-11-28 15:04:05 +0000 +00`");
    let time = match text.split(' ').collect::<Vec<_>>()[..] {
        [""] => return Ok(None),
        [date, time, offset, hours] if offset.strip_prefix(hours).is_some_and(|minutes| minutes.len() == 2) => {
            format!("{date}T{time}{hours}:{}", &offset[hours.len()..])
        }
        _ => return Err(malformed()),
    };
    OffsetDateTime::parse(&time, &Rfc3339).map(Some).map_err(|_| malformed())
}

impl Filter {
    fn matches(&self, agent: &AttestedAgent) -> bool {
        let has_selectors =
            |(wanted, how): &(SelectorSet, i32)| super::entry::sets_match(wanted, &node_selectors(agent), *how);
        self.selectors.as_ref().is_none_or(has_selectors)
            && (self.attestation_type.is_empty() || self.attestation_type == agent.attestation_type)
            && self.banned.is_none_or(|b| b == agent.banned)
            && self.can_reattest.is_none_or(|c| c == agent.can_reattest)
            && self.expires_before.is_none_or(|time| agent.expires_at < time)
    }
}

impl Endpoint {
    fn agents_matching(&self, filter: &Filter) -> Vec<types::Agent> {
        self.0.agents.list().iter().filter(|agent| filter.matches(agent)).map(|agent| agent_to_wire(agent)).collect()
    }

    fn known_agent(&self, id: Option<types::Spiffeid>) -> Result<Arc<AttestedAgent>, Status> {
        let id = id_from_wire("id", id).map_err(invalid)?;
        self.0.agents.get(&id).ok_or_else(|| Status::not_found(format!("there is no agent `{id}`")))
    }
}

#[async_trait]
impl Agent for Endpoint {
    type AttestAgentStream = BoxStream<AttestAgentResponse>;

    async fn count_agents(
        &self,
        request: Request<CountAgentsRequest>,
    ) -> Result<Response<CountAgentsResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let filter = filter!(request.into_inner().filter)?;
        let count = self.agents_matching(&filter).len().try_into().unwrap_or(i32::MAX);
        Ok(Response::new(CountAgentsResponse { count }))
    }

    async fn list_agents(&self, request: Request<ListAgentsRequest>) -> Result<Response<ListAgentsResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let filter = filter!(request.filter)?;
        let name = |a: &types::Agent| {
            a.id.as_ref().map(|id| format!("spiffe://{}{}", id.trust_domain, id.path)).unwrap_or_default()
        };
        let (page, next_page_token) =
            paging::page(self.agents_matching(&filter), request.page_size, &request.page_token, name);
        let agents = page.into_iter().map(|a| masks::agent(a, request.output_mask)).collect();
        Ok(Response::new(ListAgentsResponse { agents, next_page_token }))
    }

    async fn get_agent(&self, request: Request<GetAgentRequest>) -> Result<Response<types::Agent>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let agent = self.known_agent(request.id)?;
        Ok(Response::new(masks::agent(agent_to_wire(&agent), request.output_mask)))
    }

    async fn delete_agent(&self, request: Request<DeleteAgentRequest>) -> Result<Response<()>, Status> {
        let caller = Caller::operator(&self.0, &request)?;
        let agent = self.known_agent(request.into_inner().id)?;
        let evict = |core: Arc<Core>| async move {
            core.agents.evict(&agent.id).await.map_err(|e| store_status(&e))?;
            tracing::warn!(agent = %agent.id, %caller, "agent evicted");
            Ok(())
        };
        self.0.to_the_end(evict).await.map(Response::new)
    }

    async fn ban_agent(&self, request: Request<BanAgentRequest>) -> Result<Response<()>, Status> {
        let caller = Caller::operator(&self.0, &request)?;
        let agent = self.known_agent(request.into_inner().id)?;
        let ban = |core: Arc<Core>| async move {
            let id = &agent.id;
            core.agents.ban(id).await.map_err(|error| match error {
                // It was evicted a moment ago.
                ChangeError::Denied(Denied::NotAttested) => Status::not_found(format!("there is no agent `{id}`")),
                other => change_status(other, id),
            })?;
            tracing::warn!(agent = %id, %caller, "agent banned");
            Ok(())
        };
        self.0.to_the_end(ban).await.map(Response::new)
    }

    async fn attest_agent(
        &self,
        request: Request<Streaming<AttestAgentRequest>>,
    ) -> Result<Response<Self::AttestAgentStream>, Status> {
        let peer = request.extensions().get::<TlsPeer>().map(|p| p.address);
        let source = peer.map(|address| address.ip().to_canonical());
        let caller = source.map_or_else(|| "local".to_owned(), |ip| format!("anonymous@{ip}"));
        let attempt = peer.map_or_else(|| Some(Attempt::unbounded()), |address| self.0.attempts.begin(address));
        let attempt = attempt.ok_or_else(|| {
            source.inspect(|ip| self.0.refuse_over_limit("agent_svid", *ip));
            Status::resource_exhausted("this connection has an attestation in progress already")
        })?;
        let (tx, rx) = mpsc::channel(1);
        let core = self.0.clone();
        self.0.tasks.spawn(async move {
            let mut challenger = StreamChallenger { attempt, requests: request.into_inner(), responses: tx.clone() };
            let attested = async {
                match challenger.requests.message().await? {
                    Some(AttestAgentRequest { step: Some(Asked::Params(params)) }) => {
                        attest(&core, params, &mut challenger, &caller).await
                    }
                    _ => Err(invalid("the first message must hold params")),
                }
            };
            let attested = tokio::select! {
                attested = tokio::time::timeout(ATTESTATION_TIMEOUT, attested) => {
                    attested.unwrap_or_else(|_| Err(Status::deadline_exceeded("the attestation took too long")))
                }
                () = core.shutdown.cancelled() => Err(Status::unavailable("the server is shutting down")),
            };
            let failed = attested.is_err();
            let message = match attested {
                Ok(result) => Ok(AttestAgentResponse { step: Some(Answered::Result(result)) }),
                Err(status) => {
                    core.refuse_counted("agent_svid", &caller, source, ATTESTATION, status.message());
                    Err(status)
                }
            };
            // The caller may be gone; what was decided is in the record.
            let _ = tx.send(message).await;
            if failed {
                drop((challenger.requests, challenger.responses, tx));
                challenger.attempt.fail().await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn renew_agent(&self, request: Request<RenewAgentRequest>) -> Result<Response<RenewAgentResponse>, Status> {
        let agent = Caller::agent(&self.0, &request)?;
        self.0.within_sign_limit(&request, 1)?;
        if agent.lacks_evidence() {
            let reason = "it attested before evidence was kept; it must attest again";
            self.0.refuse("agent_svid", &agent.id.to_string(), "", "", ATTESTATION, reason);
            return Err(denied_status(Denied::NotActive, &agent.id));
        }
        let in_use = request.extensions().get::<TlsPeer>().and_then(|p| p.svid.clone());
        let csr = request.into_inner().params.ok_or_else(|| invalid("params is missing"))?.csr;
        let issued = self
            .0
            .sign(&SigningRequest {
                kind: "agent_svid",
                caller: &agent.id.to_string(),
                entry_id: "",
                id: &agent.id,
                dns_names: &[],
                ttl: self.0.issuance().agent_svid_ttl,
                csr: &csr,
            })
            .await?;
        let renewal = Renewal {
            in_use: in_use.map(|svid| svid.facts.serial.clone()).unwrap_or_default(),
            serial: issued.facts.serial.clone(),
            expires_at: issued.facts.not_after,
        };
        // Banned or evicted while it was signed: what was signed is thrown away.
        let id = agent.id.clone();
        let note = |core: Arc<Core>| async move {
            core.agents.renewed(&id, &renewal).await.map_err(|error| {
                core.refuse("agent_svid", &id.to_string(), "", "", ATTESTATION, &error.to_string());
                change_status(error, &id)
            })
        };
        self.0.to_the_end(note).await?;
        Ok(Response::new(RenewAgentResponse { svid: Some(svid_to_wire(&agent.id, &issued, "")) }))
    }

    async fn create_join_token(
        &self,
        request: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<types::JoinToken>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let seconds = u64::try_from(request.ttl).ok().filter(|seconds| *seconds > 0);
        let ttl = Duration::from_secs(seconds.ok_or_else(|| invalid("ttl is required, you must provide one"))?);
        let token = if request.token.is_empty() { random_token()? } else { request.token };
        // The token becomes the last segment of the agent's SPIFFE ID.
        agent_id(self.0.trust_domain(), "join_token", &token)
            .map_err(|_| invalid("token: use letters, digits, `.`, `_`, `-`"))?;
        if token.len() > 255 || token.contains('/') {
            return Err(invalid("token: use 1 to 255 letters, digits, `.`, `_`, `-`"));
        }
        let agent_id = request.agent_id.map(|id| id_from_wire("agent_id", Some(id))).transpose().map_err(invalid)?;
        if let Some(alias) = &agent_id {
            alias_entry(&self.0, alias.clone(), alias)?;
        }
        let now = self.0.now();
        let token = JoinToken { token, expires_at: now + ttl, agent_id };
        self.0.store.put_token(&token, now).await.map_err(|e| store_status(&e))?;
        Ok(Response::new(types::JoinToken { value: token.token, expires_at: token.expires_at.unix_timestamp() }))
    }

    async fn post_status(&self, request: Request<PostStatusRequest>) -> Result<Response<PostStatusResponse>, Status> {
        Caller::agent(&self.0, &request)?;
        Ok(Response::new(PostStatusResponse {}))
    }
}

fn random_token() -> Result<String, Status> {
    let mut bytes = [0u8; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Status::internal("no randomness"))?;
    Ok(hex::encode(bytes))
}

#[cfg(test)]
mod tests;
