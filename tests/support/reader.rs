//! A reader's machine: network, processes, `/run` and `/var/lib` of its own, in which the commands of a page run as they
//! stand there. Sockets, ports and folders are the default ones and meet nobody else's; with the machine all of it ends.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::pages::source;
use super::{COUNTERSIGN, outcome, run, wait_for};

/// What the machine's first process does: it makes the folders, and then reaps who is orphaned until the test is over.
const FIRST: &str = "
set -e
for dir in /run /var/lib; do mount -t tmpfs -o mode=755 none $dir; done
ip link set lo up
echo up
cat > /dev/null";

/// The programs that a [`Reader`] is made with.
pub const PROGRAMS: [&str; 5] = ["unshare", "nsenter", "setpriv", "pgrep", "ip"];

/// The machine. The reader is root, in a clone below a folder that only root may enter.
pub struct Reader {
    holder: Child,
    first: u32,
    home: tempfile::TempDir,
    programs: tempfile::TempDir,
}

impl Reader {
    /// Makes one.
    pub fn new() -> Self {
        let (home, programs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mode = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        mode(home.path(), 0o700);
        mode(programs.path(), 0o755);
        // As installed: by name, for every user.
        std::fs::copy(COUNTERSIGN, programs.path().join("countersign")).unwrap();
        let clone = home.path().join("clone");
        std::fs::create_dir(&clone).unwrap();
        run(Command::new("cp").arg("-r").arg(source("examples")).arg(&clone));
        let mut holder = Command::new("unshare")
            .args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", FIRST])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut said).unwrap();
        let first = if said == "up\n" { child_of(holder.id()) } else { None };
        let Some(first) = first else {
            panic!("no namespaces for a reader: {:?}", holder.wait());
        };
        Self { holder, first, home, programs }
    }

    /// A terminal of root's, in the clone.
    pub fn terminal(&self) -> Terminal<'_> {
        let folder = self.home.path().join("clone").display().to_string();
        Terminal { reader: self, folder, user: vec![], exported: vec![] }
    }

    /// A terminal of another user, who may not enter root's home.
    pub fn terminal_of(&self, uid: u32) -> Terminal<'_> {
        let uid = uid.to_string();
        let user = ["setpriv", "--reuid", &uid, "--regid", &uid, "--clear-groups"].map(str::to_owned).to_vec();
        Terminal { reader: self, folder: "/".into(), user, exported: vec![] }
    }

    /// A file of this machine, by the path that the test finds it under.
    pub fn file(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.first))
    }

    /// Installs a program of the test's own.
    pub fn install(&self, name: &str, script: &str) {
        let path = self.programs.path().join(name);
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Closes its standard input, at whose end the first process ends, and with it all others of the PID namespace.
        let _ = self.holder.wait();
    }
}

/// A shell: what it exports holds for its later commands.
pub struct Terminal<'a> {
    reader: &'a Reader,
    folder: String,
    user: Vec<String>,
    exported: Vec<String>,
}

impl Terminal<'_> {
    /// Runs a command, which must succeed within a minute; what it says.
    pub fn run(&mut self, command: &str) -> String {
        if command.starts_with("export ") {
            self.exported.push(command.to_owned());
            return String::new();
        }
        let (code, said) = outcome(&mut self.shell(command));
        assert_eq!(code, 0, "`{command}` said {said}");
        said
    }

    /// Starts a command that runs until it is told to end, and waits until it says a text.
    pub fn start(&self, command: &str, ready: &str) -> Running {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut shell = self.shell(&format!("exec {command}"));
        let out = log.reopen().unwrap();
        shell.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out);
        let mut running = Running { command: command.to_owned(), shell: shell.spawn().unwrap(), log };
        wait_for(&format!("`{command}` to say `{ready}`"), Duration::from_secs(60), || {
            if let Some(status) = running.shell.try_wait().unwrap() {
                panic!("`{command}` ended with {status}: {}", running.said());
            }
            running.said().contains(ready).then_some(())
        });
        running
    }

    fn shell(&self, script: &str) -> Command {
        let path = std::env::var("PATH").unwrap();
        let lines = [&[format!("cd {}", self.folder)], &self.exported[..], &[script.to_owned()]].concat();
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.reader.first.to_string(), "--mount", "--net", "--pid", "--"]);
        command.args(&self.user).args(["bash", "-o", "pipefail", "-c", &lines.join("\n")]);
        command.env("PATH", format!("{}:{path}", self.reader.programs.path().display()));
        command.env_remove("COUNTERSIGN_SERVER_SOCKET").env_remove("COUNTERSIGN_AGENT_SOCKET");
        command
    }
}

/// A command that runs in a terminal.
pub struct Running {
    command: String,
    shell: Child,
    log: tempfile::NamedTempFile,
}

impl Running {
    /// What it has said.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log.path()).unwrap()).into_owned()
    }

    /// Whether it is the command that begins so.
    pub fn is(&self, begin: &str) -> bool {
        self.command.starts_with(begin)
    }

    /// Ctrl-C: it must end, and orderly.
    pub fn interrupt(mut self) {
        let pid = child_of(self.shell.id()).unwrap_or_else(|| panic!("`{}` is gone: {}", self.command, self.said()));
        kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGINT).unwrap();
        let ended =
            wait_for(&format!("`{}` to end", self.command), Duration::from_secs(60), || self.shell.try_wait().unwrap());
        assert!(ended.success(), "`{}` ended with {ended}: {}", self.command, self.said());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Its process ends with the machine.
        let _ = self.shell.kill();
        let _ = self.shell.wait();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.command, self.said());
        }
    }
}

/// The first child of a process. `unshare` and `nsenter` stay outside of a PID namespace; what they start is inside.
fn child_of(pid: u32) -> Option<u32> {
    let (_, said) = outcome(Command::new("pgrep").args(["-P", &pid.to_string()]));
    said.lines().next()?.parse().ok()
}
