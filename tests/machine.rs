//! A mesh on one machine from another terminal: `ps`, `logs`, `status NAME`, `down`, what restarts and what does not, and the
//! live table in a terminal.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{COUNTERSIGN, Ended, Mesh, able, countersign, outcome, run, sh, wait_for};

fn ps(mesh: &Mesh) -> serde_json::Value {
    serde_json::from_str(&run(&mut countersign(&["ps", "--mesh", &mesh.name, "--output", "json"]))).unwrap()
}

/// The row of a workload in `ps`; null if there is none of this name.
fn row(mesh: &Mesh, workload: &str) -> serde_json::Value {
    let all = ps(mesh);
    let rows = all[0]["workloads"].as_array().unwrap_or_else(|| panic!("no workloads: {all}"));
    rows.iter().find(|r| r["name"] == workload).cloned().unwrap_or_default()
}

#[test]
fn a_mesh_is_listed_read_asked_and_taken_down_from_another_terminal() {
    if !able(&["ip"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    sh(&format!("chmod 755 {}", folder.path().display()));
    let at = folder.path().display().to_string();
    let mut mesh = Mesh::up(
        "machine",
        &format!(
            "  - name: steady\n    command: [sh, -c, 'pwd; exec sleep infinity']\n    workdir: {at}\n\
             \x20 - name: crasher\n    command: [sh, -c, 'echo last words; sleep 0.3; exit 3']\n    restart: on-failure\n\
             \x20 - name: once\n    command: [sh, -c, 'exit 7']\n\
             \x20 - name: content\n    command: ['true']\n    restart: on-failure\n\
             \x20 - name: always\n    command: ['true']\n    restart: always\n"
        ),
    );
    let name = mesh.name.clone();
    let on = |args: &[&str]| countersign(&[args, &["--mesh", &name]].concat());

    // What restarts and what does not, with code and time.
    wait_for("restarts", Duration::from_secs(20), || {
        let often = |w: &str| row(&mesh, w)["restarts"].as_u64().unwrap() >= 2;
        (often("crasher") && often("always")).then_some(())
    });
    assert!(
        row(&mesh, "once")["state"].as_str().unwrap().starts_with("ended with code 7 at "),
        "{}",
        row(&mesh, "once")
    );
    assert_eq!(
        (row(&mesh, "once")["restarts"].as_u64(), row(&mesh, "content")["restarts"].as_u64()),
        (Some(0), Some(0))
    );
    assert!(row(&mesh, "content")["state"].as_str().unwrap().starts_with("ended with code 0 at "));
    let table = run(&mut on(&["ps"]));
    assert!(table.starts_with("MESH") && table.contains("(agent)") && table.contains("RESTARTS"), "{table}");
    assert!(!table.lines().nth(1).unwrap().contains("steady"), "what is wrong comes first: {table}");

    // Logs, and what happened.
    assert_eq!(run(&mut on(&["logs", "steady"])).trim(), at, "its working directory");
    let events = run(&mut on(&["logs", "events"]));
    assert!(events.contains("crasher: ended with code 3 after 0s; starting it again in "), "{events}");
    assert!(events.contains("its log ends: last words") && events.contains("once: ended with code 7"), "{events}");
    assert!(run(&mut on(&["logs", "server", "-n", "5"])).lines().count() <= 5);
    let (code, said) = outcome(&mut on(&["logs", "staedy"]));
    assert_eq!((code, said.contains("has no workload `staedy`; did you mean `steady`?")), (2, true), "{said}");
    let (code, said) = outcome(countersign(&["ps", "--mesh"]).arg(format!("{name}x")));
    assert_eq!((code, said.contains(&format!("did you mean `{name}`?"))), (2, true), "{said}");

    // Status by name.
    assert!(run(&mut on(&["status", "steady"])).contains("sa/steady"));
    assert!(run(&mut on(&["status", "server"])).contains("server"));
    let everything = ps(&mesh);
    let only = serde_json::from_str::<serde_json::Value>(&run(&mut countersign(&["ps", "-o", "json"]))).unwrap();
    let (code, said) = outcome(countersign(&["entry", "show"]).env_remove("COUNTERSIGN_SERVER_SOCKET"));
    if only.as_array().unwrap().len() == 1 {
        assert!(code == 0 && said.contains("sa/steady"), "the only mesh's server: {said}");
    }
    assert_eq!(everything[0]["mesh"], name.as_str());

    // A frozen sidecar holds nobody up.
    let frozen = Pid::from_raw(mesh.process("sidecars/steady"));
    kill(frozen, Signal::SIGSTOP).unwrap();
    let before = Instant::now();
    assert!(row(&mesh, "steady")["state"].as_str().unwrap().starts_with("no answer for "), "{}", row(&mesh, "steady"));
    assert!(before.elapsed() < Duration::from_secs(8), "{:?}", before.elapsed());
    kill(frozen, Signal::SIGCONT).unwrap();

    // A stopped server is seen as such, and who asks it is told so and where it is.
    let stopped = Pid::from_raw(mesh.process("countersign server"));
    kill(stopped, Signal::SIGSTOP).unwrap();
    let (code, said) = outcome(&mut mesh.operator(&["authority", "show"]));
    let state = ps(&mesh)[0]["roles"][0]["state"].clone();
    kill(stopped, Signal::SIGCONT).unwrap();
    let expected = format!("the server at {}/server/server.sock does not answer, for 9 s", mesh.dir().display());
    assert_eq!((code, said.contains(&expected)), (1, true), "{said}");
    assert_eq!(state, "no answer for 2 s");

    // Down: one way, and the programs that failed are told.
    run(&mut countersign(&["down", &name]));
    assert_eq!(mesh.exit_code(), 1, "{}", mesh.said());
    assert!(mesh.said().contains("once ended with code 7 at "), "{}", mesh.said());
    mesh.down();
}

#[test]
fn a_mesh_whose_name_begins_like_anothers_leaves_the_other_alone() {
    if !able(&["ip"]) {
        return;
    }
    let workload = |name: &str| format!("  - {{name: {name}, command: [sleep, infinity]}}\n");
    let mut short = Mesh::up("alike", &workload("web"));
    let name = short.name.clone();
    let long = Mesh::up_named(format!("{name}-eu"), "mode: strict", &workload("web"));
    let own = |mesh: &str| {
        let names = sh("ls /run/netns");
        names.lines().filter(|n| *n == format!("cs-{mesh}") || *n == format!("cs-{mesh}-web")).count()
    };
    let (program, sidecar) = (row(&long, "web"), long.process("sidecars/web"));
    let is_whole = || {
        assert_eq!(own(&long.name), 2, "{}", sh("ls /run/netns"));
        assert_eq!(row(&long, "web")["state"], "running");
        assert_eq!((long.process("sidecars/web"), &row(&long, "web")["restarts"]), (sidecar, &program["restarts"]));
    };

    // One name that two meshes could mean stays with the mesh that has it.
    let (code, said) = outcome(&mut short.join("eu", &[], &["true"]));
    let owner = format!("would be cs-{name}-eu, which belongs to the mesh `{name}-eu`");
    assert!(code == 1 && said.contains(&owner), "{code} {said}");
    is_whole();

    // Killed, and tidied by the next of its name.
    kill(Pid::from_raw(short.pid()), Signal::SIGKILL).unwrap();
    short.exit_code();
    assert_eq!(own(&name), 2, "a killed mesh leaves its namespaces");
    drop(short);
    let mut short = Mesh::up_named(name.clone(), "mode: strict", &workload("web"));
    is_whole();

    // Taken down in order: it neither takes the other's namespaces along nor complains of them.
    run(&mut countersign(&["down", &name]));
    assert_eq!((short.exit_code(), own(&name)), (0, 0), "{}", short.said());
    assert!(!short.said().contains("could not remove"), "{}", short.said());
    is_whole();
    let lists = sh("ls /run/countersign/up");
    assert!(!lists.lines().any(|f| f == format!("{name}.namespaces")), "{lists}");
    drop(short);
    long.down();
}

#[test]
fn a_workload_leaves_neither_its_identity_nor_its_processes_to_the_next() {
    if !able(&["ip", "setsid", "unshare"]) {
        return;
    }
    let mesh = Mesh::up("heirs", "  - {name: idle, command: [sleep, infinity]}\n");
    let patience = Duration::from_secs(30);
    let registered = |workload: &str| run(&mut mesh.operator(&["entry", "show"])).contains(&format!("sa/{workload} "));
    let has_namespace =
        |workload: &str| sh("ls /run/netns").lines().any(|n| n == format!("cs-{}-{workload}", mesh.name));
    let runs = |pid: &str| std::path::Path::new("/proc").join(pid).join("exe").exists();

    // A process that went into namespaces of its own ends with its workload, and does so before its user is given on.
    let script = "setsid unshare -Urn sleep 7777 >/dev/null 2>&1 & \
                  until [ \"$(cat /proc/$!/comm)\" = sleep ]; do sleep 0.05; done; echo $! $(id -u)";
    let said = mesh.run("a", &["sh", "-c", script]);
    let (pid, user) = said.trim().split_once(' ').unwrap();
    wait_for("the process that went away to be ended", patience, || (!runs(pid)).then_some(()));
    assert_ne!(mesh.run("b", &["id", "-u"]).trim(), user, "a number comes again late");
    wait_for("both to be gone", patience, || (!registered("a") && !registered("b")).then_some(()));

    // The server cannot be reached in the moment when a workload ends, and when the next one starts.
    let mut c = mesh.join("c", &[], &["sleep", "infinity"]);
    let mut c = Ended(c.stdin(std::process::Stdio::null()).spawn().unwrap());
    wait_for("c to run", patience, || (row(&mesh, "c")["state"] == "joined").then_some(()));
    let server = Pid::from_raw(mesh.process("countersign server"));
    kill(server, Signal::SIGSTOP).unwrap();
    c.0.kill().unwrap();
    wait_for("c to leave", patience, || (!has_namespace("c")).then_some(()));
    let (code, said) = outcome(&mut mesh.join("d", &[], &["true"]));
    assert!(code == 1 && said.contains("cannot register d"), "{code} {said}");
    wait_for("d to be gone", patience, || (!has_namespace("d")).then_some(()));
    kill(server, Signal::SIGCONT).unwrap();
    mesh.run("d", &["true"]);
    wait_for("the entries of both to be deleted", patience, || (!registered("c") && !registered("d")).then_some(()));

    // A client that goes away before its sidecar has an identity leaves at once too.
    let agent = Pid::from_raw(mesh.process("countersign agent"));
    kill(agent, Signal::SIGSTOP).unwrap();
    let mut joining = mesh.join("f", &[], &["true"]);
    let mut joining = Ended(joining.stdin(std::process::Stdio::null()).spawn().unwrap());
    wait_for("f to be joining", patience, || (row(&mesh, "f")["state"] == "joining").then_some(()));
    joining.0.kill().unwrap();
    wait_for("f to leave", Duration::from_secs(15), || (!has_namespace("f") && !registered("f")).then_some(()));
    kill(agent, Signal::SIGCONT).unwrap();

    // A start that fails after the sidecar has come up leaves neither entries nor the sidecar.
    let home = mesh.dir().join("homes/e");
    std::fs::write(&home, "no folder").unwrap();
    let (code, said) = outcome(&mut mesh.join("e", &[], &["true"]));
    assert!(code == 1 && said.contains("homes/e"), "{code} {said}");
    assert!(!registered("e") && !has_namespace("e"));
    let sidecar = format!("{}/sidecars/e/", mesh.dir().display());
    let lines = sh("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' || true");
    assert!(!lines.contains(&sidecar), "a sidecar without a workload runs on");
    std::fs::remove_file(&home).unwrap();
    mesh.run("e", &["true"]);
    mesh.down();
}

#[test]
fn what_a_killed_program_left_ends_before_it_starts_again_and_nothing_else_does() {
    if !able(&["ip", "setsid"]) {
        return;
    }
    // A child in the program's process group, and one that went away from it and does not listen to SIGTERM.
    let script = r#"sleep 8888 & a=$!; (trap "" TERM; exec setsid sleep 8888) & echo $$ $a $!; wait; exit 1"#;
    let workload = |name: &str, user: &str| {
        format!("  - {{name: {name}{user}, restart: on-failure, command: [sh, -c, '{script}']}}\n")
    };
    let mesh = Mesh::up("orphans", &(workload("own", "") + &workload("roots", ", user: root")));
    let started = |name: &str| -> Vec<Vec<i32>> {
        let log = run(&mut countersign(&["logs", name, "--mesh", &mesh.name]));
        let words = |line: &str| line.split(' ').map(|pid| pid.parse().unwrap()).collect();
        log.lines().map(words).collect()
    };
    let runs = |pid: i32| std::path::Path::new(&format!("/proc/{pid}/exe")).exists();
    // What an operator runs in a workload's namespace is not the workload's.
    let namespace = format!("cs-{}-roots", mesh.name);
    let mut guest = std::process::Command::new("ip");
    let guest = Ended(guest.args(["netns", "exec", &namespace, "sleep", "8889"]).spawn().unwrap());
    let others = [mesh.process("sidecars/own"), mesh.process("sidecars/roots"), i32::try_from(guest.0.id()).unwrap()];
    let patience = Duration::from_secs(20);
    for name in ["own", "roots"] {
        let first = wait_for("the first start", patience, || started(name).first().cloned());
        wait_for("its children", patience, || first.iter().all(|pid| runs(*pid)).then_some(()));
        kill(Pid::from_raw(first[0]), Signal::SIGKILL).unwrap();
        let second = wait_for("the second start", patience, || started(name).get(1).cloned());
        assert!(!first.iter().any(|pid| runs(*pid)), "{name}: {first:?} goes on beside {second:?}");
    }
    let own = started("own");
    assert_eq!(own.len(), 2, "the other workload's end has ended nothing here");
    assert!(own[1].iter().chain(&others).all(|pid| runs(*pid)), "{own:?} {others:?}");
    let events = run(&mut countersign(&["logs", "events", "--mesh", &mesh.name]));
    assert!(events.contains("own: 2 processes that it left were ended"), "{events}");
    drop(guest);

    // Nothing is written to this log any more: whoever follows it ends with its reader all the same.
    let mut follower = countersign(&["logs", "-f", "own", "--mesh", &mesh.name]);
    let mut follower = Ended(follower.stdout(std::process::Stdio::piped()).spawn().unwrap());
    let mut first = [0; 1];
    std::io::Read::read_exact(&mut follower.0.stdout.take().unwrap(), &mut first).unwrap();
    wait_for("logs -f to end", patience, || follower.0.try_wait().unwrap());
    mesh.down();
}

#[test]
fn an_up_that_cannot_listen_for_run_leaves_nothing() {
    if !able(&["ip"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let name = format!("t-deaf-{}", std::process::id());
    let file = folder.path().join("mesh.yaml");
    std::fs::write(&file, format!("name: {name}\nworkloads:\n  - {{name: idle, command: [sleep, infinity]}}\n"))
        .unwrap();
    let dir = std::path::Path::new("/run/countersign/up").join(&name);
    let mut up = countersign(&["up", "--plain"]);
    let mut up =
        Ended(up.arg(&file).stdin(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap());
    let socket = dir.join("up.sock");
    wait_for("the mesh's folder", Duration::from_secs(20), || std::fs::write(&socket, "no socket").ok());
    let status = wait_for("up to end", Duration::from_secs(60), || up.0.try_wait().unwrap());
    let mut said = String::new();
    std::io::Read::read_to_string(&mut up.0.stderr.take().unwrap(), &mut said).unwrap();
    assert!(status.code() == Some(1) && said.contains("cannot listen on"), "{status} {said}");
    assert!(!dir.exists() && !sh("ls /run/netns").contains(&name), "{}", sh("ls /run/netns /run/countersign/up"));
}

/// Runs `up` in a terminal of this size, with keys after the mesh is up; what the terminal got.
fn in_a_terminal(term: &str, size: (u16, u16), keys: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let workloads: String =
        (0..12).map(|n| format!("  - name: w{n:02}\n    command: [sleep, infinity]\n    workdir: /\n")).collect();
    let name = format!("t-pty-{}-{}", std::process::id(), term);
    std::fs::write(folder.path().join("mesh.yaml"), format!("name: {name}\nworkloads:\n{workloads}")).unwrap();
    let script = format!(
        r#"
import fcntl, os, pty, select, struct, sys, termios, time
pid, fd = pty.fork()
if pid == 0:
    os.environ["TERM"] = "{term}"
    time.sleep(0.2)
    os.execv("{COUNTERSIGN}", ["countersign", "up", "{file}"])
fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", {rows}, {columns}, 0, 0))
got, keys, deadline, quiet = b"", bytes({keys:?}), time.time() + 120, None
while time.time() < deadline:
    if select.select([fd], [], [], 0.5)[0]:
        try:
            got += os.read(fd, 65536)
        except OSError:
            break
    shown = b"q takes the mesh down" in got or b"Ctrl-C takes it down" in got
    if shown and quiet is None:
        quiet = time.time() + 3
    if quiet and time.time() > quiet and keys:
        os.write(fd, keys[:1]); keys = keys[1:]; quiet = time.time() + 1
os.write(1, got)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"#,
        file = folder.path().join("mesh.yaml").display(),
        rows = size.1,
        columns = size.0,
        keys = keys.as_bytes(),
    );
    std::fs::write(folder.path().join("terminal.py"), script).unwrap();
    run(std::process::Command::new("python3").arg(folder.path().join("terminal.py")))
}

#[test]
fn the_live_table_fits_its_window_scrolls_and_goes_at_a_key() {
    if !able(&["python3", "ip"]) {
        return;
    }
    let got = in_a_terminal("xterm", (60, 12), "Gq");
    let (_, table) = got.split_once("\x1b[?1049h").expect("another screen");
    let (table, after) = table.split_once("\x1b[?1049l").expect("and back");
    assert!(
        table.contains("12 workloads: 12 running") && table.contains("w00") && table.contains("WORKLOAD"),
        "{table:?}"
    );
    assert!(table.contains("w11") && table.contains("of 12"), "G shows the last: {table:?}");
    assert!(!table.contains('\n'), "every line is put at its place, so that none can scroll the screen: {table:?}");
    let lowest = table.split("\x1b[").filter_map(|s| s.split_once('H')?.0.split(';').next()?.parse::<u16>().ok()).max();
    assert_eq!(lowest, Some(12), "no line below the window");
    assert!(after.contains("taking the mesh down"), "{after:?}");

    let got = in_a_terminal("dumb", (60, 12), "\u{3}");
    assert!(got.contains("is up; logs in ") && !got.contains('\x1b'), "plain lines alone: {got:?}");
}
