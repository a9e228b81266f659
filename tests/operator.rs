//! Each operator command against a running server, as a table and as JSON.

use std::time::Duration;

use crate::support::roles::{Role, Server, TD};
use crate::support::{COUNTERSIGN, able, countersign, outcome, run, sh, wait_for};

#[test]
fn entries_are_created_shown_updated_and_deleted() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let parent = format!("spiffe://{TD}/node");
    let id = format!("spiffe://{TD}/web");
    let created = server.json(&[
        "entry",
        "create",
        "--spiffe-id",
        &id,
        "--parent-id",
        &parent,
        "--selector",
        "unix:uid:1",
        "--selector",
        "unix:gid:1",
        "--x509-svid-ttl",
        "5m",
    ]);
    let entry = created[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(created[0]["selectors"], serde_json::json!(["unix:gid:1", "unix:uid:1"]));
    let (code, said) = outcome(&mut server.operator(&[
        "entry",
        "create",
        "--spiffe-id",
        &id,
        "--parent-id",
        &parent,
        "--selector",
        "unix:uid:1",
        "--selector",
        "unix:gid:1",
    ]));
    assert_eq!((code, said.contains("an entry with this SPIFFE ID, parent and selectors exists")), (1, true), "{said}");
    // What serves nobody is taken, with a word: its node may come later.
    let doubted =
        ["entry", "create", "--spiffe-id", &id, "--parent-id", &parent, "--selector", "unx:uid:1", "--id", "odd"];
    let (code, said) = outcome(&mut server.operator(&doubted));
    assert_eq!(code, 0, "{said}");
    assert!(said.contains(&format!("warning: no node has the parent ID {parent} yet")), "{said}");
    assert!(said.contains("warning: no attestor makes selectors of type `unx`"), "{said}");
    let alias =
        ["--parent-id", "spiffe://test.local/spire/server", "--selector", "x509pop:subject:cn:a", "--id", "alias"];
    let (code, said) =
        outcome(&mut server.operator(&[&["entry", "create", "--spiffe-id", &parent], &alias[..]].concat()));
    assert!(code == 0 && !said.contains("warning"), "{said}");
    let known =
        ["entry", "create", "--spiffe-id", &id, "--parent-id", &parent, "--selector", "unix:uid:7", "--id", "served"];
    let (code, said) = outcome(&mut server.operator(&known));
    assert!(code == 0 && !said.contains("warning"), "{said}");
    for made in ["odd", "alias", "served"] {
        server.json(&["entry", "delete", "--id", made]);
    }
    assert_eq!(server.json(&["entry", "show", "--spiffe-id", &id])[0]["x509_svid_ttl_seconds"], 300);
    assert_eq!(
        server.json(&["entry", "show", "--selector", "unix:uid:1"]),
        serde_json::json!([]),
        "selectors match exactly"
    );
    let updated = server.json(&["entry", "update", "--id", &entry, "--dns-name", "web.local"]);
    assert_eq!(
        (&updated[0]["dns_names"], &updated[0]["revision"], &updated[0]["spiffe_id"]),
        (&serde_json::json!(["web.local"]), &1.into(), &id.clone().into())
    );
    let table = run(&mut server.operator(&["entry", "show"]));
    assert!(table.starts_with("ID") && table.contains(&id), "{table}");
    assert_eq!(server.json(&["entry", "delete", "--id", &entry])["deleted"][0], entry.as_str());
    let (code, said) = outcome(&mut server.operator(&["entry", "delete", "--id", &entry]));
    assert_eq!((code, said.trim()), (1, format!("countersign: there is no entry `{entry}`").as_str()));
}

#[test]
fn wrong_input_gets_one_line_and_exit_code_2() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let parent = format!("spiffe://{TD}/node");
    for (args, code, expected) in [
        (
            vec!["entry", "create", "--spiffe-id", "web", "--parent-id", &parent, "--selector", "unix:uid:1"],
            2,
            "--spiffe-id: `web` is not a SPIFFE ID",
        ),
        (
            vec![
                "entry",
                "create",
                "--spiffe-id",
                "spiffe://test.local/a",
                "--parent-id",
                &parent,
                "--selector",
                "uid",
            ],
            2,
            "--selector: `uid` is not a selector",
        ),
        (
            vec![
                "entry",
                "create",
                "--spiffe-id",
                "spiffe://other/a",
                "--parent-id",
                &parent,
                "--selector",
                "unix:uid:1",
            ],
            1,
            "`spiffe://other/a` is not in this server's trust domain `test.local`",
        ),
        (
            vec![
                "entry",
                "create",
                "--spiffe-id",
                "spiffe://test.local/spire/server",
                "--parent-id",
                &parent,
                "--selector",
                "unix:uid:1",
            ],
            1,
            "lies under `/spire`, which is kept for servers and agents",
        ),
        (
            vec!["entry", "create", "--spiffe-id", "spiffe://test.local/a", "--parent-id", &parent],
            1,
            "has no selectors",
        ),
        (vec!["entry", "show", "--id", "nope"], 1, "there is no entry `nope`"),
        (vec!["node", "ban", "--spiffe-id", "spiffe://test.local/spire/agent/x/y"], 1, "there is no agent"),
        (vec!["authority", "activate"], 1, "no authority is prepared; run `countersign authority prepare` first"),
        (vec!["authority", "taint", "--id", "00"], 1, "there is no authority `00`"),
        (
            vec!["authority", "activate", "--kind", "jwt"],
            1,
            "no authority is prepared; run `countersign authority prepare --kind jwt` first",
        ),
        (vec!["authority", "taint", "--kind", "jwt", "--id", "00"], 1, "there is no authority `00`"),
        (vec!["mint", "jwt", "--spiffe-id", "spiffe://test.local/a", "--audience", ""], 1, "none may be empty"),
        (
            vec!["mint", "jwt", "--spiffe-id", "spiffe://elsewhere/a", "--audience", "db"],
            1,
            "it must be a workload's ID of trust domain `test.local`",
        ),
        (
            vec!["mint", "x509", "--spiffe-id", "spiffe://test.local/a", "--write", "/no/such/folder"],
            2,
            "--write: /no/such/folder is no folder",
        ),
        (vec!["mint", "x509", "--spiffe-id", "spiffe://test.local/spire/server"], 1, "cannot be minted"),
        (
            vec!["bundle", "set", "--trust-domain", "other.local", "--path", "/etc/hostname"],
            2,
            "--path: /etc/hostname: no `-----BEGIN CERTIFICATE-----` block found",
        ),
        (vec!["bundle", "show", "--trust-domain", "other.local"], 1, "no bundle of `other.local` is here"),
    ] {
        let (got, said) = outcome(server.operator(&args).current_dir(dir.path()));
        assert_eq!(got, code, "{args:?}: {said}");
        assert!(said.contains(expected) && said.trim().lines().count() == 1, "{args:?}: {said}");
    }
    let (code, said) =
        outcome(countersign(&["status", "--socket", "/no/such.sock"]).env_remove("COUNTERSIGN_SERVER_SOCKET"));
    assert_eq!((code, said.contains("no role listens at /no/such.sock")), (1, true), "{said}");
}

#[test]
fn a_token_can_be_printed_alone_and_a_closed_folder_gets_the_right_words() {
    if !able(&["setpriv"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let token = run(&mut server.operator(&["token", "generate", "-q"]));
    assert_eq!((token.lines().count(), token.split_whitespace().count()), (1, 1), "{token}");
    // Another user, who may start the program but not enter the socket's folder.
    let elsewhere = tempfile::tempdir().unwrap();
    let program = elsewhere.path().join("countersign").display().to_string();
    let at = (elsewhere.path().display(), dir.path().display());
    sh(&format!("chmod 755 {}; cp {COUNTERSIGN} {program}; chmod 700 {}", at.0, at.1));
    let mut command = std::process::Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", &program, "entry", "show", "--socket"]);
    let (code, said) = outcome(command.arg(dir.path().join("server.sock")));
    assert!(code == 1 && said.contains("this user may not enter the folder of "), "{said}");
}

#[test]
fn nodes_are_listed_evicted_and_banned_and_tokens_work_once() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let (agent, id) = server.agent();
    let nodes = server.json(&["node", "list"]);
    assert_eq!(
        (&nodes[0]["spiffe_id"], &nodes[0]["attestation_type"], &nodes[0]["banned"]),
        (&id.clone().into(), &"join_token".into(), &false.into())
    );
    run(&mut server.operator(&["node", "evict", "--spiffe-id", &id]));
    wait_for("the agent to notice", Duration::from_secs(10), || {
        agent.log().contains("asks this agent to attest again").then_some(())
    });
    assert_eq!(server.json(&["node", "list"]), serde_json::json!([]));
    // Its token was used up: it cannot come back with it, and says what to do.
    wait_for("what the agent needs", Duration::from_secs(10), || {
        agent.log().contains("a join token works once").then_some(())
    });
}

#[test]
fn authorities_are_prepared_activated_tainted_and_revoked() {
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
    let socket = server.agent_socket().display().to_string();
    let serial = || {
        let said = run(&mut countersign(&["x509", "fetch", "--output", "json", "--socket", &socket]));
        serde_json::from_str::<serde_json::Value>(&said).unwrap()[0]["serial"].as_str().unwrap().to_owned()
    };
    wait_for("the first SVID", Duration::from_secs(20), || agent.log().contains("SVID ready").then_some(()));
    let before = serial();
    let first = server.json(&["authority", "show"])["active"]["id"].as_str().unwrap().to_owned();
    let prepared = server.json(&["authority", "prepare"])["prepared"]["id"].as_str().unwrap().to_owned();
    assert_eq!(
        server.json(&["bundle", "show"])["authorities"].as_array().unwrap().len(),
        2,
        "published before first use"
    );
    assert_eq!(server.json(&["authority", "activate"])["active"]["id"], prepared.as_str());
    assert_eq!(server.json(&["authority", "show"])["old"]["id"], first.as_str());
    assert_eq!(serial(), before, "an old authority's SVIDs live on");
    assert_eq!(server.json(&["authority", "show"])["old"]["tainted"], false);
    server.json(&["authority", "taint", "--id", &first]);
    assert_eq!(server.json(&["authority", "show"])["old"]["tainted"], true);
    assert!(run(&mut server.operator(&["authority", "show"])).contains("tainted"));
    wait_for("the SVID to be renewed at once", Duration::from_secs(10), || (serial() != before).then_some(()));
    server.json(&["authority", "revoke", "--id", &first]);
    let bundle = server.json(&["bundle", "show"]);
    assert_eq!(bundle["authorities"].as_array().unwrap().len(), 1);
    assert_eq!(bundle["authorities"][0]["id"], prepared.as_str());
}

#[test]
fn a_server_logs_in_more_detail_until_it_is_told_otherwise() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let level = |args: &[&str]| server.json(&[&["logger"], args].concat())["level"].as_str().unwrap().to_owned();
    assert_eq!(level(&["get"]), "info");
    // The creation of an entry is told at level info.
    let told = |name: &str| {
        let id = format!("spiffe://{TD}/{name}");
        let parent = format!("spiffe://{TD}/node");
        server.json(&["entry", "create", "--spiffe-id", &id, "--parent-id", &parent, "--selector", "unix:uid:1"]);
        server.log().matches("entry created").count()
    };
    assert_eq!(told("a"), 1);
    assert_eq!(level(&["set", "--level", "warn"]), "warn");
    assert_eq!(told("b"), 1);
    assert!(server.log().contains("level of logging changed"), "{}", server.log());
    assert_eq!(level(&["reset"]), "info");
    assert_eq!(told("c"), 2);
    let (code, said) = outcome(&mut server.operator(&["logger", "set", "--level", "loud"]));
    assert!(code == 2 && said.contains("warn"), "{said}");
}

#[test]
fn jwt_authorities_rotate_by_hand_and_tokens_of_a_revoked_one_are_good_for_nobody() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &["--jwt-issuer", "https://issuer.test"]);
    let minted = |ttl: &str| {
        let id = format!("spiffe://{TD}/a");
        server.json(&["mint", "jwt", "--spiffe-id", &id, "--audience", "db", "--audience", "cache", "--ttl", ttl])
    };
    // What anybody with the bundle of the moment says of a token.
    let judge = |minted: &serde_json::Value, audience: &str| {
        let socket = server.socket().display().to_string();
        let shown = run(&mut countersign(&["bundle", "show", "--format", "spiffe", "--socket", &socket]));
        let td = countersign_identity::TrustDomain::new(TD).unwrap();
        let bundle = countersign_identity::bundle_document::read(td, shown.as_bytes()).unwrap();
        let bundles = std::iter::once(bundle).collect();
        let now = time::OffsetDateTime::now_utc();
        countersign_identity::jwt_svid::verify(minted["token"].as_str().unwrap(), audience, &bundles, now)
    };
    let old = minted("10m");
    let claims = judge(&old, "cache").unwrap().claims;
    assert_eq!((&claims["iss"], &claims["aud"]), (&"https://issuer.test".into(), &serde_json::json!(["db", "cache"])));
    assert!(judge(&old, "web").is_err());
    let ended = server.json(&["authority", "show"])["jwt"]["active"]["expires_at"].as_i64().unwrap();
    assert_eq!(minted("400d")["expires_at"].as_i64(), Some(ended), "no longer than its authority");
    let show = || server.json(&["authority", "show"])["jwt"].clone();
    let first = show()["active"]["id"].as_str().unwrap().to_owned();
    let prepared = server.json(&["authority", "prepare", "--kind", "jwt"])["prepared"]["id"].clone();
    assert_eq!(server.json(&["bundle", "show"])["jwt_authorities"].as_array().unwrap().len(), 2);
    assert_eq!(server.json(&["authority", "activate", "--kind", "jwt"])["active"]["id"], prepared);
    assert_eq!((&show()["old"]["id"], &show()["active"]["id"]), (&first.as_str().into(), &prepared));
    assert!(judge(&minted("10m"), "db").is_ok() && judge(&old, "db").is_ok());
    let socket = server.socket().display().to_string();
    let revoke = ["authority", "revoke", "--kind", "jwt", "--id", &first, "--socket", &socket];
    let (code, said) = outcome(&mut countersign(&revoke));
    assert!(code == 1 && said.contains("not possible to revoke an untainted one"), "{said}");
    server.json(&["authority", "taint", "--kind", "jwt", "--id", &first]);
    assert!(judge(&old, "db").is_ok(), "a taint alone refuses nobody");
    server.json(&["authority", "revoke", "--kind", "jwt", "--id", &first]);
    assert!(judge(&old, "db").unwrap_err().to_string().contains(&first));
    let signed: Vec<_> = server.audit().into_iter().filter(|l| l["kind"] == "jwt_svid").collect();
    assert_eq!(signed.len(), 3);
    assert!(signed.iter().all(|l| l["spiffe_id"] == format!("spiffe://{TD}/a") && l["outcome"] == "signed"));
}

#[test]
fn foreign_bundles_are_set_and_shown() {
    if !able(&[]) {
        return;
    }
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (server, foreign) = (Server::start(dir.path(), &[]), Server::start(other.path(), &[]));
    let path = foreign.bundle().display().to_string();
    run(&mut server.operator(&["bundle", "set", "--trust-domain", "other.local", "--path", &path]));
    let shown = run(&mut server.operator(&["bundle", "show", "--trust-domain", "other.local"]));
    assert_eq!(shown, std::fs::read_to_string(&path).unwrap());
    let mut piped = server.operator(&["bundle", "set", "--trust-domain", "third.local", "--path", "-"]);
    let piped = piped.stdin(std::fs::File::open(&path).unwrap()).output().unwrap();
    crate::support::success("bundle set by standard input", &piped);
    assert_eq!(run(&mut server.operator(&["bundle", "show", "--trust-domain", "third.local"])), shown);
    assert_ne!(run(&mut server.operator(&["bundle", "show"])), shown);

    // Its own is not set: what is to be done instead is a command.
    let path = server.bundle().display().to_string();
    let (code, said) = outcome(&mut server.operator(&["bundle", "set", "--trust-domain", TD, "--path", &path]));
    assert!(code == 2 && said.contains("come from `countersign authority prepare`"), "{code} {said}");
}

#[test]
fn an_agent_attests_with_a_certificate_too_and_again_after_an_eviction() {
    if !able(&["openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    crate::support::sh(&format!(
        "cd {at}
        openssl ecparam -name prime256v1 -genkey -noout -out ca.key && openssl req -x509 -new -key ca.key -days 2 -subj /CN=nodes -out ca.crt
        openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out node.key
        openssl req -new -key node.key -subj /CN=node-1 -out node.csr
        printf 'keyUsage=critical,digitalSignature\nextendedKeyUsage=clientAuth\n' > ext
        openssl x509 -req -in node.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out node.crt 2>/dev/null"
    ));
    let ca = dir.path().join("ca.crt").display().to_string();
    let server = Server::start(dir.path(), &["--x509pop-ca", &ca]);
    let mut args = server.agent_args("unused");
    let flag = args.iter().position(|a| a == "--join-token-file").unwrap();
    args.drain(flag..flag + 2);
    for (flag, file) in [("--x509pop-cert", "node.crt"), ("--x509pop-key", "node.key")] {
        args.extend([flag.to_owned(), dir.path().join(file).display().to_string()]);
    }
    let agent = Role::start(dir.path(), "agent", &args);
    let listed = || server.json(&["node", "list"]);
    let nodes =
        wait_for("the agent", Duration::from_secs(20), || Some(listed()).filter(|n| n[0]["spiffe_id"].is_string()));
    let fingerprint = crate::support::sh(&format!(
        "openssl x509 -in {at}/node.crt -noout -fingerprint -sha1 | cut -d= -f2 | tr -d : | tr A-F a-f"
    ));
    let id = format!("spiffe://{TD}/spire/agent/x509pop/{}", fingerprint.trim());
    assert_eq!((&nodes[0]["spiffe_id"], &nodes[0]["can_reattest"]), (&id.clone().into(), &true.into()));
    let serial = nodes[0]["serial"].clone();
    run(&mut server.operator(&["node", "evict", "--spiffe-id", &id]));
    wait_for("it to be back by itself", Duration::from_secs(20), || {
        Some(listed()).filter(|n| n[0]["serial"].is_string() && n[0]["serial"] != serial)
    });
    run(&mut server.operator(&["node", "ban", "--spiffe-id", &id]));
    wait_for("the ban to arrive", Duration::from_secs(20), || {
        agent.log().contains("this agent is banned").then_some(())
    });
    let (_, said) =
        outcome(&mut countersign(&["x509", "fetch", "--socket", &server.agent_socket().display().to_string()]));
    assert!(said.contains("no identity issued"), "a banned agent's workloads have no identity: {said}");
    assert_eq!(listed()[0]["banned"], true);
    // Banned stays banned, good certificate or not.
    wait_for("its attestation to be refused", Duration::from_secs(20), || {
        agent.log().contains("is banned").then_some(())
    });
}

#[test]
fn status_shows_each_role_and_completion_each_shell() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let (_agent, id) = server.agent();
    let status: serde_json::Value = serde_json::from_str(&run(server
        .operator(&["status", "--output", "json"])
        .arg("--socket")
        .arg(server.socket())))
    .unwrap();
    assert_eq!((&status["role"], &status["facts"]["agents"]), (&"server".into(), &"1".into()));
    let agent = run(countersign(&["status", "--socket"]).arg(server.agent_socket()));
    assert!(agent.contains("role") && agent.contains("agent") && agent.contains(&id), "{agent}");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(run(&mut countersign(&["completion", shell])).contains("countersign"), "{shell}");
    }
    let help = run(&mut countersign(&["--help"]));
    for command in [
        "up",
        "run",
        "server",
        "agent",
        "proxy",
        "redirect",
        "entry",
        "node",
        "token",
        "bundle",
        "authority",
        "mint",
        "x509",
        "status",
        "completion",
    ] {
        assert!(help.lines().any(|l| l.trim_start().starts_with(command)), "{command} is not in the help");
    }
}
