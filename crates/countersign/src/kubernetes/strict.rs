//! `countersign strict`: who would be cut off by strict, and the move to it.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Context, Result};
use countersign_controller::facts::{self, Facts};
use countersign_controller::feed::api_server;
use countersign_identity::policy::Policy;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use super::cluster::{SIDECAR_PORT, client, is_meshed, page, sidecar_log};
use super::exceptions::{drops_others, exceptions, leave};
use crate::metrics_page::{label, metric};
use crate::operator::block;
use crate::operator::output::{Output, Table};
use crate::settings::Mistake;

/// Lines of each sidecar's log that are looked at.
const LINES: i64 = 20_000;

/// Kubernetes: move a namespace, or the whole mesh, to strict: first see with --plan which plaintext peers that would cut off.
///
/// The peers are those that the sidecars' logs show. A sidecar whose log does not tell everything is named and stops the move, and
/// so does a pod whose annotations let traffic past its sidecar without the administrator's leave. Go namespace by namespace (-n), then the whole mesh (--mesh); both take
/// effect on running pods at once, and are taken back by `kubectl annotate namespace NS countersign.dev/mode-` with `kubectl label namespace NS countersign.dev/mode-`, and by the mode
/// in ConfigMap countersign-mesh.
#[derive(Debug, clap::Args)]
pub struct StrictArgs {
    /// Show who would be cut off, and change nothing.
    #[arg(long)]
    plan: bool,
    /// The namespace that is looked at or moved; without it --plan looks at all.
    #[arg(long, short, value_name = "NAMESPACE", conflicts_with = "mesh")]
    namespace: Option<String>,
    /// Move the whole mesh.
    #[arg(long, conflicts_with = "plan")]
    mesh: bool,
    /// Move although somebody would be cut off, or it is not known whether.
    #[arg(long)]
    force: bool,
    /// Namespace of the installation.
    #[arg(long, value_name = "NAMESPACE", default_value = "countersign")]
    mesh_namespace: String,
    #[command(flatten)]
    output: Output,
}

/// A workload and somebody that it talks to in the clear.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Plain {
    workload: String,
    direction: &'static str,
    peer: String,
    port: String,
}

/// Plans, or moves; exit 1 when somebody would be cut off.
pub fn strict(args: &StrictArgs) -> Result<ExitCode> {
    if !args.plan && !args.mesh && args.namespace.is_none() {
        return Err(Mistake("say what: --plan, -n NAMESPACE, or --mesh".into()).into());
    }
    block(run(args))
}

/// What is known before a move.
#[derive(Debug, Default)]
struct Plan {
    /// Plaintext connections that strict would refuse, by workload and peer.
    found: BTreeMap<Plain, usize>,
    /// Pods whose peers are not known, and why.
    unknown: Vec<(String, String)>,
    /// Pods with exceptions that nobody gave leave for, and which.
    exceptions: Vec<(String, String)>,
    /// Pods whose other protocols go on in the clear until they are made anew.
    unguarded: Vec<String>,
    /// Pods with connections that are still open, of which the log says nothing yet.
    open: Vec<(String, u64)>,
}

impl Plan {
    fn is_clear(&self) -> bool {
        self.found.is_empty() && self.unknown.is_empty() && self.exceptions.is_empty()
    }
}

async fn run(args: &StrictArgs) -> Result<ExitCode> {
    let client = client().await?;
    let plan = plan(&client, args.namespace.as_deref(), &args.mesh_namespace).await?;
    let mut table = Table::new(&["workload", "direction", "plaintext peer", "port", "connections seen"]);
    for (p, count) in &plan.found {
        table.row(vec![p.workload.clone(), p.direction.into(), p.peer.clone(), p.port.clone(), count.to_string()]);
    }
    for (pod, why) in &plan.unknown {
        table.row(vec![pod.clone(), "?".into(), format!("unknown: {why}"), String::new(), String::new()]);
    }
    for (pod, which) in &plan.exceptions {
        table.row(vec![pod.clone(), "past".into(), format!("exception: {which}"), String::new(), String::new()]);
    }
    let rows = plan.found.iter().map(|(p, count)| {
        json!({ "workload": p.workload, "direction": p.direction, "peer": p.peer, "port": p.port, "connections": count })
    });
    let rows: Vec<_> = rows.collect();
    let pairs = |all: &[(String, String)], key: &str| -> Vec<Value> {
        all.iter().map(|(pod, what)| json!({ "workload": pod, key: what })).collect()
    };
    let moves = !args.plan && (plan.is_clear() || args.force);
    if moves {
        move_to_strict(&client, args).await?;
    }
    args.output.print(
        &table,
        &json!({
            "moved": moves, "plaintext": rows, "unknown": pairs(&plan.unknown, "why"),
            "exceptions": pairs(&plan.exceptions, "what"), "other_protocols_in_clear": plan.unguarded,
        }),
    )?;
    say(&plan, args.plan, moves);
    Ok(ExitCode::from(u8::from(!plan.is_clear() && !moves)))
}

/// What the table leaves open, in words.
fn say(plan: &Plan, only_plan: bool, moves: bool) {
    if plan.is_clear() {
        eprintln!("no plaintext peer was seen: strict would cut off nobody that the sidecars know of");
    } else if !only_plan && !moves {
        eprintln!(
            "nothing was changed: peers would be cut off, are unknown, or go past a sidecar (table). Fix these, or say --force"
        );
    }
    for (pod, count) in &plan.open {
        eprintln!("{pod}: {count} connections are open; whether they are plaintext is logged when they end");
    }
    if !plan.unguarded.is_empty() {
        eprintln!(
            "UDP, other protocols and TCP to link-local IPv6 addresses (fe80::/10) go on in the clear until these pods are made anew under strict (kubectl rollout restart): {}",
            plan.unguarded.join(", ")
        );
    }
}

/// What the pods' sidecars and redirects tell.
async fn plan(client: &Client, namespace: Option<&str>, mesh: &str) -> Result<Plan> {
    let everywhere: Api<Pod> = Api::all(client.clone());
    let all = everywhere.list(&ListParams::default()).await.context("cannot list pods")?.items;
    let leave = leave(client, mesh).await.context("cannot read the injector's settings")?;
    let strict = strict_policy(client).await?;
    let named: HashMap<String, String> = all
        .iter()
        .filter(|p| p.spec.as_ref().and_then(|s| s.host_network) != Some(true))
        .filter_map(|p| Some((p.status.as_ref()?.pod_ip.clone()?, format!("pod {}", name_of(p)))))
        .collect();
    let mut plan = Plan::default();
    for pod in all.iter().filter(|p| is_meshed(p) && namespace.is_none_or(|n| p.namespace().as_deref() == Some(n))) {
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default();
        if ["Succeeded", "Failed"].contains(&phase) {
            continue;
        }
        if !leave.is_given(&pod.namespace().unwrap_or_default()) {
            plan.exceptions.extend(exceptions(pod).into_iter().map(|which| (name_of(pod), which)));
        }
        if !drops_others(pod) {
            plan.unguarded.push(name_of(pod));
        }
        match seen(client, pod).await {
            Ok((connections, open)) => {
                let plain = connections.iter().filter_map(|c| plain(c, &name_of(pod), &named, &strict));
                plain.for_each(|p| *plan.found.entry(p).or_default() += 1);
                if open > 0 {
                    plan.open.push((name_of(pod), open));
                }
            }
            Err(why) => plan.unknown.push((name_of(pod), why)),
        }
    }
    Ok(plan)
}

/// The connections in a sidecar's log, where it tells of all, and how many are open; or why it does not.
async fn seen(client: &Client, pod: &Pod) -> Result<(Vec<Value>, u64), String> {
    let (lines, connections) =
        sidecar_log(client, pod, LINES).await.map_err(|e| format!("its log cannot be read ({})", one_line(&e)))?;
    let metrics = page(client, pod, SIDECAR_PORT, "/metrics")
        .await
        .map_err(|e| format!("its sidecar does not answer ({})", one_line(&e)))?;
    complete(lines.len(), &connections, &metrics)?;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a count
    let open = metric(&metrics, "countersign_proxy_active_connections").map(|(_, n)| n.max(0.0) as u64).sum();
    Ok((connections, open))
}

fn one_line(error: &anyhow::Error) -> String {
    super::cluster::words(&format!("{error:#}"))
}

/// Whether a log has every plaintext connection that the sidecar has counted since it started. A log that was rotated, or is
/// longer than what is read of it, has fewer.
fn complete(lines: usize, connections: &[Value], metrics: &str) -> Result<(), String> {
    if i64::try_from(lines).is_ok_and(|n| n >= LINES) {
        return Err(format!("its log is longer than the {LINES} lines that are read"));
    }
    let is_plain = |mode: &str| mode.eq_ignore_ascii_case("plain");
    let counts = metric(metrics, "countersign_proxy_connections_total");
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a count
    let counted: usize =
        counts.filter(|(l, _)| label(l, "mode").is_some_and(is_plain)).map(|(_, n)| n.max(0.0) as usize).sum();
    let logged = connections.iter().filter(|c| c["mode"].as_str().is_some_and(is_plain)).count();
    if counted > logged {
        return Err(format!(
            "it has counted {counted} plaintext connections, and its log has {logged}: it was rotated"
        ));
    }
    Ok(())
}

/// What strict lets out of every pod, by the code that tells the sidecars.
async fn strict_policy(client: &Client) -> Result<Policy> {
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
    let service = services.get("kubernetes").await.context("cannot read Service default/kubernetes")?;
    let of_it = ListParams::default().labels("kubernetes.io/service-name=kubernetes");
    let found = slices.list(&of_it).await.context("cannot read the API server's EndpointSlices")?;
    let key = |name: String| ("default".to_owned(), name);
    let facts = Facts {
        services: facts::Service::read(&service).map(|s| (key(s.name.clone()), s)).into_iter().collect(),
        slices: found.items.iter().filter_map(|s| Some((key(s.name_any()), facts::Slice::read(s)?))).collect(),
        ..Facts::default()
    };
    Ok(Policy { egress: api_server(&facts), ..Policy::default() })
}

fn name_of(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any())
}

/// A connection that strict would refuse; `None`: it would not.
fn plain(connection: &Value, workload: &str, named: &HashMap<String, String>, strict: &Policy) -> Option<Plain> {
    if connection["mode"] != "plain" {
        return None;
    }
    let (direction, peer) = match connection["direction"].as_str()? {
        "inbound" => ("in", connection["source"].as_str()?),
        "outbound" => ("out", connection["destination"].as_str()?),
        _ => return None,
    };
    let destination = connection["destination"].as_str()?;
    let (ip, _) = peer.rsplit_once(':')?;
    let (_, port) = destination.rsplit_once(':')?;
    let address = ip.trim_matches(['[', ']']).parse::<IpAddr>().ok();
    if direction == "out" && address.is_some_and(|a| strict.lets_out(a)) {
        return None;
    }
    let peer = named.get(ip).cloned().unwrap_or_else(|| ip.to_owned());
    Some(Plain { workload: workload.to_owned(), direction, peer, port: port.to_owned() })
}

async fn move_to_strict(client: &Client, args: &StrictArgs) -> Result<()> {
    let params = PatchParams::default();
    if let Some(namespace) = &args.namespace {
        let api: Api<Namespace> = Api::all(client.clone());
        // The label tells the webhook's selectors, so that new pods drop what is not TCP.
        let strict = json!({ "countersign.dev/mode": "strict" });
        let patch = json!({ "metadata": { "annotations": strict, "labels": strict } });
        api.patch(namespace, &params, &Patch::Merge(patch))
            .await
            .with_context(|| format!("cannot change namespace {namespace}"))?;
        eprintln!("namespace {namespace} is strict");
    } else {
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), &args.mesh_namespace);
        let patch = json!({ "data": { "mode": "strict" } });
        api.patch("countersign-mesh", &params, &Patch::Merge(patch))
            .await
            .context("cannot change the mesh's settings")?;
        eprintln!("the mesh is strict");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plaintext_peers_are_found_and_named() {
        let named = [("10.0.0.9".to_owned(), "pod old/cron".to_owned())].into();
        let strict = Policy { egress: vec!["10.96.0.1/32".parse().unwrap()], ..Policy::default() };
        let line = |direction: &str, mode: &str| json!({ "direction": direction, "mode": mode, "source": "10.0.0.9:4000", "destination": "10.0.0.1:8080" });
        let inbound = plain(&line("inbound", "plain"), "shop/web", &named, &strict).unwrap();
        assert_eq!((inbound.peer.as_str(), inbound.port.as_str(), inbound.direction), ("pod old/cron", "8080", "in"));
        let outbound = plain(&line("outbound", "plain"), "shop/web", &named, &strict).unwrap();
        assert_eq!((outbound.peer.as_str(), outbound.port.as_str()), ("10.0.0.1", "8080"));
        assert!(plain(&line("inbound", "mtls"), "shop/web", &named, &strict).is_none());
        assert!(plain(&line("inbound", "refused"), "shop/web", &named, &strict).is_none());
        assert!(plain(&json!({ "mode": "plain" }), "shop/web", &named, &strict).is_none());
    }

    #[test]
    fn what_strict_would_let_out_cuts_off_nobody() {
        let strict = Policy { egress: vec!["10.96.0.1/32".parse().unwrap()], ..Policy::default() };
        let line = |direction: &str| json!({ "direction": direction, "mode": "plain", "source": "10.96.0.1:443", "destination": "10.96.0.1:443" });
        assert!(plain(&line("outbound"), "shop/web", &HashMap::new(), &strict).is_none(), "the API server");
        assert!(plain(&line("inbound"), "shop/web", &HashMap::new(), &strict).is_some(), "out is not in");
    }

    #[test]
    fn a_log_that_does_not_tell_everything_is_no_proof() {
        let plain = json!({ "mode": "plain" });
        let page = |mode: &str, n: u32| {
            format!("countersign_proxy_connections_total{{direction=\"inbound\",mode=\"{mode}\"}} {n}\n")
        };
        assert!(complete(10, std::slice::from_ref(&plain), &page("Plain", 1)).is_ok());
        assert!(complete(10, std::slice::from_ref(&plain), &page("mtls", 9)).is_ok());
        for mode in ["Plain", "plain"] {
            let why = complete(10, std::slice::from_ref(&plain), &page(mode, 2)).unwrap_err();
            assert!(why.contains("counted 2") && why.contains("has 1"), "{why}");
        }
        assert!(complete(20_000, &[], "").unwrap_err().contains("longer than"));
        let unknown = Plan { unknown: vec![("a/b".into(), "403".into())], ..Plan::default() };
        assert!(!unknown.is_clear(), "who cannot be asked stops the move");
        assert!(Plan { unguarded: vec!["a/b".into()], ..Plan::default() }.is_clear());
    }
}
