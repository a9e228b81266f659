//! `countersign jwt`: fetches and validates JWT-SVIDs as a workload does.

use anyhow::{Result, anyhow};
use clap::Subcommand;
use countersign_api::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use countersign_api::workload::{JwtsvidRequest, ValidateJwtsvidRequest};
use serde_json::{Value, json};
use tonic::Status;

use super::output::{Output, Table};
use super::x509::{AgentArg, workload_call};
use crate::clients::{channel, client};

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

/// The agent's own words say what to do.
fn said(status: Status) -> anyhow::Error {
    anyhow!("{}", status.message().to_owned())
}

/// Runs a subcommand and prints its result.
pub async fn run(command: JwtCommand) -> Result<()> {
    match command {
        JwtCommand::Fetch { agent, audience, spiffe_id, output } => {
            let asked = JwtsvidRequest { audience, spiffe_id: spiffe_id.unwrap_or_default() };
            let mut client = client!(SpiffeWorkloadApiClient, channel(&agent.socket, "agent")?);
            let fetched = client.fetch_jwtsvid(workload_call(asked)).await.map_err(said)?.into_inner().svids;
            let mut table = Table::new(&["spiffe id", "hint", "token"]);
            for svid in &fetched {
                table.row(vec![svid.spiffe_id.clone(), svid.hint.clone(), svid.svid.clone()]);
            }
            let all = fetched.iter().map(|s| json!({ "spiffe_id": s.spiffe_id, "hint": s.hint, "token": s.svid }));
            output.print(&table, &Value::Array(all.collect()))?;
        }
        JwtCommand::Validate { agent, audience, svid, output } => {
            let svid = if svid == "-" { String::from_utf8(crate::settings::read_stdin()?)? } else { svid };
            let asked = ValidateJwtsvidRequest { audience, svid: svid.trim().to_owned() };
            let mut client = client!(SpiffeWorkloadApiClient, channel(&agent.socket, "agent")?);
            let valid = client.validate_jwtsvid(workload_call(asked)).await.map_err(said)?.into_inner();
            let table = Table::facts([("spiffe id".to_owned(), valid.spiffe_id.clone())]);
            output.print(&table, &json!({ "spiffe_id": valid.spiffe_id }))?;
        }
    }
    Ok(())
}
