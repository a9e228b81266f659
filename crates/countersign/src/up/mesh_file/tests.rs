//! What loads, and the exact error line for everything that does not.

use super::*;

/// Reads a text as a file `mesh.yaml`, and removes the folder's name from the error.
fn read_bytes(text: &[u8]) -> Result<MeshSpec, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    std::fs::write(&path, text).unwrap();
    std::fs::write(dir.path().join("plain.txt"), "x").unwrap();
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    load(&path).map_err(|e| {
        let folder = dir.path().display().to_string();
        e.to_string().replace(&format!("{folder}/"), "").replace(&folder, ".")
    })
}

fn read(text: &str) -> Result<MeshSpec, String> {
    read_bytes(text.as_bytes())
}

/// A mesh with one workload that has these additional lines.
fn with(lines: &str) -> String {
    let lines: String = lines.lines().map(|l| format!("    {l}\n")).collect();
    format!("workloads:\n  - name: a\n    command: [sleep]\n{lines}")
}

/// A mesh with one valid workload and these lines above it.
fn above(lines: &str) -> String {
    format!("{lines}\nworkloads:\n  - name: a\n    command: [sleep]\n")
}

#[test]
fn the_documented_example_loads() {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/mesh.yaml"));
    let mesh = load(path).unwrap();
    assert_eq!(mesh.workloads.len(), 2);
}

#[test]
fn a_small_file_takes_the_defaults() {
    let mesh = read("workloads:\n  - name: web\n    command: [sleep, '1']\n").unwrap();
    assert_eq!(mesh.trust_domain.to_string(), "mesh.local");
    assert_eq!((mesh.ca_ttl.to_string(), mesh.svid_ttl.to_string()), ("1d".into(), "1h".into()));
    let w = &mesh.workloads[0];
    assert_eq!((w.namespace.as_str(), w.service_account.as_str(), w.policy.mode), ("default", "web", Mode::Permissive));
    assert_eq!((w.restart, &w.workdir), (Restart::No, &None));
}

#[test]
fn every_key_of_a_workload_is_read() {
    let mesh = read(&with(
        "namespace: shop\nservice_account: web\nuser: 1234\nworkdir: folder\nrestart: on-failure\nports: [80, 81]\nenv: {A: b, N: 1, E: '', B: true}\nallow: [a, 'spiffe://mesh.local/x']\nmode: off\nport_modes: {80: strict}\nport_allow: {81: []}\nproxy_protocol: [81]\negress: [10.0.0.0/8]\nallow_udp_ports: [53, 4433]\nallow_other_cidrs: [10.9.0.0/16]\nexclude_outbound_ports: [5432]\nexclude_inbound_ports: [22]\nexclude_outbound_cidrs: [192.168.0.0/16]\nexclude_inbound_cidrs: ['fd00::/8']",
    ))
    .unwrap();
    let w = &mesh.workloads[0];
    assert_eq!((w.namespace.as_str(), w.service_account.as_str(), w.restart), ("shop", "web", Restart::OnFailure));
    assert!(w.workdir.as_ref().unwrap().ends_with("folder") && w.workdir.as_ref().unwrap().is_absolute());
    assert_eq!(w.user.as_ref().unwrap().uid, 1234);
    let env: Vec<(&str, &str)> = w.env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert_eq!(env, [("A", "b"), ("B", "true"), ("E", ""), ("N", "1")]);
    assert_eq!((w.policy.mode, w.policy.mode_of(80)), (Mode::Off, Mode::Strict));
    assert!(w.policy.port_allow[&81].is_empty(), "nobody");
    assert_eq!(w.policy.allow.as_ref().unwrap().len(), 2);
    assert_eq!((w.ports.len(), w.exclude_outbound_ports.len(), w.exclude_inbound_cidrs.len()), (2, 1, 1));
    assert_eq!((w.proxy_protocol.len(), w.allow_udp_ports.len(), w.allow_other_cidrs.len()), (1, 2, 1));
}

#[test]
fn a_workload_cannot_weaken_a_strict_mesh_and_off_may_be_bare() {
    let mesh = read("mode: strict\nworkloads:\n  - name: a\n    command: [sleep]\n    mode: off\n").unwrap();
    assert_eq!(mesh.workloads[0].policy.mode, Mode::Strict);
    let mesh = read(&format!("mode: off\n{}", with("ports: [80]\nport_modes: {80: strict}"))).unwrap();
    assert_eq!((mesh.workloads[0].policy.mode, mesh.workloads[0].policy.mode_of(80)), (Mode::Off, Mode::Strict));
}

#[test]
fn a_byte_order_mark_and_carriage_returns_do_no_harm() {
    let text = "\u{feff}workloads:\r\n  - name: a\r\n    command: [sleep, '1']\r\n    env: {A: b}\r\n";
    let mesh = read(text).unwrap();
    assert_eq!((mesh.workloads[0].command[1].as_str(), mesh.workloads[0].env["A"].as_str()), ("1", "b"));
}

#[test]
fn a_relative_program_is_meant_from_where_it_was_found() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let program = dir.path().join("prog");
    std::fs::write(&program, "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let relative = format!("./{}/prog", dir.path().file_name().unwrap().display());
    let mesh = read(&format!("workloads:\n  - name: a\n    command: [{relative}]\n    workdir: /\n")).unwrap();
    assert!(Path::new(&mesh.workloads[0].command[0]).is_absolute());
}

/// Each mistake, and the exact line that reports it.
#[rustfmt::skip]
fn mistakes() -> Vec<(String, &'static str)> {
    vec![
        // The file as a whole.
        (String::new(), "mesh.yaml: the file is empty; expected keys with values"),
        ("# only a comment\n".into(), "mesh.yaml: the file is empty; expected keys with values"),
        ("---\n".into(), "mesh.yaml:1: expected keys of a mesh file such as `name: …`, found nothing"),
        ("hello\n".into(), "mesh.yaml:1: expected keys of a mesh file such as `name: …`, found `hello`"),
        ("- a\n".into(), "mesh.yaml:1: expected keys of a mesh file such as `name: …`, found a list"),
        (above("name: x") + "---\n" + &above("name: y"), "mesh.yaml:5: a second YAML document begins here; expected one document in the file"),
        // Not valid YAML.
        ("workloads:\n\t- name: a\n".into(), "mesh.yaml:2: a tab is used for indentation; use spaces"),
        (with("ports: [80"), "mesh.yaml:4: `[` is opened and not closed"),
        (with("env: {A: b"), "mesh.yaml:4: `{` is opened and not closed"),
        (with("env: {A: 'b}"), "mesh.yaml:4: a quote is opened and not closed"),
        (with("user: a: b"), "mesh.yaml:4: `: ` stands where no key can be: check the indentation, or quote a text that contains it"),
        ("workloads:\n  - name: a\n   command: [sleep]\n".into(), "mesh.yaml:3: expected a list item, `- …`: check the indentation"),
        (with("user: !env USER"), "mesh.yaml:4: the tag `!env` is not supported; leave it out"),
        (with("user: *who"), "mesh.yaml:4: this alias names an anchor that is not set above it"),
        // Keys.
        ("wrkloads: []\n".into(), "mesh.yaml:1: unknown key `wrkloads`; did you mean `workloads`?"),
        (with("prots: [80]"), "mesh.yaml:4: unknown key `prots`; did you mean `ports`?"),
        (with("colour: red"), "mesh.yaml:4: unknown key `colour`; known keys of workload `a`: name, namespace, service_account, user, command, workdir, restart, ports, env, allow, mode, port_modes, port_allow, proxy_protocol, egress, allow_udp_ports, allow_other_cidrs, exclude_outbound_ports, exclude_inbound_ports, exclude_outbound_cidrs, exclude_inbound_cidrs"),
        (with("ports: [80]\nuser: root\nports: [81]"), "mesh.yaml:6: ports: this key is there twice; it is first set on line 4"),
        (with("[a]: b"), "mesh.yaml:4: expected a text as key, found a list"),
        (above("upstream: {cert: a, key: b}"), "mesh.yaml:1: unknown key `cert`; did you mean `certificate`?"),
        // Missing keys, reported at the line of the map.
        ("name: x\n".into(), "mesh.yaml:1: a mesh file has no `workloads`, and needs one"),
        ("workloads:\n".into(), "mesh.yaml:1: workloads: expected a value, found nothing"),
        ("workloads:\n  - name: a\n    command: [sleep]\n  - name: b\n    ports: [80]\n  - name: c\n    command: [sleep]\n".into(), "mesh.yaml:4: workload `b` has no `command`, and needs one"),
        ("workloads:\n  - command: [sleep]\n".into(), "mesh.yaml:2: a workload has no `name`, and needs one"),
        (above("upstream: {certificate: plain.txt}"), "mesh.yaml:1: upstream has no `key`, and needs one"),
        // The mesh.
        (above("name: My Mesh"), "mesh.yaml:1: name: `My Mesh` is not a name: use 1 to 40 of a-z, 0-9 and `-`, not at the ends"),
        (above("name: [x]"), "mesh.yaml:1: name: expected a name, found a list"),
        (above("trust_domain: Shop"), "mesh.yaml:1: trust_domain: `Shop` is not a trust domain name: it has upper-case letters"),
        (above("trust_domain: spiffe://shop"), "mesh.yaml:1: trust_domain: `spiffe://shop` is not a trust domain name: give the bare name, without `spiffe://`"),
        (above("mode: strickt"), "mesh.yaml:1: mode: `strickt` is not a mode: use off, permissive or strict"),
        (above("svid_ttl: 2"), "mesh.yaml:1: svid_ttl: `2` is not a length of time: write 20s, 5m, 1h, 30d or 1h30m"),
        (above("svid_ttl: -5m"), "mesh.yaml:1: svid_ttl: `-5m` is not a length of time: write 20s, 5m, 1h, 30d or 1h30m"),
        (above("svid_ttl: {h: 1}"), "mesh.yaml:1: svid_ttl: expected a length of time such as 20s, 5m or 1h30m, found keys with values"),
        (above("svid_ttl: 3s"), "mesh.yaml:1: svid_ttl: expected at least 10s, so that an SVID can be renewed in time, found 3s"),
        (above("svid_ttl: 2h\nca_ttl: 1h"), "mesh.yaml:1: svid_ttl: an SVID cannot outlive its authority: svid_ttl is 2h and ca_ttl is 1h"),
        (above("ca_ttl: 30m"), "mesh.yaml:1: ca_ttl: an SVID cannot outlive its authority: svid_ttl is 1h and ca_ttl is 30m"),
        (above("ca_key_type: dsa"), "mesh.yaml:1: ca_key_type: `dsa` is not a key type: use ec-p256, ec-p384, rsa-2048 or rsa-4096"),
        (above("upstream: {certificate: no.crt, key: no.key}"), "mesh.yaml:1: certificate: there is no file no.crt"),
        (above("upstream: {certificate: folder, key: no.key}"), "mesh.yaml:1: certificate: folder is a folder; expected a PEM file"),
        (above("upstream: plain.txt"), "mesh.yaml:1: upstream: expected keys of upstream such as `certificate: …`, found `plain.txt`"),
        ("workloads: []\n".into(), "mesh.yaml:1: workloads: expected at least one workload, found an empty list"),
        ("workloads: {a: {command: [sleep]}}\n".into(), "mesh.yaml:1: workloads: expected a list such as [{name: web, command: [nginx]}], found keys with values"),
        ("workloads: [sleep]\n".into(), "mesh.yaml:1: workloads: expected keys of a workload such as `name: …`, found `sleep`"),
        // A workload's identity.
        ("workloads:\n  - name: A\n    command: [sleep]\n".into(), "mesh.yaml:2: name: `A` is not a name: use 1 to 40 of a-z, 0-9 and `-`, not at the ends"),
        ("workloads:\n  - name: events\n    command: [sleep]\n".into(), "mesh.yaml:2: name: `events` is not a workload's name: events.log is a log of the mesh itself; use another name"),
        ("workloads:\n  - name: countersign-agent\n    command: [sleep]\n".into(), "mesh.yaml:2: name: `countersign-agent` is not a workload's name: countersign-agent.log is a log of the mesh itself; use another name"),
        ("workloads:\n  - name: countersign-server\n    command: [sleep]\n".into(), "mesh.yaml:2: name: `countersign-server` is not a workload's name: countersign-server.log is a log of the mesh itself; use another name"),
        ("workloads:\n  - name: a\n    command: [sleep]\n  - name: a\n    command: [sleep]\n".into(), "mesh.yaml:4: name: `a` is already the name of the workload on line 2; names are unique in a mesh"),
        (with("namespace: a/b"), "mesh.yaml:4: namespace: `a/b` is not one segment of a SPIFFE ID: use 1 to 63 of a-z, A-Z, 0-9, `.`, `_` and `-`"),
        (with("service_account: ''"), "mesh.yaml:4: service_account: `` is not one segment of a SPIFFE ID: use 1 to 63 of a-z, A-Z, 0-9, `.`, `_` and `-`"),
        (with("user: no-such-user"), "mesh.yaml:4: user: there is no user `no-such-user` in this machine's /etc/passwd"),
        (with("user: '2102'"), "mesh.yaml:4: user: uid 2102 is kept for sidecars, whose traffic is never caught; use another user"),
        // Its program.
        ("workloads:\n  - name: a\n    command: \"python3 -m http.server\"\n".into(), "mesh.yaml:3: command: expected a list such as [python3, -m, http.server], found `python3 -m http.server`"),
        ("workloads:\n  - name: a\n    command: ['sleep 9']\n".into(), "mesh.yaml:3: command: there is no program `sleep 9` on the PATH; write its arguments as further items of the list"),
        ("workloads:\n  - name: a\n    command: []\n".into(), "mesh.yaml:3: command: expected a program and its arguments, found an empty list"),
        ("workloads:\n  - name: a\n    command: ['']\n".into(), "mesh.yaml:3: command: the program is an empty text; expected a name or a path"),
        ("workloads:\n  - name: a\n    command: [sleep, {x: y}]\n".into(), "mesh.yaml:3: command: expected a text for each argument; write '' for an empty one, found keys with values"),
        ("workloads:\n  - name: a\n    command:\n      - sleep\n      -\n".into(), "mesh.yaml:5: command: expected a text for each argument; write '' for an empty one, found nothing"),
        ("workloads:\n  - name: a\n    command: [sleep, \"a\\0b\"]\n".into(), "mesh.yaml:3: command: `a\\u{0}b` contains a NUL byte"),
        ("workloads:\n  - name: a\n    command: [no-such-program]\n".into(), "mesh.yaml:3: command: there is no program `no-such-program` on the PATH; install it, or write its whole path"),
        ("workloads:\n  - name: a\n    command: [/etc/passwd]\n".into(), "mesh.yaml:3: command: `/etc/passwd` is not executable; make it so with `chmod +x`"),
        ("workloads:\n  - name: a\n    command: [/etc]\n".into(), "mesh.yaml:3: command: `/etc` is a folder; expected a program"),
        ("workloads:\n  - name: a\n    command: [/no/such]\n".into(), "mesh.yaml:3: command: there is no program `/no/such`"),
        (with("workdir: nowhere"), "mesh.yaml:4: workdir: there is no folder nowhere"),
        (with("workdir: plain.txt"), "mesh.yaml:4: workdir: plain.txt is not a folder"),
        (with("restart: sometimes"), "mesh.yaml:4: restart: expected no, on-failure or always, found `sometimes`"),
        (with("env: [A=b]"), "mesh.yaml:4: env: expected names with values such as {LANG: C}, found a list"),
        (with("env: {C: null}"), "mesh.yaml:4: env.C: expected a text; write '' for an empty one, found nothing"),
        (with("env:\n  A: b\n  C:\n"), "mesh.yaml:6: env.C: expected a text; write '' for an empty one, found nothing"),
        (with("env: {'A=B': c}"), "mesh.yaml:4: env: `A=B` cannot be the name of a variable"),
        // Its ports.
        (with("ports: [http]"), "mesh.yaml:4: ports: expected a port from 1 to 65535, found `http`"),
        (with("ports: 80"), "mesh.yaml:4: ports: expected a list such as [80], found the number 80"),
        (with("ports: [70000]"), "mesh.yaml:4: ports: expected a port from 1 to 65535, found the number 70000"),
        (with("ports: [0]"), "mesh.yaml:4: ports: expected a port from 1 to 65535, found the number 0"),
        (with("ports: [80.5]"), "mesh.yaml:4: ports: expected a port from 1 to 65535, found the number 80.5"),
        (with("ports: [[80]]"), "mesh.yaml:4: ports: expected a port from 1 to 65535, found a list"),
        (with("ports:\n  - 80\n  - 80"), "mesh.yaml:6: ports: 80 is in this list twice"),
        (with("ports: [15008]"), "mesh.yaml:4: ports: port 15008 is the sidecar's own; let the program listen on another one"),
        (with("exclude_outbound_ports: [dns]"), "mesh.yaml:4: exclude_outbound_ports: expected a port from 1 to 65535, found `dns`"),
        // Its policy.
        (with("mode: [strict]"), "mesh.yaml:4: mode: expected off, permissive or strict, found a list"),
        (with("allow: [b]"), "mesh.yaml:4: allow: `b` is neither a workload of this mesh nor a SPIFFE ID; it has a"),
        (with("allow: []"), "mesh.yaml:4: allow: an empty list; leave the key out to let the whole trust domain call, or name who may"),
        (with("allow: a"), "mesh.yaml:4: allow: expected a list such as [a], found `a`"),
        (with("allow: [a, a]"), "mesh.yaml:4: allow: spiffe://mesh.local/ns/default/sa/a is in this list twice"),
        (with("allow: ['spiffe://A/b']"), "mesh.yaml:4: allow: `spiffe://A/b` is not a SPIFFE ID: the trust domain has upper-case letters"),
        (with("port_modes: {80: strict}"), "mesh.yaml:4: port_modes: port 80 is not served: the workload has no `ports`; add `ports: [80]`"),
        (with("ports: [80, 81]\nport_allow: {82: [a]}"), "mesh.yaml:5: port_allow: port 82 is not served: `ports` lists 80, 81"),
        (with("ports: [80]\nport_allow: {http: [a]}"), "mesh.yaml:5: port_allow: expected a port from 1 to 65535 as key, found `http`"),
        (with("ports: [80]\nport_allow: {80: a}"), "mesh.yaml:5: port_allow.80: expected a list such as [a], found `a`"),
        (with("ports: [80]\nport_allow: [a]"), "mesh.yaml:5: port_allow: expected names with values such as {8080: [web]}, found a list"),
        (with("ports: [80]\nport_modes: {80: strickt}"), "mesh.yaml:5: port_modes.80: `strickt` is not a mode: use off, permissive or strict"),
        (with("ports: [80]\nproxy_protocl: [80]"), "mesh.yaml:5: unknown key `proxy_protocl`; did you mean `proxy_protocol`?"),
        (with("ports: [80]\nproxy_protocol: [80, 81]"), "mesh.yaml:5: proxy_protocol: port 81 is not served: `ports` lists 80"),
        (with("proxy_protocol: 80"), "mesh.yaml:4: proxy_protocol: expected a list such as [80], found the number 80"),
        (with("allow_udp_port: [80]"), "mesh.yaml:4: unknown key `allow_udp_port`; did you mean `allow_udp_ports`?"),
        (with("allow_udp_ports: [0]"), "mesh.yaml:4: allow_udp_ports: expected a port from 1 to 65535, found the number 0"),
        (with("allow_other_cidr: [10.0.0.0/8]"), "mesh.yaml:4: unknown key `allow_other_cidr`; did you mean `allow_other_cidrs`?"),
        (with("allow_other_cidrs: [10.0.0.0]"), "mesh.yaml:4: allow_other_cidrs: expected a network such as 10.0.0.0/8, found the address 10.0.0.0; write 10.0.0.0/32"),
        (with("egress: [here]"), "mesh.yaml:4: egress: expected a network such as 10.0.0.0/8, found `here`"),
        (with("egress: [10.0.0.1]"), "mesh.yaml:4: egress: expected a network such as 10.0.0.0/8, found the address 10.0.0.1; write 10.0.0.1/32"),
        (with("exclude_inbound_cidrs: [10.0.0.0/33]"), "mesh.yaml:4: exclude_inbound_cidrs: expected a network such as 10.0.0.0/8, found `10.0.0.0/33`"),
        // Text with malicious content.
        (with("user: \"\\e[2J\\e[31mroot\\nuid=0\""), "mesh.yaml:4: user: there is no user `\\u{1b}[2J\\u{1b}[31mroot\\nuid=0` in this machine's /etc/passwd"),
        (with("\"\\e[2J\": x"), "mesh.yaml:4: unknown key `\\u{1b}[2J`; known keys of workload `a`: name, namespace, service_account, user, command, workdir, restart, ports, env, allow, mode, port_modes, port_allow, proxy_protocol, egress, allow_udp_ports, allow_other_cidrs, exclude_outbound_ports, exclude_inbound_ports, exclude_outbound_cidrs, exclude_inbound_cidrs"),
    ]
}

#[test]
fn every_mistake_is_one_line_with_file_line_key_and_what_was_expected() {
    let mut wrong = vec![];
    for (text, expected) in mistakes() {
        let found = read(&text).err().unwrap_or_else(|| "it was taken".into());
        if found != expected {
            wrong.push(format!("{text}\n  found:    {found}\n  expected: {expected}\n"));
        }
    }
    assert!(wrong.is_empty(), "{} lines differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn what_is_no_text_file_is_refused_at_once() {
    let not_text = read_bytes(b"name: a\nworkloads: \xff\xfe\n").unwrap_err();
    assert_eq!(not_text, "mesh.yaml:2: this is not UTF-8 text; save the file as UTF-8");
    let long = read(&format!("name: {}\n", "x".repeat(900_000))).unwrap_err();
    assert!(long.len() < 250 && long.contains("… (900000 bytes)` is not a name"), "{long}");
    let longer = read(&"# x\n".repeat(300_000)).unwrap_err();
    assert_eq!(longer, "mesh.yaml: cannot be read: it is longer than 1048576 bytes");
    let read = |path: &str| load(Path::new(path)).unwrap_err().to_string();
    assert_eq!(read("/dev/zero"), "/dev/zero: cannot be read: it is a device; expected a file");
    assert_eq!(read("/etc"), "/etc: cannot be read: it is a folder; expected a file");
    assert_eq!(read("/no/mesh.yaml"), "/no/mesh.yaml: cannot be read: No such file or directory (os error 2)");
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(load(&pipe).unwrap_err().to_string().ends_with("pipe: cannot be read: it is a pipe; expected a file"));
}
