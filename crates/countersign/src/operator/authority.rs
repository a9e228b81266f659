//! `countersign authority`: shows and changes the signing authorities.

mod kind;

use std::collections::HashSet;

use anyhow::Result;
use clap::Subcommand;
use countersign_api::spire::localauthority::AuthorityState;
use countersign_identity::TrustBundle;
use serde_json::{Map, Value, json};

use self::kind::{Authorities, Kind, States};
use super::output::{Output, Table, told};
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
    /// Mark an old authority as compromised: agents renew the SVIDs that it signed, and give out none of its tokens, at once.
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
    /// Remove a tainted authority from the bundle: nothing under it is trusted any more, and connections of its SVIDs are cut.
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

/// IDs of the authorities that the bundle has as tainted, which the state of an authority does not say (SPIRE API).
fn tainted(bundle: &TrustBundle) -> HashSet<String> {
    let x509 = bundle.authorities.iter().filter(|a| a.tainted).map(|a| a.id().to_owned());
    let jwt = bundle.jwt_authorities.iter().filter(|a| a.tainted).map(|a| a.key_id().to_owned());
    x509.chain(jwt).collect()
}

/// Prints both kinds. As JSON the X.509 authorities stand at the top, where they were before there were others.
fn print_all(output: &Output, x509: States, jwt: States, tainted: &HashSet<String>) -> Result<()> {
    let by_status = |s: States| [("active", s.active), ("prepared", s.prepared), ("old", s.old)];
    let (x509, jwt) = (by_status(x509), by_status(jwt));
    let mut table = Table::new(&["kind", "status", "id", "expires"]);
    for (kind, states) in [("x509", &x509), ("jwt", &jwt)] {
        for (status, state) in states {
            if let Some(s) = state {
                let status = if tainted.contains(&s.authority_id) { "tainted" } else { status };
                table.row(vec![kind.into(), status.into(), s.authority_id.clone(), when(s.expires_at)]);
            }
        }
    }
    let facts = |states: &[_]| {
        let mut facts = facts(states);
        for fact in facts.values_mut() {
            fact["tainted"] = fact["id"].as_str().is_some_and(|id| tainted.contains(id)).into();
        }
        facts
    };
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
            let bundle = super::bundle::own(server.channel()?).await?;
            print_all(&output, x509, jwt, &tainted(&bundle))?;
        }
        AuthorityCommand::Prepare { server, kind, output } => {
            let mut authorities = Authorities::of(&server, kind)?;
            let before = authorities.states().await?.prepared;
            let prepared = authorities.prepare().await?;
            if let Some(before) = before {
                // Whoever has it in a copy of the bundle has no use for it.
                eprintln!("it replaces authority {}, which was prepared before", told(&before.authority_id));
            }
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
