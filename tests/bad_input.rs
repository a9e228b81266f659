//! Mistakes get one line with the place and the mend, exit code 2, and leave nothing behind.

use std::process::Command;

use crate::support::{COUNTERSIGN, able, countersign, outcome, sh};

fn one_line(command: &mut Command, expected: &str) {
    let (code, said) = outcome(command);
    assert!(said.contains(expected), "{command:?}\nsaid: {said}\nexpected: {expected}");
    assert_eq!(code, 2, "{said}");
    assert_eq!(said.trim().lines().filter(|l| !l.contains(" INFO ")).count(), 1, "one line: {said}");
}

#[test]
fn role_flags_and_files() {
    let dir = tempfile::tempdir().unwrap();
    let place = |n: &str| dir.path().join(n).display().to_string();
    let write = |n: &str, text: &str| {
        std::fs::write(dir.path().join(n), text).unwrap();
        place(n)
    };
    let unknown = write("unknown.yaml", "trust_domain: a.b\nbindd: 1.2.3.4:5\n");
    let wrong = write("wrong.yaml", "trust_domain: a.b\nbind: nowhere\n");
    let ttl = write("ttl.yaml", "trust_domain: a.b\n\nsvid_ttl: forever\n");
    one_line(
        &mut countersign(&["server"]),
        "--trust-domain is missing: give the flag, or `trust_domain` in the file of --config",
    );
    one_line(&mut countersign(&["server", "--config", "/no/such.yaml"]), "/no/such.yaml: cannot be read");
    one_line(
        &mut countersign(&["server", "--config", &unknown]),
        "unknown.yaml:2: unknown key `bindd`; did you mean `bind`?",
    );
    one_line(&mut countersign(&["server", "--config", &wrong]), "wrong.yaml:2: bind: ");
    one_line(
        &mut countersign(&["server", "--config", &ttl]),
        "ttl.yaml:3: svid_ttl: `forever` is not a length of time: write 20s, 5m, 1h, 30d or 1h30m",
    );
    one_line(
        &mut countersign(&["server", "--trust-domain", "A.b"]),
        "--trust-domain: `A.b` is not a trust domain name: it has upper-case letters",
    );
    one_line(
        &mut countersign(&["server", "--trust-domain", "a", "--ca-key-type", "rsa-512"]),
        "--ca-key-type: `rsa-512` is not a key type",
    );
    one_line(
        &mut countersign(&["server", "--trust-domain", "a", "--key-manager", "cloud"]),
        "--key-manager: `cloud` is no key manager: use disk or memory",
    );
    one_line(
        &mut countersign(&["server", "--trust-domain", "a", "--svid-ttl", "2h", "--ca-ttl", "1h"]),
        "--svid-ttl: an SVID cannot outlive its authority",
    );
    one_line(
        &mut countersign(&["server", "--trust-domain", "a", "--upstream-cert", "x"]),
        "an upstream authority needs both --upstream-cert and --upstream-key",
    );
    one_line(
        &mut countersign(&["agent", "--trust-domain", "a", "--server", "here"]),
        "--server: `here` is no address: write host:port",
    );
    one_line(
        &mut countersign(&["agent", "--trust-domain", "a", "--server", "h:1", "--join-token-file", "/no/token"]),
        "--join-token-file: /no/token: No such file",
    );
    one_line(
        &mut countersign(&[
            "agent",
            "--trust-domain",
            "a",
            "--server",
            "h:1",
            "--socket",
            &place("a.sock"),
            "--data-dir",
            &place("data"),
        ]),
        "no trust bundle to know the server by; fetch it with `countersign bundle show",
    );
    one_line(&mut countersign(&["proxy", "--svid", "x"]), "an identity from files needs --svid, --key and --bundle");
    one_line(
        &mut countersign(&["proxy", "--outbound-listen", "127.0.0.1:1", "--outbound-target", "127.0.0.1:2"]),
        "--outbound-expect is missing",
    );
    one_line(&mut countersign(&["proxy", "--mesh-port", "15001"]), "must be four different ports");
    one_line(
        &mut countersign(&[
            "proxy",
            "--svid",
            "/no/svid",
            "--key",
            "/no/key",
            "--bundle",
            "a=/no/bundle",
            "--inbound-listen",
            "127.0.0.1:0",
            "--inbound-target",
            "127.0.0.1:2",
        ]),
        "/no/svid: No such file",
    );
    one_line(
        &mut countersign(&["redirect", "--proxy-uid", "2102", "--exclude-outbound-ports", "53, http"]),
        "--exclude-outbound-ports: `http` is no port",
    );
    one_line(
        &mut countersign(&["redirect", "--proxy-uid", "2102", "--exclude-outbound-cidrs", "10.0.0.0/33"]),
        "--exclude-outbound-cidrs: `10.0.0.0/33` is no CIDR",
    );
    one_line(&mut countersign(&["server", "--trust-domain", "a", "--log", "x=loud"]), "--log: `x=loud`");
    assert!(!dir.path().join("a.sock").exists(), "nothing is left");
}

/// Runs a line of `sh`, where `$0` is the program; exit code and what it says on standard error.
fn shell(line: &str) -> (i32, String) {
    let output = Command::new("bash").args(["-o", "pipefail", "-c", line, COUNTERSIGN]).output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_reader_that_has_seen_enough_and_a_full_disk_are_no_reason_to_panic() {
    let install = "install --ignore-cluster --set trustDomain=a.b";
    for command in ["completion bash", install, "install --show-values", "--help", "up --help"] {
        let (code, said) = shell(&format!("\"$0\" {command} | head -c 1 >/dev/null"));
        assert!((code == 141 || code == 0) && said.is_empty(), "{command}: {code} {said}");
        let (code, said) = shell(&format!("\"$0\" {command} >/dev/full"));
        assert_eq!(code, 1, "{command}: {said}");
        assert_eq!(said, "countersign: cannot write to standard output: No space left on device (os error 28)\n");
    }
    // Nobody to tell: the exit code alone is left.
    assert_eq!(shell("\"$0\" up /no/mesh.yaml 2>/dev/full").0, 2);
    assert_eq!(shell("\"$0\" up /no/mesh.yaml 2>&-").0, 2);
}

#[test]
fn files_that_are_no_files_and_tokens_that_are_no_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token").display().to_string();
    std::fs::write(&token, "token    0b7c2a9e\nexpires  2026-01-01T00:00:00Z\n").unwrap();
    let agent =
        |token: &str| countersign(&["agent", "--trust-domain", "a", "--server", "h:1", "--join-token-file", token]);
    one_line(
        &mut agent(&token),
        "token: expected a join token alone, found more around it; write it with `countersign token generate -q`",
    );
    one_line(&mut agent("/dev/zero"), "--join-token-file: /dev/zero: it is a device; expected a file");
    for role in ["server", "agent", "proxy"] {
        one_line(&mut countersign(&[role, "--config", "/dev/zero"]), "/dev/zero: cannot be read: it is a device");
    }
    one_line(&mut countersign(&["up", "/dev/zero"]), "/dev/zero: cannot be read: it is a device; expected a file");
    one_line(&mut countersign(&["up", "/dev/\u{1b}[2J\nx"]), "/dev/\\u{1b}[2J x: cannot be read: No such file");
}

#[test]
fn hidden_commands_are_not_suggested() {
    for wrong in ["top", "shp", "lunch", "prob"] {
        let (code, said) = outcome(&mut countersign(&[wrong]));
        let hidden =
            ["shop", "launch", "probe", "capture", "sidecar-hook"].iter().any(|h| said.contains(&format!("'{h}'")));
        assert!(code == 2 && !hidden, "{said}");
    }
}

#[test]
fn a_taken_port_and_a_taken_socket() {
    let dir = tempfile::tempdir().unwrap();
    let place = |n: &str| dir.path().join(n).display().to_string();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    one_line(
        &mut countersign(&[
            "server",
            "--trust-domain",
            "a",
            "--bind",
            &address,
            "--socket",
            &place("s"),
            "--data-dir",
            &place("d"),
        ]),
        &format!("cannot listen on {address}: Address already in use"),
    );
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("live")).unwrap();
    one_line(
        &mut countersign(&[
            "server",
            "--trust-domain",
            "a",
            "--bind",
            "127.0.0.1:0",
            "--socket",
            &place("live"),
            "--data-dir",
            &place("d"),
        ]),
        "another process listens on this socket",
    );
    std::fs::write(dir.path().join("file"), "precious").unwrap();
    one_line(
        &mut countersign(&[
            "server",
            "--trust-domain",
            "a",
            "--bind",
            "127.0.0.1:0",
            "--socket",
            &place("file"),
            "--data-dir",
            &place("d"),
        ]),
        "there is a file here that is no socket",
    );
    assert_eq!(std::fs::read_to_string(dir.path().join("file")).unwrap(), "precious");
}

#[test]
fn up_and_run_say_what_to_mend() {
    if !able(&["setpriv"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = |text: &str| {
        let path = dir.path().join("mesh.yaml");
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let bad = file("name: bad-one\nworkloads:\n  - name: a\n    command: [no-such-program]\n");
    one_line(
        &mut countersign(&["up", &bad]),
        "mesh.yaml:4: command: there is no program `no-such-program` on the PATH; install it, or write its whole path",
    );
    let bad = file("name: bad-one\nworkloads:\n  - name: a\n    command: [sleep, '9']\n    ports: [80, 80]\n");
    one_line(&mut countersign(&["up", &bad]), "mesh.yaml:5: ports: 80 is in this list twice");
    one_line(&mut countersign(&["up", "/no/mesh.yaml"]), "/no/mesh.yaml: cannot be read");
    // A folder that another user may pass through, for the program itself.
    sh(&format!("chmod 755 {0} && cp {COUNTERSIGN} {0}/countersign", dir.path().display()));
    let program = dir.path().join("countersign").display().to_string();
    let as_nobody = |args: &[&str]| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", &program])
            .args(args)
            .env("PATH", "/usr/bin:/bin");
        command
    };
    one_line(&mut as_nobody(&["up"]), "up needs root: it makes network namespaces and redirects; run it with sudo");
    one_line(&mut as_nobody(&["run", "--name", "a", "--", "true"]), "run needs root");
    one_line(
        &mut as_nobody(&["redirect", "--proxy-uid", "2102", "--host-namespace"]),
        "changing the redirect needs CAP_NET_ADMIN in this network namespace; run as root",
    );
    one_line(&mut countersign(&["run", "--name", "events", "--", "true"]), "--name: `events` is not a workload's name");
    one_line(&mut countersign(&["run", "--name", "A b", "--", "true"]), "--name: `A b` is not a name");
    one_line(
        &mut countersign(&["run", "--mesh", "no-such-mesh", "--name", "a", "--", "true"]),
        "no mesh `no-such-mesh` is up here",
    );
    one_line(
        &mut countersign(&["run", "--name", "a", "--", "no-such-program"]),
        "there is no program `no-such-program`",
    );
    assert!(
        !std::path::Path::new("/run/countersign/up/bad-one").exists() && !sh("ip netns list").contains("cs-bad-one"),
        "nothing is left"
    );
}

#[test]
fn the_machines_own_namespace_is_not_redirected_unasked() {
    one_line(
        &mut countersign(&["redirect", "--proxy-uid", "2102"]),
        "this is the machine's own network namespace, net:[",
    );
    for (args, expected) in [
        (&["redirect", "--proxy-uid", "2102", "--outbound-port", "0"][..], "--outbound-port"),
        (&["redirect"], "--proxy-uid"),
    ] {
        let (code, said) = outcome(&mut countersign(args));
        assert_eq!(code, 2, "{said}");
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn a_kernel_without_netfilter_is_named() {
    if !able(&["ip"]) {
        return;
    }
    // The binary fallback without a binary: as on a kernel without nf_tables and a machine without iptables.
    let (code, said) = outcome(
        countersign(&["redirect", "--proxy-uid", "2102", "--host-namespace", "--backend", "iptables"])
            .env("PATH", "/nowhere"),
    );
    assert_ne!(code, 0);
    assert!(said.contains("`iptables-restore -w 5 --noflush` failed: No such file or directory"), "{said}");
}

#[test]
fn wrong_command_lines_teach() {
    for (args, expected) in [
        (&["upp"][..], "similar"),
        (&["entry", "creat"], "create"),
        (&["up", "--verfy"], "--verify"),
        (&["entry", "create"], "--spiffe-id"),
    ] {
        let (code, said) = outcome(&mut countersign(args));
        assert_eq!(code, 2, "{said}");
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn every_kubernetes_command_says_the_same_of_an_api_server_that_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let config = crate::cni::no_api_server(dir.path());
    let archive = dir.path().join("a.tar.gz").display().to_string();
    let whom =
        format!("cannot reach the API server at http://127.0.0.1:1 (KUBECONFIG {}, context x): ", config.display());
    let commands: [&[&str]; 8] = [
        &["check"],
        &["check", "--before"],
        &["explain", "pod", "web"],
        &["support", "--out", &archive],
        &["verify"],
        &["strict", "--plan"],
        &["uninstall", "--yes"],
        &["install"],
    ];
    for command in commands {
        let (code, said) = outcome(countersign(command).env("KUBECONFIG", &config));
        // It was tried; nothing has to be corrected first.
        assert_eq!((code, said.lines().count()), (1, 1), "{command:?}: {said}");
        assert!(said.contains(&whom), "{command:?}: {said}");
    }
    assert!(!dir.path().join("a.tar.gz").exists());
}

/// In the place of a mesh that is strict nobody may get permissive pods because it could not be asked.
#[test]
fn inject_guesses_no_mode_where_a_cluster_is_configured() {
    let dir = tempfile::tempdir().unwrap();
    let config = crate::cni::no_api_server(dir.path());
    let app = dir.path().join("app.yaml");
    std::fs::write(&app, "apiVersion: v1\nkind: Pod\nspec: {containers: [{name: a, image: i}]}\n").unwrap();
    let file = app.display().to_string();
    let inject = |more: &[&str]| countersign(&[&["inject", "-f", &file], more].concat());
    let whom =
        format!("cannot reach the API server at http://127.0.0.1:1 (KUBECONFIG {}, context x): ", config.display());
    let (code, said) = outcome(inject(&[]).env("KUBECONFIG", &config));
    assert_eq!((code, said.lines().count()), (1, 1), "{said}");
    for part in [whom.as_str(), "--mode", "--ignore-cluster"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // Who says the mode oneself, or that no cluster is meant, is not held up, and the defaults are told of.
    let (code, said) = outcome(inject(&["--mode=strict"]).env("KUBECONFIG", &config));
    assert!(code == 0 && said.contains("name: countersign-proxy") && said.contains(&whom), "{said}");
    assert!(said.contains("other-protocols=drop") && !said.contains("permissive"), "{said}");
    let (code, said) = outcome(inject(&["--ignore-cluster"]).env("KUBECONFIG", &config));
    assert!(code == 0 && said.contains("name: countersign-proxy"), "{said}");
    // None is configured: nobody else knows.
    let mut none = inject(&[]);
    let none = none.env_remove("KUBECONFIG").env("HOME", dir.path().join("none"));
    let (code, said) = outcome(none.env_remove("KUBERNETES_SERVICE_HOST"));
    assert!(code == 0 && said.contains("no cluster is configured") && said.contains("mode permissive"), "{said}");
    // One is, by a file that cannot be used.
    std::fs::create_dir_all(dir.path().join(".kube")).unwrap();
    std::fs::write(dir.path().join(".kube/config"), "clusters: [").unwrap();
    let mut broken = inject(&[]);
    one_line(broken.env_remove("KUBECONFIG").env("HOME", dir.path()), "/.kube/config");
    std::fs::write(&app, "some plain text\n").unwrap();
    one_line(&mut inject(&[]), "app.yaml: no Kubernetes object was found");
}
