//! Certificates as foreign eyes see them: openssl, and the extensions one by one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::roles::{Server, TD};
use crate::support::{able, countersign, outcome, run, sh, wait_for};

/// An upstream root, and an intermediate below it with a path length, made by openssl.
fn upstream(dir: &Path, pathlen: &str) {
    let at = dir.display();
    sh(&format!(
        "cd {at}
        openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out root.key
        openssl req -x509 -new -key root.key -days 30 -subj '/O=Corp/CN=Corp Root' -out root.crt -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
        openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out inter.key
        openssl req -new -key inter.key -subj '/O=Corp/CN=Corp Issuing' -out inter.csr
        printf 'basicConstraints=critical,CA:TRUE{pathlen}\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n' > inter.ext
        openssl x509 -req -in inter.csr -CA root.crt -CAkey root.key -CAcreateserial -days 20 -extfile inter.ext -out inter.crt 2>/dev/null"
    ));
}

/// Another upstream in a folder below, with the same names and other keys, as the roots of a company often have.
fn successor(dir: &Path) -> PathBuf {
    let next = dir.join("next");
    std::fs::create_dir(&next).unwrap();
    upstream(&next, "");
    next
}

fn upstream_flags(dir: &Path) -> [String; 6] {
    let place = |n: &str| dir.join(n).display().to_string();
    [
        "--upstream-cert".into(),
        place("inter.crt"),
        "--upstream-key".into(),
        place("inter.key"),
        "--upstream-bundle".into(),
        place("root.crt"),
    ]
}

#[test]
fn openssl_verifies_a_leaf_up_to_the_upstream_root() {
    if !able(&["openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    upstream(dir.path(), ",pathlen:1");
    let flags = upstream_flags(dir.path());
    let server = Server::start(dir.path(), &flags.each_ref().map(String::as_str));
    let minted = server.mint("/ns/default/sa/web", "web", &["--ttl", "10m"]);
    let at = minted.display();
    // svid.pem: the leaf, our CA, the issuing CA. The root is in no chain, only in the bundle.
    let said = sh(&format!(
        "cd {at} && openssl verify -x509_strict -purpose sslserver -CAfile ../root.crt -untrusted svid.pem svid.pem && openssl verify -purpose sslclient -CAfile bundle.pem -untrusted svid.pem svid.pem"
    ));
    assert_eq!(said, "svid.pem: OK\nsvid.pem: OK\n");
    let roots = sh(&format!(
        "openssl x509 -in {at}/bundle.pem -noout -subject; grep -c BEGIN {at}/bundle.pem; grep -c BEGIN {at}/svid.pem"
    ));
    assert_eq!(roots.lines().skip(1).collect::<Vec<_>>(), ["1", "3"]);
    assert!(roots.contains("Corp Root"), "{roots}");
}

/// As docs/operations.md has it: the next root first, then a CA below it.
#[test]
fn an_upstreams_root_is_replaced_while_the_server_runs() {
    if !able(&["openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    upstream(dir.path(), "");
    let next = successor(dir.path());
    let flags = upstream_flags(dir.path());
    let server = Server::start(dir.path(), &flags.each_ref().map(String::as_str));
    let bundle = || run(&mut server.operator(&["bundle", "show"])).matches("BEGIN CERTIFICATE").count();
    assert_eq!(bundle(), 1);
    sh(&format!(
        "cd {} && cp root.crt former.crt && cat root.crt next/root.crt > both && mv both root.crt",
        dir.path().display()
    ));
    wait_for("the next root", Duration::from_secs(30), || (bundle() == 2).then_some(()));
    let at = dir.path().display();
    // What is signed is below the former root until certificate and key are replaced.
    let verified = |root: &str, minted: &Path| {
        let verify =
            format!("cd {} && openssl verify -CAfile {at}/{root} -untrusted svid.pem svid.pem", minted.display());
        outcome(Command::new("sh").args(["-c", &verify])).0 == 0
    };
    let before = server.mint("/ns/default/sa/web", "before", &["--ttl", "10m"]);
    assert!(verified("former.crt", &before) && !verified("next/root.crt", &before));
    sh(&format!("cd {at} && mv next/inter.key next/inter.crt ."));
    let prepared = server.json(&["authority", "prepare"])["prepared"]["id"].clone();
    assert_eq!(server.json(&["authority", "activate"])["active"]["id"], prepared);
    let after = server.mint("/ns/default/sa/web", "after", &["--ttl", "10m"]);
    assert!(verified("next/root.crt", &after));
    // The former root stays, although the file does not name it any more: by the time that the third is there, it was read.
    let third = next.join("third");
    std::fs::create_dir(&third).unwrap();
    upstream(&third, "");
    sh(&format!("cd {at}/next && cat root.crt third/root.crt > both && mv both ../root.crt"));
    wait_for("the third root", Duration::from_secs(30), || (bundle() == 3).then_some(()));
    let kept = server.bundle();
    assert!(
        outcome(Command::new("openssl").args(["verify", "-CAfile"]).arg(kept).arg(dir.path().join("former.crt"))).0
            == 0
    );
}

/// As docs/operations.md has it for a root whose key is lost to somebody else.
#[test]
fn a_stolen_root_of_the_upstream_is_tainted_and_revoked_and_the_file_does_not_bring_it_back() {
    if !able(&["openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    upstream(dir.path(), "");
    successor(dir.path());
    let flags = upstream_flags(dir.path());
    let mut server = Server::start(dir.path(), &flags.each_ref().map(String::as_str));
    let (agent, parent) = server.agent();
    let id = format!("spiffe://{TD}/me");
    server.json(&["entry", "create", "--spiffe-id", &id, "--parent-id", &parent, "--selector", "unix:uid:0"]);
    wait_for("the SVID", Duration::from_secs(20), || agent.log().contains("SVID ready").then_some(()));
    let socket = server.agent_socket().display().to_string();
    let serial = || {
        let said = run(&mut countersign(&["x509", "fetch", "--output", "json", "--socket", &socket]));
        serde_json::from_str::<serde_json::Value>(&said).unwrap()[0]["serial"].as_str().unwrap().to_owned()
    };
    let before = serial();
    let root = |server: &Server, n: usize| server.json(&["authority", "show"])["roots"][n].clone();
    let stolen = root(&server, 0)["id"].as_str().unwrap().to_owned();
    assert_eq!(server.json(&["authority", "show"])["active"]["upstream_id"], stolen.as_str());
    let upstream_root = |server: &Server, what: &str| {
        outcome(&mut server.operator(&["authority", what, "--kind", "upstream", "--id", &stolen]))
    };
    let (code, said) = upstream_root(&server, "taint");
    assert!(code == 1 && said.contains("the active authority") && said.contains("prepare and activate"), "{said}");

    // The successor, and what the server signs with below it.
    let at = dir.path().display();
    sh(&format!("cd {at} && cat root.crt next/root.crt > both && cp both kept && mv both root.crt"));
    wait_for("the next root", Duration::from_secs(30), || root(&server, 1)["id"].as_str().map(drop));
    sh(&format!("cd {at} && mv next/inter.key next/inter.crt ."));
    let activated = server.json(&["authority", "prepare"])["prepared"]["id"].clone();
    assert_eq!(server.json(&["authority", "activate"])["active"]["id"], activated);
    let (code, said) = upstream_root(&server, "revoke");
    assert!(code == 1 && said.contains("not tainted"), "{said}");
    let (code, said) = upstream_root(&server, "taint");
    assert!(code == 0 && said.contains(&stolen), "{said}");
    assert!(run(&mut server.operator(&["authority", "show"])).contains("tainted"));
    wait_for("the SVID to be renewed at once", Duration::from_secs(20), || (serial() != before).then_some(()));
    wait_for("the agent to renew itself", Duration::from_secs(20), || {
        agent.log().contains("agent SVID renewed").then_some(())
    });
    assert_eq!(upstream_root(&server, "revoke").0, 0);
    let only = |server: &Server| server.json(&["bundle", "show"])["authorities"].as_array().unwrap().len() == 1;
    assert!(only(&server));
    // The file still has it, when the server runs and when it starts.
    wait_for("the server to say so", Duration::from_secs(30), || {
        server.log().contains("roots that were revoked here").then_some(())
    });
    server.again();
    wait_for("the server to say so again", Duration::from_secs(30), || {
        server.log().contains("roots that were revoked here").then_some(())
    });
    assert!(only(&server));
    let (code, said) = outcome(&mut server.operator(&["authority", "taint", "--kind", "upstream", "--id", &stolen]));
    assert!(code == 1 && said.contains("no root"), "{said}");
    let fetched = outcome(&mut countersign(&["x509", "fetch", "--socket", &socket])).1;
    assert!(fetched.contains("/me"), "{fetched}");
}

#[test]
fn an_issued_leafs_every_extension_is_as_documented() {
    if !able(&["openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let minted = server.mint("/ns/default/sa/web", "web", &["--ttl", "10m"]);
    let text = run(Command::new("openssl").args(["x509", "-noout", "-text", "-in"]).arg(minted.join("svid.pem")));
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let after = |head: &str| {
        lines[lines.iter().position(|l| *l == head).unwrap_or_else(|| panic!("no `{head}` in {text}")) + 1]
    };
    assert!(text.contains("Version: 3 (0x2)"));
    assert!(lines.contains(&"Subject: C = US, O = Countersign"));
    assert_eq!(after("X509v3 Subject Alternative Name:"), format!("URI:spiffe://{TD}/ns/default/sa/web"));
    assert_eq!(after("X509v3 Key Usage: critical"), "Digital Signature, Key Encipherment, Key Agreement");
    assert_eq!(after("X509v3 Extended Key Usage:"), "TLS Web Server Authentication, TLS Web Client Authentication");
    assert_eq!(after("X509v3 Basic Constraints: critical"), "CA:FALSE");
    let authority = server.json(&["authority", "show"])["active"]["id"].as_str().unwrap().to_uppercase();
    assert_eq!(after("X509v3 Authority Key Identifier:").replace(':', ""), authority);
    assert!(!after("X509v3 Subject Key Identifier:").is_empty());
    let extensions = text.matches("X509v3").count();
    assert_eq!(extensions, 7, "six extensions under one head: {text}");
    let dates = run(Command::new("openssl")
        .args(["x509", "-noout", "-startdate", "-enddate", "-in"])
        .arg(minted.join("svid.pem")));
    let seconds: Vec<i64> = dates
        .lines()
        .map(|l| sh(&format!("date -d '{}' +%s", l.split_once('=').unwrap().1)).trim().parse().unwrap())
        .collect();
    assert_eq!(seconds[1] - seconds[0], 610, "ten minutes, and ten seconds of backdating");
    let ca = run(Command::new("openssl").args(["x509", "-noout", "-text", "-in"]).arg(minted.join("bundle.pem")));
    for expected in
        [format!("URI:spiffe://{TD}"), "CA:TRUE".into(), "Certificate Sign, CRL Sign".into(), "serialNumber = ".into()]
    {
        assert!(ca.contains(&expected), "no `{expected}` in {ca}");
    }
}

#[test]
fn path_length_problems_are_explained_when_loading() {
    if !able(&["openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    upstream(dir.path(), ",pathlen:0");
    let flags = upstream_flags(dir.path());
    let place = |n: &str| dir.path().join(n).display().to_string();
    let mut server = countersign(&[
        "server",
        "--trust-domain",
        TD,
        "--bind",
        "127.0.0.1:0",
        "--socket",
        &place("s.sock"),
        "--data-dir",
        &place("data"),
    ]);
    let (code, said) = outcome(server.args(&flags));
    assert_eq!(code, 2);
    assert!(said.contains("path length: `O=Corp, CN=Corp Issuing` allows 0 CA certificates below it, and Countersign's own CA needs 1; issue it again with pathlen:1"), "{said}");
}

#[test]
fn one_svid_can_be_followed_by_serial_from_issue_to_replacement() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &["--svid-ttl", "20s", "--agent-svid-ttl", "1h"]);
    let (_agent, parent) = server.agent();
    let entry = server.json(&[
        "entry",
        "create",
        "--spiffe-id",
        &format!("spiffe://{TD}/me"),
        "--parent-id",
        &parent,
        "--selector",
        "unix:uid:0",
    ]);
    let id = entry[0]["id"].as_str().unwrap().to_owned();
    let of_entry = || server.audit().into_iter().filter(|l| l["entry_id"] == id.as_str()).collect::<Vec<_>>();
    let two = wait_for("a renewal", Duration::from_secs(30), || Some(of_entry()).filter(|l| l.len() >= 2));
    for line in &two {
        assert_eq!(
            (&line["outcome"], &line["kind"], line["caller"].as_str().unwrap()),
            (&"signed".into(), &"x509_svid".into(), parent.as_str())
        );
        assert_eq!(line["spiffe_id"], format!("spiffe://{TD}/me"));
    }
    assert_ne!(two[0]["serial"], two[1]["serial"]);
    let (first_ends, second_begins) = (two[0]["expires_at"].as_str().unwrap(), two[1]["time"].as_str().unwrap());
    assert!(second_begins < first_ends, "renewed before it ended: {second_begins} against {first_ends}");
}
