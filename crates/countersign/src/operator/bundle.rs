//! `countersign bundle`: shows and sets trust bundles.

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;
use countersign_api::convert::{bundle_from_wire, bundle_to_wire};
use countersign_api::spire::bundle::bundle_client::BundleClient;
use countersign_api::spire::bundle::{BatchSetFederatedBundleRequest, GetBundleRequest, GetFederatedBundleRequest};
use countersign_identity::X509Bundle;
use countersign_identity::trust_domain::parse_trust_domain;
use serde_json::json;

use super::ok;
use super::output::Output;
use crate::clients::{Asking, ServerArg, client, refused};
use crate::settings::{Mistake, read_file};

/// Show trust bundles, and set those of foreign trust domains.
#[derive(Subcommand)]
pub enum BundleCommand {
    /// Print a trust bundle as PEM.
    Show {
        #[command(flatten)]
        server: ServerArg,
        /// Foreign trust domain whose bundle to print [default: the server's own].
        #[arg(long)]
        trust_domain: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Set the bundle of a foreign trust domain.
    Set {
        #[command(flatten)]
        server: ServerArg,
        /// Name of the foreign trust domain.
        #[arg(long)]
        trust_domain: String,
        /// PEM file with the authorities of that trust domain.
        #[arg(long, value_name = "FILE")]
        path: PathBuf,
    },
}

/// The server's own bundle.
pub async fn own(channel: Asking) -> Result<X509Bundle> {
    let bundle = client!(BundleClient, channel).get_bundle(GetBundleRequest::default()).await.map_err(refused)?;
    Ok(bundle_from_wire(bundle.into_inner())?)
}

/// Runs a subcommand and prints its result.
pub async fn run(command: BundleCommand) -> Result<()> {
    match command {
        BundleCommand::Show { server, trust_domain, output } => {
            let channel = server.channel()?;
            let bundle = match trust_domain {
                None => own(channel).await?,
                Some(trust_domain) => {
                    let request = GetFederatedBundleRequest { trust_domain, output_mask: None };
                    let bundle = client!(BundleClient, channel).get_federated_bundle(request).await.map_err(refused)?;
                    bundle_from_wire(bundle.into_inner())?
                }
            };
            if output.is_json() {
                let authorities = bundle.authorities.iter().map(|a| {
                    json!({ "id": a.id(), "expires_at": a.not_after().unix_timestamp(), "tainted": a.tainted,
                        "pem": countersign_identity::bundle::certificates_to_pem([a.der().as_ref()]) })
                });
                let all = json!({ "trust_domain": bundle.trust_domain.to_string(), "sequence": bundle.sequence, "authorities": authorities.collect::<Vec<_>>() });
                crate::stdout::line(&serde_json::to_string_pretty(&all)?)?;
            } else {
                crate::stdout::put(&bundle.to_pem())?;
            }
        }
        BundleCommand::Set { server, trust_domain, path } => {
            let td = parse_trust_domain(&trust_domain).map_err(|e| Mistake::flag("--trust-domain", &e.to_string()))?;
            let wrong = |why: String| Mistake::flag("--path", &format!("{}: {why}", path.display()));
            let pem = read_file(&path).map_err(|e| Mistake::flag("--path", &e.0))?;
            let bundle = X509Bundle::from_pem(td, &pem).map_err(|e| wrong(e.to_string()))?;
            let channel = server.channel()?;
            let home = own(channel.clone()).await?.trust_domain;
            if home == bundle.trust_domain {
                let why = format!(
                    "`{home}` is this server's own trust domain; its authorities come from `countersign authority prepare` and `activate`"
                );
                return Err(Mistake::flag("--trust-domain", &why).into());
            }
            let request = BatchSetFederatedBundleRequest { bundle: vec![bundle_to_wire(&bundle)], output_mask: None };
            let response = client!(BundleClient, channel).batch_set_federated_bundle(request).await.map_err(refused)?;
            response.into_inner().results.into_iter().try_for_each(|r| ok(r.status))?;
            eprintln!("bundle of {trust_domain} set: {} authorities", bundle.authorities.len());
        }
    }
    Ok(())
}
