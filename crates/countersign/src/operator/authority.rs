//! `countersign authority`: shows and changes the signing authorities.

use anyhow::Result;
use clap::Subcommand;
use countersign_api::spire::localauthority::local_authority_client::LocalAuthorityClient;
use countersign_api::spire::localauthority::{
    ActivateX509AuthorityRequest, AuthorityState, GetX509AuthorityStateRequest, PrepareX509AuthorityRequest,
    RevokeX509AuthorityRequest, TaintX509AuthorityRequest,
};
use serde_json::{Value, json};

use super::output::{Output, Table};
use super::when;
use crate::clients::{ServerArg, client, refused};

/// Show, rotate, taint and revoke the signing authorities.
#[derive(Subcommand)]
pub enum AuthorityCommand {
    /// Show the active, the prepared and the old authority.
    Show {
        #[command(flatten)]
        server: ServerArg,
        #[command(flatten)]
        output: Output,
    },
    /// Prepare the next authority and publish it in the bundle.
    Prepare {
        #[command(flatten)]
        server: ServerArg,
        #[command(flatten)]
        output: Output,
    },
    /// Make the prepared authority the signing one; the active one becomes old.
    Activate {
        #[command(flatten)]
        server: ServerArg,
        /// ID of the authority [default: the prepared one].
        #[arg(long)]
        id: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Mark an old authority as compromised: everything it signed is renewed at once.
    Taint {
        #[command(flatten)]
        server: ServerArg,
        /// ID of the authority, from `countersign authority show`.
        #[arg(long)]
        id: String,
        #[command(flatten)]
        output: Output,
    },
    /// Remove a tainted authority from the bundle: nothing under it is trusted any more, and its connections are cut.
    Revoke {
        #[command(flatten)]
        server: ServerArg,
        /// ID of the authority, from `countersign authority show`.
        #[arg(long)]
        id: String,
        /// Taint and revoke at once: everything that was not renewed yet is cut off.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        output: Output,
    },
}

fn print(output: &Output, states: &[(&str, Option<AuthorityState>)]) -> Result<()> {
    let mut table = Table::new(&["status", "id", "expires"]);
    let mut all = serde_json::Map::new();
    for (status, state) in states {
        if let Some(s) = state {
            table.row(vec![(*status).to_owned(), s.authority_id.clone(), when(s.expires_at)]);
            all.insert((*status).to_owned(), json!({ "id": s.authority_id, "expires_at": s.expires_at }));
        }
    }
    Ok(output.print(&table, &Value::Object(all))?)
}

/// Runs a subcommand and prints its result.
pub async fn run(command: AuthorityCommand) -> Result<()> {
    match command {
        AuthorityCommand::Show { server, output } => {
            let mut client = client!(LocalAuthorityClient, server.channel()?);
            let s =
                client.get_x509_authority_state(GetX509AuthorityStateRequest {}).await.map_err(refused)?.into_inner();
            print(&output, &[("active", s.active), ("prepared", s.prepared), ("old", s.old)])?;
        }
        AuthorityCommand::Prepare { server, output } => {
            let mut client = client!(LocalAuthorityClient, server.channel()?);
            let s = client.prepare_x509_authority(PrepareX509AuthorityRequest {}).await.map_err(refused)?.into_inner();
            print(&output, &[("prepared", s.prepared_authority)])?;
        }
        AuthorityCommand::Activate { server, id, output } => {
            let mut client = client!(LocalAuthorityClient, server.channel()?);
            let id = if let Some(id) = id {
                id
            } else {
                let found = client.get_x509_authority_state(GetX509AuthorityStateRequest {}).await;
                let prepared = found.map_err(refused)?.into_inner().prepared;
                prepared.map(|p| p.authority_id).ok_or_else(|| {
                    anyhow::anyhow!("no authority is prepared; run `countersign authority prepare` first")
                })?
            };
            let s = client
                .activate_x509_authority(ActivateX509AuthorityRequest { authority_id: id })
                .await
                .map_err(refused)?
                .into_inner();
            print(&output, &[("active", s.activated_authority)])?;
        }
        AuthorityCommand::Taint { server, id, output } => {
            let mut client = client!(LocalAuthorityClient, server.channel()?);
            let s = client
                .taint_x509_authority(TaintX509AuthorityRequest { authority_id: id })
                .await
                .map_err(refused)?
                .into_inner();
            print(&output, &[("tainted", s.tainted_authority)])?;
            eprintln!(
                "agents renew what it signed now. Revoke it once `countersign status` shows its ID at no agent and sidecar: that cuts each connection which still depends on it"
            );
        }
        AuthorityCommand::Revoke { server, id, force, output } => {
            let mut client = client!(LocalAuthorityClient, server.channel()?);
            if force {
                let taint = TaintX509AuthorityRequest { authority_id: id.clone() };
                client.taint_x509_authority(taint).await.map_err(refused)?;
            }
            let s = client
                .revoke_x509_authority(RevokeX509AuthorityRequest { authority_id: id })
                .await
                .map_err(refused)?
                .into_inner();
            print(&output, &[("revoked", s.revoked_authority)])?;
        }
    }
    Ok(())
}
