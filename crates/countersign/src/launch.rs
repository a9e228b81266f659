//! Starts a program in a network namespace as another user. `up` starts every sidecar and workload through this.
//!
//! It is its own process that becomes the program by exec, so nothing unsafe has to run between fork and exec.

use std::convert::Infallible;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{AccessFlags, Gid, Uid, access, dup2_stdin, getppid, setgid, setgroups, setuid};

use crate::one_line;
use crate::up::find_program;

/// This program, even if its path is in a folder that may not be entered or its file was replaced: the kernel follows
/// this link to the open file, not to its path (proc(5)).
pub const OWN_PROGRAM: &str = "/proc/self/exe";

/// Start a program in a network namespace.
#[derive(Debug, clap::Args)]
pub struct LaunchArgs {
    /// File of the network namespace [default: the current one].
    #[arg(long)]
    netns: Option<PathBuf>,
    /// File to mount over /etc/hosts.
    #[arg(long)]
    hosts: Option<PathBuf>,
    /// Folder with files to mount over /etc/passwd and /etc/group.
    #[arg(long)]
    accounts: Option<PathBuf>,
    /// User ID of the program.
    #[arg(long)]
    uid: u32,
    /// Group ID of the program.
    #[arg(long)]
    gid: u32,
    /// Supplementary group IDs, comma separated.
    #[arg(long, value_delimiter = ',')]
    groups: Vec<u32>,
    /// Working directory of the program.
    #[arg(long)]
    workdir: Option<PathBuf>,
    /// Process ID of the parent, which this process must not outlive.
    #[arg(long)]
    parent: Option<i32>,
    /// Never gain privileges, not even through a set-uid file.
    #[arg(long)]
    no_new_privs: bool,
    /// Standard input is a pipe that receives the reason if the program cannot be started, and is closed once it runs;
    /// the program gets /dev/null.
    #[arg(long)]
    report: bool,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Replaces this process by the program. Returns only if that fails.
pub fn run(args: &LaunchArgs) -> Result<Infallible> {
    keep_descriptors().context("cannot close the open files of the calling shell")?;
    if !args.report {
        return start(args);
    }
    // A close-on-exec copy: its reader sees it closed once the program runs.
    let mut report = File::from(std::io::stdin().as_fd().try_clone_to_owned().context("no pipe to report on")?);
    dup2_stdin(File::open("/dev/null")?).context("cannot replace standard input")?;
    start(args).inspect_err(|error| {
        // `up` may be gone, which ends this process as well.
        let _ = report.write_all(one_line(error).as_bytes());
    })
}

/// Marks every descriptor but standard input, output and error as close-on-exec: what the shell that started us has open is
/// root's, and no business of another user's program. Needs Linux 5.11; before, the descriptors are listed by procfs.
#[allow(unsafe_code)]
fn keep_descriptors() -> std::io::Result<()> {
    // SAFETY: sets a flag of this process's descriptors; no memory is passed.
    let marked = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if marked == 0 {
        return Ok(());
    }
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse::<libc::c_int>().ok());
        let Some(number) = number.filter(|n| *n > 2) else { continue };
        // SAFETY: as above.
        if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

fn start(args: &LaunchArgs) -> Result<Infallible> {
    let (program, arguments) = args.command.split_first().context("no program")?;
    // Before changing the user: afterwards the path to our own file may not be accessible.
    let own = is_own(program);
    let program_path = absolute(program);
    enter(args)?;
    become_user(args)?;
    // An inherited working directory may be unreadable for the user. Files that seem missing are harder to understand
    // than an empty home folder.
    if args.workdir.is_none()
        && std::fs::read_dir(".").is_err()
        && let Some(home) = std::env::var_os("HOME")
    {
        let moved = std::env::set_current_dir(&home);
        if moved.is_ok() {
            eprintln!(
                "countersign: uid {} cannot read the folder that this was started in; the program starts in {}",
                args.uid,
                home.display()
            );
        }
    }
    let mut command = if own {
        let mut command = Command::new(OWN_PROGRAM);
        command.arg0(if program == OWN_PROGRAM { "countersign" } else { program });
        command
    } else {
        Command::new(&program_path)
    };
    let error = command.args(arguments).exec();
    Err(match obstacle(&program_path) {
        Some(folder) if !own => anyhow!(
            "cannot start `{program}`: its user (uid {uid}) may not enter {folder}; move the program, name another `user`, or allow it with `chmod o+x {folder}`",
            uid = args.uid,
            folder = folder.display()
        ),
        _ if error.kind() == std::io::ErrorKind::PermissionDenied => anyhow!(
            "cannot start `{program}`: its user (uid {}) may not execute it; allow it with `chmod o+rx`",
            args.uid
        ),
        _ => anyhow!("cannot start `{program}`: {error}"),
    })
}

/// Whether a command's first word is this program itself.
fn is_own(program: &str) -> bool {
    let file = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let found = find_program(program).ok();
    found.is_some_and(|path| file(&path).is_some() && file(&path) == file(Path::new(OWN_PROGRAM)))
}

/// An absolute path, so that it is still right after a change of the working directory. A bare name is left to PATH.
fn absolute(program: &str) -> PathBuf {
    if program.contains('/') { std::path::absolute(program).unwrap_or_else(|_| program.into()) } else { program.into() }
}

/// The first folder on the path to a file that this process may not enter.
fn obstacle(path: &Path) -> Option<PathBuf> {
    let mut way: Vec<&Path> = path.ancestors().skip(1).filter(|part| !part.as_os_str().is_empty()).collect();
    way.reverse();
    way.into_iter().find(|part| access(*part, AccessFlags::X_OK) == Err(nix::errno::Errno::EACCES)).map(Path::to_owned)
}

/// Enters the namespaces, and mounts the mesh's host names and accounts over the machine's.
fn enter(args: &LaunchArgs) -> Result<()> {
    if let Some(path) = &args.netns {
        let netns = File::open(path).with_context(|| format!("cannot open the namespace {}", path.display()))?;
        setns(&netns, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
    }
    let mut stand_ins: Vec<(PathBuf, &str)> = vec![];
    stand_ins.extend(args.hosts.iter().map(|hosts| (hosts.clone(), "/etc/hosts")));
    if let Some(folder) = &args.accounts {
        stand_ins.extend([(folder.join("passwd"), "/etc/passwd"), (folder.join("group"), "/etc/group")]);
    }
    if stand_ins.is_empty() {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot make mounts private")?;
    for (from, to) in stand_ins {
        mount(Some(&from), to, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("cannot put {} in place of {to}", from.display()))?;
    }
    Ok(())
}

/// Changes from root to the user, and ties this process to its parent.
fn become_user(args: &LaunchArgs) -> Result<()> {
    let groups: Vec<Gid> = args.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    setgroups(&groups).context("cannot set groups")?;
    setgid(Gid::from_raw(args.gid)).context("cannot set the group")?;
    setuid(Uid::from_raw(args.uid)).context("cannot set the user")?;
    if let Some(workdir) = &args.workdir {
        // As the user: an inaccessible folder is reported now, not by a program that finds no files.
        std::env::set_current_dir(workdir)
            .with_context(|| format!("uid {} cannot enter the working directory {}", args.uid, workdir.display()))?;
    }
    if args.no_new_privs {
        prctl::set_no_new_privs().context("cannot give up new privileges")?;
    }
    if let Some(parent) = args.parent {
        // After changing the user, which clears it. A parent that has ended by then is recognised by its process ID.
        prctl::set_pdeathsig(Signal::SIGKILL).context("cannot tie this process to its parent")?;
        if getppid().as_raw() != parent {
            return Err(anyhow!("the parent process is gone"));
        }
    }
    Ok(())
}
