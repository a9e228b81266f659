//! Roles started by hand: a server and an agent in a temporary folder, and identities minted for sidecars on fixed ways.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::{countersign, run, wait_for};

/// The trust domain of servers started by hand.
pub const TD: &str = "test.local";

/// A free port on loopback, given to no other test: below the range that the kernel takes clients' ports from.
pub fn free_port() -> u16 {
    const PORTS: std::ops::Range<u32> = 20_000..32_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let at = NEXT.fetch_add(1, Ordering::Relaxed) + std::process::id() * 97;
        let port = u16::try_from(PORTS.start + at % (PORTS.end - PORTS.start)).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A process that ends with the test.
pub struct Role {
    child: Child,
    log: PathBuf,
}

impl Role {
    /// Starts `countersign` with these arguments and waits until it is ready.
    pub fn start(dir: &Path, name: &str, args: &[String]) -> Self {
        Self::start_command(dir, name, countersign(&[]).args(args))
    }

    /// The same with a variable in its environment.
    pub fn start_with(dir: &Path, name: &str, args: &[String], (variable, value): (&str, &Path)) -> Self {
        Self::start_command(dir, name, countersign(&[]).args(args).env(variable, value))
    }

    /// The same with a clock that is off: `shift` is `libfaketime`'s, as in `-30s`. (Its wrapper `faketime` would leave
    /// its child behind when killed.)
    pub fn start_shifted(dir: &Path, name: &str, shift: &str, args: &[String]) -> Self {
        let is_static = cfg!(target_feature = "crt-static");
        assert!(!is_static, "a static binary's clock cannot be shifted: build without crt-static");
        let library = std::fs::read_dir("/usr/lib")
            .unwrap()
            .flatten()
            .map(|d| d.path().join("faketime/libfaketimeMT.so.1"))
            .find(|p| p.is_file())
            .expect("Debian's package libfaketime");
        let mut command = countersign(&[]);
        command.args(args).env("LD_PRELOAD", library).env("FAKETIME", shift).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        Self::start_command(dir, name, &mut command)
    }

    fn start_command(dir: &Path, name: &str, command: &mut Command) -> Self {
        let ready = dir.join(format!("{name}.ready"));
        let _ = std::fs::remove_file(&ready);
        let mut role = Self::spawn(dir, name, command.arg("--ready-file").arg(&ready));
        wait_for(&format!("{name} to be ready"), Duration::from_secs(30), || {
            if let Some(status) = role.child.try_wait().unwrap() {
                panic!("{name} ended with {status}: {}", role.log());
            }
            ready.exists().then_some(())
        });
        role
    }

    fn spawn(dir: &Path, name: &str, command: &mut Command) -> Self {
        let log = dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let child = command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        Self { child, log }
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Kills it as the kernel would.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log());
        }
    }
}

/// A server, and what belongs to it.
pub struct Server {
    /// The process.
    pub role: Option<Role>,
    /// Its folder.
    pub dir: PathBuf,
    /// Where agents connect.
    pub address: SocketAddr,
    /// Its trust domain.
    pub trust_domain: String,
    variable: Option<(&'static str, PathBuf)>,
    args: Vec<String>,
}

impl Server {
    /// Starts one; `more` goes to its command line.
    pub fn start(dir: &Path, more: &[&str]) -> Self {
        Self::start_as(dir, TD, more)
    }

    /// Starts one for this trust domain.
    pub fn start_as(dir: &Path, trust_domain: &str, more: &[&str]) -> Self {
        Self::start_in(dir, trust_domain, more, None)
    }

    /// The same with a variable in its environment.
    pub fn start_in(dir: &Path, trust_domain: &str, more: &[&str], variable: Option<(&'static str, PathBuf)>) -> Self {
        let address: SocketAddr = format!("127.0.0.1:{}", free_port()).parse().unwrap();
        let place = |n: &str| dir.join(n).display().to_string();
        let (bind, socket, data, audit) =
            (address.to_string(), place("server.sock"), place("server"), place("audit.log"));
        let args = [
            "server",
            "--trust-domain",
            trust_domain,
            "--bind",
            &bind,
            "--socket",
            &socket,
            "--data-dir",
            &data,
            "--audit-log",
            &audit,
        ];
        let args: Vec<String> = args.iter().chain(more).map(|a| (*a).to_owned()).collect();
        let mut server =
            Self { role: None, dir: dir.to_owned(), address, trust_domain: trust_domain.to_owned(), variable, args };
        server.again();
        server
    }

    /// Starts it again with the same arguments.
    pub fn again(&mut self) {
        self.role = None;
        self.role = Some(match &self.variable {
            Some((name, value)) => Role::start_with(&self.dir, "server", &self.args, (name, value)),
            None => Role::start(&self.dir, "server", &self.args),
        });
    }

    /// Kills it.
    pub fn kill(&mut self) {
        if let Some(role) = self.role.take() {
            role.kill();
        }
    }

    /// What it has logged since it was started last.
    pub fn log(&self) -> String {
        self.role.as_ref().map(Role::log).unwrap_or_default()
    }

    /// Its operator socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("server.sock")
    }

    /// An operator's command.
    pub fn operator(&self, args: &[&str]) -> Command {
        let mut command = countersign(args);
        command.env("COUNTERSIGN_SERVER_SOCKET", self.socket());
        command
    }

    /// An operator's command that must succeed, with JSON as its output.
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let text = run(self.operator(args).args(["--output", "json"]));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    /// The audit record, one JSON value a line.
    pub fn audit(&self) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.dir.join("audit.log")).unwrap_or_default();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    }

    /// Writes the bundle to a file.
    pub fn bundle(&self) -> PathBuf {
        let path = self.dir.join("bundle.pem");
        std::fs::write(&path, run(&mut self.operator(&["bundle", "show"]))).unwrap();
        path
    }

    /// A join token.
    pub fn token(&self, more: &[&str]) -> String {
        self.json(&[&["token", "generate"], more].concat())["token"].as_str().unwrap().to_owned()
    }

    /// The arguments of an agent with a join token.
    pub fn agent_args(&self, token: &str) -> Vec<String> {
        let place = |n: &str| self.dir.join(n).display().to_string();
        std::fs::write(self.dir.join("token"), token).unwrap();
        let (server, bundle) = (self.address.to_string(), self.bundle().display().to_string());
        let (socket, data, token) = (place("agent.sock"), place("agent"), place("token"));
        let args = [
            "agent",
            "--trust-domain",
            &self.trust_domain,
            "--server",
            &server,
            "--socket",
            &socket,
            "--data-dir",
            &data,
            "--trust-bundle",
            &bundle,
            "--join-token-file",
            &token,
            "--log",
            "info,countersign_agent=debug",
        ];
        args.map(str::to_owned).to_vec()
    }

    /// Starts an agent and waits until it is attested; returns its SPIFFE ID too.
    pub fn agent(&self) -> (Role, String) {
        let token = self.token(&[]);
        let agent = Role::start(&self.dir, "agent", &self.agent_args(&token));
        wait_for("the agent to attest", Duration::from_secs(20), || agent.log().contains("attested").then_some(()));
        (agent, format!("spiffe://{}/spire/agent/join_token/{token}", self.trust_domain))
    }

    /// Where the agent listens.
    pub fn agent_socket(&self) -> PathBuf {
        self.dir.join("agent.sock")
    }

    /// Mints an identity: svid.pem, key.pem and bundle.pem in a folder.
    pub fn mint(&self, id: &str, folder: &str, more: &[&str]) -> PathBuf {
        let dir = self.dir.join(folder);
        std::fs::create_dir_all(&dir).unwrap();
        let id = format!("spiffe://{}{id}", self.trust_domain);
        run(self.operator(&["mint", "x509", "--spiffe-id", &id, "--write"]).arg(&dir).args(more));
        dir
    }
}
