//! `countersign status`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use countersign_api::push::status_client::StatusClient;
use countersign_api::push::{GetStatusRequest, GetStatusResponse};
use serde_json::json;

use super::output::{Output, Table};
use super::when;
use crate::clients::{SERVER_SOCKET, channel, client, refused};

/// Show what a running server, agent or sidecar knows of itself: identities, authorities, what it refused and why.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// The Unix socket of a server or agent, or a sidecar's --admin-socket.
    #[arg(long, env = "COUNTERSIGN_SERVER_SOCKET", default_value = SERVER_SOCKET, value_name = "PATH")]
    socket: PathBuf,
    #[command(flatten)]
    output: Output,
}

/// Asks a role.
pub async fn get(socket: &Path) -> Result<GetStatusResponse> {
    let mut client = client!(StatusClient, channel(socket, "role")?);
    Ok(client.get_status(GetStatusRequest {}).await.map_err(refused)?.into_inner())
}

/// Runs the command.
pub async fn run(args: StatusArgs) -> Result<()> {
    let s = get(&args.socket).await?;
    if args.output.is_json() {
        let identities: Vec<_> = s.identities.iter().map(|i| {
            json!({ "entry_id": i.entry_id, "spiffe_id": i.spiffe_id, "serial": i.serial, "expires_at": i.expires_at,
                "authority_id": i.authority_id })
        }).collect();
        let all = json!({ "role": s.role, "version": s.version, "trust_domain": s.trust_domain, "started_at": s.started_at,
            "facts": s.facts, "refused": s.refused, "identities": identities });
        return Ok(crate::stdout::line(&serde_json::to_string_pretty(&all)?)?);
    }
    let mut facts = vec![
        ("role".to_owned(), s.role),
        ("version".to_owned(), s.version),
        ("trust domain".to_owned(), s.trust_domain),
        ("started".to_owned(), when(s.started_at)),
    ];
    let mut more: Vec<_> = s.facts.into_iter().collect();
    more.sort();
    facts.extend(more);
    let mut text = Table::facts(facts).render();
    if !s.identities.is_empty() {
        let mut table = Table::new(&["spiffe id", "serial", "expires", "authority", "entry"]);
        for i in s.identities {
            table.row(vec![i.spiffe_id, i.serial, when(i.expires_at), i.authority_id, i.entry_id]);
        }
        text.push_str(&format!("\n{}", table.render()));
    }
    if !s.refused.is_empty() {
        let mut table = Table::new(&["refused", "times"]);
        let mut all: Vec<_> = s.refused.into_iter().collect();
        all.sort();
        all.into_iter().for_each(|(reason, n)| table.row(vec![reason, n.to_string()]));
        text.push_str(&format!("\n{}", table.render()));
    }
    Ok(crate::stdout::put(&text)?)
}
