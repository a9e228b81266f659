//! The socket by which `run` joins a running mesh: one JSON line in, one out. The workload stays until the client
//! closes the connection; a last line out then lists what was refused.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_api::transport::{bind_unix, peer_credentials};
use countersign_identity::policy::Policy;
use countersign_identity::trust_domain::parse_workload_id;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::account::Account;
use super::mesh::Mesh;
use super::mesh_file::{WorkloadSpec, check_port, check_segment, check_user, check_workload_name};
use super::refusals;
use super::run_directory::RUN_DIR;
use crate::settings::words::did_you_mean;
use crate::settings::{Mistake, parse_mode};

/// Name of the socket in a mesh's run directory over which `run` joins and other commands ask.
pub const SOCKET: &str = "up.sock";
/// Longest request, in bytes.
const MAX_LINE: u64 = 64 * 1024;

/// How long a client may take to send its request, and to read an answer.
const REQUEST: Duration = Duration::from_secs(10);

/// What `run` asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Join {
    /// Name of the workload.
    pub name: String,
    /// Namespace in its SPIFFE ID.
    pub namespace: String,
    /// Service account in its SPIFFE ID.
    pub service_account: String,
    /// TCP ports that it serves.
    pub ports: BTreeSet<u16>,
    /// Name or ID of the user to run as; `None` for a user of its own.
    pub user: Option<String>,
    /// Mode of the workload; `None` for the mesh's.
    pub mode: Option<String>,
    /// SPIFFE IDs or names of workloads that may call; empty for no list.
    pub allow: Vec<String>,
}

/// Answer to `run`: what it needs to start its program.
#[derive(Debug, Serialize, Deserialize)]
pub struct Joined {
    /// File of the network namespace.
    pub netns: PathBuf,
    /// File with the mesh's host names.
    pub hosts: PathBuf,
    /// Folder with tables that contain the program's user; `None` if the machine's suffice.
    pub accounts: Option<PathBuf>,
    /// Environment variables about its user.
    pub environment: BTreeMap<String, String>,
    /// User ID of the program.
    pub uid: u32,
    /// Group ID of the program.
    pub gid: u32,
    /// Supplementary group IDs.
    pub groups: Vec<u32>,
    /// SPIFFE ID of the workload.
    pub spiffe_id: String,
    /// IP address of the workload.
    pub address: String,
}

/// Last line to `run`, once its program has ended.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Farewell {
    /// What the sidecar refused, or was refused, one line each.
    pub refused: Vec<String>,
}

/// Path of a mesh's socket.
pub fn socket_of(mesh: &str) -> PathBuf {
    Path::new(RUN_DIR).join(mesh).join(SOCKET)
}

/// Serves the socket until the runtime ends.
pub fn serve(mesh: &Rc<Mesh>) -> Result<()> {
    let path = socket_of(&mesh.spec.name);
    let listener = bind_unix(&path, 0o600).with_context(|| format!("cannot listen on {}", path.display()))?;
    let mesh = mesh.clone();
    tokio::task::spawn_local(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let mesh = mesh.clone();
                    tokio::task::spawn_local(async move { talk(&mesh, stream).await });
                }
                Err(error) => countersign_api::transport::back_off_after(&error).await,
            }
        }
    });
    Ok(())
}

async fn talk(mesh: &Rc<Mesh>, stream: UnixStream) {
    // The file's mode excludes others already; this also excludes a process that got hold of the socket otherwise.
    if peer_credentials(&stream).map_or(true, |p| p.uid != 0) {
        return;
    }
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    let Some(line) = request(&mut read).await else { return };
    if let Some(answer) = super::ask::answer(mesh, &line).await {
        // Whoever asked may be gone; then nobody misses the answer.
        let _ = tell(&mut write, answer).await;
        return;
    }
    let joined = join(mesh, &line, &mut read).await;
    let answer = match &joined {
        Ok((_, joined)) => serde_json::to_string(joined),
        Err(error) => {
            // Whether the command line has to be corrected, which `run` tells by its exit code.
            let mistake = error.downcast_ref::<Mistake>().is_some();
            serde_json::to_string(&serde_json::json!({ "error": format!("{error:#}"), "mistake": mistake }))
        }
    };
    let told = tell(&mut write, answer.unwrap_or_default()).await;
    if let Ok((name, _)) = joined {
        if told.is_ok() {
            // Stays until the client closes the connection, for whatever reason.
            gone(&mut read).await;
            if let Some(running) = mesh.workload(&name) {
                let farewell = Farewell { refused: refusals::told(mesh, &running).await };
                // Nobody may be there any more.
                let _ = tell(&mut write, serde_json::to_string(&farewell).unwrap_or_default()).await;
            }
        }
        mesh.remove(&name).await;
    }
}

/// The request, a line; `None` when the client does not finish it in time.
async fn request(read: &mut (impl AsyncBufRead + Unpin)) -> Option<String> {
    let mut line = String::new();
    let read = tokio::time::timeout(REQUEST, read.take(MAX_LINE).read_line(&mut line)).await;
    matches!(read, Ok(Ok(_))).then_some(line)
}

/// Resolves once the client has closed the connection. What it says meanwhile means nothing.
async fn gone(read: &mut (impl AsyncRead + Unpin)) {
    let mut rest = [0; 1];
    while matches!(read.read(&mut rest).await, Ok(n) if n > 0) {}
}

/// Writes a line. A client that does not read it in time is as one that is gone.
async fn tell(write: &mut (impl AsyncWrite + Unpin), line: String) -> io::Result<()> {
    tokio::time::timeout(REQUEST, write.write_all((line + "\n").as_bytes())).await?
}

/// The error for a caller that is neither a SPIFFE ID nor a workload of the mesh.
fn stranger<T>(caller: &str, why: &str, known: &BTreeMap<String, T>) -> Mistake {
    let names = known.keys().map(String::as_str);
    let hint = match did_you_mean(caller, names.clone()) {
        hint if hint.is_empty() => format!("; there is {}", names.collect::<Vec<_>>().join(", ")),
        hint => hint,
    };
    Mistake::flag("--allow", &format!("{why}, nor is it a workload of the mesh{hint}"))
}

/// Adds the workload that a client asks for. A client that goes away before its sidecar is ready leaves at once.
async fn join(mesh: &Rc<Mesh>, line: &str, client: &mut (impl AsyncRead + Unpin)) -> Result<(String, Joined)> {
    let join: Join = serde_json::from_str(line).context("the request cannot be read")?;
    // The rules of mesh files apply, whoever wrote the request.
    check_workload_name(&join.name).map_err(|e| Mistake::flag("--name", &e))?;
    check_segment(&join.namespace).map_err(|e| Mistake::flag("--namespace", &e))?;
    check_segment(&join.service_account).map_err(|e| Mistake::flag("--service-account", &e))?;
    for port in &join.ports {
        check_port(*port).map_err(|e| Mistake::flag("--port", &e))?;
    }
    let user = join.user.as_deref().map(Account::find).transpose().map_err(|e| Mistake::flag("--user", &e))?;
    if let Some(user) = &user {
        check_user(user).map_err(|e| Mistake::flag("--user", &e))?;
    }
    let mode = join.mode.as_deref().map(parse_mode).transpose().map_err(|e| Mistake::flag("--mode", &e))?;
    let known = mesh.workloads();
    let allow = join.allow.iter().map(|a| match known.get(a) {
        Some(w) => Ok(w.spiffe_id.to_string()),
        None => parse_workload_id(a).map(|id| id.to_string()).map_err(|e| stranger(a, &e.to_string(), &known)),
    });
    let spec = WorkloadSpec {
        policy: Policy {
            mode: mesh.spec.mode.narrowed_by(mode),
            // Without `--allow`, `run` sends an empty list, which means no list.
            allow: (!join.allow.is_empty()).then(|| allow.collect::<Result<_, _>>()).transpose()?,
            ..Policy::default()
        },
        name: join.name.clone(),
        namespace: join.namespace,
        service_account: join.service_account,
        user,
        command: vec![],
        ports: join.ports,
        workdir: None,
        restart: Default::default(),
        env: Default::default(),
        exclude_outbound_ports: [].into(),
        exclude_inbound_ports: [].into(),
        exclude_outbound_cidrs: [].into(),
        exclude_inbound_cidrs: [].into(),
        proxy_protocol: [].into(),
        allow_udp_ports: [].into(),
        allow_other_cidrs: [].into(),
    };
    let running = mesh.join(spec).await?;
    let ready = tokio::select! {
        ready = mesh.wait_for_sidecar(&running) => ready,
        () = gone(client) => Err(anyhow!("the client has gone away")),
    };
    if let Err(error) = ready {
        mesh.remove(&join.name).await;
        return Err(error);
    }
    let account = &running.account;
    let joined = Joined {
        netns: running.netns.path().to_owned(),
        hosts: mesh.hosts(),
        accounts: running.accounts.clone(),
        environment: running.environment.clone(),
        uid: account.uid,
        gid: account.gid,
        groups: account.groups.clone(),
        spiffe_id: running.spiffe_id.to_string(),
        address: running.addresses[0].to_string(),
    };
    Ok((join.name, joined))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_finish_or_does_not_read_is_given_up() {
        let (mut client, server) = tokio::io::duplex(16);
        client.write_all(b"{\"ask\":").await.unwrap();
        assert_eq!(request(&mut BufReader::new(server)).await, None);
        let (client, mut server) = tokio::io::duplex(16);
        assert_eq!(tell(&mut server, "x".repeat(100)).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(client);
        let (mut client, server) = tokio::io::duplex(64);
        client.write_all(b"{\"ask\":\"ps\"}\nmore").await.unwrap();
        assert_eq!(request(&mut BufReader::new(server)).await.unwrap(), "{\"ask\":\"ps\"}\n");
    }
}
