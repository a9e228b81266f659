//! The documented metrics are the ones that exist, and the other way round.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::cni::no_api_server;
use crate::support::roles::{Role, Server, free_port};
use crate::support::{able, wait_for};

/// The text of a page on loopback.
pub fn http_get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

fn names(page: &str) -> BTreeSet<String> {
    // "# TYPE name kind": counters get `_total` behind their name.
    let types = page.lines().filter_map(|l| l.strip_prefix("# TYPE "));
    types
        .filter_map(|l| l.split_once(' '))
        .map(|(name, kind)| if kind == "counter" { format!("{name}_total") } else { name.to_owned() })
        .collect()
}

#[test]
fn the_table_in_the_docs_is_what_the_roles_serve() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let ports = [free_port(), free_port(), free_port(), free_port(), free_port(), free_port()];
    let at = |n: usize| format!("127.0.0.1:{}", ports[n]);
    let server = Server::start(dir.path(), &["--metrics", &at(0)]);
    let mut args = server.agent_args(&server.token(&[]));
    args.extend(["--metrics".into(), at(1)]);
    let _agent = Role::start(dir.path(), "agent", &args);
    let minted = server.mint("/a", "a", &[]);
    let file = |n: &str| minted.join(n).display().to_string();
    let inbound = format!("127.0.0.1:{}", free_port());
    let proxy = [
        "proxy",
        "--svid",
        &file("svid.pem"),
        "--key",
        &file("key.pem"),
        "--bundle",
        &format!("test.local={}", file("bundle.pem")),
        "--inbound-listen",
        &inbound,
        "--inbound-target",
        "127.0.0.1:9",
        "--http",
        &at(2),
    ];
    let _proxy = Role::start(dir.path(), "proxy", &proxy.map(str::to_owned));
    // A controller whose agent gives it no certificate is not ready, and says so; its metrics are there all the same.
    let controller = [
        "controller",
        "--only=injector",
        "--trust-domain=test.local",
        &format!("--bind=127.0.0.1:{}", free_port()),
        &format!("--agent-socket={}", dir.path().join("no-agent.sock").display()),
        &format!("--metrics={}", at(3)),
    ];
    let _controller = Role::start(dir.path(), "controller", &controller.map(str::to_owned));
    // No kubelet registers this driver, so that it is not ready either.
    let csi = [
        "csi",
        "--node-name=here",
        &format!("--kubelet-dir={}", dir.path().join("kubelet").display()),
        &format!("--agent-dir={}", dir.path().display()),
        &format!("--metrics={}", at(4)),
    ];
    let _csi = Role::start(dir.path(), "csi", &csi.map(str::to_owned));
    // Nobody has written a network configuration here.
    let place = |n: &str| dir.path().join(n).display().to_string();
    let cni = [
        "cni-node",
        "--node-name=here",
        &format!("--bin-dir={}", dir.path().display()),
        &format!("--conf-dir={}", dir.path().display()),
        &format!("--socket={}", place("cni.sock")),
        "--repair",
        &format!("--metrics={}", at(5)),
    ];
    let nowhere = no_api_server(dir.path());
    let _cni = Role::start_with(dir.path(), "cni", &cni.map(str::to_owned), ("KUBECONFIG", &nowhere));
    let mut served = BTreeSet::new();
    for port in ports {
        let page = wait_for("the metrics", Duration::from_secs(10), || {
            http_get(port, "/metrics").filter(|p| p.starts_with("HTTP/1.1 200"))
        });
        assert!(page.contains("openmetrics-text") && page.trim_end().ends_with("# EOF"), "{page}");
        served.extend(names(&page));
        assert!(http_get(port, "/live").unwrap().starts_with("HTTP/1.1 200"));
        let lacking = [
            (ports[3], "the agent has given us no certificate yet"),
            (ports[4], "the kubelet has not registered the driver"),
            (ports[5], "no network configuration yet"),
        ];
        if let Some((_, why)) = lacking.into_iter().find(|(lacks, _)| *lacks == port) {
            wait_for(why, Duration::from_secs(10), || http_get(port, "/ready").filter(|page| page.contains(why)));
            continue;
        }
        wait_for("readiness", Duration::from_secs(10), || {
            http_get(port, "/ready").filter(|p| p.starts_with("HTTP/1.1 200"))
        });
        assert!(http_get(port, "/other").unwrap().starts_with("HTTP/1.1 404"));
    }
    // Values of labels too: alerts match on them.
    TcpStream::connect(&inbound).unwrap().write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    wait_for("the refused connection", Duration::from_secs(10), || {
        let page = http_get(ports[2], "/metrics")?;
        let counted = |l: &&str| l.starts_with("countersign_proxy_connections_total{") && !l.ends_with(" 0");
        let lines: Vec<&str> = page.lines().filter(counted).collect();
        let expected = "countersign_proxy_connections_total{direction=\"inbound\",mode=\"refused\"} 1";
        assert!(lines.iter().all(|l| *l == expected), "{lines:?}");
        (lines == [expected]).then_some(())
    });
    let docs = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md")).unwrap();
    let documented: BTreeSet<String> = docs
        .lines()
        .filter_map(|l| l.strip_prefix("| `countersign_")?.split_once('`'))
        .map(|(n, _)| format!("countersign_{n}"))
        .collect();
    let unknown: Vec<_> = served.difference(&documented).collect();
    assert!(unknown.is_empty(), "not documented: {unknown:?}");
    // A family shows once it has a value; that the others exist is read from where they are registered.
    let files = [
        "server/src/metrics",
        "agent/src/metrics",
        "proxy/src/telemetry",
        "controller/src/metrics",
        "csi/src/metrics",
        "cni/src/metrics",
    ];
    let sources = files.map(|f| std::fs::read_to_string(format!("{}/../{f}.rs", env!("CARGO_MANIFEST_DIR"))).unwrap());
    for name in &documented {
        let role = ["server", "agent", "proxy", "controller", "csi", "cni"]
            .iter()
            .position(|r| name.starts_with(&format!("countersign_{r}_")))
            .unwrap();
        let own = name.splitn(3, '_').nth(2).unwrap().trim_end_matches("_total");
        assert!(sources[role].contains(&format!("\"{own}\"")), "{name} does not exist");
    }
}
