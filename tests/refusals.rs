//! Who and what is not let through, each with its reason in log, metric and `status`.
//!
//! Peers here are sidecars on fixed ways whose identities come from files, so that each can be wrong in one way; hostile
//! ones are openssl's client, or bytes by hand.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::metrics::http_get;
use crate::support::roles::{Role, Server, TD, free_port};
use crate::support::{Mesh, able, countersign, outcome, run, sh, wait_for};

/// A sidecar that takes mTLS for an echo server, as `spiffe://test.local/server`.
struct Inbound {
    dir: PathBuf,
    port: u16,
    http: u16,
    role: Role,
    admin: PathBuf,
}

/// Answers every connection with what comes.
fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut back = stream.try_clone().unwrap();
                let _ = std::io::copy(&mut &stream, &mut back);
                let _ = back.shutdown(std::net::Shutdown::Write);
            });
        }
    });
    port
}

impl Inbound {
    fn start(dir: &Path, identity: &Path, more: &[&str]) -> Self {
        let (port, http, admin) = (free_port(), free_port(), dir.join("inbound.sock"));
        let file = |n: &str| identity.join(n).display().to_string();
        let (listen, target, page) =
            (format!("127.0.0.1:{port}"), format!("127.0.0.1:{}", echo()), format!("127.0.0.1:{http}"));
        let bundle = format!("{TD}={}", file("bundle.pem"));
        let (svid, key, socket) = (file("svid.pem"), file("key.pem"), admin.display().to_string());
        let args = [
            "proxy",
            "--svid",
            &svid,
            "--key",
            &key,
            "--bundle",
            &bundle,
            "--inbound-listen",
            &listen,
            "--inbound-target",
            &target,
            "--http",
            &page,
            "--admin-socket",
            &socket,
        ];
        let args: Vec<String> = args.iter().chain(more).map(|a| (*a).to_owned()).collect();
        Self { dir: dir.to_owned(), port, http, role: Role::start(dir, "inbound", &args), admin }
    }

    /// A reason stands in the log, the metrics and the status.
    fn refused(&self, code: &str, text: &str) {
        wait_for(&format!("{code} in the log: {}", self.role.log()), Duration::from_secs(15), || {
            self.role.log().lines().any(|l| l.contains(&format!("code=\"{code}\"")) && l.contains(text)).then_some(())
        });
        let metrics = http_get(self.http, "/metrics").unwrap();
        assert!(
            metrics.contains(&format!("countersign_proxy_refused_total{{direction=\"inbound\",reason=\"{code}\"}}")),
            "{metrics}"
        );
        let status = run(countersign(&["status", "--socket"]).arg(&self.admin));
        assert!(status.contains(&format!("inbound {code}")), "{status}");
    }

    /// What a caller with this identity and expectation gets back for `hello`; and its sidecar's log.
    fn called_by(&self, name: &str, identity: &Path, expect: &str) -> (std::io::Result<String>, String) {
        let port = free_port();
        let file = |n: &str| identity.join(n).display().to_string();
        let args = [
            "proxy",
            "--svid",
            &file("svid.pem"),
            "--key",
            &file("key.pem"),
            "--bundle",
            &format!("{TD}={}", self.dir.join("server-id/bundle.pem").display()),
            "--outbound-listen",
            &format!("127.0.0.1:{port}"),
            "--outbound-target",
            &format!("127.0.0.1:{}", self.port),
            "--outbound-expect",
            expect,
        ];
        let role = Role::start(&self.dir, name, &args.map(str::to_owned));
        let talk = || {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_read_timeout(Some(Duration::from_secs(15)))?;
            stream.write_all(b"hello")?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        };
        let got = talk();
        if got.is_err() {
            // A log has a writer of its own, which may come a moment later than the reset.
            let why = || role.log().contains("code=").then_some(());
            wait_for("the reason in the caller's log", Duration::from_secs(10), why);
        }
        (got, role.log())
    }
}

const SERVER_ID: &str = "spiffe://test.local/server";

/// A CA, and a folder with an identity of it that breaks what `extensions` says.
fn forge(dir: &Path, name: &str, ca: &str, extensions: &str, days: &str) -> PathBuf {
    let folder = dir.join(name);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("ext"), extensions).unwrap();
    sh(&format!(
        "cd {} && openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out key.pem
        openssl req -new -key key.pem -subj /O=Forged -out csr
        openssl x509 -req -in csr -CA {1}/{ca}.crt -CAkey {1}/{ca}.key -set_serial 0x{2} {days} -extfile ext -out svid.pem 2>/dev/null
        cp {1}/{ca}.crt bundle.pem",
        folder.display(),
        dir.display(),
        "4711"
    ));
    folder
}

/// What `openssl ca` needs to sign anything in the folder that it runs in.
const CA_CONFIG: &str = "[ca]\ndefault_ca=d\n[d]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n[p]\norganizationName=optional\n";

/// A CA that is a day old: what was signed by it an hour ago and has ended since is of its time.
fn make_ca(dir: &Path, name: &str) {
    let (from, to) = (sh("date -u -d '-1 day' +%Y%m%d%H%M%SZ"), sh("date -u -d '30 days' +%Y%m%d%H%M%SZ"));
    let folder = dir.join(format!("{name}.ca"));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("ca.cnf"), CA_CONFIG).unwrap();
    std::fs::write(
        folder.join("ext"),
        format!("basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\nsubjectAltName=URI:spiffe://{TD}\n"),
    )
    .unwrap();
    sh(&format!(
        "cd {0} && : > index && echo 01 > serial
        openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out ../{name}.key
        openssl req -new -key ../{name}.key -subj /O={name} -out csr
        openssl ca -batch -notext -config ca.cnf -selfsign -in csr -keyfile ../{name}.key -startdate {1} -enddate {2} -extfile ext -out ../{name}.crt",
        folder.display(),
        from.trim(),
        to.trim()
    ));
}

/// A CA below `ca` with this key usage.
fn make_intermediate(dir: &Path, name: &str, usage: &str) {
    std::fs::write(dir.join("ext"), format!("basicConstraints=critical,CA:TRUE\nkeyUsage=critical,{usage}\n")).unwrap();
    sh(&format!(
        "cd {} && openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out {name}.key
        openssl req -new -key {name}.key -subj /O={name} -out {name}.csr
        openssl x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -set_serial 0x{} -days 3 -extfile ext -out {name}.crt 2>/dev/null",
        dir.display(),
        if usage == "keyCertSign" { "21" } else { "22" }
    ));
}

fn leaf(uri: &str) -> String {
    format!(
        "subjectAltName={uri}\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n"
    )
}

#[test]
fn certificates_that_are_not_right_are_refused_for_their_own_reason() {
    if !able(&["openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    make_ca(dir.path(), "ca");
    make_ca(dir.path(), "other");
    let own = forge(dir.path(), "server-id", "ca", &leaf(&format!("URI:{SERVER_ID}")), "-days 2");
    let inbound = Inbound::start(dir.path(), &own, &[]);
    let call = |name: &str, ca: &str, extensions: &str, days: &str| {
        let identity = forge(dir.path(), name, ca, extensions, days);
        inbound.called_by(name, &identity, SERVER_ID)
    };
    let good = call("good", "ca", &leaf("URI:spiffe://test.local/a"), "-days 2");
    assert_eq!(good.0.unwrap(), "hello", "the untouched one passes: {}", good.1);
    for (name, ca, extensions, days, code, text) in [
        (
            "other-ca",
            "other",
            leaf("URI:spiffe://test.local/a"),
            "-days 2",
            "untrusted",
            "is not signed by an authority of its trust domain",
        ),
        (
            "other-td",
            "ca",
            leaf("URI:spiffe://elsewhere.local/a"),
            "-days 2",
            "trust_domain",
            "no trust bundle for the trust domain `elsewhere.local` that the peer claims",
        ),
    ] {
        let (got, log) = call(name, ca, &extensions, days);
        assert!(got.is_err(), "{name} got through: {log}");
        inbound.refused(code, text);
    }
    // A sidecar refuses to start with an SVID that is none: hostile callers bring their own TLS.
    let raw_chain = |name: &str, ca: &str, extensions: &str, days: &str, more: &[&str]| {
        let identity = forge(dir.path(), name, ca, extensions, days);
        let more: String = more.iter().map(|n| std::fs::read_to_string(dir.path().join(n)).unwrap()).collect();
        std::fs::write(identity.join("more.pem"), &more).unwrap();
        let mut client = Command::new("openssl");
        client
            .args([
                "s_client",
                "-tls1_3",
                "-alpn",
                "countersign/1",
                "-connect",
                &format!("127.0.0.1:{}", inbound.port),
                "-cert",
            ])
            .arg(identity.join("svid.pem"))
            .arg("-key")
            .arg(identity.join("key.pem"));
        if !more.is_empty() {
            client.arg("-cert_chain").arg(identity.join("more.pem"));
        }
        let mut client = client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        // A whole preamble and a payload: were the certificate good, it would be echoed.
        let _ = client.stdin.as_mut().unwrap().write_all(b"\x01\x00\x07\x04\x7f\x00\x00\x01\x00\x50secret");
        // Refused, it ends by itself; were it not, it would wait for more to send.
        let stdin = client.stdin.take();
        wait_for(&format!("{name} to be cut off"), Duration::from_secs(10), || client.try_wait().unwrap());
        drop(stdin);
        let output = client.wait_with_output().unwrap();
        assert!(!String::from_utf8_lossy(&output.stdout).contains("secret"), "{name} was echoed");
    };
    let raw = |name: &str, extensions: &str, days: &str| raw_chain(name, "ca", extensions, days, &[]);
    let at = |minutes: i32| sh(&format!("date -u -d '{minutes} minutes' +%Y%m%d%H%M%SZ")).trim().to_owned();
    let dates = |from: i32, to: i32| format!("-not_before {} -not_after {}", at(from), at(to));
    let supports_dates = sh("openssl x509 -help 2>&1 || true").contains("-not_before");
    raw("two-sans", &leaf("URI:spiffe://test.local/a,URI:spiffe://test.local/b"), "-days 2");
    inbound.refused("uri_sans", "holds 2 URI names");
    raw("no-san", &leaf("DNS:a.test"), "-days 2");
    inbound.refused("uri_sans", "holds 0 URI names");
    raw("rootless", &leaf("URI:spiffe://test.local"), "-days 2");
    inbound.refused("no_path", "has no path");
    raw("bad-id", &leaf("URI:spiffe://test.local/a/../b"), "-days 2");
    inbound.refused("bad_spiffe_id", "is not a SPIFFE ID");
    raw(
        "ca-as-leaf",
        "subjectAltName=URI:spiffe://test.local/a\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,digitalSignature\n",
        "-days 2",
    );
    inbound.refused("ca_as_leaf", "showed a CA certificate");
    raw(
        "wrong-usage",
        "subjectAltName=URI:spiffe://test.local/a\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,keyAgreement\n",
        "-days 2",
    );
    inbound.refused("key_usage", "digitalSignature is not set");
    // An intermediate that may not sign; the same leaf below one that may, with something behind it that is in no path.
    let a = leaf("URI:spiffe://test.local/a");
    make_intermediate(dir.path(), "unfit", "digitalSignature");
    make_intermediate(dir.path(), "fit", "keyCertSign");
    raw_chain("below-unfit", "unfit", &a, "-days 2", &["unfit.crt"]);
    inbound.refused("untrusted", "keyUsage lacks keyCertSign");
    raw_chain("junk", "ca", &a, "-days 2", &["other.crt"]);
    inbound.refused("not_in_path", "1 of the certificates");
    raw_chain("junk-behind", "fit", &a, "-days 2", &["fit.crt", "other.crt"]);
    raw("two-lines", &leaf("URI:x y\\n2026-11-26 WARN forged"), "-days 2");
    inbound.refused("bad_spiffe_id", "is not a SPIFFE ID");
    assert!(!inbound.role.log().contains("\n2026-11-26 WARN forged"), "{}", inbound.role.log());
    if supports_dates {
        raw("expired", &leaf("URI:spiffe://test.local/a"), &dates(-60, -1));
        inbound.refused("expired", "check both clocks");
        raw("early", &leaf("URI:spiffe://test.local/a"), &dates(5, 60));
        inbound.refused("not_yet_valid", "check both clocks");
    } else {
        // openssl before 3.4 cannot set both ends: `faketime` is not needed, the `ca` command can.
        for (name, from, to, code) in [("expired", -60, -1, "expired"), ("early", 5, 60, "not_yet_valid")] {
            let identity = forge_dated(dir.path(), name, &at(from), &at(to));
            let port = inbound.port;
            sh(&format!(
                "(printf x; sleep 0.3) | openssl s_client -tls1_3 -alpn countersign/1 -connect 127.0.0.1:{port} -cert {0}/svid.pem -key {0}/key.pem >/dev/null 2>&1 || true",
                identity.display()
            ));
            inbound.refused(code, "check both clocks");
        }
    }
}

/// A leaf with its two ends set, by openssl's CA command.
fn forge_dated(dir: &Path, name: &str, from: &str, to: &str) -> PathBuf {
    let folder = dir.join(name);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("ext"), leaf("URI:spiffe://test.local/a")).unwrap();
    std::fs::write(folder.join("ca.cnf"), CA_CONFIG).unwrap();
    sh(&format!(
        "cd {0} && : > index && echo 4712 > serial
        openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out key.pem
        openssl req -new -key key.pem -subj /O=Forged -out csr
        openssl ca -batch -notext -config ca.cnf -in csr -cert {1}/ca.crt -keyfile {1}/ca.key -startdate {from} -enddate {to} -extfile ext -out svid.pem 2>/dev/null",
        folder.display(),
        dir.display()
    ));
    folder
}

#[test]
fn callers_without_certificate_or_with_old_tls_or_another_protocol_are_refused() {
    if !able(&["openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let own = server.mint("/server", "server-id", &[]);
    let inbound = Inbound::start(dir.path(), &own, &[]);
    let client = |args: &str| {
        let id = own.display();
        outcome(Command::new("sh").arg("-c").arg(format!(
            "(printf x; sleep 0.3) | openssl s_client -connect 127.0.0.1:{} {}",
            inbound.port,
            args.replace("ID", &id.to_string())
        )))
    };
    let (_, said) = client("-tls1_3 -alpn countersign/1");
    assert!(said.contains("certificate required"), "TLS 1.3's own alert: {said}");
    inbound.refused("no_certificate", "showed no certificate");
    let (_, said) = client("-tls1_2 -cert ID/svid.pem -key ID/key.pem");
    assert!(said.contains("protocol version"), "{said}");
    inbound.refused("tls", "TLS handshake failed");
    client("-tls1_3 -cert ID/svid.pem -key ID/key.pem");
    inbound.refused("protocol", "did not offer the protocol");
    let (_, said) = client("-tls1_3 -alpn h2 -cert ID/svid.pem -key ID/key.pem");
    assert!(said.contains("no application protocol"), "{said}");
}

#[test]
fn a_server_that_is_not_the_expected_one_learns_nothing() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let own = server.mint("/thief", "server-id", &[]);
    let inbound = Inbound::start(dir.path(), &own, &[]);
    let caller = server.mint("/caller", "caller-id", &[]);
    let (got, log) = inbound.called_by("caller", &caller, "spiffe://test.local/bank");
    assert!(got.is_err());
    assert!(
        log.contains("code=\"wrong_identity\"")
            && log.contains("expected `spiffe://test.local/bank` there, found `spiffe://test.local/thief`"),
        "{log}"
    );
    // The thief saw a handshake that was called off, and no certificate of ours.
    inbound.refused("tls", "TLS handshake failed");
    assert!(!inbound.role.log().contains("/caller"), "{}", inbound.role.log());
}

#[test]
fn a_caller_that_is_not_on_the_list_is_told_why() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let own = server.mint("/server", "server-id", &[]);
    let inbound = Inbound::start(dir.path(), &own, &["--inbound-allow", "spiffe://test.local/friend"]);
    let (friend, other) = (server.mint("/friend", "friend-id", &[]), server.mint("/other", "other-id", &[]));
    assert_eq!(inbound.called_by("friend", &friend, SERVER_ID).0.unwrap(), "hello");
    let (got, log) = inbound.called_by("other", &other, SERVER_ID);
    assert!(got.is_err());
    assert!(
        log.contains(
            "refused by the other sidecar (not_allowed): `spiffe://test.local/other` is not allowed to call port"
        ),
        "{log}"
    );
    inbound.refused("not_allowed", "`spiffe://test.local/other` is not allowed to call port");
}

#[test]
fn slow_oversized_and_endless_hellos_and_garbage_end_in_bounded_time() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let own = server.mint("/server", "server-id", &[]);
    let inbound = Inbound::start(dir.path(), &own, &[]);
    let dial = || {
        let stream = TcpStream::connect(("127.0.0.1", inbound.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    };
    let ends_within = |mut stream: TcpStream, seconds: u64| {
        let began = Instant::now();
        let mut rest = vec![];
        let _ = stream.read_to_end(&mut rest);
        assert!(began.elapsed() < Duration::from_secs(seconds), "it took {:?}", began.elapsed());
        rest
    };
    // Garbage is refused at once.
    let mut garbage = dial();
    garbage.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    assert!(!ends_within(garbage, 3).windows(4).any(|w| w == b"HTTP"));
    inbound.refused("tls", "TLS handshake failed");
    // A handshake message that says it is 16 MiB long.
    let mut huge = dial();
    huge.write_all(&[0x16, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff]).unwrap();
    let _ = huge.write_all(&[0; 0x3ffc]);
    ends_within(huge, 3);
    // Endless records of a handshake that never completes.
    let mut endless = dial();
    let record = [&[0x16, 3, 1, 0x10, 0][..], &[1, 0, 0xff, 0xff], &[0; 0xffc]].concat();
    let began = Instant::now();
    while endless.write_all(&record).is_ok() && began.elapsed() < Duration::from_secs(5) {}
    assert!(began.elapsed() < Duration::from_secs(5), "it read on and on");
    // One that says nothing is dropped after ten seconds; meanwhile others are served.
    let silent = dial();
    let caller = server.mint("/caller", "caller-id", &[]);
    assert_eq!(inbound.called_by("caller", &caller, SERVER_ID).0.unwrap(), "hello");
    ends_within(silent, 14);
    inbound.refused("handshake_timeout", "took longer than 10s");
}

#[test]
fn bad_preambles_are_refused_and_nobody_is_relayed() {
    if !able(&["openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let own = server.mint("/server", "server-id", &[]);
    let inbound = Inbound::start(dir.path(), &own, &[]);
    let say = |bytes: &str, wait: &str| {
        sh(&format!(
            "(printf '{bytes}'; sleep {wait}) | openssl s_client -quiet -tls1_3 -alpn countersign/1 -connect 127.0.0.1:{} -cert {1}/svid.pem -key {1}/key.pem 2>/dev/null || true",
            inbound.port,
            own.display()
        ))
    };
    assert!(!say(r"GET / HTTP/1.1\r\n\r\n", "0.3").contains("HTTP"));
    inbound.refused("preamble", "only 1 is spoken here");
    say(r"\001\377\377", "0.3");
    inbound.refused("preamble", "65535 bytes long");
    say(r"\001", "11");
    inbound.refused("preamble", "not there within 10s");
}

#[test]
fn a_mesh_relays_to_no_one_and_hides_its_own_ports() {
    if !able(&["openssl", "python3"]) {
        return;
    }
    let mesh = Mesh::up(
        "relay",
        "  - name: web\n    ports: [8000]\n    workdir: /\n    command: [/usr/bin/python3, -m, http.server, '8000']\n  - name: other\n    ports: [8000]\n    command: [python3, -m, http.server, '8000']\n",
    );
    mesh.wait_for_port("web", 8000);
    mesh.wait_for_port("other", 8000);
    let identity = tempfile::tempdir().unwrap();
    let (td, folder) = (format!("{}.local", mesh.name), identity.path().display().to_string());
    run(&mut mesh.operator(&["mint", "x509", "--spiffe-id", &format!("spiffe://{td}/insider"), "--write", &folder]));
    // An insider with a good identity and TLS of its own, from a namespace without a redirect, names its own destinations.
    let ns = format!("cs-{}-web", mesh.name);
    let ask = |octets: &str, port: &str| {
        let script = format!(
            "(printf '\\001\\000\\007\\004{octets}{port}'; printf 'GET / HTTP/1.0\\r\\n\\r\\n'; sleep 0.5) | openssl s_client -quiet -tls1_3 -alpn countersign/1 -connect 10.86.0.10:15008 -cert {folder}/svid.pem -key {folder}/key.pem 2>/dev/null || true"
        );
        sh(&format!("ip netns exec {ns} sh -c \"{}\"", script.replace('"', "\\\"").replace('\\', "\\\\")))
    };
    let (web, other, loopback) = (r"\012\126\000\012", r"\012\126\000\013", r"\177\000\000\001");
    let (http, outbound) = (r"\037\100", r"\072\231"); // 8000, 15001
    assert!(ask(web, http).contains("200 OK"), "the honest way is open");
    assert!(ask(other, http).contains("not_ours"), "not to another workload");
    assert!(ask(loopback, http).contains("not_ours"), "not to what listens on loopback alone");
    assert!(ask(web, outbound).contains("loop"), "not to the sidecar itself");
    let refused = mesh.status("web")["refused"].clone();
    assert!(
        refused["inbound not_ours"].as_u64().unwrap() == 2 && refused["inbound loop"].as_u64().unwrap() == 1,
        "{refused}"
    );
    mesh.down();
}

#[test]
fn strict_lets_nothing_out_but_the_mesh_and_named_exceptions() {
    if !able(&["python3"]) {
        return;
    }
    let mesh = Mesh::up(
        "egress",
        "  - name: web\n    ports: [8000]\n    workdir: /\n    command: [/usr/bin/python3, -m, http.server, '8000']\n",
    );
    mesh.wait_for_port("web", 8000);
    let python = "import socket,sys\ns=socket.socket(); s.settimeout(5)\ntry:\n s.connect((sys.argv[1], int(sys.argv[2]))); s.send(b'GET / HTTP/1.0\\r\\n\\r\\n'); print(s.recv(12))\nexcept OSError as e: print(type(e).__name__)";
    let said = mesh.run("out", &["/usr/bin/python3", "-c", python, "10.86.0.99", "8000"]);
    assert_eq!(said.trim(), "ConnectionResetError");
    let said = mesh.run("in", &["/usr/bin/python3", "-c", python, "web", "8000"]);
    assert_eq!(said.trim(), "b'HTTP/1.0 200'");
    // A port of a meshed workload that nobody listens on, and the sidecars' own ports.
    for port in ["8001", "15001", "15006"] {
        assert_eq!(
            mesh.run("knock", &["/usr/bin/python3", "-c", python, "web", port]).trim(),
            "ConnectionResetError",
            "{port}"
        );
    }
    mesh.down();
}

#[test]
fn join_tokens_work_once_and_end() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let token = server.token(&[]);
    let first = Role::start(dir.path(), "agent", &server.agent_args(&token));
    wait_for("the first agent", Duration::from_secs(10), || first.log().contains("attested").then_some(()));
    drop(first);
    let second = |name: &str, token: &str, refused: &str| {
        std::fs::remove_dir_all(dir.path().join("agent")).unwrap();
        let agent = Role::start(dir.path(), name, &server.agent_args(token));
        wait_for("a refusal", Duration::from_secs(20), || {
            let log = agent.log();
            (log.contains(refused) && log.contains("make another with `countersign token generate`")).then_some(())
        });
    };
    second("used", &token, "join token does not exist or has already been used");
    let brief = server.json(&["token", "generate", "--ttl", "1s"]);
    wait_for("the token's end", Duration::from_secs(10), || {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        (now > brief["expires_at"].as_u64().unwrap()).then_some(())
    });
    second("late", brief["token"].as_str().unwrap(), "join token expired");
    second("made-up", "0123456789abcdef", "join token does not exist or has already been used");
    // Whoever has no identity cannot fill the record: a source has one line per reason and minute.
    let refused: Vec<_> = server.audit().into_iter().filter(|l| l["outcome"] == "refused").collect();
    assert!(
        refused.len() == 1
            && refused.iter().all(|l| l["kind"] == "agent_svid"
                && l["caller"] == "anonymous@127.0.0.1"
                && l["reason"].as_str().unwrap().contains("join token")),
        "{refused:?}"
    );
    let status = run(server.operator(&["status", "--socket"]).arg(server.socket()));
    assert!(status.contains("attestation"), "{status}");
}

#[test]
fn garbage_on_every_port_and_socket_leaves_the_roles_serving() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &["--metrics", "127.0.0.1:0"]);
    let (_agent, _) = server.agent();
    let mut garbage = vec![0u8; 200_000];
    std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut garbage).unwrap();
    for head in [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], b"", b"\x16\x03\x01\x02\x00\x01"] {
        let mut tcp = TcpStream::connect(server.address).unwrap();
        let _ = tcp.write_all(head).and_then(|()| tcp.write_all(&garbage));
        for socket in [server.socket(), server.agent_socket()] {
            let mut unix = std::os::unix::net::UnixStream::connect(socket).unwrap();
            let _ = unix.write_all(head).and_then(|()| unix.write_all(&garbage));
        }
    }
    assert_eq!(server.json(&["entry", "show"]), serde_json::json!([]));
    let status = run(countersign(&["status", "--socket"]).arg(server.agent_socket()));
    assert!(status.contains("test.local"), "{status}");
    // A workload's call without the header of the standard.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        use countersign_api::workload::{X509svidRequest, spiffe_workload_api_client::SpiffeWorkloadApiClient};
        let channel = countersign_api::transport::unix_channel(server.agent_socket());
        let refused = SpiffeWorkloadApiClient::new(channel).fetch_x509svid(X509svidRequest {}).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    });
}

#[test]
fn an_agent_refuses_a_server_that_is_not_its_own() {
    if !able(&[]) {
        return;
    }
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (server, impostor) = (Server::start(dir.path(), &[]), Server::start(other.path(), &[]));
    let token = server.token(&[]);
    let mut args = server.agent_args(&token);
    let at = args.iter().position(|a| a == "--server").unwrap() + 1;
    args[at] = impostor.address.to_string();
    let agent = Role::start(dir.path(), "agent", &args);
    wait_for("the refusal", Duration::from_secs(20), || {
        agent.log().contains("is not signed by an authority of its trust domain").then_some(())
    });
    assert!(!impostor.audit().iter().any(|l| l["kind"] == "agent_svid"), "the token was never shown to it");
}
