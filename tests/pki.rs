//! Certificates as foreign eyes see them: openssl, and the extensions one by one.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::roles::{Server, TD};
use crate::support::{able, countersign, outcome, run, sh};

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
    let next = dir.path().join("next");
    std::fs::create_dir(&next).unwrap();
    upstream(&next, "");
    // The two have one name and different keys, as the roots of a company often do.
    let flags = upstream_flags(dir.path());
    let server = Server::start(dir.path(), &flags.each_ref().map(String::as_str));
    let bundle = || run(&mut server.operator(&["bundle", "show"])).matches("BEGIN CERTIFICATE").count();
    assert_eq!(bundle(), 1);
    sh(&format!(
        "cd {} && cp root.crt former.crt && cat root.crt next/root.crt > both && mv both root.crt",
        dir.path().display()
    ));
    crate::support::wait_for("the next root", Duration::from_secs(30), || (bundle() == 2).then_some(()));
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
    crate::support::wait_for("the third root", Duration::from_secs(30), || (bundle() == 3).then_some(()));
    let kept = server.bundle();
    assert!(
        outcome(Command::new("openssl").args(["verify", "-CAfile"]).arg(kept).arg(dir.path().join("former.crt"))).0
            == 0
    );
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
    let two =
        crate::support::wait_for("a renewal", Duration::from_secs(30), || Some(of_entry()).filter(|l| l.len() >= 2));
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
