//! Unmodified SPIFFE clients get their SVID from the agent and follow its rotation: `PyPI`'s and crates.io's.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::process::Command;
use std::time::Duration;

use crate::support::roles::{Server, TD};
use crate::support::{able, python, run, wait_for};

/// A server with short lives, its agent, and an entry for this very user.
fn world(dir: &std::path::Path) -> (Server, crate::support::roles::Role) {
    let server = Server::start(dir, &["--svid-ttl", "20s", "--agent-svid-ttl", "1h"]);
    let (agent, parent) = server.agent();
    let uid = format!("unix:uid:{}", nix::unistd::geteuid());
    server.json(&[
        "entry",
        "create",
        "--spiffe-id",
        &format!("spiffe://{TD}/me"),
        "--parent-id",
        &parent,
        "--selector",
        &uid,
        "--dns-name",
        "me.test",
    ]);
    (server, agent)
}

#[test]
fn the_pypi_client_follows_rotating_svids() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (server, _agent) = world(dir.path());
    let script = r"
import sys, time
from spiffe import X509Source
source = X509Source(socket_path=sys.argv[1])
seen = []
end = time.time() + 60
while len(seen) < 3 and time.time() < end:
    svid = source.svid
    serial = format(svid.leaf.serial_number, 'x')
    if serial not in seen: seen.append(serial)
    time.sleep(0.2)
bundle = source.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
print(svid.spiffe_id, len(bundle.x509_authorities), *seen)
source.close()
";
    let said =
        run(Command::new(python).args(["-c", script]).arg(format!("unix://{}", server.agent_socket().display())));
    let words: Vec<&str> = said.split_whitespace().collect();
    assert_eq!(&words[..2], [&format!("spiffe://{TD}/me"), "1"], "{said}");
    assert_eq!(words.len(), 5, "three serials: {said}");
    let issued: HashSet<String> =
        server.audit().iter().filter_map(|l| l["serial"].as_str().map(str::to_owned)).collect();
    assert!(words[2..].iter().all(|s| issued.contains(*s)), "all of them are in the audit record: {said}");
}

#[test]
fn the_crates_io_client_follows_rotating_svids() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (server, _agent) = world(dir.path());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let seen = runtime.block_on(async {
        let source = spiffe::X509Source::builder()
            .endpoint(format!("unix:{}", server.agent_socket().display()))
            .build()
            .await
            .unwrap();
        let mut seen = Vec::new();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        while seen.len() < 3 && tokio::time::Instant::now() < deadline {
            let svid = source.svid().unwrap();
            assert_eq!(svid.spiffe_id().to_string(), format!("spiffe://{TD}/me"));
            let leaf = svid.leaf().as_bytes().to_vec();
            if !seen.contains(&leaf) {
                seen.push(leaf);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        source.shutdown().await;
        seen
    });
    assert_eq!(seen.len(), 3, "three different leaves");
}

#[test]
fn a_caller_without_an_entry_is_refused_and_a_withdrawn_one_is_told() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (server, agent) = world(dir.path());
    let socket = server.agent_socket().display().to_string();
    let fetch = || crate::support::outcome(&mut crate::support::countersign(&["x509", "fetch", "--socket", &socket]));
    wait_for("the first SVID", Duration::from_secs(20), || (fetch().0 == 0).then_some(()));
    let mut stranger = Command::new("setpriv");
    stranger.args([
        "--reuid",
        "12345",
        "--regid",
        "12345",
        "--clear-groups",
        crate::support::COUNTERSIGN,
        "x509",
        "fetch",
        "--socket",
        &socket,
    ]);
    crate::support::sh(&format!("chmod 755 {}", dir.path().display()));
    let (code, said) = crate::support::outcome(&mut stranger);
    assert_eq!(code, 1);
    assert!(said.contains("no identity issued: attested unix:gid:12345, unix:uid:12345; the closest entry, `spiffe://test.local/me`, also needs unix:uid:0"), "{said}");
    // One that watches is told when its entry goes.
    let mut watch = crate::support::countersign(&["x509", "watch", "--socket", &socket])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let (mut told, mut first) = (BufReader::new(watch.stdout.take().unwrap()), String::new());
    told.read_line(&mut first).unwrap();
    assert!(first.contains("spiffe://test.local/me"), "{first}");
    let id = server.json(&["entry", "show"])[0]["id"].as_str().unwrap().to_owned();
    server.json(&["entry", "delete", "--id", &id]);
    let output = watch.wait_with_output().unwrap();
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("no identity issued"),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    wait_for("the agent's log", Duration::from_secs(10), || agent.log().contains("caller attested").then_some(()));
    let status: serde_json::Value = serde_json::from_str(&run(&mut crate::support::countersign(&[
        "status", "--output", "json", "--socket", &socket,
    ])))
    .unwrap();
    assert!(status["refused"]["no_identity"].as_u64().unwrap() >= 1, "{status}");
}

#[test]
fn a_workload_gets_its_svid_while_the_server_is_stopped() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut server, agent) = world(dir.path());
    wait_for("the SVID to be ready before anybody asks", Duration::from_secs(20), || {
        agent.log().contains("SVID ready").then_some(())
    });
    server.kill();
    let socket = server.agent_socket().display().to_string();
    let said = run(&mut crate::support::countersign(&["x509", "fetch", "--socket", &socket]));
    assert!(said.contains(&format!("spiffe://{TD}/me")), "{said}");
}

#[test]
fn the_pypi_client_validates_the_tokens_of_a_federated_trust_domain() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (server, _agent) = world(dir.path());
    // Another trust domain's key, and a token that it has signed.
    let script = r#"
import json, sys, time, jwt
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec
key = ec.generate_private_key(ec.SECP256R1())
public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
print(json.dumps({"keys": [{**public, "use": "jwt-svid", "kid": "k1"}], "spiffe_sequence": 1}))
claims = {"sub": "spiffe://partner.test/db", "aud": ["me"], "exp": int(time.time()) + 600, "iat": int(time.time()), "n": {"a": [1, True]}}
for kid in ("k1", "k2"): print(jwt.encode(claims, key, algorithm="ES256", headers={"kid": kid}))
"#;
    let made = run(Command::new(&python).args(["-c", script]));
    let [document, token, unknown] = made.lines().collect::<Vec<_>>()[..] else { panic!("{made}") };
    let path = dir.path().join("partner.json");
    std::fs::write(&path, document).unwrap();
    let set = |format: &str| {
        let path = path.display().to_string();
        let set = ["bundle", "set", "--trust-domain", "partner.test", "--path", &path, "--format", format];
        let socket = server.socket().display().to_string();
        crate::support::outcome(&mut crate::support::countersign(&[&set[..], &["--socket", &socket]].concat()))
    };
    let (code, said) = set("pem");
    assert!(code == 2 && said.contains("needs --format spiffe"), "{said}");
    let (code, said) = set("spiffe");
    assert!(code == 0 && said.contains("bundle of partner.test set: 0 X.509 and 1 JWT authorities"), "{said}");
    let client = r#"
import sys, time
from spiffe import WorkloadApiClient, TrustDomain
client, (token, unknown) = WorkloadApiClient(sys.argv[1]), sys.argv[2:]
def bundle():
    try: return client.fetch_jwt_bundles().get_bundle_for_trust_domain(TrustDomain("partner.test"))
    except Exception as e: print(repr(e), file=sys.stderr)
end = time.time() + 20
while not bundle() and time.time() < end: time.sleep(0.2)
print(*bundle().jwt_authorities)
svid = client.validate_jwt_svid(token, "me")
print(svid.spiffe_id, *svid.audience)
for bad in ((token, "you"), (unknown, "me"), (token[:-4] + "AAAA", "me")):
    try: print("accepted", client.validate_jwt_svid(*bad))
    except Exception as e: print("refused", e)
"#;
    let ask = || {
        let socket = format!("unix://{}", server.agent_socket().display());
        run(Command::new(&python).args(["-c", client, &socket, token, unknown]))
    };
    // The entry does not federate with it yet.
    let entry = &server.json(&["entry", "show"])[0];
    server.json(&["entry", "update", "--id", entry["id"].as_str().unwrap(), "--federates-with", "partner.test"]);
    let said = ask();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..2], ["k1", "spiffe://partner.test/db me"], "{said}");
    for (line, why) in lines[2..].iter().zip(["`aud`", "no JWT authority `k2`", "signature is wrong"]) {
        assert!(line.starts_with("refused") && line.contains(why), "{said}");
    }
    assert_eq!(lines.len(), 5, "{said}");
}

#[test]
fn the_pypi_client_fetches_tokens_that_its_peers_accept_until_their_key_is_revoked() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (server, agent) = world(dir.path());
    let client = r#"
import sys
from spiffe import WorkloadApiClient, SpiffeId
client, (me, known) = WorkloadApiClient(sys.argv[1]), sys.argv[2:]
def say(what):
    try: print(what())
    except Exception as e: print("refused", repr(e).replace("\n", " "))
if known: say(lambda: client.validate_jwt_svid(known, "db").spiffe_id)
svid = client.fetch_jwt_svid({"db", "cache"}, SpiffeId(me))
print(svid.token)
print(svid.spiffe_id, *sorted(svid.audience))
print(client.validate_jwt_svid(svid.token, "cache").spiffe_id)
say(lambda: client.validate_jwt_svid(svid.token, "web").spiffe_id)
say(lambda: client.fetch_jwt_svid({"db"}, SpiffeId(me + "/other")).spiffe_id)
print(len(client.fetch_jwt_svids({"db"})))
"#;
    let me = format!("spiffe://{TD}/me");
    let ask = |known: &str| {
        let socket = format!("unix://{}", server.agent_socket().display());
        run(Command::new(&python).args(["-c", client, &socket, &me, known]))
    };
    wait_for("the first SVID", Duration::from_secs(20), || agent.log().contains("SVID ready").then_some(()));
    let said = ask("");
    let lines: Vec<&str> = said.lines().collect();
    let token = lines[0].to_owned();
    assert_eq!(lines[1..3], [&format!("{me} cache db"), &me], "{said}");
    for (line, why) in lines[3..].iter().zip(["`aud`", "is none of the caller's"]) {
        assert!(line.starts_with("refused") && line.contains(why), "{said}");
    }
    assert_eq!(lines[5], "1", "{said}");
    assert_eq!(
        ask(&token).lines().collect::<Vec<_>>()[..2],
        [me.as_str(), &token],
        "the same one, and it is still good"
    );
    // Another key signs, and what the first one signed is good until it is revoked.
    let first = server.json(&["authority", "show"])["jwt"]["active"]["id"].as_str().unwrap().to_owned();
    server.json(&["authority", "prepare", "--kind", "jwt"]);
    server.json(&["authority", "activate", "--kind", "jwt"]);
    server.json(&["authority", "taint", "--kind", "jwt", "--id", &first]);
    let renewed = wait_for("a token of the new key", Duration::from_secs(10), || {
        let said = ask(&token);
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines[0], me, "a tainted key's tokens are still accepted: {said}");
        (lines[1] != token).then(|| lines[1].to_owned())
    });
    server.json(&["authority", "revoke", "--kind", "jwt", "--id", &first]);
    wait_for("the revocation", Duration::from_secs(10), || ask(&token).starts_with("refused").then_some(()));
    assert_eq!(ask(&renewed).lines().next(), Some(me.as_str()));
    let audit = std::fs::read_to_string(dir.path().join("audit.log")).unwrap();
    assert!(audit.contains("jwt_svid") && !audit.contains(&token[token.len() - 20..]), "no token in the audit log");
    assert!(!agent.log().contains(&token[token.len() - 20..]), "nor in the agent's");
}

#[test]
fn a_token_is_fetched_and_validated_by_hand_and_wrong_input_is_told() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut server, agent) = world(dir.path());
    wait_for("the first SVID", Duration::from_secs(20), || agent.log().contains("SVID ready").then_some(()));
    let socket = server.agent_socket().display().to_string();
    let jwt = |args: &[&str]| {
        let all = [&["jwt"], args, &["--socket", &socket]].concat();
        crate::support::outcome(&mut crate::support::countersign(&all))
    };
    let fetch = |audience: &str| {
        let (code, said) = jwt(&["fetch", "--audience", audience, "--output", "json"]);
        (code == 0).then(|| serde_json::from_str::<serde_json::Value>(&said).unwrap()[0].clone()).ok_or(said)
    };
    let fetched = fetch("db").unwrap();
    assert_eq!(fetched["spiffe_id"], format!("spiffe://{TD}/me"));
    let token = fetched["token"].as_str().unwrap();
    let (code, said) = jwt(&["validate", "--audience", "db", "--svid", token]);
    assert!(code == 0 && said.contains(&format!("spiffe://{TD}/me")) && said.contains("db"), "{said}");
    let (_, told) = jwt(&["validate", "--audience", "db", "--svid", token, "--output", "json"]);
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["claims"]["exp"], &told["claims"]["aud"][0]), (&fetched["expires_at"], &"db".into()), "{told}");
    assert!(told["claims"]["exp"].is_i64());
    for (args, why) in [
        (&["validate", "--audience", "web", "--svid", token][..], "does not have the audience"),
        (&["validate", "--audience", "db", "--svid", "x.y.z"], "no JSON object"),
        (&["fetch", "--audience", ""], "audience must be specified"),
        (&["fetch", "--audience", "db", "--spiffe-id", "spiffe://test.local/other"], "is none of the caller's"),
        (&["fetch", "--audience", "db", "--spiffe-id", "me"], "invalid requested SPIFFE ID"),
    ] {
        let (code, said) = jwt(args);
        assert!(code == 1 && said.contains(why), "{args:?}: {said}");
    }
    let (code, said) = jwt(&["fetch", "--audience", "db", "--spiffe-id", ""]);
    assert!(code == 2 && said.contains("--spiffe-id: it is empty"), "{said}");
    // The server's socket instead of the agent's.
    let mixed_up = ["jwt", "fetch", "--audience", "db", "--socket", &server.socket().display().to_string()];
    let (code, said) = crate::support::outcome(&mut crate::support::countersign(&mixed_up));
    assert!(code == 1 && said.contains("is it the socket of another role?"), "{said}");
    // An entry's own lifetime, which no token outlives its authority by.
    let entry = server.json(&["entry", "show"])[0]["id"].as_str().unwrap().to_owned();
    server.json(&["entry", "update", "--id", &entry, "--jwt-svid-ttl", "400d"]);
    let end = server.json(&["authority", "show"])["jwt"]["active"]["expires_at"].as_i64().unwrap();
    let lives = || {
        let issued: Vec<_> = server.audit().into_iter().filter(|l| l["kind"] == "jwt_svid").collect();
        let end = issued.last().unwrap()["expires_at"].as_str().unwrap().to_owned();
        time::OffsetDateTime::parse(&end, &time::format_description::well_known::Rfc3339).unwrap().unix_timestamp()
    };
    wait_for("a token of the entry as it is now", Duration::from_secs(10), || {
        fetch("db").unwrap();
        (lives() == end).then_some(())
    });
    // With the server away the token at hand is given out, and no other one.
    let token = fetch("db").unwrap();
    server.kill();
    assert_eq!(fetch("db").unwrap(), token);
    assert!(fetch("cache").unwrap_err().contains("could not fetch JWT-SVID"));
}
