//! When things break: what is promised holds, nothing leaks in clear, nothing is lost.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::roles::{Role, Server, TD, free_port};
use crate::support::{COUNTERSIGN, Mesh, able, countersign, outcome, path_of, run, sh, wait_for};

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// One service of the shop, and a client that asks it all the time.
fn shop(test: &str, settings: &str) -> Mesh {
    let mesh = Mesh::up_with(
        test,
        settings,
        &format!("  - name: server\n    ports: [9080]\n    command: [{COUNTERSIGN}, shop, ratings]\n"),
    );
    mesh.wait_for_port("server", 9080);
    mesh
}

struct Load(Child);

impl Load {
    fn start(mesh: &Mesh, name: &str, seconds: u64, query: &str) -> Self {
        let url = format!("http://server:9080/{query}");
        let mut command = mesh.join(
            name,
            &[],
            &[
                COUNTERSIGN,
                "probe",
                &url,
                "--seconds",
                &seconds.to_string(),
                "--kept",
                "2",
                "--fresh",
                "2",
                "--pause-ms",
                "20",
            ],
        );
        Self(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn report(self) -> serde_json::Value {
        let output = self.0.wait_with_output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
    }
}

/// A capture of everything on a workload's link.
struct Capture {
    child: Child,
    file: std::path::PathBuf,
}

impl Capture {
    fn start(mesh: &Mesh, workload: &str, folder: &Path) -> Self {
        let file = folder.join("capture.pcap");
        let ns = format!("cs-{}-{workload}", mesh.name);
        let child = Command::new("ip")
            .args([
                "netns",
                "exec",
                &ns,
                &path_of("tcpdump"),
                "-i",
                "eth0",
                "--immediate-mode",
                "-U",
                "-Z",
                "root",
                "-w",
            ])
            .arg(&file)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the capture", Duration::from_secs(10), || std::fs::metadata(&file).ok().filter(|m| m.len() > 0));
        Self { child, file }
    }

    /// Bytes captured, and whether these are among them.
    fn stop(mut self, needle: &str) -> (usize, bool) {
        // What the kernel has seen is in the file when it has not grown for a while.
        let (mut last, mut since) = (0, Instant::now());
        wait_for("the capture to be written", Duration::from_secs(10), || {
            let now = std::fs::metadata(&self.file).unwrap().len();
            if std::mem::replace(&mut last, now) != now {
                since = Instant::now();
            }
            (since.elapsed() > Duration::from_millis(300)).then_some(())
        });
        signal(self.child.id().try_into().unwrap(), Signal::SIGTERM);
        self.child.wait().unwrap();
        let bytes = std::fs::read(&self.file).unwrap();
        (bytes.len(), bytes.windows(needle.len()).any(|w| w == needle.as_bytes()))
    }
}

/// Waits until further connections have come through the server's sidecar.
fn traffic_goes_on(mesh: &Mesh) {
    let log = mesh.dir().join("sidecars/server/access.log");
    let lines = || std::fs::read_to_string(&log).unwrap_or_default().lines().count();
    let before = lines();
    wait_for("traffic to go on", Duration::from_secs(20), || (lines() > before + 50).then_some(()));
}

/// Kills a process of the mesh, by what its command line holds, and waits until there is another.
fn dies_and_comes_back(mesh: &Mesh, process: &str) {
    let pid = mesh.process(process);
    signal(pid, Signal::SIGKILL);
    wait_for(&format!("{process} to be back"), Duration::from_secs(20), || {
        (mesh.process(process) != pid).then_some(())
    });
}

#[test]
fn server_and_agent_die_under_load_and_nobody_notices() {
    if !able(&[]) {
        return;
    }
    let mesh = shop("die-control", "mode: strict\nsvid_ttl: 30s");
    let load = Load::start(&mesh, "client", 20, "");
    traffic_goes_on(&mesh);
    for role in ["countersign server", "countersign agent", "countersign server", "countersign agent"] {
        dies_and_comes_back(&mesh, role);
        traffic_goes_on(&mesh);
    }
    let report = load.report();
    assert_eq!(report["failed"], 0, "{report}");
    assert!(
        mesh.log("countersign-agent").matches("attested agent=").count() <= 1,
        "the agent came back from its own identity"
    );
    // All is as before: a new entry reaches the agent, and what was registered is still there.
    let entries: serde_json::Value =
        serde_json::from_str(&run(&mut mesh.operator(&["entry", "show", "--output", "json"]))).unwrap();
    assert!(
        entries.as_array().unwrap().iter().any(|e| e["spiffe_id"].as_str().unwrap().ends_with("/sa/server")),
        "{entries}"
    );
    assert_eq!(mesh.run("late", &["curl", "-sS", "http://server:9080/"]).trim(), r#"{"stars":[5,4]}"#);
    mesh.down();
}

#[test]
fn a_sidecar_that_dies_leaks_nothing_and_comes_back() {
    if !able(&["tcpdump"]) {
        return;
    }
    let mesh = shop("die-sidecar", "mode: strict");
    let folder = tempfile::tempdir().unwrap();
    let capture = Capture::start(&mesh, "server", folder.path());
    let load = Load::start(&mesh, "client", 14, "?echo=canary-of-a-dying-sidecar");
    traffic_goes_on(&mesh);
    for sidecar in ["sidecars/server/admin.sock", "sidecars/client/admin.sock", "sidecars/server/admin.sock"] {
        dies_and_comes_back(&mesh, sidecar);
        traffic_goes_on(&mesh);
    }
    let report = load.report();
    // While a sidecar is away its app's connections fail; they never go around it.
    assert!(report["ok"].as_u64().unwrap() > 500, "{report}");
    let (bytes, leaked) = capture.stop("canary-of-a-dying-sidecar");
    assert!(bytes > 100_000 && !leaked, "{bytes} bytes captured, leaked: {leaked}");
    let after = Load::start(&mesh, "after", 2, "").report();
    assert_eq!(after["failed"], 0, "{after}");
    mesh.down();
}

#[test]
fn a_server_that_is_away_for_minutes_costs_nothing() {
    if !able(&[]) {
        return;
    }
    let away: u64 = std::env::var("COUNTERSIGN_AWAY_SECONDS").map_or(150, |s| s.parse().unwrap());
    let mesh = shop("away", "mode: strict\nsvid_ttl: 15m");
    let load = Load::start(&mesh, "client", away + 10, "");
    traffic_goes_on(&mesh);
    let server = mesh.process("countersign server");
    // Stopped, it accepts connections and answers nothing: worse than gone.
    signal(server, Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(away / 2));
    // Its agent dies meanwhile: the sidecars stay who they are.
    signal(mesh.process("countersign agent"), Signal::SIGKILL);
    std::thread::sleep(Duration::from_secs(away - away / 2));
    signal(server, Signal::SIGCONT);
    let report = load.report();
    assert_eq!(report["failed"], 0, "{report}");
    assert_eq!(mesh.run("late", &["curl", "-sS", "http://server:9080/"]).trim(), r#"{"stars":[5,4]}"#);
    mesh.down();
}

#[test]
fn a_full_disk_refuses_changes_and_signs_on() {
    if !able(&["mount"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("server");
    std::fs::create_dir(&data).unwrap();
    sh(&format!("mount -t tmpfs -o size=1m,mode=700 tmpfs {}", data.display()));
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
    let _unmount = Unmount(data.clone());
    let server = Server::start(dir.path(), &["--svid-ttl", "20s", "--agent-svid-ttl", "1h"]);
    let (agent, parent) = server.agent();
    server.json(&[
        "entry",
        "create",
        "--spiffe-id",
        &format!("spiffe://{TD}/me"),
        "--parent-id",
        &parent,
        "--selector",
        "unix:uid:0",
    ]);
    wait_for("the SVID", Duration::from_secs(10), || agent.log().contains("SVID ready").then_some(()));
    sh(&format!("dd if=/dev/zero of={}/filler bs=4k 2>/dev/null || true", data.display()));
    let create = |n: usize| {
        outcome(&mut server.operator(&[
            "entry",
            "create",
            "--spiffe-id",
            &format!("spiffe://{TD}/w{n}"),
            "--parent-id",
            &parent,
            "--selector",
            &format!("unix:uid:{n}"),
        ]))
    };
    let refused = wait_for("the disk to be full for SQLite too", Duration::from_secs(30), || {
        static N: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(1);
        let (code, said) = create(N.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        (code != 0).then_some(said)
    });
    assert!(refused.contains("the change was not made: the database refused") && refused.contains("full"), "{refused}");
    // Known entries are signed from memory.
    let before = server.audit().iter().filter(|l| l["kind"] == "x509_svid" && l["outcome"] == "signed").count();
    wait_for("a renewal on a full disk", Duration::from_secs(30), || {
        (server.audit().iter().filter(|l| l["kind"] == "x509_svid" && l["outcome"] == "signed").count() > before)
            .then_some(())
    });
    let known = server.json(&["entry", "show"]).as_array().unwrap().len();
    std::fs::remove_file(data.join("filler")).unwrap();
    assert_eq!(create(9999).0, 0, "with room again, changes are made again");
    // Nothing is half-written: what was refused is not there after a restart either.
    let mut server = server;
    server.kill();
    server.again();
    assert_eq!(server.json(&["entry", "show"]).as_array().unwrap().len(), known + 1);
}

#[test]
fn a_deleted_socket_is_bound_again() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let (agent, parent) = server.agent();
    server.json(&[
        "entry",
        "create",
        "--spiffe-id",
        &format!("spiffe://{TD}/me"),
        "--parent-id",
        &parent,
        "--selector",
        "unix:uid:0",
    ]);
    wait_for("the SVID", Duration::from_secs(10), || agent.log().contains("SVID ready").then_some(()));
    for socket in [server.agent_socket(), server.socket()] {
        std::fs::remove_file(&socket).unwrap();
        wait_for("the socket to be back", Duration::from_secs(5), || socket.exists().then_some(()));
    }
    let fetched = run(countersign(&["x509", "fetch", "--socket"]).arg(server.agent_socket()));
    assert!(fetched.contains("/me"), "{fetched}");
    assert_eq!(server.json(&["entry", "show"]).as_array().unwrap().len(), 1);
}

#[test]
fn an_agent_comes_back_without_a_new_token() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let (agent, parent) = server.agent();
    server.json(&[
        "entry",
        "create",
        "--spiffe-id",
        &format!("spiffe://{TD}/me"),
        "--parent-id",
        &parent,
        "--selector",
        "unix:uid:0",
    ]);
    agent.kill();
    let mut args = server.agent_args("used up");
    let flag = args.iter().position(|a| a == "--join-token-file").unwrap();
    args.drain(flag..flag + 2);
    let again = Role::start(dir.path(), "again", &args);
    wait_for("the SVID", Duration::from_secs(10), || again.log().contains("SVID ready").then_some(()));
    assert_eq!(server.json(&["node", "list"]).as_array().unwrap().len(), 1);
    let mode = sh(&format!("stat -c %a {0}/agent/agent-svid.pem {0}/server/keys/*.key", dir.path().display()));
    assert!(mode.lines().all(|m| m == "600"), "{mode}");
}

#[test]
fn an_agent_outlives_the_revocation_of_the_authority_above_it() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), &[]);
    let (agent, parent) = server.agent();
    let entry = |server: &Server, name: &str| {
        let id = format!("spiffe://{TD}/{name}");
        server.json(&["entry", "create", "--spiffe-id", &id, "--parent-id", &parent, "--selector", "unix:uid:0"]);
    };
    entry(&server, "before");
    wait_for("the SVID", Duration::from_secs(20), || agent.log().contains("SVID ready").then_some(()));
    let first = server.json(&["authority", "show"])["active"]["id"].as_str().unwrap().to_owned();
    server.json(&["authority", "prepare"]);
    server.json(&["authority", "activate"]);
    server.json(&["authority", "taint", "--id", &first]);
    wait_for("the agent to renew itself", Duration::from_secs(20), || {
        agent.log().contains("agent SVID renewed").then_some(())
    });
    server.json(&["authority", "revoke", "--id", &first]);
    // Every connection is new after this: an agent that still held its first SVID, an hour of it, would be locked out.
    server.again();
    entry(&server, "after");
    let fetch = || outcome(countersign(&["x509", "fetch", "--socket"]).arg(server.agent_socket())).1;
    wait_for("an entry made after the restart", Duration::from_secs(30), || fetch().contains("/after").then_some(()));
    assert!(!agent.log().contains("does not accept this agent's SVID"), "{}", agent.log());
    assert_eq!(server.json(&["node", "list"]).as_array().unwrap().len(), 1, "it is the same agent");
}

#[test]
fn a_stopped_client_does_not_keep_an_agent_from_ending() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let (agent, parent) = server.agent();
    let id = format!("spiffe://{TD}/me");
    server.json(&["entry", "create", "--spiffe-id", &id, "--parent-id", &parent, "--selector", "unix:uid:0"]);
    wait_for("the SVID", Duration::from_secs(20), || agent.log().contains("SVID ready").then_some(()));
    let out = dir.path().join("watched");
    let mut client = countersign(&["x509", "watch", "--socket"])
        .arg(server.agent_socket())
        .stdout(std::fs::File::create(&out).unwrap())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the client's SVID", Duration::from_secs(20), || {
        std::fs::read_to_string(&out).unwrap().contains("/me").then_some(())
    });
    let pid = client.id().try_into().unwrap();
    signal(pid, Signal::SIGSTOP);
    let agent_pid: i32 = agent.pid().try_into().unwrap();
    signal(agent_pid, Signal::SIGTERM);
    wait_for("the agent to end", Duration::from_secs(10), || {
        // Its parent has not waited for it: an ended process is a zombie.
        let stat = std::fs::read_to_string(format!("/proc/{agent_pid}/stat")).unwrap();
        stat.rsplit_once(')').unwrap().1.starts_with(" Z").then_some(())
    });
    assert!(!server.agent_socket().exists(), "the socket goes with it");
    signal(pid, Signal::SIGKILL);
    client.wait().unwrap();
}

#[test]
fn a_clock_that_is_off_by_thirty_seconds_is_named() {
    if !able(&["faketime"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let own = server.mint("/server", "server-id", &[]);
    let caller = server.mint("/caller", "caller-id", &[]);
    let file = |d: &Path, n: &str| d.join(n).display().to_string();
    // The called sidecar's clock is shifted; its own SVID is given time enough to be good under it.
    std::thread::sleep(Duration::from_secs(2));
    let call = |name: &str, shift: &str| {
        let fresh = server.mint("/caller", &format!("fresh-{name}"), &[]);
        let (inner, outer) = (free_port(), free_port());
        let echo = free_port();
        let listener = std::net::TcpListener::bind(("127.0.0.1", echo)).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = std::io::Write::write_all(&mut stream, b"hello");
            }
        });
        let shifted = Role::start_shifted(
            dir.path(),
            name,
            shift,
            &[
                "proxy",
                "--svid",
                &file(&own, "svid.pem"),
                "--key",
                &file(&own, "key.pem"),
                "--bundle",
                &format!("{TD}={}", file(&own, "bundle.pem")),
                "--inbound-listen",
                &format!("127.0.0.1:{inner}"),
                "--inbound-target",
                &format!("127.0.0.1:{echo}"),
            ]
            .map(str::to_owned),
        );
        let _caller = Role::start(
            dir.path(),
            &format!("caller-{name}"),
            &[
                "proxy",
                "--svid",
                &file(&fresh, "svid.pem"),
                "--key",
                &file(&fresh, "key.pem"),
                "--bundle",
                &format!("{TD}={}", file(&caller, "bundle.pem")),
                "--outbound-listen",
                &format!("127.0.0.1:{outer}"),
                "--outbound-target",
                &format!("127.0.0.1:{inner}"),
                "--outbound-expect",
                "spiffe://test.local/server",
            ]
            .map(str::to_owned),
        );
        let mut text = String::new();
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", outer)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let read = std::io::Read::read_to_string(&mut stream, &mut text);
        if read.is_err() {
            // A log has a writer of its own, which may come a moment later than the reset.
            wait_for("the refusal in the log", Duration::from_secs(10), || {
                shifted.log().contains("code=").then_some(())
            });
        }
        (read.map(|_| text), shifted.log())
    };
    assert_eq!(call("five-behind", "-5s").0.unwrap(), "hello", "ten seconds are tolerated");
    assert_eq!(call("thirty-ahead", "+30s").0.unwrap(), "hello");
    let (got, log) = call("thirty-behind", "-30s");
    assert!(got.is_err());
    assert!(
        log.contains("code=\"not_yet_valid\"")
            && log.contains("is not valid before")
            && log.contains("check both clocks"),
        "{log}"
    );
}

#[test]
fn a_revoked_authority_takes_its_connections_with_it() {
    if !able(&["python3"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    sh(&format!("chmod 755 {}", folder.path().display()));
    let script = folder.path().join("server.py");
    std::fs::write(&script, "import socket\ns = socket.create_server(('', 7000))\nkeep = []\nwhile True:\n c, _ = s.accept(); c.sendall(b'hello'); keep.append(c)\n").unwrap();
    let mesh = Mesh::up(
        "revoke",
        &format!("  - name: server\n    ports: [7000]\n    command: [/usr/bin/python3, {}]\n", script.display()),
    );
    mesh.wait_for_port("server", 7000);
    let client = "import socket,time\nc = socket.create_connection(('server', 7000)); assert c.recv(5) == b'hello'; print('connected', flush=True); t = time.time()\ntry: print('end', c.recv(1))\nexcept ConnectionResetError: print('reset', flush=True); time.sleep(10)";
    let mut child = mesh
        .join("client", &[], &["/usr/bin/python3", "-c", client])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    assert_eq!(line, "connected\n");
    let authority = |args: &[&str]| {
        let said = run(mesh.operator(&[&["authority"], args].concat()).args(["--output", "json"]));
        serde_json::from_str::<serde_json::Value>(&said).unwrap()
    };
    let first = authority(&["show"])["active"]["id"].as_str().unwrap().to_owned();
    authority(&["prepare"]);
    authority(&["activate"]);
    authority(&["taint", "--id", &first]);
    let second = authority(&["show"])["active"]["id"].as_str().unwrap().to_owned();
    wait_for("all to hold SVIDs of the new one", Duration::from_secs(20), || {
        let holds = |w: &&str| mesh.status(w)["identities"][0]["authority_id"] == second.as_str();
        ["server", "client"].iter().all(holds).then_some(())
    });
    assert!(child.try_wait().unwrap().is_none(), "so far the connection lives");
    authority(&["revoke", "--id", &first]);
    line.clear();
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    assert_eq!(line, "reset\n");
    // Whichever sidecar hears of it first cuts the connection; the other one sees a reset.
    let cuts = |w, reason| mesh.status(w)["refused"][reason].as_u64().unwrap_or(0);
    assert!(cuts("server", "inbound authority_revoked") + cuts("client", "outbound authority_revoked") >= 1);
    child.wait().unwrap();
    mesh.down();
}

#[test]
fn a_killed_up_leaves_no_process_and_the_next_one_tidies_up() {
    if !able(&[]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let name = format!("t-killed-{}", std::process::id());
    let file = folder.path().join("mesh.yaml");
    std::fs::write(&file, format!("name: {name}\nworkloads:\n  - name: a\n    command: [sleep, '1000']\n")).unwrap();
    let up = || {
        let out = folder.path().join("out");
        let child = countersign(&["up", "--plain"])
            .arg(&file)
            .stdout(std::fs::File::create(&out).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the mesh", Duration::from_secs(30), || {
            std::fs::read_to_string(&out).unwrap().contains(" is up; ").then_some(())
        });
        child
    };
    let (code, said) = {
        let mut first = up();
        let second = outcome(countersign(&["up", "--plain"]).arg(&file));
        first.kill().unwrap();
        first.wait().unwrap();
        second
    };
    assert_eq!(code, 2);
    assert!(
        said.contains(&format!(
            "a mesh `{name}` is already up on this machine; stop it with Ctrl-C, or give this one another `name`"
        )),
        "{said}"
    );
    let dir = format!("/run/countersign/up/{name}/");
    wait_for("its processes to die with it", Duration::from_secs(10), || {
        let alive = Command::new("pgrep").args(["-f", &dir]).output().unwrap();
        alive.stdout.is_empty().then_some(())
    });
    assert!(sh("ip netns list").contains(&name), "namespaces outlive a kill");
    let mut again = up();
    signal(again.id().try_into().unwrap(), Signal::SIGINT);
    assert!(again.wait().unwrap().success());
    assert!(!sh("ip netns list").contains(&name) && !Path::new(&dir).exists(), "everything is gone");
}
