//! `countersign mint`: signs SVIDs without a registration entry.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Subcommand;
use countersign_api::files::{write_atomically, write_secret};
use countersign_api::spire::svid::svid_client::SvidClient;
use countersign_api::spire::svid::{MintJwtsvidRequest, MintX509svidRequest};
use countersign_identity::bundle::{certificates_to_pem, pem_block};
use countersign_identity::profile::request;
use countersign_identity::{KeyType, PrivateKey};
use serde_json::json;
use zeroize::Zeroizing;

use super::output::{Output, Table, json_text, told};
use super::{any_id, bundle, when, workload_id};
use crate::clients::{ServerArg, client, refused};
use crate::settings::{Mistake, Ttl};

/// Sign an SVID for a given SPIFFE ID.
#[derive(Subcommand)]
pub enum MintCommand {
    /// Mint an X509-SVID with a new key: writes svid.pem, key.pem and bundle.pem to a folder.
    X509(X509Args),
    /// Mint a JWT-SVID and print the token. Whoever has it is taken for its holder until it ends.
    Jwt(JwtArgs),
}

/// The arguments of `mint x509`.
#[derive(clap::Args)]
pub struct X509Args {
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
}

/// The arguments of `mint jwt`.
#[derive(clap::Args)]
pub struct JwtArgs {
    #[command(flatten)]
    server: ServerArg,
    /// SPIFFE ID of the SVID.
    #[arg(long)]
    spiffe_id: String,
    /// For whom the token is; repeat it for several.
    #[arg(long, value_name = "NAME", required = true)]
    audience: Vec<String>,
    /// Lifetime of the token, such as 30m [default: 5m]. It never outlives the authority that signs it.
    #[arg(long, value_name = "TTL")]
    ttl: Option<Ttl>,
    #[command(flatten)]
    output: Output,
}

/// Runs a subcommand and prints its result.
pub async fn run(command: MintCommand) -> Result<()> {
    match command {
        MintCommand::X509(args) => x509(args).await,
        MintCommand::Jwt(args) => jwt(args).await,
    }
}

async fn jwt(args: JwtArgs) -> Result<()> {
    let JwtArgs { server, spiffe_id, audience, ttl, output } = args;
    let id = Some(workload_id("--spiffe-id", &spiffe_id)?);
    let asked = MintJwtsvidRequest { id, audience, ttl: seconds(ttl) };
    let minted = client!(SvidClient, server.channel()?).mint_jwtsvid(asked).await.map_err(refused)?;
    let svid = minted.into_inner().svid.context("the server's answer holds no SVID")?;
    let shorter = |asked: Ttl| i128::from(svid.expires_at - svid.issued_at) < i128::from(asked.0.as_secs());
    if ttl.is_some_and(shorter) {
        eprintln!("the token ends at {}, sooner than asked for: its authority ends then", when(svid.expires_at));
    }
    if output.is_json() {
        let all = json!({ "spiffe_id": spiffe_id, "expires_at": svid.expires_at, "token": svid.token });
        crate::stdout::line(&json_text(&all))?;
    } else {
        crate::stdout::line(&told(&svid.token))?;
    }
    Ok(())
}

async fn x509(args: X509Args) -> Result<()> {
    let X509Args { server, spiffe_id, ttl, key_type, write, output } = args;
    let id = any_id("--spiffe-id", &spiffe_id)?;
    let key_type: KeyType = key_type
        .parse()
        .map_err(|e: countersign_identity::key::KeyError| Mistake::flag("--key-type", &e.to_string()))?;
    if !write.is_dir() {
        return Err(Mistake::flag("--write", &format!("{} is no folder", write.display())).into());
    }
    let key = PrivateKey::generate(key_type)?;
    let csr = request(&key, Some(&id))?;
    let ttl = seconds(ttl);
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

/// A lifetime as the server takes it: 0 stands for its own default.
fn seconds(ttl: Option<Ttl>) -> i32 {
    ttl.map_or(0, |t| t.0.as_secs().try_into().unwrap_or(i32::MAX))
}

fn put(path: &Path, content: &[u8], secret: bool) -> Result<()> {
    let written = if secret { write_secret(path, content) } else { write_atomically(path, content, 0o644) };
    written.with_context(|| format!("cannot write {}", path.display()))
}
