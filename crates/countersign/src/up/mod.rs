//! `countersign up` and `countersign run`: a whole mesh on one machine.
//!
//! `mesh_file` says what is wanted, `run_directory` where it stands on this machine, `namespaces` which network namespaces
//! are its, `account` whose users run it, `mesh` brings it up and takes it down, `running` is a workload of it,
//! `registration` its entries, `published` its directory, `control_plane` is its server and agent, `sidecar` what a
//! workload's sidecar is told, `children` keeps its processes, `leftovers` ends what they leave, `control` is how `run` joins, `table` shows it, `verify` checks
//! it. `events` is what happened, `ask` and `machine` are `ps`, `logs` and `down`, `rotate` bounds the logs, `reach` looks at
//! working folders.

mod account;
mod ask;
mod children;
mod control;
mod control_plane;
mod events;
mod example;
mod leftovers;
mod machine;
mod mesh;
mod mesh_file;
mod namespaces;
mod node_identity;
mod numbers;
mod published;
mod reach;
mod refusals;
mod registration;
mod rotate;
mod run;
mod run_directory;
mod running;
mod sidecar;
mod signals;
mod table;
mod users;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use crate::logging::LogArgs;
use crate::settings::{Mistake, need_root};

pub use ask::meshes;
pub use machine::{DownArgs, LogsArgs, PsArgs, down, logs, ps, socket_named};
pub use mesh_file::find_program;
#[cfg(fuzzing)]
pub use mesh_file::read as read_mesh;
pub use run::{RunArgs, run};
pub use run_directory::RUN_DIR;

use mesh::Mesh;
use run_directory::RunDirectory;
use signals::Signals;

/// Run a mesh on this machine: every workload in a network namespace with its own sidecar.
///
/// Without FILE an example runs that needs no installation: a shop of four HTTP services. Every workload gets a network
/// namespace, an address, host names of the others, a sidecar and a short-lived identity. Ctrl-C stops everything.
///
/// Exit code: 0 after an orderly end; 1 if the mesh could not start, or a program failed and was not restarted; 2 for
/// an error in the command or the mesh file.
#[derive(Debug, clap::Args)]
pub struct UpArgs {
    /// Mesh file (YAML); see docs/mesh-file.md.
    file: Option<PathBuf>,
    /// Check the mesh and exit: code 0 if every check passed, otherwise 1. Without FILE, the example is checked in
    /// full.
    #[arg(long)]
    verify: bool,
    /// Keep the logs of all processes in this folder.
    #[arg(long, value_name = "DIR")]
    log_dir: Option<PathBuf>,
    /// Print plain lines even in a terminal.
    #[arg(long)]
    plain: bool,
    #[command(flatten)]
    log: LogArgs,
}

/// Runs a mesh until it is stopped, or verifies it.
pub fn up(args: UpArgs) -> Result<ExitCode> {
    let table = !args.plain && !args.verify && table::possible();
    let log = if args.log.log == "info" && (table || args.verify) {
        LogArgs { log: "warn".into(), ..args.log.clone() }
    } else {
        args.log.clone()
    };
    log.start()?;
    let spec = match &args.file {
        Some(path) => mesh_file::load(path)?,
        None if args.verify => example::verification(),
        None => example::shop(),
    };
    need_root("up")?;
    // One thread: children are tied to the thread that starts them, and this one lives as long as the mesh.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if args.file.is_some() {
        runtime.block_on(check_upstream(&spec))?;
    }
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let signals = Signals::take()?;
        let stop = signals.stop.clone();
        if args.verify {
            let full = args.file.is_none();
            return verify::verify(spec, args.log_dir, full, signals).await;
        }
        let run_dir = RunDirectory::take(&spec.name)?;
        if args.file.is_some() {
            say_unreadable(&spec, run_dir.users());
        }
        let progress = |step: &str| eprintln!("{step}");
        let started = tokio::select! {
            mesh = Mesh::start(spec, &run_dir, args.log_dir, &progress) => mesh,
            () = stop.cancelled() => {
                eprintln!("stopped while starting; tidying up");
                run_dir.tidy();
                say_leftovers(&run_dir);
                return Ok(ExitCode::from(130));
            }
        };
        let mesh = started?;
        control::serve(&mesh)?;
        let rotating = tokio::task::spawn_local(rotate::keep_short(mesh.clone()));
        if table {
            table::live(&mesh, &stop).await;
        } else {
            table::plain(&mesh, &stop).await;
        }
        rotating.abort();
        let failed = mesh.failed_programs();
        eprintln!("taking the mesh down");
        let in_order = tokio::select! {
            () = mesh.stop() => true,
            () = signals.at_once.cancelled() => false,
        };
        // Kills what did not end in order.
        run_dir.tidy();
        let left = say_leftovers(&run_dir);
        for (name, end) in &failed {
            eprintln!("{name} {end}");
        }
        Ok(match (left || !failed.is_empty(), in_order) {
            (true, _) => ExitCode::FAILURE,
            (false, true) => ExitCode::SUCCESS,
            (false, false) => ExitCode::from(130),
        })
    })
}

/// Checks the upstream's files with the server's code before the server gets copies of them: errors name the path that
/// the user knows, and nothing has been started yet.
async fn check_upstream(spec: &mesh_file::MeshSpec) -> Result<(), Mistake> {
    let Some((certificate, key, bundle)) = spec.upstream.clone() else { return Ok(()) };
    let files = countersign_server::UpstreamDisk { certificate, key, bundle };
    let now = time::OffsetDateTime::now_utc();
    let checked = countersign_server::upstream_authority::Disk::new(files, &spec.trust_domain, now);
    checked.await.map(|_| ()).map_err(|e| Mistake(e.to_string()))
}

/// Reports what is left of a mesh on the machine; returns whether anything is.
fn say_leftovers(run_dir: &RunDirectory) -> bool {
    let left = run_dir.leftovers();
    for what in &left {
        eprintln!("countersign: could not remove the {what}");
    }
    !left.is_empty()
}

/// Warns about each workload whose user cannot read its working directory: relative paths fail there, often silently.
fn say_unreadable(spec: &mesh_file::MeshSpec, users: users::Users) {
    let accounts = spec
        .workloads
        .iter()
        .enumerate()
        .map(|(number, workload)| (workload, workload.user.clone().unwrap_or_else(|| users.workload(number))));
    for word in reach::words(accounts, std::env::current_dir().ok().as_deref()) {
        eprintln!("note: {word}");
    }
}
