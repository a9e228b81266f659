//! Real processes on real sockets: living ones are attested, ended and foreign ones are not.

use super::*;
use countersign_api::transport::peer_credentials;
use std::process::{Command, Stdio};
use tokio::net::{UnixListener, UnixStream};

async fn caller(dir: &std::path::Path, script: &str) -> (UnixStream, std::process::Child) {
    let path = dir.join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let child = Command::new("sh")
        .arg("-c")
        .arg(script)
        .env("S", &path)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (stream, _) = tokio::time::timeout(std::time::Duration::from_secs(20), listener.accept())
        .await
        .expect("the script connects")
        .unwrap();
    (stream, child)
}

const CONNECT: &str = "import os,socket,sys,time\ns=socket.socket(socket.AF_UNIX)\ns.connect(os.environ['S'])\n";

#[tokio::test]
async fn a_living_caller_is_looked_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let _client = UnixStream::connect(&path).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    let peer = peer_credentials(&server).unwrap();
    let process = look_up(&peer, false).unwrap();
    assert_eq!(process.pid, i32::try_from(std::process::id()).unwrap());
    assert_eq!(process.uid, nix::unistd::geteuid().as_raw());
    assert_eq!(process.exe.map(|e| e.path), std::env::current_exe().ok());
}

#[tokio::test]
async fn a_caller_whose_process_ended_is_refused_though_its_connection_lives_on() {
    let dir = tempfile::tempdir().unwrap();
    // The child connects, leaves the connection to its own child and ends: its ID is free for another process.
    let script = format!("exec python3 -c \"{CONNECT}if os.fork(): os._exit(0)\ntime.sleep(30)\"");
    let (stream, mut child) = caller(dir.path(), &script).await;
    child.wait().unwrap();
    let mut peer = peer_credentials(&stream).unwrap();
    assert_eq!(look_up(&peer, true), Err(PeerError::Gone(peer.pid)));
    // The same on a kernel without pidfds, where the start time decides.
    peer.pidfd = None;
    assert_eq!(look_up(&peer, true), Err(PeerError::Gone(peer.pid)));
    // And when the ID is in use again, here by this test itself.
    peer.pid = i32::try_from(std::process::id()).unwrap();
    peer.started = Some(1);
    assert_eq!(look_up(&peer, true), Err(PeerError::Gone(peer.pid)));
}

/// Polls until the change that the script makes is visible.
async fn after_the_change(peer: &UnixPeer) -> Result<Process, PeerError> {
    for _ in 0..500 {
        match look_up(peer, true) {
            Ok(_) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
            refused => return refused,
        }
    }
    look_up(peer, true)
}

#[tokio::test]
async fn a_caller_that_became_a_trusted_program_after_it_connected_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    // The child of the connecting process calls on its connection; the connecting process itself becomes `sleep`, whose
    // path an entry trusts.
    let script = format!(
        "exec python3 -c \"{CONNECT}\nif not os.fork(): s.recv(1); os._exit(0)\n\
         while not os.path.exists(os.environ['S'] + '.go'): time.sleep(0.01)\nos.execv('/bin/sleep', ['sleep', '60'])\""
    );
    let (stream, mut child) = caller(dir.path(), &script).await;
    let peer = peer_credentials(&stream).unwrap();
    let before = look_up(&peer, true).unwrap().exe.unwrap().path;
    assert!(before.to_string_lossy().contains("python"), "{}", before.display());
    std::fs::write(dir.path().join("s.go"), "").unwrap();
    assert_eq!(after_the_change(&peer).await, Err(PeerError::Changed { pid: peer.pid, what: "executable" }));
    // The stream of a caller that was attested before it changed ends by the same check.
    assert_eq!(unchanged(&peer).err(), Some(PeerError::Changed { pid: peer.pid, what: "executable" }));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn a_program_whose_file_is_replaced_while_it_runs_is_the_same_program() {
    let dir = tempfile::tempdir().unwrap();
    let python = String::from_utf8(
        Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output().unwrap().stdout,
    );
    let own = dir.path().join("python");
    std::fs::copy(python.unwrap().trim(), &own).unwrap();
    let script = format!("exec {} -c \"{CONNECT}time.sleep(60)\"", own.display());
    let (stream, mut child) = caller(dir.path(), &script).await;
    let peer = peer_credentials(&stream).unwrap();
    std::fs::remove_file(&own).unwrap();
    assert_eq!(look_up(&peer, true).unwrap().exe.unwrap().path, own);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn groups_that_came_after_the_connection_are_refused_and_those_given_up_do_not_count() {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "CI runs as root");
        eprintln!("skipped: only root may set groups");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let wait = |file: &str| format!("while not os.path.exists(os.environ['S'] + '.{file}'): time.sleep(0.01)\n");
    let script = format!(
        "exec python3 -c \"import os\nos.setgroups([7, 8])\n{CONNECT}{}os.setgroups([8])\n{}os.setgroups([8, 9])\ntime.sleep(60)\"",
        wait("fewer"),
        wait("more")
    );
    let (stream, mut child) = caller(dir.path(), &script).await;
    let peer = peer_credentials(&stream).unwrap();
    assert_eq!(look_up(&peer, true).unwrap().groups, [7, 8].into());
    std::fs::write(dir.path().join("s.fewer"), "").unwrap();
    for _ in 0..500 {
        if look_up(&peer, true).unwrap().groups == [8].into() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(look_up(&peer, true).unwrap().groups, [8].into());
    std::fs::write(dir.path().join("s.more"), "").unwrap();
    assert_eq!(after_the_change(&peer).await, Err(PeerError::Changed { pid: peer.pid, what: "groups" }));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn a_caller_in_another_user_namespace_is_refused_whatever_uid_it_claims() {
    let dir = tempfile::tempdir().unwrap();
    let able = Command::new("unshare").args(["--user", "--map-root-user", "true"]).status().is_ok_and(|s| s.success());
    if !able {
        assert!(std::env::var_os("CI").is_none(), "CI must be able to make user namespaces");
        eprintln!("skipped: this machine cannot make user namespaces");
        return;
    }
    let script = format!("exec unshare --user --map-root-user python3 -c \"{CONNECT}time.sleep(30)\"");
    let (stream, mut child) = caller(dir.path(), &script).await;
    let peer = peer_credentials(&stream).unwrap();
    let refused = look_up(&peer, false);
    assert_eq!(refused, Err(PeerError::ForeignNamespace { pid: peer.pid, namespace: "user" }));
    assert!(look_up(&peer, true).is_ok(), "unless the agent is told that others decide");
    child.kill().unwrap();
    child.wait().unwrap();
}
