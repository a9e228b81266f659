//! The server's folder is all there is to keep: a copy, put elsewhere, is the same authority.

use std::time::Duration;

use crate::support::roles::{Role, Server, TD};
use crate::support::{able, countersign, run, sh, wait_for};

#[test]
fn a_server_restored_from_a_copy_is_the_same_authority() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), &[]);
    let (agent, parent) = server.agent();
    let id = format!("spiffe://{TD}/kept");
    server.json(&["entry", "create", "--spiffe-id", &id, "--parent-id", &parent, "--selector", "unix:uid:0"]);
    wait_for("the SVID", Duration::from_secs(20), || agent.log().contains("SVID ready").then_some(()));
    let bundle = run(&mut server.operator(&["bundle", "show"]));
    let entries = server.json(&["entry", "show"]);

    // Backup with the server stopped, then the machine is lost.
    server.kill();
    let here = dir.path().display();
    sh(&format!("cp -a {here}/server {here}/backup && rm -rf {here}/server"));
    // The agent serves from memory meanwhile.
    let fetch = || run(countersign(&["x509", "fetch", "--socket"]).arg(dir.path().join("agent.sock")));
    assert!(fetch().contains(&id));

    sh(&format!("cp -a {here}/backup {here}/server"));
    server.again();
    assert_eq!(run(&mut server.operator(&["bundle", "show"])), bundle, "another authority");
    assert_eq!(server.json(&["entry", "show"]), entries);

    // The same agent goes on: a change reaches it, and after a restart it needs no new token.
    let later = format!("spiffe://{TD}/later");
    server.json(&["entry", "create", "--spiffe-id", &later, "--parent-id", &parent, "--selector", "unix:uid:0"]);
    wait_for("the later SVID", Duration::from_secs(30), || fetch().contains(&later).then_some(()));
    agent.kill();
    let mut args = server.agent_args("used up");
    let flag = args.iter().position(|a| a == "--join-token-file").unwrap();
    args.drain(flag..flag + 2);
    let again = Role::start(dir.path(), "again", &args);
    wait_for("the SVID", Duration::from_secs(20), || again.log().contains("SVID ready").then_some(()));
    assert!(fetch().contains(&id));
}
