//! `countersign bundle`: shows and sets trust bundles.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Result;
use clap::Subcommand;
use countersign_api::convert::{bundle_from_wire, bundle_to_wire};
use countersign_api::spire::bundle::batch_delete_federated_bundle_request::Mode;
use countersign_api::spire::bundle::bundle_client::BundleClient;
use countersign_api::spire::bundle::{
    BatchDeleteFederatedBundleRequest, BatchSetFederatedBundleRequest, GetBundleRequest, GetFederatedBundleRequest,
};
use countersign_identity::{TrustBundle, TrustDomain, bundle_document};
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
    /// Delete the bundle of a foreign trust domain: its workloads are trusted no longer. While there is a federation relationship
    /// with it, its bundle may be fetched again.
    Delete {
        #[command(flatten)]
        server: ServerArg,
        /// Name of the foreign trust domain.
        #[arg(long)]
        trust_domain: String,
        /// What becomes of entries that federate with it. restrict: while there are any, nothing is deleted. dissociate: they federate
        /// with it no more. delete: they are deleted.
        #[arg(long, value_name = "MODE", default_value = "restrict", value_parser = ["restrict", "dissociate", "delete"])]
        mode: String,
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

/// Reads a bundle from a file, or for `-` from standard input. `flags` are those for file and format.
pub fn read_bundle(flags: (&str, &str), td: TrustDomain, path: &Path, form: Form) -> Result<TrustBundle, Mistake> {
    let (flag, format) = flags;
    let wrong = |why: String| Mistake::flag(flag, &format!("{}: {why}", path.display()));
    let text = if path.as_os_str() == "-" { read_stdin() } else { read_file(path) };
    let text = text.map_err(|e| Mistake::flag(flag, &e.0))?;
    match form {
        Form::Pem if text.trim_ascii_start().starts_with(b"{") => {
            Err(wrong(format!("it is JSON, not PEM: a SPIFFE bundle needs {format} spiffe")))
        }
        Form::Pem => TrustBundle::from_pem(td, &text).map_err(|e| wrong(e.to_string())),
        Form::Spiffe => bundle_document::read(td, &text).map_err(|e| wrong(e.to_string())),
    }
}

/// Runs a subcommand and prints its result.
pub async fn run(command: BundleCommand) -> Result<()> {
    match command {
        BundleCommand::Show { server, trust_domain, form, output } => {
            let channel = server.channel()?;
            let bundle = match trust_domain {
                None => own(channel).await?,
                Some(name) => {
                    let trust_domain = super::trust_domain("--trust-domain", &name)?.to_string();
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
            let td = super::trust_domain("--trust-domain", &trust_domain)?;
            let bundle = read_bundle(("--path", "--format"), td, &path, form)?;
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
        BundleCommand::Delete { server, trust_domain: name, mode } => {
            let td = super::trust_domain("--trust-domain", &name)?.to_string();
            let mode = match mode.as_str() {
                "dissociate" => Mode::Dissociate,
                "delete" => Mode::Delete,
                _ => Mode::Restrict,
            };
            let request = BatchDeleteFederatedBundleRequest { trust_domains: vec![td.clone()], mode: mode.into() };
            let mut client = client!(BundleClient, server.channel()?);
            let answer = client.batch_delete_federated_bundle(request).await.map_err(refused)?.into_inner();
            answer.results.into_iter().try_for_each(|r| ok(r.status))?;
            eprintln!("bundle of {td} deleted");
        }
    }
    Ok(())
}
