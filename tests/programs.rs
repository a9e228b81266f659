//! Unmodified programs in a strict mesh, each with a check that the bytes are right.

use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{COUNTERSIGN, Mesh, able, path_of, random_file, run, sh, sha256, wait_for};

/// A workload of a mesh file.
fn workload(name: &str, user: &str, port: u16, command: &[&str]) -> String {
    let command = serde_json::to_string(command).unwrap();
    format!("  - name: {name}\n    user: {user}\n    ports: [{port}]\n    command: {command}\n")
}

fn nginx_config(folder: &std::path::Path) -> String {
    let at = folder.display();
    let config = format!(
        "user root;\nworker_processes 1;\npid {at}/nginx.pid;\nerror_log {at}/nginx.err;\nevents {{ worker_connections 4096; }}\n\
         http {{ access_log off; client_body_temp_path {at}; server {{ listen 8080; listen [::]:8080; root {at}/www; }} }}\n"
    );
    std::fs::create_dir_all(folder.join("www")).unwrap();
    let path = folder.join("nginx.conf");
    std::fs::write(&path, config).unwrap();
    path.display().to_string()
}

#[test]
fn nginx_serves_curl_and_wrk_over_ipv4_and_ipv6() {
    if !able(&["nginx", "curl", "wrk"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = nginx_config(folder.path());
    let sum = random_file(&folder.path().join("www/file"), 32);
    std::fs::write(folder.path().join("www/small"), "small").unwrap();
    let mesh =
        Mesh::up("nginx", &workload("web", "root", 8080, &[&path_of("nginx"), "-c", &config, "-g", "daemon off;"]));
    mesh.wait_for_port("web", 8080);
    for (name, version) in [("four", "-4"), ("six", "-6")] {
        let got = folder.path().join(name);
        mesh.shell(name, &format!("curl -sS {version} -o {} http://web:8080/file", got.display()));
        assert_eq!(sha256(&got), sum, "{version}");
    }
    let wrk = mesh.run("load", &["wrk", "-t2", "-c64", "-d3s", "http://web:8080/small"]);
    assert!(!wrk.contains("Socket errors") && !wrk.contains("Non-2xx"), "{wrk}");
    let close = mesh.run("churn", &["wrk", "-t2", "-c16", "-d2s", "-H", "Connection: close", "http://web:8080/small"]);
    assert!(!close.contains("Socket errors") && !close.contains("Non-2xx"), "{close}");
    let log = mesh.access_log("web");
    assert!(
        log.len() > 80 && log.iter().all(|l| l["mode"] == "mtls" && l["tls"] == "TLSv1.3 X25519MLKEM768"),
        "all of it came over mTLS"
    );
    assert!(
        log.iter()
            .any(|l| l["source_id"].as_str().unwrap().ends_with("/sa/six") && l["destination"] == "[fd86::a]:8080")
    );
    mesh.down();
}

#[test]
fn redis_keeps_a_megabyte_and_its_benchmark_runs() {
    if !able(&["redis-server", "redis-cli", "redis-benchmark"]) {
        return;
    }
    let server =
        [&path_of("redis-server"), "--port", "6379", "--bind", "0.0.0.0", "::", "--save", "", "--protected-mode", "no"];
    let mesh = Mesh::up("redis", &workload("redis", "nobody", 6379, &server));
    mesh.wait_for_port("redis", 6379);
    let folder = mesh.folder().display().to_string();
    let sum = random_file(&mesh.folder().join("value"), 1);
    mesh.shell("writer", &format!("redis-cli -h redis -x set big < {folder}/value"));
    mesh.shell("reader", &format!("redis-cli -h redis --raw get big | head -c 1048576 > {folder}/back"));
    assert_eq!(sha256(&mesh.folder().join("back")), sum);
    let benchmark =
        mesh.run("bench", &["redis-benchmark", "-h", "redis", "-q", "-n", "20000", "-c", "50", "-t", "set,get,lpush"]);
    assert!(benchmark.contains("GET") && !benchmark.to_lowercase().contains("error"), "{benchmark}");
    mesh.down();
}

#[test]
fn postgresql_balances_its_accounts_under_pgbench() {
    if !able(&["initdb", "postgres", "psql", "pgbench"]) {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let at = data.path().display().to_string();
    sh(&format!(
        "chown postgres {at} && cd / && setpriv --reuid postgres --regid postgres --clear-groups {} -D {at}/data -A trust -U postgres >/dev/null",
        path_of("initdb")
    ));
    sh(&format!("echo 'host all all all trust' >> {at}/data/pg_hba.conf"));
    let server = [
        &path_of("postgres"),
        "-D",
        &format!("{at}/data"),
        "-c",
        "listen_addresses=*",
        "-c",
        &format!("unix_socket_directories={at}"),
        "-c",
        "max_connections=50",
    ];
    let mesh = Mesh::up("postgres", &workload("db", "postgres", 5432, &server));
    mesh.wait_for_port("db", 5432);
    let psql =
        |name: &str, sql: &str| mesh.run(name, &["psql", "-h", "db", "-U", "postgres", "-qtAc", sql]).trim().to_owned();
    wait_for("the database to answer", Duration::from_secs(20), || {
        let mut asked = mesh.join("ping", &[], &["psql", "-h", "db", "-U", "postgres", "-qtAc", "select 1"]);
        asked.output().unwrap().status.success().then_some(())
    });
    mesh.run("init", &["pgbench", "-h", "db", "-U", "postgres", "-i", "-s", "1", "-q", "postgres"]);
    let ran =
        mesh.run("pgbench", &["pgbench", "-h", "db", "-U", "postgres", "-c", "8", "-j", "2", "-t", "100", "postgres"]);
    assert!(ran.contains("number of transactions actually processed: 800/800"), "{ran}");
    let sums = psql(
        "sums",
        "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history), count(*) from pgbench_history",
    );
    assert_eq!(sums, "t|800");
    mesh.down();
}

#[test]
fn mariadb_speaks_first_and_keeps_a_megabyte() {
    if !able(&["mariadbd", "mariadb", "mariadb-install-db"]) {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let at = data.path().display().to_string();
    sh(&format!(
        "chown mysql {at} && mariadb-install-db --no-defaults --user=mysql --datadir={at}/data --auth-root-authentication-method=normal >/dev/null 2>&1"
    ));
    let server = [
        &path_of("mariadbd"),
        "--no-defaults",
        &format!("--datadir={at}/data"),
        &format!("--socket={at}/sock"),
        "--bind-address=*",
        "--port=3306",
        &format!("--pid-file={at}/pid"),
        "--max-allowed-packet=16M",
    ];
    let mesh = Mesh::up("mariadb", &workload("sql", "mysql", 3306, &server));
    mesh.wait_for_port("sql", 3306);
    // Root may come over the network only after this, said over the server's own socket.
    sh(&format!(
        "mariadb --no-defaults -S {at}/sock -e \"create user t@'%' identified by 'secret'; create database d; grant all on d.* to t@'%'\""
    ));
    let sum = random_file(&mesh.folder().join("value"), 1);
    let client = "mariadb --no-defaults --max-allowed-packet=16M -h sql -u t -psecret d";
    mesh.shell("writer", &format!("(echo -n \"create table b (v longblob); insert into b values (x'\"; od -An -v -tx1 {}/value | tr -d ' \\n'; echo \"')\") | {client}", mesh.folder().display()));
    let kept = mesh.shell("reader", &format!("{client} -N -e 'select sha2(v, 256) from b'"));
    assert_eq!(kept.trim(), sum);
    mesh.down();
}

#[test]
fn openssh_copies_a_gibibyte() {
    if !able(&["sshd", "ssh", "scp", "ssh-keygen"]) {
        return;
    }
    let keys = tempfile::tempdir().unwrap();
    let at = keys.path().display().to_string();
    sh(&format!(
        "ssh-keygen -q -t ed25519 -N '' -f {at}/host && ssh-keygen -q -t ed25519 -N '' -f {at}/user && mkdir -p /run/sshd && chmod 755 /run/sshd"
    ));
    let config = format!(
        "Port 2222\nHostKey {at}/host\nAuthorizedKeysFile {at}/user.pub\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\nSubsystem sftp internal-sftp\n"
    );
    std::fs::write(keys.path().join("sshd_config"), config).unwrap();
    let mesh = Mesh::up(
        "ssh",
        &workload("host", "root", 2222, &[&path_of("sshd"), "-D", "-e", "-f", &format!("{at}/sshd_config")]),
    );
    mesh.wait_for_port("host", 2222);
    let sum = random_file(&mesh.folder().join("big"), 1024);
    let options =
        format!("-q -i {at}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o IdentitiesOnly=yes");
    let folder = mesh.folder().display().to_string();
    mesh.shell("up", &format!("scp -P 2222 {options} {folder}/big root@host:{folder}/there"));
    assert_eq!(sha256(&mesh.folder().join("there")), sum);
    let said = mesh.shell("shell", &format!("ssh -p 2222 {options} root@host echo through the mesh"));
    assert_eq!(said.trim(), "through the mesh");
    mesh.down();
}

#[test]
fn http2_streams_run_side_by_side() {
    if !able(&["nghttpd", "h2load"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    sh(&format!("chmod 755 {0}; head -c 20000 /dev/zero > {0}/page", folder.path().display()));
    let mesh = Mesh::up(
        "h2",
        &workload(
            "h2",
            "nobody",
            8080,
            &[&path_of("nghttpd"), "--no-tls", "-d", &folder.path().display().to_string(), "8080"],
        ),
    );
    mesh.wait_for_port("h2", 8080);
    let load = mesh.run("load", &["h2load", "-n", "5000", "-c", "10", "-m", "20", "http://h2:8080/page"]);
    assert!(load.contains("5000 done, 5000 succeeded, 0 failed, 0 errored, 0 timeout"), "{load}");
    mesh.down();
}

#[test]
fn grpc_calls_and_streams_pass() {
    if !able(&["sh"]) {
        return;
    }
    // A real gRPC server that knows nothing of the mesh: another Countersign server, on a Unix socket at home and TCP here.
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().display().to_string();
    let program = crate::support::COUNTERSIGN;
    let server = [
        program,
        "server",
        "--trust-domain",
        "inner.local",
        "--bind",
        "0.0.0.0:8081",
        "--socket",
        &format!("{at}/server.sock"),
        "--data-dir",
        &format!("{at}/server"),
    ];
    let mesh = Mesh::up("grpc", &workload("ca", "root", 8081, &server));
    mesh.wait_for_port("ca", 8081);
    let operator = |args: &[&str]| {
        crate::support::run(
            crate::support::countersign(args).env("COUNTERSIGN_SERVER_SOCKET", format!("{at}/server.sock")),
        )
    };
    std::fs::write(folder.path().join("bundle.pem"), operator(&["bundle", "show"])).unwrap();
    let token: serde_json::Value = serde_json::from_str(&operator(&["token", "generate", "--output", "json"])).unwrap();
    std::fs::write(folder.path().join("token"), token["token"].as_str().unwrap()).unwrap();
    // Its agent attests (a bidirectional stream), follows pushes (a server stream) and gets SVIDs signed, all through the mesh.
    let mut agent = mesh.join(
        "agent",
        &["--user", "root"],
        &[
            program,
            "agent",
            "--trust-domain",
            "inner.local",
            "--server",
            "ca:8081",
            "--socket",
            &format!("{at}/agent.sock"),
            "--data-dir",
            &format!("{at}/agent"),
            "--trust-bundle",
            &format!("{at}/bundle.pem"),
            "--join-token-file",
            &format!("{at}/token"),
        ],
    );
    let mut agent = agent
        .stdin(Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let parent = format!("spiffe://inner.local/spire/agent/join_token/{}", token["token"].as_str().unwrap());
    wait_for("the inner agent to attest", Duration::from_secs(20), || {
        operator(&["node", "list"]).contains(&parent).then_some(())
    });
    operator(&[
        "entry",
        "create",
        "--spiffe-id",
        "spiffe://inner.local/me",
        "--parent-id",
        &parent,
        "--selector",
        "unix:uid:0",
    ]);
    wait_for("the inner SVID", Duration::from_secs(20), || {
        let mut fetch = crate::support::countersign(&["x509", "fetch", "--socket"]);
        let said = fetch.arg(format!("{at}/agent.sock")).output().unwrap();
        String::from_utf8_lossy(&said.stdout).contains("spiffe://inner.local/me").then_some(())
    });
    assert!(mesh.access_log("ca").iter().all(|l| l["mode"] == "mtls"));
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(agent.id().try_into().unwrap()),
        nix::sys::signal::Signal::SIGINT,
    )
    .unwrap();
    let _ = agent.kill();
    agent.wait().unwrap();
    mesh.down();
}

#[test]
fn a_program_whose_terminal_is_closed_takes_leave_and_leaves_nothing_in_the_mesh() {
    if !able(&[]) {
        return;
    }
    let mesh = Mesh::up("hangup", &workload("web", "root", 8080, &["sleep", "600"]));
    let at = mesh.folder().display().to_string();
    let script = format!("trap 'echo bye > {at}/bye; exit 3' TERM; echo > {at}/runs; while :; do sleep 0.05; done");
    for signal in [Signal::SIGHUP, Signal::SIGTERM] {
        let mut me = mesh.join("me", &["--user", "root"], &["sh", "-c", &script]).spawn().unwrap();
        let patience = Duration::from_secs(20);
        wait_for("the program to run", patience, || std::fs::remove_file(format!("{at}/runs")).ok());
        kill(Pid::from_raw(me.id().try_into().unwrap()), signal).unwrap();
        let status = wait_for("`run` to end", patience, || me.try_wait().unwrap());
        assert_eq!(status.code(), Some(3), "{signal}: it is the program's own end");
        std::fs::remove_file(format!("{at}/bye")).unwrap();
        let left = || sh("ip netns list 2>/dev/null || true").contains(&format!("cs-{}-me", mesh.name));
        wait_for("its namespace to be gone", patience, || (!left()).then_some(()));
        assert!(!mesh.dir().join("homes/me").exists());
    }
    mesh.down();
}

#[test]
fn the_mesh_file_lets_single_udp_ports_pass_and_tells_a_program_who_calls() {
    if !able(&["python3"]) {
        return;
    }
    // It answers a connection with the bytes that came before the caller's own, and a datagram with itself.
    let program = r#"
import socket, threading
def echo(port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("0.0.0.0", port))
    while True:
        data, peer = s.recvfrom(100); s.sendto(data, peer)
for port in (4433, 4434): threading.Thread(target=echo, args=(port,), daemon=True).start()
s = socket.create_server(("0.0.0.0", 8080))
while True:
    c, _ = s.accept(); c.settimeout(10); c.sendall(c.recv(12).hex().encode()); c.close()
"#;
    let keys = "    allow_udp_ports: [4433]\n";
    let web = workload("web", "root", 8080, &["python3", "-c", program]) + "    proxy_protocol: [8080]\n" + keys;
    let mesh = Mesh::up("keys", &(web + &workload("caller", "root", 80, &["sleep", "600"]) + keys));
    mesh.wait_for_port("web", 8080);
    let caller = |script: &str| {
        let text = format!("import socket\n{script}");
        run(std::process::Command::new("ip")
            .args(["netns", "exec", &format!("cs-{}-caller", mesh.name)])
            .args(["python3", "-c", &text]))
    };
    let header = caller(
        "c = socket.create_connection(('10.86.0.10', 8080), 10); c.sendall(b'hello, who am I?'); print(c.recv(24).decode())",
    );
    assert_eq!(header.trim(), "0d0a0d0a000d0a515549540a", "PROXY protocol version 2 begins so");
    let udp = |port: u16| {
        caller(&format!(
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2)\ntry:\n  s.sendto(b'x', ('10.86.0.10', {port})); print(s.recv(9))\nexcept OSError: print('dropped')"
        ))
    };
    assert_eq!(udp(4433).trim(), "b'x'");
    assert_eq!(udp(4434).trim(), "dropped");
    mesh.down();
}

#[test]
fn a_program_of_another_user_gets_no_open_file_of_the_shell_that_starts_it() {
    if !able(&[]) {
        return;
    }
    let program = "for n in 0 1 2 7 9; do if [ -e /proc/self/fd/$n ]; then echo $n; fi; done";
    // As `up` and `run` start every program, and `launch` itself by its own descriptor.
    for command in [format!("sh -c '{program}'"), format!("\"$0\" launch --uid 65534 --gid 65534 -- sh -c '{program}'")]
    {
        let user = if command.starts_with("sh") { "--uid 65534 --gid 65534" } else { "--uid 0 --gid 0" };
        let shell = format!("exec 7</etc/shadow 9>/dev/null; exec \"$0\" launch {user} -- {command}");
        let said = run(Command::new("sh").args(["-c", &shell, COUNTERSIGN]).stdin(Stdio::null()));
        assert_eq!(said, "0\n1\n2\n");
    }
}
