//! `countersign authority`: shows and changes the signing authorities.

mod kind;

use std::collections::HashSet;

use anyhow::Result;
use clap::Subcommand;
use countersign_api::spire::localauthority::AuthorityState;
use countersign_identity::{JwtAuthority, TrustBundle, X509Authority};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;

use self::kind::{Authorities, Kind, States, Trusted};
use super::output::{Output, Table, told};
use super::when;
use crate::clients::ServerArg;

/// Show, rotate, taint and revoke the signing authorities.
#[derive(Subcommand)]
pub enum AuthorityCommand {
    /// Show the active, the prepared and the old authority of X509- and of JWT-SVIDs, and what else the trust bundle has.
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
        /// What the authority signs, x509 or jwt; upstream for a root of the CA above this server.
        #[arg(long, value_name = "KIND", default_value = "x509")]
        kind: Trusted,
        /// ID of the authority, from `countersign authority show`.
        #[arg(long)]
        id: String,
        #[command(flatten)]
        output: Output,
    },
    /// Remove a tainted authority from the bundle, for good: nothing under it is trusted any more, and connections of its SVIDs are cut.
    Revoke {
        #[command(flatten)]
        server: ServerArg,
        /// What the authority signs, x509 or jwt; upstream for a root of the CA above this server.
        #[arg(long, value_name = "KIND", default_value = "x509")]
        kind: Trusted,
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
    let fact = |s: &AuthorityState| {
        let mut fact = json!({ "id": s.authority_id, "expires_at": s.expires_at });
        if !s.upstream_authority_subject_key_id.is_empty() {
            fact["upstream_id"] = s.upstream_authority_subject_key_id.as_str().into();
        }
        fact
    };
    known.map(|(status, state)| ((*status).to_owned(), fact(state))).collect()
}

/// Whether an authority, or the root that it is below, is one of these.
fn is_tainted(state: &AuthorityState, tainted: &HashSet<String>) -> bool {
    [&state.authority_id, &state.upstream_authority_subject_key_id].into_iter().any(|id| tainted.contains(id))
}

/// IDs of the authorities that the bundle has as tainted, which the state of an authority does not say (SPIRE API).
fn tainted(bundle: &TrustBundle) -> HashSet<String> {
    let x509 = bundle.authorities.iter().filter(|a| a.tainted).map(|a| a.id().to_owned());
    let jwt = bundle.jwt_authorities.iter().filter(|a| a.tainted).map(|a| a.key_id().to_owned());
    x509.chain(jwt).collect()
}

/// The roots of the bundle that are none of these authorities: those of the upstream, of other parties, and our own older ones.
fn other_roots<'a>(
    bundle: &'a TrustBundle,
    shown: &[(&str, Option<AuthorityState>)],
) -> impl Iterator<Item = &'a X509Authority> {
    let ids: HashSet<_> = shown.iter().filter_map(|(_, s)| s.as_ref()).map(|s| s.authority_id.clone()).collect();
    bundle.authorities.iter().filter(move |root| !ids.contains(root.id()))
}

/// The keys of tokens of the bundle that are none of these: those of other servers, and our own older ones.
fn other_keys<'a>(
    bundle: &'a TrustBundle,
    shown: &[(&str, Option<AuthorityState>)],
) -> impl Iterator<Item = &'a JwtAuthority> {
    let ids: HashSet<_> = shown.iter().filter_map(|(_, s)| s.as_ref()).map(|s| s.authority_id.clone()).collect();
    bundle.jwt_authorities.iter().filter(move |key| !ids.contains(key.key_id()))
}

/// Prints both kinds. As JSON the X.509 authorities stand at the top, where they were before there were others.
fn print_all(output: &Output, x509: States, jwt: States, bundle: &TrustBundle) -> Result<()> {
    let tainted = tainted(bundle);
    let by_status = |s: States| [("active", s.active), ("prepared", s.prepared), ("old", s.old)];
    let (x509, jwt) = (by_status(x509), by_status(jwt));
    let mut table = Table::new(&["kind", "status", "id", "expires", "below"]);
    for (kind, states) in [("x509", &x509), ("jwt", &jwt)] {
        for (status, state) in states {
            if let Some(s) = state {
                let status = if is_tainted(s, &tainted) { "tainted" } else { status };
                let below = s.upstream_authority_subject_key_id.clone();
                table.row(vec![kind.into(), status.into(), s.authority_id.clone(), when(s.expires_at), below]);
            }
        }
    }
    for root in other_roots(bundle, &x509) {
        let status = if root.tainted { "tainted" } else { "trusted" };
        let ends = when(root.not_after().unix_timestamp());
        table.row(vec!["root".into(), status.into(), root.id().to_owned(), ends, String::new()]);
    }
    for key in other_keys(bundle, &jwt) {
        let status = if key.tainted { "tainted" } else { "trusted" };
        let ends = key.expires_at.map(|end| when(end.unix_timestamp())).unwrap_or_default();
        table.row(vec!["jwt key".into(), status.into(), key.key_id().to_owned(), ends, String::new()]);
    }
    let facts = |states: &[(&str, Option<AuthorityState>)]| {
        let mut facts = facts(states);
        for (status, state) in states {
            if let Some(fact) = facts.get_mut(*status) {
                fact["tainted"] = state.as_ref().is_some_and(|s| is_tainted(s, &tainted)).into();
            }
        }
        facts
    };
    let mut all = facts(&x509);
    all.insert("jwt".into(), Value::Object(facts(&jwt)));
    let root = |root: &X509Authority| json!({ "id": root.id(), "expires_at": root.not_after().unix_timestamp(), "tainted": root.tainted });
    all.insert("roots".into(), other_roots(bundle, &x509).map(root).collect());
    let key = |key: &JwtAuthority| {
        let expires_at = key.expires_at.map(OffsetDateTime::unix_timestamp);
        json!({ "id": key.key_id(), "expires_at": expires_at, "tainted": key.tainted })
    };
    all.insert("jwt_keys".into(), other_keys(bundle, &jwt).map(key).collect());
    Ok(output.print(&table, &Value::Object(all))?)
}

/// Runs a subcommand and prints its result.
pub async fn run(command: AuthorityCommand) -> Result<()> {
    match command {
        AuthorityCommand::Show { server, output } => {
            let x509 = Authorities::of(&server, Kind::X509)?.states().await?;
            let jwt = Authorities::of(&server, Kind::Jwt)?.states().await?;
            let bundle = super::bundle::own(server.channel()?).await?;
            print_all(&output, x509, jwt, &bundle)?;
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
            let tainted = kind.taint(&server, &id).await?;
            print(&output, &[("tainted", tainted)])?;
            eprintln!(
                "{}",
                match kind {
                    Trusted::Upstream =>
                        "agents renew what is below it now. Revoke it once `countersign status` shows none of the authorities below it (column BELOW of `countersign authority show`) at an agent or sidecar: that cuts each connection which still depends on it",
                    Trusted::Own(Kind::X509) =>
                        "agents renew what it signed now. Revoke it once `countersign status` shows its ID at no agent and sidecar, and `countersign authority show` at no server below this one (column BELOW): that cuts each connection which still depends on it, and locks out whoever has not renewed",
                    Trusted::Own(Kind::Jwt) =>
                        "agents give out none of its tokens any more. Revoke it to have those refused that workloads still hold",
                }
            );
        }
        AuthorityCommand::Revoke { server, kind, id, force, output } => {
            if force {
                kind.taint(&server, &id).await?;
            }
            print(&output, &[("revoked", kind.revoke(&server, &id).await?)])?;
        }
    }
    Ok(())
}
