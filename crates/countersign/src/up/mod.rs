//! `countersign up` and `countersign run`: the whole mesh on one machine.
//!
//! `mesh_file` says what is wanted, `place` where it stands on this machine, `account` whose users run it, `mesh` brings it up and takes it down,
//! `control_plane` is its server and agent, `children` keeps its processes, `control` is how `run` joins, `table` shows it, `verify` checks it.

mod account;
mod children;
mod control;
mod control_plane;
mod example;
mod mesh;
mod mesh_file;
mod place;
mod run;
mod table;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use crate::logging::LogArgs;
use crate::settings::need_root;
use crate::stop::on_signal;

pub use run::{RunArgs, run};

use mesh::Mesh;

/// Run a mesh on this machine: every workload in a network namespace with a sidecar of its own.
///
/// Without FILE an example runs that needs nothing installed: a small shop of four HTTP
/// services. Every workload gets a network namespace, an address, names for the others, a sidecar and a short-lived
/// identity; Ctrl-C takes everything down again.
#[derive(Debug, clap::Args)]
pub struct UpArgs {
    /// Mesh file (YAML); see docs/mesh-file.md.
    file: Option<PathBuf>,
    /// Check the mesh and exit: 0 when every check passed, 1 otherwise. Without FILE, the example is checked in full.
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

/// Runs a mesh until it is told to stop, or verifies it.
pub fn up(args: UpArgs) -> Result<ExitCode> {
    let table = !args.plain && !args.verify && std::io::IsTerminal::is_terminal(&std::io::stdout());
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
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let stop = on_signal()?;
        if args.verify {
            let full = args.file.is_none();
            return verify::verify(spec, args.log_dir, full, stop).await;
        }
        let place = place::Place::take(&spec.name)?;
        let progress = |step: &str| eprintln!("{step}");
        let started = tokio::select! {
            mesh = Mesh::start(spec, &place, args.log_dir, &progress) => mesh,
            () = stop.cancelled() => {
                eprintln!("stopped while starting; tidying up");
                place.tidy();
                return Ok(ExitCode::from(130));
            }
        };
        let mesh = started.inspect_err(|_| place.tidy())?;
        control::serve(&mesh)?;
        if table {
            table::live(&mesh, &stop).await;
        } else {
            table::plain(&mesh, &stop).await;
        }
        eprintln!("taking the mesh down");
        mesh.stop().await;
        place.tidy();
        Ok(ExitCode::SUCCESS)
    })
}
