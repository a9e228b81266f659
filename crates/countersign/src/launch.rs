//! Starts a program in a network namespace as another user: what `up` runs every sidecar and workload through.
//!
//! It is a process of its own that becomes the program, so that nothing unsafe has to happen between fork and exec.

use std::convert::Infallible;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, getppid, setgid, setgroups, setuid};

/// Start a program in a network namespace.
#[derive(Debug, clap::Args)]
pub struct LaunchArgs {
    /// The namespace's file.
    #[arg(long)]
    netns: Option<PathBuf>,
    /// Stands in for /etc/hosts.
    #[arg(long)]
    hosts: Option<PathBuf>,
    /// User.
    #[arg(long)]
    uid: u32,
    /// Group.
    #[arg(long)]
    gid: u32,
    /// Further groups.
    #[arg(long, value_delimiter = ',')]
    groups: Vec<u32>,
    /// Where the program starts.
    #[arg(long)]
    workdir: Option<PathBuf>,
    /// The process that this one must not outlive.
    #[arg(long)]
    parent: Option<i32>,
    /// Never gain privileges, not even by a set-uid file.
    #[arg(long)]
    no_new_privs: bool,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Becomes the program.
pub fn run(args: &LaunchArgs) -> Result<Infallible> {
    if let Some(path) = &args.netns {
        let netns = File::open(path).with_context(|| format!("cannot open the namespace {}", path.display()))?;
        setns(&netns, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
    }
    if let Some(hosts) = &args.hosts {
        unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot make mounts private")?;
        mount(Some(hosts), "/etc/hosts", none, MsFlags::MS_BIND, none)
            .context("cannot put the names in place of /etc/hosts")?;
    }
    let groups: Vec<Gid> = args.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    setgroups(&groups).context("cannot set groups")?;
    setgid(Gid::from_raw(args.gid)).context("cannot set the group")?;
    setuid(Uid::from_raw(args.uid)).context("cannot set the user")?;
    if let Some(workdir) = &args.workdir {
        // As the user: a folder that it may not enter is said now, not by a program that finds no files.
        std::env::set_current_dir(workdir)
            .with_context(|| format!("uid {} cannot enter the working directory {}", args.uid, workdir.display()))?;
    }
    if args.no_new_privs {
        prctl::set_no_new_privs().context("cannot give up new privileges")?;
    }
    if let Some(parent) = args.parent {
        // After the change of user, which clears it. A parent that is gone by then is noticed by its number.
        prctl::set_pdeathsig(Signal::SIGKILL).context("cannot tie this process to its parent")?;
        if getppid().as_raw() != parent {
            return Err(anyhow!("the parent process is gone"));
        }
    }
    let (program, arguments) = args.command.split_first().context("no program")?;
    Err(Command::new(program).args(arguments).exec()).with_context(|| format!("cannot start `{program}`"))
}
