//! The first minutes of a new user: a clone in root's own home, a program of their own in the mesh, and other tools that use
//! network namespaces on the same machine.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{COUNTERSIGN, Mesh, able, outcome, run, sh, wait_for};

/// A folder that only root may enter, as root's home on Debian, with the program in it.
struct Closed(tempfile::TempDir);

impl Closed {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o700)).unwrap();
        std::fs::create_dir(folder.path().join("clone")).unwrap();
        std::fs::copy(COUNTERSIGN, folder.path().join("clone/countersign")).unwrap();
        Self(folder)
    }

    fn clone_dir(&self) -> PathBuf {
        self.0.path().join("clone")
    }

    /// The program's copy, by its path, started in its folder.
    fn countersign(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.clone_dir().join("countersign"));
        command.args(args).current_dir(self.clone_dir());
        command
    }
}

/// `up` from a closed folder, killed when a test fails.
struct Up(Child);

impl Up {
    fn start(closed: &Closed, args: &[&str], said: &Path) -> Self {
        let out = std::fs::File::create(said).unwrap();
        let mut command = closed.countersign(&["up", "--plain"]);
        command.args(args).stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out);
        let mut up = Self(command.spawn().unwrap());
        wait_for("the mesh to come up", Duration::from_secs(60), || {
            let text = std::fs::read_to_string(said).unwrap();
            if let Some(status) = up.0.try_wait().unwrap() {
                panic!("up ended with {status}: {text}");
            }
            text.contains(" is up; logs in ").then_some(())
        });
        up
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().try_into().unwrap()), signal).unwrap();
    }

    fn ended(&mut self) -> i32 {
        wait_for("up to end", Duration::from_secs(60), || self.0.try_wait().unwrap()).code().unwrap_or(-1)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        if self.0.try_wait().unwrap().is_none() {
            self.signal(Signal::SIGTERM);
            let _ = self.0.wait();
        }
    }
}

fn namespaces(mesh: &str) -> String {
    let own = format!("cs-{mesh}");
    sh("ls /run/netns 2>/dev/null || true").lines().filter(|n| n.starts_with(&own)).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_clone_in_roots_own_home_runs_the_shop_and_programs_of_ones_own() {
    if !able(&["curl"]) {
        return;
    }
    let closed = Closed::new();
    let said = closed.0.path().join("said");
    let mut up = Up::start(&closed, &[], &said);
    let mut me = closed.countersign(&["run", "--mesh", "shop", "--name", "me", "--"]);
    let page = run(me.args(["curl", "-sS", "--retry", "20", "--retry-all-errors", "http://productpage:9080/"]));
    assert!(page.contains("The Comedy of Errors") && page.contains("stars"), "{page}");
    // Its own copy as the program of a workload, by a relative path.
    let url = "http://details:9080/";
    let mut probe =
        closed.countersign(&["run", "--mesh", "shop", "--name", "probe", "--", "./countersign", "probe", url]);
    let report = run(probe.args(["--seconds", "1", "--kept", "1", "--fresh", "1", "--pause-ms", "50"]));
    assert!(report.contains("\"failed\":0") || report.contains("\"failed\": 0"), "{report}");
    up.signal(Signal::SIGTERM);
    assert_eq!(up.ended(), 0, "{}", std::fs::read_to_string(&said).unwrap());
    assert_eq!(namespaces("shop"), "");
}

#[test]
fn a_program_below_a_closed_folder_is_named_with_the_folder_and_the_user() {
    if !able(&[]) {
        return;
    }
    let closed = Closed::new();
    let program = closed.clone_dir().join("serve");
    std::fs::write(&program, "#!/bin/sh\nsleep 60\n").unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let name = format!("t-closed-{}", std::process::id());
    std::fs::write(
        closed.clone_dir().join("mesh.yaml"),
        format!("name: {name}\nworkloads:\n  - {{name: web, command: [./serve]}}\n"),
    )
    .unwrap();
    let (code, said) = outcome(&mut closed.countersign(&["up", "--plain", "mesh.yaml"]));
    assert_eq!(code, 1, "{said}");
    let folder = closed.0.path().display().to_string();
    let last = said.lines().last().unwrap();
    assert!(last.contains("/serve`") && last.contains(&format!("may not enter {folder};")), "{said}");
    assert!(last.contains("uid 2"), "the user is named: {said}");
    assert_eq!(namespaces(&name), "");
}

#[test]
fn a_workload_finds_out_who_it_is() {
    if !able(&["whoami", "git", "ssh-keygen"]) {
        return;
    }
    let mesh = Mesh::up("who", "  - {name: idle, command: [sleep, \"600\"]}\n");
    assert_eq!(mesh.run("me", &["whoami"]).trim(), "me");
    let home = mesh.run("me", &["sh", "-c", "cd && pwd && id -gn && test -w . && stat -c %a ."]);
    assert_eq!(home.trim(), format!("{}/homes/me\nme\n700", mesh.dir().display()));
    mesh.run(
        "me",
        &["sh", "-c", "cd && git init -q r && cd r && git -c user.email=me@mesh commit -q --allow-empty -m first && git log --oneline"],
    );
    mesh.run("me", &["sh", "-c", "ssh-keygen -q -t ed25519 -N '' -f ~/.key"]);
    // Nothing of root's environment but what is harmless or named.
    let env = run(mesh
        .join("me", &["--env", "NAMED", "--env", "SET=by flag"], &["env"])
        .env("SECRET_OF_ROOT", "x")
        .env("NAMED", "handed on")
        .env("TERM", "vt100"));
    assert!(!env.contains("SECRET_OF_ROOT") && !env.contains("HOME=/root"), "{env}");
    for line in ["NAMED=handed on", "SET=by flag", "TERM=vt100", "USER=me", "LOGNAME=me"] {
        assert!(env.lines().any(|l| l == line), "{line} is not in {env}");
    }
    let root = run(mesh.join("me", &["--user", "root"], &["sh", "-c", "whoami; echo $HOME"]).env("HOME", "/root"));
    assert_eq!(root.trim(), "root\n/root");
    mesh.down();
}

#[test]
fn a_program_in_the_mesh_uses_the_workload_api_and_nobody_else_gets_its_identity() {
    if !able(&[]) {
        return;
    }
    let mesh = Mesh::up("api", "  - {name: idle, command: [sleep, \"600\"]}\n");
    let socket = mesh.dir().join("agent/agent.sock").display().to_string();
    let told = mesh.run("me", &["sh", "-c", "echo $SPIFFE_ENDPOINT_SOCKET"]);
    assert_eq!(told.trim(), format!("unix://{socket}"));
    // The sidecar's identity is the program's own.
    let fetched = mesh.run("me", &[COUNTERSIGN, "x509", "fetch", "--socket", &socket]);
    assert!(fetched.contains("/ns/default/sa/me"), "{fetched}");
    // A user that others may have gets none.
    let fetch = [COUNTERSIGN, "x509", "fetch", "--socket", &socket];
    let (code, said) = outcome(&mut mesh.join("other", &["--user", "nobody"], &fetch));
    assert!(code != 0 && !said.contains("sa/other\n"), "{said}");
    mesh.down();
}

#[test]
fn run_takes_only_what_a_mesh_file_may_say() {
    if !able(&[]) {
        return;
    }
    let mesh = Mesh::up("rules", "  - {name: idle, command: [sleep, \"600\"]}\n");
    let sidecar = sh(&format!("stat -c %u {}/sidecars/idle/admin.sock", mesh.dir().display())).trim().to_owned();
    let program = sh(&format!("stat -c %u {}/homes/idle", mesh.dir().display())).trim().to_owned();
    let server = sh(&format!("stat -c %u {}/server/server.sock", mesh.dir().display())).trim().to_owned();
    for (flags, expected) in [
        (["--user", &sidecar], "is kept for sidecars"),
        (["--user", &program], "is kept for workloads that name no user"),
        (["--user", &server], "is kept for sidecars"),
        (["--port", "0"], "--port"),
        (["--port", "15001"], "port 15001 is the sidecar's own"),
        (["--namespace", "a/b"], "is not one segment of a SPIFFE ID"),
        (["--mode", "stric"], "--mode: `stric` is not a mode: use off, permissive or strict"),
        (["--allow", "idel"], "--allow: `idel` is not a SPIFFE ID: scheme is missing or invalid, nor is it a workload"),
        (["--allow", "idel"], "did you mean `idle`?"),
        (["--service-account", "a/b"], "is not one segment of a SPIFFE ID"),
    ] {
        let (code, said) = outcome(&mut mesh.join("me", &flags, &["true"]));
        assert!(code == 2 && said.contains(expected), "{flags:?}: {code} {said}");
    }
    // A sidecar that somebody started by hand, under a number of their own.
    let mut by_hand = Command::new("setpriv")
        .args(["--reuid", "3210", "--clear-groups", COUNTERSIGN, "proxy", "--agent-socket", "/nowhere/agent.sock"])
        .args(["--outbound-port", "29101", "--inbound-port", "29106", "--mesh-port", "29108"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let refused = wait_for("the sidecar to be seen", Duration::from_secs(10), || {
        let (code, said) = outcome(&mut mesh.join("me", &["--user", "3210"], &["true"]));
        (code == 2).then_some(said)
    });
    let _ = by_hand.kill();
    by_hand.wait().unwrap();
    assert!(refused.contains("uid 3210 is that of a sidecar on this machine"), "{refused}");
    mesh.down();
}

#[test]
fn two_meshes_share_no_user() {
    if !able(&[]) {
        return;
    }
    let one = Mesh::up("users-a", "  - {name: idle, command: [sleep, \"600\"]}\n");
    let two = Mesh::up("users-b", "  - {name: idle, command: [sleep, \"600\"]}\n");
    let users = |mesh: &Mesh| {
        let dir = mesh.dir().display().to_string();
        sh(&format!("stat -c %u {dir}/sidecars/idle/admin.sock {dir}/homes/idle {dir}/server/server.sock"))
    };
    let (a, b) = (users(&one), users(&two));
    assert!(a.lines().all(|uid| b.lines().all(|other| uid != other)), "{a} and {b}");
    // The second mesh's program asks the first one's agent, whose socket it may open.
    let socket = one.dir().join("agent/agent.sock").display().to_string();
    let (code, said) = outcome(&mut two.join("spy", &[], &[COUNTERSIGN, "x509", "fetch", "--socket", &socket]));
    assert!(code != 0, "{said}");
    one.down();
    two.down();
}

#[test]
fn other_tools_make_namespaces_while_a_mesh_is_up_and_nothing_is_left() {
    if !able(&["ip", "unshare"]) {
        return;
    }
    // A machine on which nobody has made a namespace yet: a mount namespace with a /run/netns of its own.
    let name = format!("t-netns-{}", std::process::id());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mesh.yaml");
    std::fs::write(&file, format!("name: {name}\nworkloads:\n  - {{name: idle, command: [sleep, \"600\"]}}\n"))
        .unwrap();
    let script = format!(
        r#"set -e
mount --make-rprivate /
mkdir -p /run/netns; while umount /run/netns 2>/dev/null; do :; done
mount -t tmpfs none /run; mkdir /run/netns
for round in 1 2; do
  {COUNTERSIGN} up --plain {file} > /run/said 2>&1 & up=$!
  i=0; until grep -q ' is up; logs in ' /run/said; do i=$((i+1)); [ $i -lt 600 ] || {{ cat /run/said; exit 3; }}; sleep 0.1; done
  ip netns add other-$round
  ip netns exec cs-{name}-idle true
  kill -TERM $up; code=0; wait $up || code=$?
  cat /run/said
  [ $code = 0 ] || {{ echo "up ended with $code"; exit 4; }}
  ! ls /run/netns | grep ^cs-{name} || exit 5
  ! grep 'netns/cs-{name}' /proc/self/mounts || exit 6
done
ls /run/netns
"#,
        file = file.display()
    );
    let said = run(Command::new("unshare").args(["-m", "sh", "-c", &script]));
    assert!(said.contains("other-1") && said.contains("other-2") && !said.contains("cannot remove"), "{said}");
}

#[test]
fn two_signals_at_once_leave_nothing() {
    if !able(&[]) {
        return;
    }
    let mut mesh =
        Mesh::up("twice", "  - {name: deaf, command: [sh, -c, \"trap '' TERM; while :; do sleep 1; done\"]}\n");
    let pid = Pid::from_raw(mesh.pid());
    kill(pid, Signal::SIGINT).unwrap();
    wait_for("the first to be taken", Duration::from_secs(10), || {
        mesh.said().contains("taking the mesh down").then_some(())
    });
    let began = Instant::now();
    kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(mesh.ended(), 130, "{}", mesh.said());
    assert!(began.elapsed() < Duration::from_secs(4), "it waited for a program that does not end");
    assert!(!mesh.dir().exists());
    assert_eq!(namespaces(&mesh.name), "");
}

#[test]
fn run_says_what_was_refused_and_why() {
    if !able(&["curl"]) {
        return;
    }
    let mesh = Mesh::up(
        "told",
        &format!(
            "  - {{name: web, ports: [9080], allow: [spiffe://x.local/y], command: [{COUNTERSIGN}, shop, ratings]}}\n"
        ),
    );
    mesh.wait_for_port("web", 9080);
    let (code, said) = outcome(&mut mesh.join("me", &[], &["curl", "-sS", "http://web:9080/"]));
    assert_ne!(code, 0);
    let told =
        said.lines().find(|l| l.starts_with("countersign: a connection to web (")).unwrap_or_else(|| panic!("{said}"));
    assert!(told.contains("not_allowed"), "{told}");
    mesh.down();
}

#[test]
fn a_mesh_comes_back_after_an_outage_longer_than_its_svids_live() {
    if !able(&["curl"]) {
        return;
    }
    let mesh = Mesh::up_with(
        "outage",
        "mode: strict\nsvid_ttl: 20s",
        &format!("  - {{name: web, ports: [9080], command: [{COUNTERSIGN}, shop, ratings]}}\n"),
    );
    mesh.wait_for_port("web", 9080);
    let server = Pid::from_raw(mesh.process("countersign server"));
    kill(server, Signal::SIGSTOP).unwrap();
    std::thread::sleep(Duration::from_secs(32));
    kill(server, Signal::SIGCONT).unwrap();
    wait_for("traffic to flow again", Duration::from_secs(60), || {
        let (code, said) = outcome(&mut mesh.join("late", &[], &["curl", "-sS", "-m", "5", "http://web:9080/"]));
        (code == 0 && said.contains("stars")).then_some(())
    });
    mesh.down();
}
