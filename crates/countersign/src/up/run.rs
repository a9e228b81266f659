//! `countersign run`: a program of your own in a running mesh, in your terminal.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::account::Account;
use super::ask::the_mesh;
use super::control::{Farewell, Join, Joined, socket_of};
use super::mesh_file::{check_name, check_port, check_segment, check_user, find_program};
use crate::launch::OWN_PROGRAM;
use crate::settings::{Mistake, need_root};

/// Longest wait for the list of what was refused.
const FAREWELL: Duration = Duration::from_secs(10);
/// Longest such list, in bytes.
const MAX_FAREWELL: u64 = 256 * 1024;
/// Environment variables that a program of another user inherits.
const HANDED_ON: &[&str] = &["PATH", "LANG", "LANGUAGE", "TZ", "TERM", "COLORTERM", "NO_COLOR", "RUST_BACKTRACE"];

/// Run a program in a mesh that `up` runs on this machine.
///
/// The program gets a network namespace, a sidecar and an identity, and leaves the mesh when it ends. Example:
/// `countersign run --name me -- curl http://productpage:9080/`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Name in the mesh, and in the others' /etc/hosts.
    #[arg(long)]
    name: String,
    /// Port that the program serves; may be repeated.
    #[arg(long = "port", value_name = "PORT")]
    ports: Vec<u16>,
    /// Mesh to join [default: the only one that is up].
    #[arg(long)]
    mesh: Option<String>,
    /// Namespace in the SPIFFE ID.
    #[arg(long, default_value = "default")]
    namespace: String,
    /// Service account in the SPIFFE ID [default: the name].
    #[arg(long)]
    service_account: Option<String>,
    /// User to run the program as [default: a user of its own].
    #[arg(long)]
    user: Option<String>,
    /// Mode: off, permissive or strict [default: the mesh's].
    #[arg(long)]
    mode: Option<String>,
    /// Who may call: a workload of the mesh or a SPIFFE ID; may be repeated [default: all of the trust domain].
    #[arg(long)]
    allow: Vec<String>,
    /// Set an environment variable of the program, NAME=VALUE, or pass one on, NAME; may be repeated. Unless it runs as
    /// root, the program inherits only PATH and the variables for language, time zone and terminal.
    #[arg(long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// The program and its arguments.
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

/// Joins the mesh, runs the program, leaves the mesh.
pub fn run(args: RunArgs) -> Result<ExitCode> {
    let program = check(&args)?;
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
    let mut command = launch(&joined, program, &args.command[1..]);
    for set in &args.env {
        match set.split_once('=') {
            Some((name, value)) => command.env(name, value),
            None => match std::env::var_os(set) {
                Some(value) => command.env(set, value),
                None => &mut command,
            },
        };
    }
    // Ctrl-C reaches the program through the terminal; this process waits for it and then leaves the mesh.
    let _ignored = ignore_interrupts()?;
    let status = command.status().context("cannot start the program")?;
    for refused in farewell(&stream) {
        eprintln!("countersign: {refused}");
    }
    drop(stream);
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// Validates the flags by the rules of mesh files, before the mesh, which validates them again, is asked.
fn check(args: &RunArgs) -> Result<PathBuf, Mistake> {
    check_name(&args.name).map_err(|e| Mistake::flag("--name", &e))?;
    check_segment(&args.namespace).map_err(|e| Mistake::flag("--namespace", &e))?;
    if let Some(account) = &args.service_account {
        check_segment(account).map_err(|e| Mistake::flag("--service-account", &e))?;
    }
    for port in &args.ports {
        check_port(*port).map_err(|e| Mistake::flag("--port", &e))?;
    }
    if let Some(user) = &args.user {
        let checked = Account::find(user).and_then(|account| check_user(&account));
        checked.map_err(|e| Mistake::flag("--user", &e))?;
    }
    for set in &args.env {
        if set.starts_with('=') || set.is_empty() || set.contains('\0') {
            return Err(Mistake::flag("--env", &format!("`{}`: write NAME=VALUE, or NAME", set.escape_debug())));
        }
    }
    // clap requires at least one word.
    let program = args.command.first().map(String::as_str).unwrap_or_default();
    find_program(program).map_err(Mistake)
}

/// The command that starts the program in its namespace, as its user.
fn launch(joined: &Joined, program: PathBuf, arguments: &[String]) -> Command {
    let mut command = Command::new(OWN_PROGRAM);
    command.arg0("countersign").arg("launch");
    command.args(["--uid", &joined.uid.to_string(), "--gid", &joined.gid.to_string()]);
    command.args(["--parent", &std::process::id().to_string()]);
    if !joined.groups.is_empty() {
        command.args(["--groups", &joined.groups.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")]);
    }
    if let Some(accounts) = &joined.accounts {
        command.arg("--accounts").arg(accounts);
    }
    command.arg("--netns").arg(&joined.netns).arg("--hosts").arg(&joined.hosts).arg("--").arg(program).args(arguments);
    // Root's own program inherits everything. Another user's program gets neither root's home nor secrets in the
    // environment.
    if joined.uid != 0 {
        command.env_clear().envs(handed_on());
    }
    command.envs(&joined.environment);
    command
}

fn handed_on() -> impl Iterator<Item = (String, String)> {
    // Variables that are not valid text are left out.
    let all =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    all.filter(|(name, _)| HANDED_ON.contains(&name.as_str()) || name.starts_with("LC_"))
}

/// Tells the mesh that the program has ended, and returns what was refused. Empty if the mesh is gone.
fn farewell(stream: &UnixStream) -> Vec<String> {
    let hear = || {
        stream.shutdown(Shutdown::Write)?;
        stream.set_read_timeout(Some(FAREWELL))?;
        let mut line = String::new();
        BufReader::new(stream.take(MAX_FAREWELL)).read_line(&mut line)?;
        std::io::Result::Ok(line)
    };
    let line = hear().unwrap_or_default();
    serde_json::from_str::<Farewell>(&line).unwrap_or_default().refused
}

/// Keeps a runtime that ignores SIGINT and SIGTERM while the program runs.
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
