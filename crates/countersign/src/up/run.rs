//! `countersign run`: a program of your own in a mesh that `up` runs, in your terminal.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, anyhow};

use super::ask::the_mesh;
use super::control::{Join, Joined, socket_of};
use super::mesh_file::{check_name, find_program};
use crate::settings::{Mistake, need_root};

/// Add a program to a mesh that `up` runs on this machine.
///
/// It gets a namespace, a sidecar and an identity, and leaves the mesh when it ends. For example `countersign run --name me -- curl http://productpage:9080/`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Name in the mesh, and in the others' /etc/hosts.
    #[arg(long)]
    name: String,
    /// Port that the program serves; several are possible.
    #[arg(long = "port", value_name = "PORT")]
    ports: Vec<u16>,
    /// Which mesh [default: the one that is up].
    #[arg(long)]
    mesh: Option<String>,
    /// Namespace of the identity.
    #[arg(long, default_value = "default")]
    namespace: String,
    /// Service account of the identity [default: the name].
    #[arg(long)]
    service_account: Option<String>,
    /// As whom the program runs [default: a user of its own].
    #[arg(long)]
    user: Option<String>,
    /// Mode: off, permissive or strict [default: the mesh's].
    #[arg(long)]
    mode: Option<String>,
    /// Who may call: a workload of the mesh or a SPIFFE ID [default: anyone in the trust domain].
    #[arg(long)]
    allow: Vec<String>,
    /// The program and its arguments.
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

/// Joins, runs the program, leaves.
pub fn run(args: RunArgs) -> Result<ExitCode> {
    check_name(&args.name).map_err(|e| Mistake::flag("--name", &e))?;
    let program = args.command.first().map(|p| find_program(p)).transpose().map_err(Mistake)?.context("no program")?;
    need_root("run")?;
    let mesh = the_mesh(args.mesh.as_deref(), "--mesh")?;
    let path = socket_of(&mesh);
    let mut stream = UnixStream::connect(&path).map_err(|e| {
        Mistake(format!("no mesh `{mesh}` is up here ({}: {e}); start one with `countersign up`", path.display()))
    })?;
    let join = Join {
        service_account: args.service_account.unwrap_or_else(|| args.name.clone()),
        name: args.name,
        namespace: args.namespace,
        ports: args.ports.into_iter().collect(),
        user: args.user,
        mode: args.mode,
        allow: args.allow,
    };
    writeln!(stream, "{}", serde_json::to_string(&join)?)?;
    let mut answer = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut answer).context("the mesh went away")?;
    let joined: Joined = serde_json::from_str(&answer).map_err(|_| {
        let said = serde_json::from_str::<serde_json::Value>(&answer)
            .ok()
            .and_then(|v| v["error"].as_str().map(str::to_owned));
        anyhow!(said.unwrap_or_else(|| "the mesh went away".into()))
    })?;
    eprintln!("joined {mesh} as {} at {}", joined.spiffe_id, joined.address);
    let mut command = Command::new(std::env::current_exe()?);
    command.args([
        "launch",
        "--uid",
        &joined.uid.to_string(),
        "--gid",
        &joined.gid.to_string(),
        "--parent",
        &std::process::id().to_string(),
    ]);
    if !joined.groups.is_empty() {
        command.args(["--groups", &joined.groups.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")]);
    }
    command
        .arg("--netns")
        .arg(&joined.netns)
        .arg("--hosts")
        .arg(&joined.hosts)
        .arg("--")
        .arg(program)
        .args(&args.command[1..]);
    // Ctrl-C reaches the program through the terminal; this one waits for it and leaves the mesh.
    let _ignored = ignore_interrupts()?;
    let status = command.status().context("cannot start the program")?;
    drop(stream);
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// Keeps a runtime that swallows SIGINT and SIGTERM while the program runs.
fn ignore_interrupts() -> Result<tokio::runtime::Runtime> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let mut int = signal(SignalKind::interrupt())?;
        tokio::spawn(async move { while int.recv().await.is_some() {} });
        anyhow::Ok(())
    })?;
    Ok(runtime)
}
