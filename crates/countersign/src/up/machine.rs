//! `countersign ps`, `logs` and `down`: access to the meshes of this machine from another terminal.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::ask::{Meshes, Overview, Question, ask, killed, meshes, the_mesh};
use super::control::socket_of;
use super::events;
use super::run_directory::{RUN_DIR, RunDirectory};
use crate::operator::output::{Output, Table};
use crate::settings::words::{did_you_mean, shown};
use crate::settings::{Mistake, need_root_because};
use crate::stdout;

/// Why these commands need root.
const SOCKET_IS_ROOTS: &str = "a mesh answers root alone";
/// Longest shutdown of a mesh.
const DOWN_PATIENCE: Duration = Duration::from_secs(60);
/// Interval between two checks for new lines of a log.
const LOOK: Duration = Duration::from_millis(200);
/// Size of the end of a log that is searched for its last lines, in bytes.
const MAX_TAIL: u64 = 1024 * 1024;

/// List the workloads of the meshes that are up on this machine.
///
/// Workloads that need attention come first: programs that ended, sidecars that do not answer.
#[derive(Debug, clap::Args)]
pub struct PsArgs {
    /// Only this mesh [default: all].
    #[arg(long, value_name = "NAME")]
    mesh: Option<String>,
    #[command(flatten)]
    output: Output,
}

/// Show the log of a workload, its sidecar, the server or the agent of a mesh on this machine.
#[derive(Debug, clap::Args)]
pub struct LogsArgs {
    /// WORKLOAD, WORKLOAD.sidecar, server, agent, or events.
    name: String,
    /// Keep printing as the log grows.
    #[arg(long, short)]
    follow: bool,
    /// Number of last lines to start with.
    #[arg(long, short = 'n', value_name = "LINES", default_value_t = 100)]
    lines: usize,
    /// Mesh of the log [default: the only one that is up].
    #[arg(long, value_name = "NAME")]
    mesh: Option<String>,
}

/// Stop a mesh of this machine, like Ctrl-C in its own terminal.
#[derive(Debug, clap::Args)]
pub struct DownArgs {
    /// Mesh to stop [default: the only one that is up].
    mesh: Option<String>,
}

/// Prints the table.
pub fn ps(args: &PsArgs) -> Result<()> {
    need_root_because("ps", SOCKET_IS_ROOTS)?;
    let Meshes { up, killed: dead } = match &args.mesh {
        Some(mesh) => Meshes { up: vec![the_mesh(Some(mesh), "--mesh")?], killed: vec![] },
        None => meshes()?,
    };
    // A mesh that is dead keeps nobody from those that live.
    for mesh in &dead {
        eprintln!("{}", killed(mesh));
    }
    let all = up.iter().map(|mesh| ask(mesh, &Question::Ps)).collect::<Result<Vec<Overview>>>()?;
    let mut table = Table::new(&["mesh", "name", "state", "restarts", "refused", "svid ends in", "spiffe id"]);
    for overview in &all {
        for w in &overview.workloads {
            table.row(vec![
                overview.mesh.clone(),
                w.name.clone(),
                w.state.clone(),
                w.restarts.to_string(),
                w.refused.to_string(),
                w.expires(),
                w.spiffe_id.clone(),
            ]);
        }
        for r in &overview.roles {
            let dash = || "-".to_owned();
            table.row(vec![
                overview.mesh.clone(),
                format!("({})", r.name),
                r.state.clone(),
                r.restarts.to_string(),
                dash(),
                dash(),
                dash(),
            ]);
        }
    }
    if all.is_empty() && dead.is_empty() && !args.output.is_json() {
        eprintln!("no mesh is up on this machine; start one with `countersign up`");
        return Ok(());
    }
    Ok(args.output.print(&table, &serde_json::to_value(&all)?)?)
}

/// The log file for a name.
fn log_of(overview: &Overview, name: &str) -> Result<PathBuf, Mistake> {
    let file = match name {
        "server" | "agent" if !overview.workloads.iter().any(|w| w.name == name) => format!("countersign-{name}.log"),
        "events" if !overview.workloads.iter().any(|w| w.name == name) => events::FILE.into(),
        _ => {
            let workload = name.strip_suffix(".sidecar").unwrap_or(name);
            if !overview.workloads.iter().any(|w| w.name == workload) {
                return Err(stranger(overview, workload));
            }
            format!("{name}.log")
        }
    };
    Ok(overview.logs.join(file))
}

/// The socket for a name: a workload's sidecar, the server or the agent.
pub fn socket_named(name: &str, mesh: Option<&str>) -> Result<PathBuf> {
    need_root_because("status NAME", SOCKET_IS_ROOTS)?;
    let overview = ask(&the_mesh(mesh, "--mesh")?, &Question::Ps)?;
    if let Some(w) = overview.workloads.iter().find(|w| w.name == name) {
        return Ok(PathBuf::from(&w.admin_socket));
    }
    match name {
        "server" => Ok(overview.server_socket),
        "agent" => Ok(overview.agent_socket),
        _ => Err(stranger(&overview, name).into()),
    }
}

fn stranger(overview: &Overview, name: &str) -> Mistake {
    let names = overview.workloads.iter().map(|w| w.name.as_str()).chain(["server", "agent"]);
    let hint = did_you_mean(name, names);
    Mistake(format!("mesh `{}` has no workload `{}`{hint}", overview.mesh, shown(name)))
}

/// Prints a log, and follows it if requested.
pub fn logs(args: &LogsArgs) -> Result<()> {
    need_root_because("logs", SOCKET_IS_ROOTS)?;
    let overview = ask(&the_mesh(args.mesh.as_deref(), "--mesh")?, &Question::Ps)?;
    let path = log_of(&overview, &args.name)?;
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            // `run` leaves its program's output in its own terminal.
            return Err(anyhow!("`{}` has no log: {} is not there", shown(&args.name), path.display()));
        }
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    };
    print_tail(&mut file, args.lines).with_context(|| format!("cannot read {}", path.display()))??;
    if !args.follow {
        return Ok(());
    }
    loop {
        let grown = print_rest(&mut file).with_context(|| format!("cannot read {}", path.display()))??;
        if !grown {
            if !socket_of(&overview.mesh).exists() {
                return Ok(());
            }
            reopened(&mut file, &path);
            stdout::wait(LOOK)?;
        }
    }
}

type Printed<T> = std::io::Result<Result<T, stdout::StdoutError>>;

/// Prints the last lines of a file, and leaves the position at its end.
fn print_tail(file: &mut File, lines: usize) -> Printed<()> {
    let start = file.metadata()?.len().saturating_sub(MAX_TAIL);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = vec![];
    file.take(MAX_TAIL).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.split_inclusive('\n').collect();
    Ok(stdout::put(&all[all.len().saturating_sub(lines)..].concat()))
}

/// Prints what was appended to a file; returns whether anything was.
fn print_rest(file: &mut File) -> Printed<bool> {
    let mut bytes = vec![];
    file.take(MAX_TAIL).read_to_end(&mut bytes)?;
    if bytes.is_empty() {
        return Ok(Ok(false));
    }
    Ok(stdout::put(&String::from_utf8_lossy(&bytes)).map(|()| true))
}

/// Reopens a log that was moved or truncated, and reads it from the start.
fn reopened(file: &mut File, path: &Path) {
    let (Ok(at), Ok(ours), Ok(theirs)) = (file.stream_position(), file.metadata(), std::fs::metadata(path)) else {
        return;
    };
    if ours.len() < at {
        // A regular file can always be read from its start.
        let _ = file.seek(SeekFrom::Start(0));
    } else if ours.ino() != theirs.ino()
        && let Ok(fresh) = File::open(path)
    {
        *file = fresh;
    }
}

/// Asks a mesh to stop, and waits until it has. Of one whose `up` was killed it removes what is left.
pub fn down(args: &DownArgs) -> Result<()> {
    need_root_because("down", SOCKET_IS_ROOTS)?;
    if let Some(mesh) = &args.mesh
        && meshes()?.killed.contains(mesh)
    {
        return remove(mesh);
    }
    let mesh = the_mesh(args.mesh.as_deref(), "its name, as in `countersign down NAME`")?;
    let overview = ask(&mesh, &Question::Down)?;
    let folder = Path::new(RUN_DIR).join(&mesh);
    let deadline = Instant::now() + DOWN_PATIENCE;
    while runs(overview.pid) && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
    if runs(overview.pid) {
        return Err(anyhow!(
            "mesh `{mesh}` is still going down after {} s (process {})",
            DOWN_PATIENCE.as_secs(),
            overview.pid
        ));
    }
    if folder.exists() {
        return Err(anyhow!(
            "mesh `{mesh}` has ended and left {} behind; `countersign up` tidies it",
            folder.display()
        ));
    }
    eprintln!("mesh {mesh} is down");
    Ok(())
}

/// Removes what a killed `up` has left of a mesh.
fn remove(mesh: &str) -> Result<()> {
    let run_dir = RunDirectory::take(mesh)?;
    run_dir.tidy();
    let left = run_dir.leftovers();
    if left.is_empty() {
        eprintln!("mesh {mesh} is down; its `up` had been killed");
        return Ok(());
    }
    Err(anyhow!("of mesh `{mesh}` these are left: {}", left.join(", ")))
}

/// Whether a process runs. One that has ended but was not waited for is still listed (proc(5)).
fn runs(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The name in parentheses may contain anything; the state follows the last parenthesis.
    let state = stat.rsplit_once(')').map_or("", |(_, rest)| rest.trim_start());
    !state.starts_with(['Z', 'X'])
}

#[cfg(test)]
mod tests {
    use super::super::table::Row;
    use super::*;

    fn overview() -> Overview {
        let row = |name: &str| Row { name: name.into(), ..Row::default() };
        Overview {
            mesh: "shop".into(),
            logs: "/logs".into(),
            workloads: vec![row("web"), row("db")],
            ..Overview::default()
        }
    }

    #[test]
    fn a_process_that_has_ended_does_not_run_though_it_is_listed() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while runs(child.id()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!runs(child.id()) && Path::new("/proc").join(child.id().to_string()).exists());
        child.wait().unwrap();
        assert!(!runs(child.id()) && runs(std::process::id()));
    }

    #[test]
    fn names_of_logs() {
        let of = |name: &str| log_of(&overview(), name).map(|p| p.display().to_string()).map_err(|e| e.0);
        assert_eq!(of("web").unwrap(), "/logs/web.log");
        assert_eq!(of("web.sidecar").unwrap(), "/logs/web.sidecar.log");
        assert_eq!(of("server").unwrap(), "/logs/countersign-server.log");
        assert_eq!(of("events").unwrap(), "/logs/events.log");
        assert_eq!(of("wbe").unwrap_err(), "mesh `shop` has no workload `wbe`; did you mean `web`?");
        assert_eq!(of("../../etc/passwd").unwrap_err(), "mesh `shop` has no workload `../../etc/passwd`");
    }

    #[test]
    fn a_log_that_is_cut_or_moved_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        std::fs::write(&path, "one\ntwo\n").unwrap();
        let mut file = File::open(&path).unwrap();
        let read = |file: &mut File| {
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            text
        };
        assert_eq!(read(&mut file), "one\ntwo\n");
        std::fs::write(&path, "cut\n").unwrap();
        reopened(&mut file, &path);
        assert_eq!(read(&mut file), "cut\n");
        std::fs::rename(&path, folder.path().join("a.log.1")).unwrap();
        std::fs::write(&path, "fresh\n").unwrap();
        reopened(&mut file, &path);
        assert_eq!(read(&mut file), "fresh\n");
    }
}
