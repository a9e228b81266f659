//! `countersign mint`: signs SVIDs without a registration entry.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Subcommand;
use countersign_api::files::{write_atomically, write_secret};
use countersign_api::spire::svid::MintX509svidRequest;
use countersign_api::spire::svid::svid_client::SvidClient;
use countersign_identity::bundle::{certificates_to_pem, pem_block};
use countersign_identity::profile::request;
use countersign_identity::{KeyType, PrivateKey};
use serde_json::json;
use zeroize::Zeroizing;

use super::output::{Output, Table};
use super::{any_id, bundle, when};
use crate::clients::{ServerArg, client, refused};
use crate::settings::{Mistake, Ttl};

/// Sign an SVID for a given SPIFFE ID.
#[derive(Subcommand)]
pub enum MintCommand {
    /// Mint an X509-SVID with a new key: writes svid.pem, key.pem and bundle.pem to a folder.
    X509 {
        #[command(flatten)]
        server: ServerArg,
        /// SPIFFE ID of the SVID.
        #[arg(long)]
        spiffe_id: String,
        /// Lifetime of the SVID, such as 30m [default: the server's --svid-ttl].
        #[arg(long, value_name = "TTL")]
        ttl: Option<Ttl>,
        /// Key type: ec-p256, ec-p384, rsa-2048 or rsa-4096.
        #[arg(long, default_value = "ec-p256")]
        key_type: String,
        /// Existing folder to write the files to.
        #[arg(long, value_name = "DIR", default_value = ".")]
        write: PathBuf,
        #[command(flatten)]
        output: Output,
    },
}

/// Runs the subcommand and prints its result.
pub async fn run(command: MintCommand) -> Result<()> {
    let MintCommand::X509 { server, spiffe_id, ttl, key_type, write, output } = command;
    let id = any_id("--spiffe-id", &spiffe_id)?;
    let key_type: KeyType = key_type
        .parse()
        .map_err(|e: countersign_identity::key::KeyError| Mistake::flag("--key-type", &e.to_string()))?;
    if !write.is_dir() {
        return Err(Mistake::flag("--write", &format!("{} is no folder", write.display())).into());
    }
    let key = PrivateKey::generate(key_type)?;
    let csr = request(&key, Some(&id))?;
    let ttl = ttl.map_or(0, |t| t.0.as_secs().try_into().unwrap_or(i32::MAX));
    let channel = server.channel()?;
    let minted =
        client!(SvidClient, channel.clone()).mint_x509svid(MintX509svidRequest { csr, ttl }).await.map_err(refused)?;
    let svid = minted.into_inner().svid.context("the server's answer holds no SVID")?;
    let roots = bundle::own(channel).await?;
    let place = |name: &str| write.join(name);
    let chain = certificates_to_pem(svid.cert_chain.iter().map(Vec::as_slice));
    put(&place("svid.pem"), chain.as_bytes(), false)?;
    put(&place("key.pem"), Zeroizing::new(pem_block("PRIVATE KEY", key.as_pkcs8())).as_bytes(), true)?;
    put(&place("bundle.pem"), roots.to_pem().as_bytes(), false)?;
    let files: Vec<String> =
        ["svid.pem", "key.pem", "bundle.pem"].iter().map(|n| place(n).display().to_string()).collect();
    let table = Table::facts([
        ("spiffe id".into(), spiffe_id.clone()),
        ("expires".into(), when(svid.expires_at)),
        ("files".into(), files.join(" ")),
    ]);
    output.print(&table, &json!({ "spiffe_id": spiffe_id, "expires_at": svid.expires_at, "files": files }))?;
    Ok(())
}

fn put(path: &Path, content: &[u8], secret: bool) -> Result<()> {
    let written = if secret { write_secret(path, content) } else { write_atomically(path, content, 0o644) };
    written.with_context(|| format!("cannot write {}", path.display()))
}
