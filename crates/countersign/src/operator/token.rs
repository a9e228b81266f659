//! `countersign token`: generates join tokens.

use anyhow::Result;
use clap::Subcommand;
use countersign_api::spire::agent::CreateJoinTokenRequest;
use countersign_api::spire::agent::agent_client::AgentClient;
use serde_json::json;

use super::output::{Output, Table};
use super::{when, workload_id};
use crate::clients::{Asking, ServerArg, client, refused};
use crate::settings::Ttl;

/// Generate join tokens, with which agents attest.
#[derive(Subcommand)]
pub enum TokenCommand {
    /// Generate a join token, with which one agent can attest once.
    Generate {
        #[command(flatten)]
        server: ServerArg,
        /// How long the token is valid.
        #[arg(long, value_name = "TTL", default_value = "10m")]
        ttl: Ttl,
        /// SPIFFE ID that the agent gets as an alias, usable as parent of entries.
        #[arg(long)]
        spiffe_id: Option<String>,
        /// Print only the token, as an agent's --join-token-file expects it.
        #[arg(long, short, conflicts_with = "format")]
        quiet: bool,
        #[command(flatten)]
        output: Output,
    },
}

/// Generates a token, optionally with an alias for the agent. Returns the token and its expiry in Unix seconds.
pub async fn generate(channel: Asking, ttl: Ttl, alias: Option<&str>) -> Result<(String, i64)> {
    let agent_id = alias.map(|id| workload_id("--spiffe-id", id)).transpose()?;
    let ttl = ttl.0.as_secs().try_into().unwrap_or(i32::MAX);
    let request = CreateJoinTokenRequest { ttl, token: String::new(), agent_id };
    let token = client!(AgentClient, channel).create_join_token(request).await.map_err(refused)?.into_inner();
    Ok((token.value, token.expires_at))
}

/// Runs the subcommand and prints its result.
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
