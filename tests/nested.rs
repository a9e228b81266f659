//! Servers below servers of one trust domain: one bundle for all, and tokens and certificates that everybody verifies.

use std::process::Command;
use std::time::Duration;

use crate::support::roles::{Role, Server, TD};
use crate::support::{able, countersign, outcome, run, wait_for};

/// An agent of a server, in the server's folder, with an entry for everybody who is root.
struct Node {
    agent: Role,
    parent: String,
    socket: String,
}

impl Node {
    fn of(server: &Server) -> Self {
        let (agent, parent) = server.agent();
        Self { agent, parent, socket: server.agent_socket().display().to_string() }
    }

    fn register(&self, server: &Server, name: &str, more: &[&str]) {
        let id = format!("spiffe://{TD}/{name}");
        let entry = ["entry", "create", "--spiffe-id", &id, "--parent-id", &self.parent, "--selector", "unix:uid:0"];
        server.json(&[&entry, more].concat());
        wait_for(name, Duration::from_secs(20), || self.svid(name).map(drop));
    }

    /// What the Workload API says of an identity; `None` if it is not there yet.
    fn svid(&self, name: &str) -> Option<serde_json::Value> {
        let (code, said) = outcome(&mut countersign(&["x509", "fetch", "--output", "json", "--socket", &self.socket]));
        let all = (code == 0).then(|| serde_json::from_str::<serde_json::Value>(&said).unwrap())?;
        let id = format!("spiffe://{TD}/{name}");
        all.as_array().unwrap().iter().find(|svid| svid["spiffe_id"] == id.as_str()).cloned()
    }
}

fn authorities(server: &Server) -> Vec<String> {
    let shown = server.json(&["bundle", "show"]);
    shown["authorities"].as_array().unwrap().iter().map(|a| a["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_server_below_another_follows_it_through_the_loss_of_its_root() {
    if !able(&["openssl"]) {
        return;
    }
    let (root_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let root = Server::start(root_dir.path(), &[]);
    let node = Node::of(&root);
    node.register(&root, "below", &["--downstream"]);
    let address = root.address.to_string();
    let below =
        Server::start(dir.path(), &["--upstream-spire", &address, "--upstream-spire-workload-api", &node.socket]);
    let first = authorities(&root);
    assert_eq!(authorities(&below), first, "one bundle");
    assert_eq!(below.json(&["authority", "show"])["active"]["upstream_id"], first[0].as_str());

    let inner = Node::of(&below);
    inner.register(&below, "web", &[]);
    let before = inner.svid("web").unwrap()["serial"].clone();
    let svid = below.mint("/minted", "minted", &[]).join("svid.pem");
    let verify = Command::new("openssl")
        .args(["verify", "-CAfile"])
        .arg(root.bundle())
        .arg("-untrusted")
        .args([&svid, &svid])
        .output()
        .unwrap();
    assert!(verify.status.success(), "by the bundle of the root server: {verify:?}");

    // A token of the inner server is good for whoever has the root server's bundle.
    let fetched =
        run(&mut countersign(&["jwt", "fetch", "--audience", "db", "--output", "json", "--socket", &inner.socket]));
    let token = serde_json::from_str::<serde_json::Value>(&fetched).unwrap()[0]["token"].as_str().unwrap().to_owned();
    wait_for("the key of the server below", Duration::from_secs(20), || {
        let validate = ["jwt", "validate", "--audience", "db", "--svid", &token, "--socket", &node.socket];
        (outcome(&mut countersign(&validate)).0 == 0).then_some(())
    });

    // The root's key is lost: everybody moves, below it too, and nobody is locked out.
    root.json(&["authority", "prepare"]);
    let second = root.json(&["authority", "activate"])["active"]["id"].as_str().unwrap().to_owned();
    root.json(&["authority", "taint", "--id", &first[0]]);
    wait_for("the server below to sign below the next root", Duration::from_secs(60), || {
        (below.json(&["authority", "show"])["active"]["upstream_id"] == second.as_str()).then_some(())
    });
    wait_for("the workload's renewal", Duration::from_secs(30), || {
        (inner.svid("web").unwrap()["serial"] != before).then_some(())
    });
    wait_for("the agent's renewal", Duration::from_secs(30), || {
        inner.agent.log().contains("agent SVID renewed").then_some(())
    });
    root.json(&["authority", "revoke", "--id", &first[0]]);
    wait_for("the end of the first root", Duration::from_secs(30), || {
        (authorities(&below) == [second.clone()]).then_some(())
    });
    inner.register(&below, "after", &[]);
    assert!(!below.log().contains("cannot rotate"), "{}", below.log());
}

#[test]
fn a_server_without_a_downstream_entry_is_told_what_is_missing() {
    if !able(&[]) {
        return;
    }
    let (root_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let root = Server::start(root_dir.path(), &[]);
    let node = Node::of(&root);
    let start = |address: &str| {
        let place = |name: &str| dir.path().join(name).display().to_string();
        let (socket, data) = (place("server.sock"), place("server"));
        let args = [
            &["server", "--trust-domain", TD, "--bind", "127.0.0.1:0", "--socket", &socket, "--data-dir", &data][..],
            &["--upstream-spire", address, "--upstream-spire-workload-api", &node.socket],
        ];
        outcome(&mut countersign(&args.concat()))
    };
    let address = root.address.to_string();
    let (code, said) = start(&address);
    assert!(code == 1 && said.contains(&node.socket) && said.contains("--downstream"), "{said}");
    node.register(&root, "anybody", &[]);
    let (code, said) = start(&address);
    assert!(code == 1 && said.contains("takes a downstream entry") && said.contains(&address), "{said}");
    let (code, said) = start("nowhere");
    assert!(code == 2 && said.contains("host:port"), "{said}");
}
