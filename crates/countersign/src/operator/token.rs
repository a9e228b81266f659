//! `countersign token`.

use anyhow::Result;
use clap::Subcommand;
use countersign_api::spire::agent::CreateJoinTokenRequest;
use countersign_api::spire::agent::agent_client::AgentClient;
use serde_json::json;
use tonic::transport::Channel;

use super::output::{Output, Table};
use super::{when, workload_id};
use crate::clients::{ServerArg, client, refused};
use crate::settings::Ttl;

/// Join tokens.
#[derive(Subcommand)]
pub enum TokenCommand {
    /// Make a join token, which lets one agent attest once.
    Generate {
        #[command(flatten)]
        server: ServerArg,
        /// How long it may be used.
        #[arg(long, value_name = "TTL", default_value = "10m")]
        ttl: Ttl,
        /// An ID that the agent gets as an alias, for entries to name as their parent.
        #[arg(long)]
        spiffe_id: Option<String>,
        /// Print the token alone, as --join-token-file of an agent wants it.
        #[arg(long, short, conflicts_with = "format")]
        quiet: bool,
        #[command(flatten)]
        output: Output,
    },
}

/// Makes a token, with an alias for the agent that uses it.
pub async fn generate(channel: Channel, ttl: Ttl, alias: Option<&str>) -> Result<(String, i64)> {
    let agent_id = alias.map(|id| workload_id("--spiffe-id", id)).transpose()?;
    let ttl = ttl.0.as_secs().try_into().unwrap_or(i32::MAX);
    let request = CreateJoinTokenRequest { ttl, token: String::new(), agent_id };
    let token = client!(AgentClient, channel).create_join_token(request).await.map_err(refused)?.into_inner();
    Ok((token.value, token.expires_at))
}

/// Runs the command.
pub async fn run(command: TokenCommand) -> Result<()> {
    let TokenCommand::Generate { server, ttl, spiffe_id, quiet, output } = command;
    let (token, expires_at) = generate(server.channel()?, ttl, spiffe_id.as_deref()).await?;
    if quiet {
        return Ok(crate::stdout::line(&token)?);
    }
    let table = Table::facts([("token".into(), token.clone()), ("expires".into(), when(expires_at))]);
    output.print(&table, &json!({ "token": token, "expires_at": expires_at }))?;
    Ok(())
}
