//! `countersign status`: shows the state of a running role.

use std::path::{Path, PathBuf};

use anyhow::Result;
use countersign_api::push::status_client::StatusClient;
use countersign_api::push::{GetStatusRequest, GetStatusResponse, PlaintextPeer};
use serde_json::json;

use super::output::{Output, Table, json_text};
use super::when;
use crate::clients::{channel, client, refused, server_socket};

/// Show the state of a running server, agent or sidecar: identities, authorities, what it refused and why.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Workload of a mesh that `up` runs on this machine, or its `server` or `agent`.
    #[arg(conflicts_with = "socket")]
    name: Option<String>,
    /// Mesh of that workload [default: the only one that is up].
    #[arg(long, value_name = "NAME", requires = "name")]
    mesh: Option<String>,
    /// Unix socket of a server or agent, or a sidecar's --admin-socket [default: the server's].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Fetches the status of the role behind a socket.
pub async fn get(socket: &Path) -> Result<GetStatusResponse> {
    let mut client = client!(StatusClient, channel(socket, "role")?);
    Ok(client.get_status(GetStatusRequest {}).await.map_err(refused)?.into_inner())
}

/// A sidecar's plaintext peers as JSON.
fn plaintext(s: &GetStatusResponse) -> Vec<serde_json::Value> {
    let row = |p: &PlaintextPeer| {
        json!({ "peer": p.peer, "port": p.port, "direction": p.direction, "mode": p.mode, "first_seen": p.first_seen,
            "last_seen": p.last_seen, "open": p.open, "total": p.total })
    };
    s.plaintext_peers.iter().map(row).collect()
}

/// Fetches the status and prints it.
pub async fn run(args: StatusArgs) -> Result<()> {
    let socket = match (&args.name, args.socket) {
        (Some(name), _) => crate::up::socket_named(name, args.mesh.as_deref())?,
        // Not a default of the flag, because that would conflict with a name.
        (None, None) => server_socket(std::env::var_os("COUNTERSIGN_SERVER_SOCKET").map(PathBuf::from))?,
        (None, Some(socket)) => socket,
    };
    let s = get(&socket).await?;
    if args.output.is_json() {
        let identities: Vec<_> = s.identities.iter().map(|i| {
            json!({ "entry_id": i.entry_id, "spiffe_id": i.spiffe_id, "serial": i.serial, "expires_at": i.expires_at,
                "authority_id": i.authority_id })
        }).collect();
        let all = json!({ "role": s.role, "version": s.version, "trust_domain": s.trust_domain, "started_at": s.started_at,
            "facts": s.facts, "refused": s.refused, "identities": identities, "plaintext_peers": plaintext(&s),
            "plaintext_peers_forgotten": s.plaintext_peers_forgotten });
        return Ok(crate::stdout::line(&json_text(&all))?);
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
    if !s.plaintext_peers.is_empty() {
        let mut table = Table::new(&["plaintext peer", "port", "direction", "mode", "open", "total", "last seen"]);
        for p in s.plaintext_peers {
            let (open, total) = (p.open.to_string(), p.total.to_string());
            table.row(vec![p.peer, p.port.to_string(), p.direction, p.mode, open, total, when(p.last_seen)]);
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
