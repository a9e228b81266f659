//! `countersign verify`: creates two temporary pods, sends a request between them, and compares what both sidecars and
//! the wire show.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use countersign_controller::injector::SIDECAR;
use countersign_identity::shown::sentence;
use countersign_watch::in_words;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{Api, DeleteParams, LogParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use super::absent;
use super::api_server::client;
use super::cluster::{is_meshed, is_ready};
use crate::capture::{Line, pcap};
use crate::operator::block;
use crate::operator::output::{Output, Table};
use crate::probe::Report;
use crate::settings::Mistake;
use crate::shop::PORT;
use crate::stop::on_signal;

/// Interval between two polls of a pod.
const LOOK: Duration = Duration::from_millis(500);
/// Most of a sidecar's log that is read, in bytes.
const MAX_LOG_BYTES: i64 = 16 * 1024 * 1024;
/// Longest text of a pod that is repeated, in characters.
const MAX_SAID: usize = 400;
/// The port that sidecars meet on.
const MESH_PORT: u16 = 15008;
/// User ID of the pods' apps; any except the sidecar's.
const APP_UID: u32 = 20_000;

/// Kubernetes: make a handshake between two pods, show both identities, and inspect the wire.
///
/// Creates two pods in a strict namespace of their own, on two nodes if there are two. One sends the other a request
/// with a random word. Both sidecars must report the same handshake: identities, serials, cipher, key exchange. With
/// --pcap the wire is captured at the called pod, and must show that handshake and not the word. Exit code 1 if a check
/// fails. The namespace is removed at the end.
#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// Capture the wire to this file, for tcpdump or Wireshark. Needs a cluster that permits a container with
    /// `CAP_NET_RAW`.
    #[arg(long, value_name = "FILE")]
    pcap: Option<PathBuf>,
    /// Namespace of the installation.
    #[arg(long, value_name = "NAMESPACE", default_value = "countersign")]
    mesh_namespace: String,
    /// How long a pod may take to start, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 90)]
    patience: u64,
    #[command(flatten)]
    output: Output,
}

/// Results of the checks so far; later checks are skipped if an earlier one makes them pointless.
#[derive(Default)]
struct Found {
    checks: Vec<(&'static str, Result<String, String>)>,
    handshake: Option<Handshake>,
}

/// A handshake as reported by one sidecar.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Handshake {
    client: End,
    server: End,
    tls: String,
    cipher: String,
}

/// One end of a handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
struct End {
    id: String,
    serial: String,
    expires_at: String,
}

impl Found {
    /// Adds the result of a check.
    fn check(&mut self, name: &'static str, outcome: Result<String, String>) {
        self.checks.push((name, outcome));
    }
}

/// Runs the checks and prints the results.
pub fn verify(args: VerifyArgs) -> Result<ExitCode> {
    // The capture file must be writable before anything is created in the cluster.
    if let Some(path) = &args.pcap {
        let tried = std::fs::OpenOptions::new().create(true).append(true).open(path);
        tried.map_err(|e| Mistake::flag("--pcap", &format!("{}: {e}", path.display())))?;
    }
    let found = block(run(&args))?;
    let mut table = Table::new(&["check", "result", "found"]);
    let mut checks = vec![];
    for (check, outcome) in &found.checks {
        let (ok, text) = match outcome {
            Ok(text) => (true, text),
            Err(text) => (false, text),
        };
        table.row(vec![(*check).to_owned(), if ok { "ok" } else { "FAILED" }.to_owned(), text.clone()]);
        checks.push(json!({ "check": check, "ok": ok, "found": text }));
    }
    let mut shown = json!(null);
    if let Some(h) = &found.handshake {
        for (name, end) in [("client", &h.client), ("server", &h.server)] {
            let text = format!("{}, serial {}, until {}", end.id, end.serial, end.expires_at);
            table.row(vec![name.to_owned(), String::new(), text]);
        }
        table.row(vec!["key exchange".into(), String::new(), h.tls.clone()]);
        table.row(vec!["cipher".into(), String::new(), h.cipher.clone()]);
        let end = |e: &End| json!({ "spiffe_id": e.id, "serial": e.serial, "expires_at": e.expires_at });
        shown = json!({ "client": end(&h.client), "server": end(&h.server), "tls": h.tls, "cipher": h.cipher });
    }
    let good = found.checks.iter().all(|(_, o)| o.is_ok());
    args.output.print(&table, &json!({ "ok": good, "checks": checks, "handshake": shown }))?;
    Ok(ExitCode::from(u8::from(!good)))
}

async fn run(args: &VerifyArgs) -> Result<Found> {
    let (client, stop) = (client().await?, on_signal()?);
    absent::refuse(&client, &args.mesh_namespace, "--mesh-namespace").await?;
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), &args.mesh_namespace);
    let agent = sets.get_opt("countersign-agent").await.context("cannot look at the installation")?;
    let absent = || Mistake(format!("there is no installation in namespace `{}`", args.mesh_namespace));
    let agent = agent.ok_or_else(absent)?;
    let spec = agent.spec.and_then(|s| s.template.spec).unwrap_or_default();
    let container = spec.containers.first().context("the agent has no container")?;
    let word: u64 = rand::random();
    let stage = Stage {
        client: client.clone(),
        namespace: format!("countersign-verify-{:x}", word >> 40),
        word: format!("countersign-canary-{word:016x}"),
        image: container.image.clone().unwrap_or_default(),
        pull_policy: container.image_pull_policy.clone().unwrap_or_else(|| "IfNotPresent".into()),
        patience: Duration::from_secs(args.patience),
    };
    let namespaces: Api<Namespace> = Api::all(client);
    let made = json!({ "metadata": {
        "name": stage.namespace,
        // A label and not an annotation: it also decides which rules the pods' redirects have.
        "labels": {
            "countersign.dev/inject": "enabled",
            "countersign.dev/mode": "strict",
            "pod-security.kubernetes.io/enforce": "privileged",
        },
    } });
    namespaces
        .create(&PostParams::default(), &serde_json::from_value(made)?)
        .await
        .context("cannot make a namespace for the two pods")?;
    let found = tokio::select! {
        found = stage.play(args.pcap.as_deref()) => found,
        () = stop.cancelled() => Err(anyhow!("interrupted")),
    };
    if let Err(error) = namespaces.delete(&stage.namespace, &DeleteParams::default()).await {
        eprintln!("cannot remove namespace {}: {}; remove it by hand", stage.namespace, in_words(&error));
    }
    found
}

/// The namespace of the two pods, and the steps in it.
struct Stage {
    client: Client,
    namespace: String,
    word: String,
    image: String,
    pull_policy: String,
    patience: Duration,
}

impl Stage {
    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// A pod with one app and, if `captures`, a container that captures packets.
    fn pod(&self, name: &str, args: &[&str], captures: bool) -> Result<Pod> {
        let container = |name: &str, args: &[&str], uid: u32, add: &[&str]| {
            json!({
                "name": name, "image": self.image, "imagePullPolicy": self.pull_policy, "args": args,
                "securityContext": {
                    "runAsUser": uid, "runAsGroup": uid, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                    "capabilities": { "drop": ["ALL"], "add": add }, "seccompProfile": { "type": "RuntimeDefault" },
                },
            })
        };
        let mut containers = vec![container("app", args, APP_UID, &[])];
        if captures {
            containers.push(container("capture", &["capture"], 0, &["NET_RAW"]));
        }
        let apart = json!({ "podAntiAffinity": { "preferredDuringSchedulingIgnoredDuringExecution": [{ "weight": 100, "podAffinityTerm": {
            "topologyKey": "kubernetes.io/hostname", "labelSelector": { "matchLabels": { "app": "countersign-verify" } },
        } }] } });
        let pod = json!({
            "metadata": { "name": name, "labels": { "app": "countersign-verify" } },
            "spec": {
                "containers": containers, "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
                "automountServiceAccountToken": false, "affinity": apart,
            },
        });
        Ok(serde_json::from_value(pod)?)
    }

    /// Creates a pod and waits until `there` accepts it.
    async fn start(&self, pod: &Pod, there: impl Fn(&Pod) -> bool) -> Result<Pod, String> {
        let name = pod.name_any();
        self.pods().create(&PostParams::default(), pod).await.map_err(|e| format!("pod {name}: {}", in_words(&e)))?;
        let until = Instant::now() + self.patience;
        loop {
            let now = self.pods().get(&name).await.map_err(|e| format!("pod {name}: {}", in_words(&e)))?;
            if there(&now) {
                return Ok(now);
            }
            if Instant::now() > until {
                return Err(format!(
                    "pod {name} is not there after {} s: {}; see `countersign check`",
                    self.patience.as_secs(),
                    waiting_for(&now)
                ));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn log(&self, pod: &str, container: &str) -> Result<String, String> {
        let params = LogParams { container: Some(container.into()), ..LogParams::default() };
        self.pods().logs(pod, &params).await.map_err(|e| format!("log of {pod}: {}", in_words(&e)))
    }

    /// The connections that a pod's sidecar has logged last.
    async fn connections(&self, pod: &str) -> Result<Vec<Value>> {
        let params = LogParams {
            container: Some(SIDECAR.to_owned()),
            tail_lines: Some(200),
            limit_bytes: Some(MAX_LOG_BYTES),
            ..LogParams::default()
        };
        let text = self.pods().logs(pod, &params).await.context("cannot read the sidecar's log")?;
        let lines = text.lines().filter_map(|l| serde_json::from_str(l).ok());
        Ok(lines.filter(|v: &Value| v["direction"].is_string()).collect())
    }

    async fn play(&self, pcap_file: Option<&std::path::Path>) -> Result<Found> {
        let mut found = Found::default();
        eprintln!("starting two pods in namespace {}", self.namespace);
        let callee = self.pod("callee", &["shop", "details"], pcap_file.is_some())?;
        let callee = match self.start(&callee, is_ready).await {
            Ok(callee) if is_meshed(&callee) => callee,
            Ok(_) => {
                found.check("injection", Err("the pod was not injected; see `countersign check`".into()));
                return Ok(found);
            }
            Err(why) => {
                found.check("pods", Err(why));
                return Ok(found);
            }
        };
        let address = callee.status.as_ref().and_then(|s| s.pod_ip.clone()).context("the called pod has no address")?;
        let host = if address.contains(':') { format!("[{address}]") } else { address.clone() };
        if pcap_file.is_some() {
            self.wait_for_capture().await?;
        }
        let url = format!("http://{host}:{PORT}/?echo={}", self.word);
        let caller = self.pod("caller", &["probe", &url], false)?;
        let over =
            |pod: &Pod| matches!(pod.status.as_ref().and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed"));
        let caller = match self.start(&caller, over).await {
            Ok(caller) => caller,
            Err(why) => {
                found.check("pods", Err(why));
                return Ok(found);
            }
        };
        found.check("pods", Ok(format!("caller on {}, callee on {}", node_of(&caller), node_of(&callee))));
        let said = self.log("caller", "app").await.map_err(|e| anyhow!(e))?;
        found.check("request", answered(&said, &self.word));
        let out = self.connections("caller").await?;
        let inward = self.connections("callee").await?;
        let destination = format!("{host}:{PORT}");
        let both = (told(&out, "outbound", &destination), told(&inward, "inbound", &destination));
        let agreed = match both {
            (Ok(out), Ok(inward)) if out == inward => {
                found.handshake = Some(out);
                Ok("both sidecars tell of the same one".to_owned())
            }
            (Ok(out), Ok(inward)) => Err(format!("the sidecars do not agree: {out:?} and {inward:?}")),
            (Err(why), _) => Err(format!("caller: {why}")),
            (_, Err(why)) => Err(format!("callee: {why}")),
        };
        found.check("handshake", agreed);
        if let Some(path) = pcap_file {
            let frames = Line::frames(&self.log("callee", "capture").await.map_err(|e| anyhow!(e))?);
            std::fs::write(path, pcap::file(&frames)).with_context(|| format!("cannot write {}", path.display()))?;
            found.check("wire", on_the_wire(&frames, self.word.as_bytes()));
        }
        Ok(found)
    }

    async fn wait_for_capture(&self) -> Result<()> {
        let until = Instant::now() + self.patience;
        while !self.log("callee", "capture").await.is_ok_and(|text| text.starts_with("\"listening\"")) {
            if Instant::now() > until {
                let said = self.log("callee", "capture").await.unwrap_or_else(|why| why);
                return Err(anyhow!("the capture does not listen: {}", sentence(said.trim(), MAX_SAID)));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }
}

fn node_of(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|s| s.node_name.as_deref()).unwrap_or("no node")
}

/// Why a pod has not started, from its container statuses.
fn waiting_for(pod: &Pod) -> String {
    let status = pod.status.as_ref();
    let lists = status.map(|s| [s.init_container_statuses.as_ref(), s.container_statuses.as_ref()]);
    let states = lists.into_iter().flatten().flatten().flatten().filter_map(|c| {
        let waiting = c.state.as_ref()?.waiting.as_ref()?;
        Some(format!("{} waits: {}", c.name, waiting.reason.as_deref().unwrap_or("?")))
    });
    let conditions = status.and_then(|s| s.conditions.as_ref()).into_iter().flatten();
    let conditions = conditions.filter(|c| c.status == "False").filter_map(|c| c.message.clone());
    let all: Vec<String> = states.chain(conditions).collect();
    if all.is_empty() { "it says nothing".into() } else { all.join("; ") }
}

/// Whether the caller received the word back.
fn answered(said: &str, word: &str) -> Result<String, String> {
    let report: Report = serde_json::from_str(said.trim()).map_err(|e| format!("the caller said `{said}`: {e}"))?;
    match report.errors.first() {
        Some(error) => Err(error.clone()),
        None if report.body.contains(word) => Ok("answered, with the word that was sent".into()),
        None => Err(format!("an answer without the word that was sent: {}", report.body.trim())),
    }
}

/// The handshake behind the connection to an address, from a sidecar's log.
fn told(connections: &[Value], direction: &str, destination: &str) -> Result<Handshake, String> {
    let wanted = |c: &&Value| c["direction"] == direction && c["destination"] == destination;
    let line = connections.iter().rev().find(wanted).ok_or("its sidecar tells of no such connection")?;
    let text = |key: &str| line[key].as_str().map(ToOwned::to_owned);
    if line["mode"] != "mtls" {
        return Err(format!(
            "the connection was {}: {}",
            line["mode"].as_str().unwrap_or("?"),
            text("reason").unwrap_or_else(|| "in the clear".into())
        ));
    }
    let end = |id: &str, whose: &str| {
        Some(End {
            id: text(id)?,
            serial: text(&format!("{whose}_serial"))?,
            expires_at: text(&format!("{whose}_expires_at"))?,
        })
    };
    let (client, server) = if direction == "outbound" { ("own", "peer") } else { ("peer", "own") };
    let read = || {
        Some(Handshake {
            client: end("source_id", client)?,
            server: end("destination_id", server)?,
            tls: text("tls")?,
            cipher: text("cipher")?,
        })
    };
    read().ok_or_else(|| format!("its sidecar's line lacks something: {line}"))
}

/// Whether the captured frames contain the handshake and not the word.
fn on_the_wire(frames: &[pcap::Frame], word: &[u8]) -> Result<String, String> {
    let clear = frames.iter().filter(|f| f.bytes.windows(word.len()).any(|w| w == word)).count();
    if clear > 0 {
        return Err(format!("{clear} of {} frames hold the word in the clear", frames.len()));
    }
    let payloads: Vec<&[u8]> = frames.iter().filter_map(|f| f.tcp_payload(MESH_PORT)).collect();
    // RFC 8446 5.1: record type 22 (handshake), legacy version 3.x; RFC 8446 4: messages 1 (ClientHello), 2
    // (ServerHello).
    let hello = |message: u8| payloads.iter().any(|p| p.len() > 5 && p[..2] == [22, 3] && p[5] == message);
    if !hello(1) || !hello(2) {
        return Err(format!("{} frames, but no TLS handshake on port {MESH_PORT} among them", frames.len()));
    }
    Ok(format!("{} frames, a TLS handshake on port {MESH_PORT}, no frame with the word", frames.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(direction: &str, own: &str, peer: &str) -> Value {
        json!({
            "direction": direction, "mode": "mtls", "destination": "10.0.0.2:9080", "source_id": "spiffe://td/a",
            "destination_id": "spiffe://td/b", "own_serial": own, "peer_serial": peer, "own_expires_at": "t", "peer_expires_at": "t",
            "tls": "TLSv1.3 X25519MLKEM768", "cipher": "TLS_AES_128_GCM_SHA256",
        })
    }

    #[test]
    fn two_sidecars_agree_only_when_each_has_the_others_serial() {
        let told = |direction: &str, own: &str, peer: &str| {
            told(&[line(direction, own, peer)], direction, "10.0.0.2:9080").unwrap()
        };
        assert_eq!(told("outbound", "1", "2"), told("inbound", "2", "1"));
        assert_ne!(told("outbound", "1", "2"), told("inbound", "1", "2"));
    }

    #[test]
    fn a_connection_in_the_clear_or_to_somebody_else_is_no_handshake() {
        let mut plain = line("outbound", "1", "2");
        plain["mode"] = "plain".into();
        assert!(told(&[plain], "outbound", "10.0.0.2:9080").unwrap_err().contains("in the clear"));
        assert!(told(&[line("outbound", "1", "2")], "outbound", "10.0.0.3:9080").is_err());
        assert!(told(&[line("outbound", "1", "2")], "inbound", "10.0.0.2:9080").is_err());
    }

    #[test]
    fn the_wire_must_hold_the_handshake_and_not_the_word() {
        let frame = |payload: &[u8]| {
            let mut bytes = vec![2; 12];
            bytes.extend([0x08, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]);
            bytes.extend(MESH_PORT.to_be_bytes());
            bytes.extend([0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0]);
            bytes.extend(payload);
            pcap::Frame { at_us: 0, bytes }
        };
        let hellos = [frame(&[22, 3, 1, 0, 9, 1, 0]), frame(&[22, 3, 3, 0, 9, 2, 0])];
        assert!(on_the_wire(&hellos, b"word").is_ok());
        assert!(on_the_wire(&hellos[..1], b"word").unwrap_err().contains("no TLS handshake"));
        let leak = [&hellos[..], &[frame(b"GET /?echo=word")]].concat();
        assert!(on_the_wire(&leak, b"word").unwrap_err().contains("1 of 3 frames"));
    }

    #[test]
    fn an_answer_must_bring_the_word_back() {
        let report = |body: &str, errors: &[&str]| {
            json!({ "ok": 1, "failed": 0, "connections": 1, "errors": errors, "body": body }).to_string()
        };
        assert!(answered(&report("{\"echo\":\"word\"}", &[]), "word").is_ok());
        assert!(answered(&report("{}", &[]), "word").is_err());
        assert_eq!(answered(&report("", &["connect"]), "word"), Err("connect".into()));
        assert!(answered("garbage", "word").is_err());
    }
}
