//! Strangers hold open what they can, and everybody else is served as if they were not there.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::metrics::http_get;
use crate::support::roles::{Role, Server, TD, free_port};
use crate::support::{able, countersign, outcome, run, wait_for};

/// A process that opens so many connections to a socket, says nothing over them, and holds them until it is dropped.
struct Silent(Child);

impl Silent {
    /// As `uid`, to a Unix socket.
    fn hold(socket: &Path, uid: u32, count: usize) -> Self {
        let script = "import os, resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
held = []
for n in range(int(sys.argv[3])):
    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); held.append(s)
print('held', flush=True)
time.sleep(120)
";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .arg(socket)
            .args([uid.to_string(), count.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut word = [0; 4];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut word).unwrap();
        Self(child)
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn hold_tcp(to: SocketAddr, count: usize) -> Vec<TcpStream> {
    (0..count).map(|_| TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap()).collect()
}

/// How long the slowest of ten calls took.
fn slowest(mut call: impl FnMut()) -> Duration {
    let took = |call: &mut dyn FnMut()| {
        let began = Instant::now();
        call();
        began.elapsed()
    };
    (0..10).map(|_| took(&mut call)).max().unwrap()
}

/// Reachable for another user: a test's folder lies in a private one otherwise.
fn open_folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    dir
}

#[test]
fn silent_connections_keep_no_workload_operator_node_or_probe_waiting() {
    if !able(&["python3"]) {
        return;
    }
    let dir = open_folder();
    let (server_page, agent_page) = (free_port(), free_port());
    let page = |port| format!("127.0.0.1:{port}");
    let server = Server::start(dir.path(), &["--metrics", &page(server_page)]);
    let token = server.token(&[]);
    let args = [server.agent_args(&token), vec!["--metrics".to_owned(), page(agent_page)]].concat();
    let agent = Role::start(dir.path(), "agent", &args);
    let uid = format!("unix:uid:{}", nix::unistd::geteuid());
    let (id, parent) = (format!("spiffe://{TD}/me"), format!("spiffe://{TD}/spire/agent/join_token/{token}"));
    let entry = ["entry", "create", "--spiffe-id", &id, "--parent-id", &parent, "--selector", &uid];
    run(&mut server.operator(&entry));
    let fetch = || outcome(countersign(&["x509", "fetch", "--socket"]).arg(server.agent_socket()));
    wait_for("an SVID", Duration::from_secs(20), || (fetch().0 == 0).then_some(()));
    // A local user, at the Workload API; root itself at the operators' socket; a stranger at each port.
    let _nobody = Silent::hold(&server.agent_socket(), 65_534, 1_010);
    let _root = Silent::hold(&server.socket(), 0, 1_010);
    let _strangers = [
        hold_tcp(server.address, 1_500),
        hold_tcp(SocketAddr::from(([127, 0, 0, 1], server_page)), 1_500),
        hold_tcp(SocketAddr::from(([127, 0, 0, 1], agent_page)), 1_500),
    ];
    assert!(slowest(|| assert_eq!(fetch().0, 0)) < Duration::from_secs(1));
    assert!(slowest(|| drop(run(&mut server.operator(&["entry", "show"])))) < Duration::from_secs(1));
    for port in [server_page, agent_page] {
        let live = || assert!(http_get(port, "/live").is_some_and(|page| page.starts_with("HTTP/1.1 200")));
        assert!(slowest(live) < Duration::from_secs(1));
    }
    // A node that comes now is attested, and one that is there is not forgotten.
    agent.kill();
    let again = Instant::now();
    let agent = Role::start(dir.path(), "agent", &args);
    wait_for("the agent to be back", Duration::from_secs(10), || (fetch().0 == 0).then_some(()));
    assert!(again.elapsed() < Duration::from_secs(5), "{:?}: {}", again.elapsed(), agent.log());
}

#[test]
fn a_hangup_ends_no_role() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let (agent, _) = server.agent();
    let port = free_port();
    let (socket, listen) = (server.agent_socket().display().to_string(), format!("127.0.0.1:{}", free_port()));
    let page = format!("127.0.0.1:{port}");
    let args = ["proxy", "--agent-socket", &socket, "--outbound-listen", &listen, "--outbound-target", "127.0.0.1:9"];
    let expect = format!("spiffe://{TD}/nobody");
    let args = [&args[..], &["--outbound-expect", &expect, "--http", &page]].concat();
    let proxy = Role::start(dir.path(), "proxy", &args.iter().map(ToString::to_string).collect::<Vec<_>>());
    for role in [server.role.as_ref().unwrap(), &agent, &proxy] {
        kill(Pid::from_raw(i32::try_from(role.pid()).unwrap()), Signal::SIGHUP).unwrap();
        wait_for("the role to hear it", Duration::from_secs(5), || role.log().contains("SIGHUP").then_some(()));
    }
    run(&mut server.operator(&["entry", "show"]));
    assert_eq!(http_get(port, "/live").unwrap().lines().next(), Some("HTTP/1.1 200 OK"));
    run(countersign(&["status", "--socket"]).arg(server.agent_socket()));
}
