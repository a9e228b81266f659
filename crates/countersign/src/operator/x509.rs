//! `countersign x509`: fetches SVIDs as a workload does.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use clap::Subcommand;
use countersign_api::status::message_of;
use countersign_api::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use countersign_api::workload::{X509svidRequest, X509svidResponse};
use countersign_api::workload_api::split_der;
use countersign_identity::bundle::certificates_to_pem;
use countersign_identity::svid::LeafFacts;
use serde_json::{Value, json};
use tonic::metadata::MetadataValue;
use tonic::{Request, Streaming};

use super::output::{Output, Table};
use super::when;
use crate::clients::{AGENT_SOCKET, channel, client, refused};

/// Fetch SVIDs from the agent, as a workload would.
#[derive(Subcommand)]
pub enum X509Command {
    /// Fetch the SVIDs once and print them.
    Fetch {
        #[command(flatten)]
        agent: AgentArg,
        #[command(flatten)]
        output: Output,
    },
    /// Print the SVIDs again after each rotation.
    Watch {
        #[command(flatten)]
        agent: AgentArg,
        #[command(flatten)]
        output: Output,
    },
}

/// The argument that selects the agent.
#[derive(Debug, clap::Args)]
pub struct AgentArg {
    /// Unix socket of the agent.
    #[arg(long, env = "COUNTERSIGN_AGENT_SOCKET", default_value = AGENT_SOCKET, value_name = "PATH")]
    pub(super) socket: PathBuf,
}

/// A call of a workload: the agent wants this header, so that no browser is tricked into one (SPIFFE Workload Endpoint 6).
pub(super) fn workload_call<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    request
}

async fn open(agent: &AgentArg) -> Result<Streaming<X509svidResponse>> {
    let request = workload_call(X509svidRequest {});
    let mut client = client!(SpiffeWorkloadApiClient, channel(&agent.socket, "agent")?);
    Ok(client.fetch_x509svid(request).await.map_err(|s| anyhow!("{}", message_of(&s).to_owned()))?.into_inner())
}

/// The SVIDs in a response, without keys: SPIFFE ID, serial, expiry, and the same as JSON.
fn facts(response: &X509svidResponse) -> Result<Vec<(String, String, i64, Value)>> {
    let one = |svid: &countersign_api::workload::X509svid| {
        let leaf = LeafFacts::of_first(&svid.x509_svid).context("the agent's SVID cannot be read")?;
        let expires_at = leaf.not_after.unix_timestamp();
        let chain = split_der(&svid.x509_svid).map_err(|e| anyhow!("the agent's SVID cannot be read: {e}"))?;
        let json = json!({
            "spiffe_id": svid.spiffe_id, "serial": leaf.serial, "expires_at": expires_at, "hint": svid.hint,
            "certificates": certificates_to_pem(chain),
        });
        Ok((svid.spiffe_id.clone(), leaf.serial, expires_at, json))
    };
    response.svids.iter().map(one).collect()
}

/// Runs a subcommand and prints its result.
pub async fn run(command: X509Command) -> Result<()> {
    match command {
        X509Command::Fetch { agent, output } => {
            let mut stream = open(&agent).await?;
            let response = stream.message().await.map_err(refused)?.context("the agent closed the stream")?;
            let mut table = Table::new(&["spiffe id", "serial", "expires"]);
            let mut all = vec![];
            for (id, serial, expires, json) in facts(&response)? {
                table.row(vec![id, serial, when(expires)]);
                all.push(json);
            }
            output.print(&table, &Value::Array(all))?;
        }
        X509Command::Watch { agent, output } => {
            let mut stream = open(&agent).await?;
            loop {
                let next = tokio::select! {
                    next = stream.message() => next.map_err(refused)?,
                    gone = crate::stdout::closed() => return Err(gone.into()),
                };
                let Some(response) = next else { break };
                for (id, serial, expires, json) in facts(&response)? {
                    if output.is_json() {
                        crate::stdout::line(&json.to_string())?;
                    } else {
                        crate::stdout::line(&format!("{id}  serial {serial}  expires {}", when(expires)))?;
                    }
                }
            }
        }
    }
    Ok(())
}
