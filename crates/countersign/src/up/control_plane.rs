//! The server and the agent of a mesh, from which all its identities come.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use countersign_api::convert::{id_to_wire, selectors_to_wire};
use countersign_api::files::{read_pem, write_secret};
use countersign_api::spire::types;
use countersign_identity::trust_domain::{parse_workload_id, server_id};
use countersign_identity::{Selector, SpiffeId};

use super::account::Account;
use super::children::{Process, Program, cause_of_end};
use super::mesh_file::{MeshSpec, Restart};
use super::node_identity::{NodeIdentity, SELECTOR};
use super::run_directory::RunDirectory;
use crate::clients::Asking;
use crate::launch::OWN_PROGRAM;
use crate::operator;

/// Longest start of a part of the mesh.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Log of the server, in the mesh's folder of logs.
pub const SERVER_LOG: &str = "countersign-server.log";
/// Log of the agent, there too.
pub const AGENT_LOG: &str = "countersign-agent.log";

/// Path of a mesh's server socket, for operators.
pub fn server_socket(dir: &Path) -> PathBuf {
    dir.join("server").join("server.sock")
}

/// Path of a mesh's agent socket.
pub fn agent_socket(dir: &Path) -> PathBuf {
    dir.join("agent").join("agent.sock")
}

/// The parent of every entry: an alias that remains valid when the agent attests again.
pub fn node_alias(spec: &MeshSpec) -> Result<SpiffeId> {
    Ok(parse_workload_id(&format!("spiffe://{}/node", spec.trust_domain))?)
}

/// Starts the server, as its own user, and waits until it serves.
pub async fn start_server(
    spec: &MeshSpec,
    run_dir: &RunDirectory,
    node: &NodeIdentity,
    logs: &Path,
) -> Result<Process> {
    let user = run_dir.users().server();
    let home = run_dir.folder("server", user)?;
    let shown = |file: &str| home.join(file).display().to_string();
    // One port for the mesh's whole life, so that the agent finds a restarted server.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .context("no free port on loopback")?
        .port();
    std::fs::write(run_dir.dir.join("server.port"), port.to_string())?;
    let mut command: Vec<String> = vec![OWN_PROGRAM.into(), "server".into()];
    let mut set = |flag: &str, value: &str| command.extend([flag.to_owned(), value.to_owned()]);
    set("--trust-domain", spec.trust_domain.as_str());
    set("--bind", &SocketAddr::from((Ipv4Addr::LOCALHOST, port)).to_string());
    set("--socket", &shown("server.sock"));
    set("--data-dir", &shown("data"));
    set("--audit-log", &shown("audit.log"));
    set("--ca-ttl", &spec.ca_ttl.to_string());
    set("--svid-ttl", &spec.svid_ttl.to_string());
    set("--ca-key-type", &spec.ca_key_type);
    set("--ready-file", &shown("ready"));
    node.write_ca(&home.join("x509pop-ca.pem"))?;
    set("--x509pop-ca", &shown("x509pop-ca.pem"));
    if let Some((certificate, key, bundle)) = &spec.upstream {
        // The server's user may not be able to read the operator's files, so it gets copies.
        let copy = |from: &Path, name: &str| -> Result<String> {
            let to = home.join(name);
            let content = read_pem(from).with_context(|| format!("cannot read {}", from.display()))?;
            write_secret(&to, &content).with_context(|| format!("cannot write {}", to.display()))?;
            std::os::unix::fs::chown(&to, Some(user), Some(user))?;
            Ok(to.display().to_string())
        };
        set("--upstream-cert", &copy(certificate, "upstream.crt")?);
        set("--upstream-key", &copy(key, "upstream.key")?);
        if let Some(bundle) = bundle {
            set("--upstream-bundle", &copy(bundle, "upstream-roots.crt")?);
        }
    }
    let log = logs.join(SERVER_LOG);
    let program = Program {
        name: "server".into(),
        netns: None,
        hosts: None,
        accounts: None,
        account: Account::of_uid(user),
        no_new_privs: true,
        command,
        env: BTreeMap::new(),
        workdir: None,
        restart: Restart::Always,
        belonging: None,
        events: run_dir.events.clone(),
    };
    let process = Process::start(program, log.clone()).await?;
    let ready = home.join("ready");
    let waited = process.wait_until("it was ready", PATIENCE, async || ready.exists()).await;
    if let Err(error) = waited {
        process.stop().await;
        return Err(error.context(format!("the server did not come up: {}", cause_of_end(&log))));
    }
    Ok(process)
}

/// Starts the agent, and waits until it is attested.
pub async fn start_agent(spec: &MeshSpec, run_dir: &RunDirectory, node: &NodeIdentity, logs: &Path) -> Result<Process> {
    let home = run_dir.folder("agent", 0)?;
    let shown = |file: &str| home.join(file).display().to_string();
    let channel = Asking::at(&server_socket(&run_dir.dir), "server");
    node.write(&home.join("node.pem"), &home.join("node.key"))?;
    let (kind, value) = SELECTOR;
    let alias = types::Entry {
        spiffe_id: Some(id_to_wire(&node_alias(spec)?)),
        parent_id: Some(id_to_wire(&server_id(&spec.trust_domain))),
        selectors: selectors_to_wire([&Selector::new(kind, value)?]),
        ..types::Entry::default()
    };
    operator::entry::create(channel.clone(), alias).await.context("cannot register the node")?;
    std::fs::write(home.join("bundle.pem"), operator::bundle::own(channel).await?.to_pem())?;
    let port = std::fs::read_to_string(run_dir.dir.join("server.port"))?;
    let server = format!("127.0.0.1:{port}");
    let command = [
        OWN_PROGRAM,
        "agent",
        "--trust-domain",
        spec.trust_domain.as_str(),
        "--server",
        &server,
        "--socket",
        &shown("agent.sock"),
        "--data-dir",
        &shown("data"),
        "--trust-bundle",
        &shown("bundle.pem"),
        "--x509pop-cert",
        &shown("node.pem"),
        "--x509pop-key",
        &shown("node.key"),
    ];
    let log = logs.join(AGENT_LOG);
    let command = command.map(String::from).to_vec();
    let program = Program {
        name: "agent".into(),
        netns: None,
        hosts: None,
        accounts: None,
        // As root, because it reads `/proc` of every caller.
        account: Account::of_uid(0),
        no_new_privs: true,
        command,
        env: BTreeMap::new(),
        workdir: None,
        restart: Restart::Always,
        belonging: None,
        events: run_dir.events.clone(),
    };
    let process = Process::start(program, log.clone()).await?;
    let socket = home.join("agent.sock");
    let attested = async || {
        operator::status::get(&socket)
            .await
            .is_ok_and(|s| s.facts.get("agent ID").is_some_and(|id| id.starts_with("spiffe://")))
    };
    let waited = process.wait_until("it was attested", PATIENCE, attested).await;
    if let Err(error) = waited {
        process.stop().await;
        return Err(error.context(format!("the agent did not come up: {}", cause_of_end(&log))));
    }
    Ok(process)
}
