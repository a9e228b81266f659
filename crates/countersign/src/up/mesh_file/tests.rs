//! Every mistake is one line with file, line, key and mend.

use super::*;

fn read(text: &str) -> Result<MeshSpec, String> {
    let dir =
        std::env::temp_dir().join(format!("cs-mesh-file-{}-{:?}", std::process::id(), std::thread::current().id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("mesh.yaml");
    std::fs::write(&path, text).unwrap();
    let read = load(&path).map_err(|e| e.to_string().replace(&format!("{}/", dir.display()), ""));
    std::fs::remove_dir_all(&dir).unwrap();
    read
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
}

#[test]
fn a_workload_cannot_weaken_a_strict_mesh_and_off_may_be_bare() {
    let mesh = read("mode: strict\nworkloads:\n  - name: a\n    command: [sleep]\n    mode: off\n").unwrap();
    assert_eq!(mesh.workloads[0].policy.mode, Mode::Strict);
    let mesh =
        read("mode: off\nworkloads:\n  - name: a\n    command: [sleep]\n    port_modes: {80: strict}\n").unwrap();
    assert_eq!((mesh.workloads[0].policy.mode, mesh.workloads[0].policy.mode_of(80)), (Mode::Off, Mode::Strict));
}

#[test]
fn mistakes_name_file_line_key_and_mend() {
    let one = |extra: &str| format!("workloads:\n  - name: a\n    command: [sleep]\n    {extra}\n");
    for (text, expected) in [
        (
            "wrkloads: []\n".to_owned(),
            "mesh.yaml:1: unknown field `wrkloads`, expected one of name, trust_domain, mode, ca_ttl, svid_ttl, ca_key_type, upstream, workloads",
        ),
        (
            one("prots: [80]"),
            "mesh.yaml:4: unknown field `prots`, expected one of name, namespace, service_account, user, command, ports, env, allow, mode, port_modes, port_allow, egress, exclude_outbound_ports, exclude_inbound_ports, exclude_outbound_cidrs, exclude_inbound_cidrs",
        ),
        (one("ports: [x]"), "mesh.yaml:4: ports: invalid u32"),
        (one("ports: [70000]"), "mesh.yaml:4: ports: 70000 is no port: use 1 to 65535"),
        (one("ports: [80, 80]"), "mesh.yaml:4: ports: port 80 is there twice"),
        (
            one("ports: [15008]"),
            "mesh.yaml:4: ports: port 15008 is the sidecar's own; let the program listen on another one",
        ),
        (one("mode: strickt"), "mesh.yaml:4: mode: `strickt` is not a mode: use off, permissive or strict"),
        (one("allow: [b]"), "mesh.yaml:4: allow: `b` is no workload of this mesh; name one of a, or a SPIFFE ID"),
        (
            one("allow: ['spiffe://A/b']"),
            "mesh.yaml:4: allow: `spiffe://A/b` is not a SPIFFE ID: the trust domain has upper-case letters",
        ),
        (one("user: no-such-user"), "mesh.yaml:4: user: there is no user `no-such-user` in this machine's /etc/passwd"),
        (
            one("user: '2102'"),
            "mesh.yaml:4: user: uid 2102 is kept for sidecars, whose traffic is never caught; use another user",
        ),
        (one("egress: [here]"), "mesh.yaml:4: egress: `here` is no network: write 10.0.0.0/8"),
        (
            "workloads:\n  - name: a\n    command: [no-such-program]\n".into(),
            "mesh.yaml:3: command: there is no program `no-such-program` on the PATH; install it, or write its whole path",
        ),
        (
            "workloads:\n  - name: A\n    command: [sleep]\n".into(),
            "mesh.yaml:2: name: `A` is no name: use 1 to 40 of a-z, 0-9 and `-`, not at the ends",
        ),
        (
            "workloads:\n  - name: a\n    command: [sleep]\n  - name: a\n    command: [sleep]\n".into(),
            "mesh.yaml:4: name: `a` is there twice; names are unique in a mesh",
        ),
        (
            "trust_domain: Shop\nworkloads:\n  - name: a\n    command: [sleep]\n".into(),
            "mesh.yaml:1: trust_domain: `Shop` is not a trust domain name: it has upper-case letters",
        ),
        (
            "svid_ttl: 2\nworkloads:\n  - name: a\n    command: [sleep]\n".into(),
            "mesh.yaml:1: svid_ttl: `2` is no length of time: write 20s, 5m, 1h, 30d or 1h30m",
        ),
        (
            "svid_ttl: 2h\nca_ttl: 1h\nworkloads:\n  - name: a\n    command: [sleep]\n".into(),
            "mesh.yaml:1: svid_ttl: an SVID cannot outlive its authority: make svid_ttl shorter than ca_ttl",
        ),
        (
            "upstream: {certificate: no.crt, key: no.key}\nworkloads:\n  - name: a\n    command: [sleep]\n".into(),
            "mesh.yaml:1: upstream: there is no file no.crt",
        ),
        ("workloads: []\n".into(), "mesh.yaml:1: workloads: name at least one workload"),
    ] {
        let found = read(&text).expect_err(&text);
        assert!(found == expected || found.starts_with(expected), "{text}\nfound:    {found}\nexpected: {expected}");
        assert_eq!(found.lines().count(), 1);
    }
}
