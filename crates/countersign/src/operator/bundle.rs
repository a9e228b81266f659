//! `countersign bundle`: shows and sets trust bundles.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;
use clap::Subcommand;
use countersign_api::convert::{bundle_from_wire, bundle_to_wire};
use countersign_api::spire::bundle::bundle_client::BundleClient;
use countersign_api::spire::bundle::{BatchSetFederatedBundleRequest, GetBundleRequest, GetFederatedBundleRequest};
use countersign_identity::trust_domain::parse_trust_domain;
use countersign_identity::{TrustBundle, bundle_document};
use serde_json::json;
use time::OffsetDateTime;

use super::ok;
use super::output::Output;
use crate::clients::{Asking, ServerArg, client, refused};
use crate::settings::{Mistake, read_file, read_stdin};

/// Show trust bundles, and set those of foreign trust domains.
#[derive(Subcommand)]
pub enum BundleCommand {
    /// Print a trust bundle. As PEM it has the X.509 authorities alone.
    Show {
        #[command(flatten)]
        server: ServerArg,
        /// Foreign trust domain whose bundle to print [default: the server's own].
        #[arg(long)]
        trust_domain: Option<String>,
        /// pem, or spiffe: a SPIFFE bundle (JSON Web Key set) with X.509 and JWT authorities.
        #[arg(long = "format", value_name = "FORMAT", default_value = "pem", conflicts_with = "format")]
        form: Form,
        #[command(flatten)]
        output: Output,
    },
    /// Set the bundle of a foreign trust domain, in place of the one that it had.
    Set {
        #[command(flatten)]
        server: ServerArg,
        /// Name of the foreign trust domain.
        #[arg(long)]
        trust_domain: String,
        /// File with the authorities of that trust domain; `-` reads standard input.
        #[arg(long, value_name = "FILE")]
        path: PathBuf,
        /// pem: X.509 authorities alone, so that the trust domain's JWT-SVIDs are refused. spiffe: a SPIFFE bundle (JSON Web Key set).
        #[arg(long = "format", value_name = "FORMAT", default_value = "pem")]
        form: Form,
    },
}

/// How a bundle is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// PEM blocks of certificates.
    Pem,
    /// A document of the SPIFFE standard.
    Spiffe,
}

impl FromStr for Form {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "pem" => Ok(Self::Pem),
            "spiffe" => Ok(Self::Spiffe),
            _ => Err("is neither pem nor spiffe".to_owned()),
        }
    }
}

/// The server's own bundle.
pub async fn own(channel: Asking) -> Result<TrustBundle> {
    let bundle = client!(BundleClient, channel).get_bundle(GetBundleRequest::default()).await.map_err(refused)?;
    Ok(bundle_from_wire(bundle.into_inner())?)
}

/// Runs a subcommand and prints its result.
pub async fn run(command: BundleCommand) -> Result<()> {
    match command {
        BundleCommand::Show { server, trust_domain, form, output } => {
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
                let keys = bundle.jwt_authorities.iter().map(|a| {
                    json!({ "key_id": a.key_id(), "expires_at": a.expires_at.map(OffsetDateTime::unix_timestamp), "tainted": a.tainted,
                        "pem": countersign_identity::bundle::pem_block("PUBLIC KEY", a.der()) })
                });
                let all = json!({ "trust_domain": bundle.trust_domain.to_string(), "sequence": bundle.sequence,
                    "authorities": authorities.collect::<Vec<_>>(), "jwt_authorities": keys.collect::<Vec<_>>() });
                crate::stdout::line(&serde_json::to_string_pretty(&all)?)?;
            } else {
                crate::stdout::put(&match form {
                    Form::Pem => bundle.to_pem(),
                    Form::Spiffe => bundle_document::write(&bundle),
                })?;
            }
        }
        BundleCommand::Set { server, trust_domain, path, form } => {
            let td = parse_trust_domain(&trust_domain).map_err(|e| Mistake::flag("--trust-domain", &e.to_string()))?;
            let wrong = |why: String| Mistake::flag("--path", &format!("{}: {why}", path.display()));
            let text = if path.as_os_str() == "-" { read_stdin() } else { read_file(&path) };
            let text = text.map_err(|e| Mistake::flag("--path", &e.0))?;
            let bundle = match form {
                Form::Pem if text.trim_ascii_start().starts_with(b"{") => {
                    return Err(wrong("it is JSON, not PEM: a SPIFFE bundle needs --format spiffe".into()).into());
                }
                Form::Pem => TrustBundle::from_pem(td, &text).map_err(|e| wrong(e.to_string()))?,
                Form::Spiffe => bundle_document::read(td, &text).map_err(|e| wrong(e.to_string()))?,
            };
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
            let (x509, jwt) = (bundle.authorities.len(), bundle.jwt_authorities.len());
            eprintln!("bundle of {trust_domain} set: {x509} X.509 and {jwt} JWT authorities");
        }
    }
    Ok(())
}
