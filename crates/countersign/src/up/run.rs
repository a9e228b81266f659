//! `countersign run`: a program of your own in a running mesh, in your terminal.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_api::transport::connect_unix;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::account::Account;
use super::ask::the_mesh;
use super::children::GRACE;
use super::control::{Farewell, Join, Joined, socket_of};
use super::mesh_file::{check_port, check_segment, check_user, check_workload_name, find_program};
use super::signals::Signals;
use crate::clients::CONNECT;
use crate::launch::OWN_PROGRAM;
use crate::operator::output::told;
use crate::settings::{Mistake, need_root, parse_mode};

/// How long a mesh may take to make room: others may be joining, and a sidecar has 30 s to come up.
const JOINING: Duration = Duration::from_secs(90);
/// Longest answer to that, in bytes.
const MAX_ANSWER: u64 = 256 * 1024;
/// How long the mesh may take to say what was refused.
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
    let mut stream = connect_unix(&path, CONNECT).map_err(|e| {
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
    stream.set_read_timeout(Some(JOINING))?;
    stream.set_write_timeout(Some(JOINING))?;
    writeln!(stream, "{}", serde_json::to_string(&join)?)?;
    let mut answer = String::new();
    BufReader::new(stream.try_clone()?.take(MAX_ANSWER)).read_line(&mut answer).map_err(|e| match e.kind() {
        ErrorKind::WouldBlock => anyhow!("the mesh gave no answer within {JOINING:?}"),
        _ => anyhow!("the mesh went away: {e}"),
    })?;
    let joined: Joined = serde_json::from_str(&answer).map_err(|_| {
        let said: serde_json::Value = serde_json::from_str(&answer).unwrap_or_default();
        match said["error"].as_str() {
            Some(error) if said["mistake"] == true => Mistake(error.into()).into(),
            Some(error) => anyhow!("{error}"),
            None => anyhow!("the mesh went away"),
        }
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
    let status = run_to_its_end(command)?;
    for refused in farewell(&stream) {
        eprintln!("countersign: {}", told(&refused));
    }
    drop(stream);
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// Validates the flags by the rules of mesh files, before the mesh, which validates them again, is asked.
fn check(args: &RunArgs) -> Result<PathBuf, Mistake> {
    check_workload_name(&args.name).map_err(|e| Mistake::flag("--name", &e))?;
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
    if let Some(mode) = &args.mode {
        parse_mode(mode).map_err(|e| Mistake::flag("--mode", &e))?;
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

/// Runs the program; however it is ended, this one stays until it has, and then leaves the mesh.
fn run_to_its_end(command: Command) -> Result<ExitStatus> {
    // One thread: the program is tied to the one that starts it (PR_SET_PDEATHSIG).
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { supervise(command, &Signals::beside_a_program()?).await })
}

/// Waits for the program's end. The first signal is handed on as SIGTERM; a program that goes on for [`GRACE`], or until a second
/// signal, is killed.
async fn supervise(command: Command, signals: &Signals) -> Result<ExitStatus> {
    let mut child = tokio::process::Command::from(command).spawn().context("cannot start the program")?;
    tokio::select! {
        ended = child.wait() => return ended.context("cannot wait for the program"),
        () = signals.stop.cancelled() => {}
    }
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // It may have ended in this very moment; then there is nobody to tell.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    tokio::select! {
        ended = child.wait() => return ended.context("cannot wait for the program"),
        () = tokio::time::sleep(GRACE) => {}
        () = signals.at_once.cancelled() => {}
    }
    child.kill().await.context("cannot end the program")?;
    child.wait().await.context("cannot wait for the program")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_util::sync::CancellationToken;

    /// How a program ended that was running, and knew what to do on SIGTERM, when the signal came.
    async fn ended(on_term: &str, second: bool) -> ExitStatus {
        let (out, mut said) = tokio::net::unix::pipe::pipe().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("trap '{on_term}' TERM; echo ready; while :; do sleep 0.05; done")]);
        command.stdout(out.into_blocking_fd().unwrap());
        let signals = Signals { stop: CancellationToken::new(), at_once: CancellationToken::new() };
        let told = signals.clone();
        let (status, ()) = tokio::join!(supervise(command, &signals), async move {
            let mut ready = [0; 6];
            tokio::io::AsyncReadExt::read_exact(&mut said, &mut ready).await.unwrap();
            told.stop.cancel();
            if second {
                told.at_once.cancel();
            }
        });
        status.unwrap()
    }

    #[tokio::test]
    async fn a_signal_ends_the_program_in_order_and_a_second_one_at_once() {
        assert_eq!(ended("exit 3", false).await.code(), Some(3), "it took leave");
        assert_eq!(ended("", true).await.signal(), Some(9), "it goes on, and was killed");
    }
}
