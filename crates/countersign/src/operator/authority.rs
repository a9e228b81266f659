//! `countersign authority`: shows and changes the signing authorities.

mod kind;

use anyhow::Result;
use clap::Subcommand;
use countersign_api::spire::localauthority::AuthorityState;
use serde_json::{Map, Value, json};

use self::kind::{Authorities, Kind, States};
use super::output::{Output, Table};
use super::when;
use crate::clients::ServerArg;

/// Show, rotate, taint and revoke the signing authorities.
#[derive(Subcommand)]
pub enum AuthorityCommand {
    /// Show the active, the prepared and the old authority of X509- and of JWT-SVIDs.
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
        /// What the authority signs: x509 or jwt.
        #[arg(long, value_name = "KIND", default_value = "x509")]
        kind: Kind,
        #[command(flatten)]
        output: Output,
    },
    /// Make the prepared authority the signing one; the active one becomes old.
    Activate {
        #[command(flatten)]
        server: ServerArg,
        /// What the authority signs: x509 or jwt.
        #[arg(long, value_name = "KIND", default_value = "x509")]
        kind: Kind,
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
        /// What the authority signs: x509 or jwt.
        #[arg(long, value_name = "KIND", default_value = "x509")]
        kind: Kind,
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
        /// What the authority signs: x509 or jwt.
        #[arg(long, value_name = "KIND", default_value = "x509")]
        kind: Kind,
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
    for (status, state) in states {
        if let Some(s) = state {
            table.row(vec![(*status).to_owned(), s.authority_id.clone(), when(s.expires_at)]);
        }
    }
    Ok(output.print(&table, &Value::Object(facts(states)))?)
}

fn facts(states: &[(&str, Option<AuthorityState>)]) -> Map<String, Value> {
    let known = states.iter().filter_map(|(status, state)| Some((status, state.as_ref()?)));
    let fact = |s: &AuthorityState| json!({ "id": s.authority_id, "expires_at": s.expires_at });
    known.map(|(status, state)| ((*status).to_owned(), fact(state))).collect()
}

/// Prints both kinds. As JSON the X.509 authorities stand at the top, where they were before there were others.
fn print_all(output: &Output, x509: States, jwt: States) -> Result<()> {
    let by_status = |s: States| [("active", s.active), ("prepared", s.prepared), ("old", s.old)];
    let (x509, jwt) = (by_status(x509), by_status(jwt));
    let mut table = Table::new(&["kind", "status", "id", "expires"]);
    for (kind, states) in [("x509", &x509), ("jwt", &jwt)] {
        for (status, state) in states {
            if let Some(s) = state {
                table.row(vec![kind.into(), (*status).into(), s.authority_id.clone(), when(s.expires_at)]);
            }
        }
    }
    let mut all = facts(&x509);
    all.insert("jwt".into(), Value::Object(facts(&jwt)));
    Ok(output.print(&table, &Value::Object(all))?)
}

/// Runs a subcommand and prints its result.
pub async fn run(command: AuthorityCommand) -> Result<()> {
    match command {
        AuthorityCommand::Show { server, output } => {
            let x509 = Authorities::of(&server, Kind::X509)?.states().await?;
            let jwt = Authorities::of(&server, Kind::Jwt)?.states().await?;
            print_all(&output, x509, jwt)?;
        }
        AuthorityCommand::Prepare { server, kind, output } => {
            let prepared = Authorities::of(&server, kind)?.prepare().await?;
            print(&output, &[("prepared", prepared)])?;
        }
        AuthorityCommand::Activate { server, kind, id, output } => {
            let mut authorities = Authorities::of(&server, kind)?;
            let id = if let Some(id) = id {
                id
            } else {
                let prepared = authorities.states().await?.prepared;
                prepared.map(|p| p.authority_id).ok_or_else(|| {
                    let kind = if kind == Kind::Jwt { " --kind jwt" } else { "" };
                    anyhow::anyhow!("no authority is prepared; run `countersign authority prepare{kind}` first")
                })?
            };
            print(&output, &[("active", authorities.activate(&id).await?)])?;
        }
        AuthorityCommand::Taint { server, kind, id, output } => {
            let tainted = Authorities::of(&server, kind)?.taint(&id).await?;
            print(&output, &[("tainted", tainted)])?;
            eprintln!(
                "{}",
                match kind {
                    Kind::X509 =>
                        "agents renew what it signed now. Revoke it once `countersign status` shows its ID at no agent and sidecar: that cuts each connection which still depends on it",
                    Kind::Jwt =>
                        "agents give out none of its tokens any more. Revoke it to have those refused that workloads still hold",
                }
            );
        }
        AuthorityCommand::Revoke { server, kind, id, force, output } => {
            let mut authorities = Authorities::of(&server, kind)?;
            if force {
                authorities.taint(&id).await?;
            }
            print(&output, &[("revoked", authorities.revoke(&id).await?)])?;
        }
    }
    Ok(())
}
