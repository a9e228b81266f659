//! `countersign jwt`: fetches and validates JWT-SVIDs as a workload does.

use anyhow::{Result, anyhow};
use clap::Subcommand;
use countersign_agent::claims::from_struct;
use countersign_api::status::message_of;
use countersign_api::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use countersign_api::workload::{Jwtsvid, JwtsvidRequest, ValidateJwtsvidRequest};
use countersign_identity::jwt_svid::unverified_claims;
use serde_json::{Map, Value, json};
use tonic::Status;

use super::output::{Output, Table};
use super::when;
use super::x509::{AgentArg, workload_call};
use crate::clients::{channel, client};
use crate::settings::Mistake;

/// Fetch and validate JWT-SVIDs at the agent, as a workload would.
#[derive(Subcommand)]
pub enum JwtCommand {
    /// Fetch a token for each identity and print them. Whoever has one is taken for its holder until it ends.
    Fetch {
        #[command(flatten)]
        agent: AgentArg,
        /// For whom the tokens are; repeat it for several.
        #[arg(long, value_name = "NAME", required = true)]
        audience: Vec<String>,
        /// Only for this identity [default: all that this process has].
        #[arg(long)]
        spiffe_id: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Say whose a token is, if it is good and for this audience.
    Validate {
        #[command(flatten)]
        agent: AgentArg,
        /// For whom it has to be.
        #[arg(long, value_name = "NAME")]
        audience: String,
        /// The token; `-` reads it from standard input, where other users of this machine do not see it.
        #[arg(long, value_name = "TOKEN")]
        svid: String,
        #[command(flatten)]
        output: Output,
    },
}

/// When claims end, in seconds since 1970.
fn end_of(claims: &Map<String, Value>) -> Option<i64> {
    claims.get("exp").and_then(Value::as_i64)
}

/// The agent's own words say what to do.
fn said(status: Status) -> anyhow::Error {
    anyhow!("{}", message_of(&status).to_owned())
}

/// Runs a subcommand and prints its result.
pub async fn run(command: JwtCommand) -> Result<()> {
    match command {
        JwtCommand::Fetch { agent, audience, spiffe_id, output } => {
            // An unset variable of a script must not ask for all.
            if spiffe_id.as_ref().is_some_and(String::is_empty) {
                return Err(Mistake::flag("--spiffe-id", "it is empty; leave it out for all identities").into());
            }
            let asked = JwtsvidRequest { audience, spiffe_id: spiffe_id.unwrap_or_default() };
            let mut client = client!(SpiffeWorkloadApiClient, channel(&agent.socket, "agent")?);
            let fetched = client.fetch_jwtsvid(workload_call(asked)).await.map_err(said)?.into_inner().svids;
            let mut table = Table::new(&["spiffe id", "hint", "expires", "token"]);
            let mut all = vec![];
            for Jwtsvid { spiffe_id, hint, svid } in fetched {
                // The agent has verified it.
                let end = unverified_claims(&svid).as_ref().and_then(end_of);
                table.row(vec![spiffe_id.clone(), hint.clone(), end.map(when).unwrap_or_default(), svid.clone()]);
                all.push(json!({ "spiffe_id": spiffe_id, "hint": hint, "expires_at": end, "token": svid }));
            }
            output.print(&table, &Value::Array(all))?;
        }
        JwtCommand::Validate { agent, audience, svid, output } => {
            let svid = if svid == "-" {
                let read = crate::settings::read_stdin()?;
                String::from_utf8(read).map_err(|_| Mistake("standard input: it is no text, so no token".into()))?
            } else {
                svid
            };
            let asked = ValidateJwtsvidRequest { audience, svid: svid.trim().to_owned() };
            let mut client = client!(SpiffeWorkloadApiClient, channel(&agent.socket, "agent")?);
            let valid = client.validate_jwtsvid(workload_call(asked)).await.map_err(said)?.into_inner();
            let claims = from_struct(valid.claims.unwrap_or_default());
            let mut facts = vec![("spiffe id".to_owned(), valid.spiffe_id.clone())];
            facts.extend(end_of(&claims).map(|end| ("expires".to_owned(), when(end))));
            let others = claims.iter().filter(|(name, _)| !matches!(name.as_str(), "sub" | "exp"));
            facts.extend(others.map(|(name, value)| (name.clone(), value.to_string())));
            output.print(&Table::facts(facts), &json!({ "spiffe_id": valid.spiffe_id, "claims": claims }))?;
        }
    }
    Ok(())
}
