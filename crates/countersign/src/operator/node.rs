//! `countersign node`: lists, evicts and bans attested nodes.

use anyhow::Result;
use clap::Subcommand;
use countersign_api::convert::serial_from_wire;
use countersign_api::spire::agent::agent_client::AgentClient;
use countersign_api::spire::agent::{BanAgentRequest, DeleteAgentRequest, ListAgentsRequest};
use serde_json::{Value, json};

use super::output::{Output, Table};
use super::{shown, when, workload_id};
use crate::clients::{ServerArg, client, refused};

/// List, evict and ban attested nodes.
#[derive(Subcommand)]
pub enum NodeCommand {
    /// List the attested agents.
    List {
        #[command(flatten)]
        server: ServerArg,
        #[command(flatten)]
        output: Output,
    },
    /// Remove an agent; it may attest again.
    Evict {
        #[command(flatten)]
        server: ServerArg,
        /// SPIFFE ID of the agent, from `countersign node list`.
        #[arg(long)]
        spiffe_id: String,
    },
    /// Reject an agent until it is evicted; its workloads lose their identities.
    Ban {
        #[command(flatten)]
        server: ServerArg,
        /// SPIFFE ID of the agent, from `countersign node list`.
        #[arg(long)]
        spiffe_id: String,
    },
}

/// Runs a subcommand and prints its result.
pub async fn run(command: NodeCommand) -> Result<()> {
    match command {
        NodeCommand::List { server, output } => {
            let mut client = client!(AgentClient, server.channel()?);
            let (mut agents, mut page_token) = (vec![], String::new());
            loop {
                let request = ListAgentsRequest { page_size: 1_000, page_token, ..Default::default() };
                let page = client.list_agents(request).await.map_err(refused)?.into_inner();
                agents.extend(page.agents);
                if page.next_page_token.is_empty() {
                    break;
                }
                page_token = page.next_page_token;
            }
            let mut table =
                Table::new(&["spiffe id", "attestation", "serial", "svid expires", "banned", "can reattest"]);
            let mut all = vec![];
            for a in &agents {
                let id = shown(a.id.as_ref());
                table.row(vec![
                    id.clone(),
                    a.attestation_type.clone(),
                    serial_from_wire(&a.x509svid_serial_number),
                    when(a.x509svid_expires_at),
                    a.banned.to_string(),
                    a.can_reattest.to_string(),
                ]);
                all.push(json!({
                    "spiffe_id": id,
                    "attestation_type": a.attestation_type,
                    "serial": serial_from_wire(&a.x509svid_serial_number),
                    "expires_at": a.x509svid_expires_at,
                    "banned": a.banned,
                    "can_reattest": a.can_reattest,
                    "selectors": a.selectors.iter().map(|s| format!("{}:{}", s.r#type, s.value)).collect::<Vec<_>>(),
                }));
            }
            output.print(&table, &Value::Array(all))?;
        }
        NodeCommand::Evict { server, spiffe_id } => {
            let id = Some(workload_id("--spiffe-id", &spiffe_id)?);
            client!(AgentClient, server.channel()?).delete_agent(DeleteAgentRequest { id }).await.map_err(refused)?;
            eprintln!("evicted {spiffe_id}");
        }
        NodeCommand::Ban { server, spiffe_id } => {
            let id = Some(workload_id("--spiffe-id", &spiffe_id)?);
            client!(AgentClient, server.channel()?).ban_agent(BanAgentRequest { id }).await.map_err(refused)?;
            eprintln!("banned {spiffe_id}");
        }
    }
    Ok(())
}
