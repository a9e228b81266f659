//! What the stories share: a mesh that is up, roles by hand, and commands with their output.

#![allow(dead_code)] // each story uses its part

pub mod pages;
pub mod reader;
pub mod roles;

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The program under test.
pub const COUNTERSIGN: &str = env!("CARGO_BIN_EXE_countersign");

/// Whether a test can run here; where not, it says why. In CI nothing may be missing.
pub fn able(programs: &[&str]) -> bool {
    let mut missing: Vec<String> = programs.iter().filter(|p| find(p).is_none()).map(|p| format!("no `{p}`")).collect();
    if !nix::unistd::geteuid().is_root() {
        missing.push("not root".into());
    }
    if missing.is_empty() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "nothing may be skipped in CI: {}", missing.join(", "));
    eprintln!("skipped: {}", missing.join(", "));
    false
}

/// A Python with what `tests/requirements.txt` lists; `None`, and said, where there is none or the test cannot run. In CI that is a
/// failure.
pub fn python() -> Option<OsString> {
    let python = std::env::var_os("COUNTERSIGN_TEST_PYTHON");
    if python.is_none() {
        assert!(std::env::var_os("CI").is_none(), "tests/run sets COUNTERSIGN_TEST_PYTHON");
        eprintln!("skipped: no Python with tests/requirements.txt; tests/run installs one");
    }
    python.filter(|_| able(&[]))
}

/// Finds a program on the PATH and in the places where Debian keeps servers.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    dirs.extend(std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|d| d.path().join("bin")));
    dirs.into_iter().map(|d| d.join(program)).find(|p| p.is_file())
}

/// The path of a program that [`able`] has found.
pub fn path_of(program: &str) -> String {
    find(program).unwrap_or_else(|| panic!("no {program}")).display().to_string()
}

/// Waits until something is true.
pub fn wait_for<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {patience:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a command; its output must be a success.
pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    success(&format!("{command:?}"), &output)
}

/// Runs a line of shell; its output must be a success.
pub fn sh(script: &str) -> String {
    run(Command::new("sh").arg("-c").arg(script))
}

/// The text of a successful output.
pub fn success(what: &str, output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what} ended with {}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// What a command says, and its exit code.
pub fn outcome(command: &mut Command) -> (i32, String) {
    let shown = format!("{command:?}");
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{shown}: {e}"));
    // A command that should have failed but runs on must not hang the story.
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    let (done, finished) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    let output = finished.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|_| {
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        panic!("{shown} ran on for a minute");
    });
    let output = output.unwrap();
    let text = [&output.stdout[..], &output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

/// `countersign` with arguments.
pub fn countersign(args: &[&str]) -> Command {
    let mut command = Command::new(COUNTERSIGN);
    command.args(args);
    command
}

/// A file of random bytes, and its SHA-256.
pub fn random_file(path: &Path, megabytes: u64) -> String {
    let mut random = File::open("/dev/urandom").unwrap().take(1024 * 1024);
    let mut block = vec![];
    random.read_to_end(&mut block).unwrap();
    // One random block with a counter in front is as good as random bytes for telling transfers apart.
    let mut file = File::create(path).unwrap();
    for n in 0..megabytes {
        block[..8].copy_from_slice(&n.to_be_bytes());
        std::io::Write::write_all(&mut file, &block).unwrap();
    }
    sha256(path)
}

/// The SHA-256 of a file.
pub fn sha256(path: &Path) -> String {
    run(Command::new("sha256sum").arg(path)).split(' ').next().unwrap().to_owned()
}

/// A process that ends with its test, also when the test fails.
pub struct Ended(pub Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A mesh that `countersign up` runs, taken down when dropped.
pub struct Mesh {
    /// Its name.
    pub name: String,
    child: Child,
    folder: tempfile::TempDir,
}

impl Mesh {
    /// Brings a mesh of these workloads (YAML, indented by two) up, strict, under a name of the test's own.
    pub fn up(test: &str, workloads: &str) -> Self {
        Self::up_with(test, "mode: strict", workloads)
    }

    /// The same with other settings at the top.
    pub fn up_with(test: &str, settings: &str, workloads: &str) -> Self {
        Self::up_named(format!("t-{test}-{}", std::process::id()), settings, workloads)
    }

    /// The same under a name that is given.
    pub fn up_named(name: String, settings: &str, workloads: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Workloads of other users read their files here.
        sh(&format!("chmod 755 {}", folder.path().display()));
        let file = folder.path().join("mesh.yaml");
        std::fs::write(&file, format!("name: {name}\n{settings}\nworkloads:\n{workloads}")).unwrap();
        let logs = folder.path().join("logs");
        let out = folder.path().join("up.log");
        let child = countersign(&["up", "--plain", "--log-dir"])
            .arg(&logs)
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(File::create(&out).unwrap())
            .stderr(File::options().append(true).open(&out).unwrap())
            .spawn()
            .unwrap();
        let mut mesh = Self { name, child, folder };
        wait_for("the mesh to come up", Duration::from_secs(60), || {
            let said = mesh.said();
            if let Some(status) = mesh.child.try_wait().unwrap() {
                panic!("up ended with {status}: {said}");
            }
            said.contains(" is up; logs in ").then_some(())
        });
        mesh
    }

    /// What `up` has printed.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("up.log")).unwrap_or_default()
    }

    /// A folder for the test's files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The mesh's own folder.
    pub fn dir(&self) -> PathBuf {
        Path::new("/run/countersign/up").join(&self.name)
    }

    /// The process number of `up`.
    pub fn pid(&self) -> i32 {
        self.child.id().try_into().unwrap()
    }

    /// A log.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join("logs").join(format!("{name}.log"))).unwrap_or_default()
    }

    /// A sidecar's access log, one JSON value per line, the part that `up` has moved aside first.
    pub fn access_log(&self, workload: &str) -> Vec<serde_json::Value> {
        let path = self.dir().join("sidecars").join(workload).join("access.log");
        let Ok(mut current) = File::open(&path) else { return vec![] };
        let mut text = String::new();
        // Opened before the older one is read: a log that is moved in between is neither missed nor read twice.
        if let Ok(mut older) = File::open(path.with_file_name("access.log.1"))
            && older.metadata().unwrap().ino() != current.metadata().unwrap().ino()
        {
            older.read_to_string(&mut text).unwrap();
        }
        current.read_to_string(&mut text).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
    }

    /// The status of a sidecar.
    pub fn status(&self, workload: &str) -> serde_json::Value {
        let socket = self.dir().join("sidecars").join(workload).join("admin.sock");
        let text = run(countersign(&["status", "--output", "json", "--socket"]).arg(socket));
        serde_json::from_str(&text).unwrap()
    }

    /// An operator's command against the mesh's server.
    pub fn operator(&self, args: &[&str]) -> Command {
        let mut command = countersign(args);
        command.env("COUNTERSIGN_SERVER_SOCKET", self.dir().join("server/server.sock"));
        command
    }

    /// `countersign run`: a program in the mesh, with a sidecar and an identity of its own.
    pub fn join(&self, name: &str, args: &[&str], program: &[&str]) -> Command {
        let mut command = countersign(&["run", "--mesh", &self.name, "--name", name]);
        command.args(args).arg("--").args(program);
        command
    }

    /// Runs a program in the mesh; it must succeed.
    pub fn run(&self, name: &str, program: &[&str]) -> String {
        run(&mut self.join(name, &[], program))
    }

    /// Runs a line of shell in the mesh, as root so that it reads the test's files.
    pub fn shell(&self, name: &str, script: &str) -> String {
        run(&mut self.join(name, &["--user", "root"], &["sh", "-c", script]))
    }

    /// Waits until a workload's port answers to a client of the mesh.
    pub fn wait_for_port(&self, workload: &str, port: u16) {
        let ns = format!("cs-{}-{workload}", self.name);
        let probe = format!("ip netns exec {ns} ss -Hltn 'sport = :{port}' | grep -q .");
        wait_for(
            &format!("{workload} to listen on {port} (its log: {})", self.log(workload)),
            Duration::from_secs(60),
            || Command::new("sh").arg("-c").arg(&probe).status().unwrap().success().then_some(()),
        );
    }

    /// A process of the mesh by what its command line holds.
    pub fn process(&self, needle: &str) -> i32 {
        let dir = self.dir().display().to_string();
        wait_for(&format!("the process {needle}"), Duration::from_secs(20), || {
            std::fs::read_dir("/proc").unwrap().flatten().find_map(|e| {
                let pid: i32 = e.file_name().to_str()?.parse().ok()?;
                let line = String::from_utf8_lossy(&std::fs::read(e.path().join("cmdline")).ok()?).replace('\0', " ");
                (line.contains(&dir) && line.contains(needle) && !line.contains(" launch ")).then_some(pid)
            })
        })
    }

    /// Waits for its end, and tells the exit code of `up`.
    pub fn exit_code(&mut self) -> i32 {
        let status = wait_for("up to end", Duration::from_secs(60), || self.child.try_wait().unwrap());
        status.code().unwrap_or(-1)
    }

    /// Waits until `up` has ended by itself, and says its code.
    pub fn ended(&mut self) -> i32 {
        let status = wait_for("up to end", Duration::from_secs(60), || self.child.try_wait().unwrap());
        status.code().unwrap_or(-1)
    }

    /// Takes it down and looks that nothing stays.
    pub fn down(mut self) {
        self.end();
        assert!(!self.dir().exists(), "{} is still there", self.dir().display());
        let left = sh("ip netns list 2>/dev/null || true");
        assert!(!left.contains(&format!("cs-{}", self.name)), "namespaces are left: {left}");
    }

    fn end(&mut self) {
        if self.child.try_wait().unwrap().is_some() {
            return;
        }
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), nix::sys::signal::Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            eprintln!("--- what up said\n{}", self.said());
            for entry in std::fs::read_dir(self.folder.path().join("logs")).into_iter().flatten().flatten() {
                let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                eprintln!(
                    "--- {}\n{}",
                    entry.file_name().display(),
                    lines[lines.len().saturating_sub(15)..].join("\n")
                );
            }
        }
    }
}
