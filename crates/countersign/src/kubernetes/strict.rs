//! `countersign strict`: who would be cut off by strict, and the move to it.

use std::collections::{BTreeMap, HashMap};
use std::process::ExitCode;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use super::cluster::{client, is_meshed, sidecar_log};
use crate::operator::block;
use crate::operator::output::{Output, Table};
use crate::settings::Mistake;

/// Lines of each sidecar's log that are looked at.
const LINES: i64 = 20_000;

/// Kubernetes: move a namespace, or the whole mesh, to strict: first see with --plan which plaintext peers that would cut off.
///
/// The peers are those that the sidecars' logs show. Go namespace by namespace (-n), then the whole mesh (--mesh); both take
/// effect on running pods at once, and are taken back by `kubectl annotate namespace NS countersign.dev/mode-` and by the mode
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
    /// Move although somebody would be cut off.
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

async fn run(args: &StrictArgs) -> Result<ExitCode> {
    let client = client().await?;
    let found = plan(&client, args.namespace.as_deref()).await?;
    let mut table = Table::new(&["workload", "direction", "plaintext peer", "port", "connections seen"]);
    for (p, count) in &found {
        table.row(vec![p.workload.clone(), p.direction.into(), p.peer.clone(), p.port.clone(), count.to_string()]);
    }
    let rows = found.iter().map(|(p, count)| {
        json!({ "workload": p.workload, "direction": p.direction, "peer": p.peer, "port": p.port, "connections": count })
    });
    let rows: Vec<_> = rows.collect();
    let moves = !args.plan && (found.is_empty() || args.force);
    if moves {
        move_to_strict(&client, args).await?;
    }
    args.output.print(&table, &json!({ "moved": moves, "plaintext": rows }))?;
    if found.is_empty() {
        eprintln!("no plaintext peer was seen: strict would cut off nobody that the sidecars know of");
    } else if !args.plan && !moves {
        eprintln!("nothing was changed: these would be cut off. Put them into the mesh, or say --force");
    }
    Ok(ExitCode::from(u8::from(!found.is_empty() && !moves)))
}

/// Plaintext connections in the sidecars' logs, by workload and peer.
async fn plan(client: &Client, namespace: Option<&str>) -> Result<BTreeMap<Plain, usize>> {
    let everywhere: Api<Pod> = Api::all(client.clone());
    let all = everywhere.list(&ListParams::default()).await.context("cannot list pods")?.items;
    let named: HashMap<String, String> = all
        .iter()
        .filter(|p| p.spec.as_ref().and_then(|s| s.host_network) != Some(true))
        .filter_map(|p| Some((p.status.as_ref()?.pod_ip.clone()?, format!("pod {}", name_of(p)))))
        .collect();
    let mut found = BTreeMap::new();
    for pod in all.iter().filter(|p| is_meshed(p) && namespace.is_none_or(|n| p.namespace().as_deref() == Some(n))) {
        // A pod that is coming or going has no log yet, or no more.
        let Ok((_, connections)) = sidecar_log(client, pod, LINES).await else { continue };
        for plain in connections.iter().filter_map(|c| plain(c, &name_of(pod), &named)) {
            *found.entry(plain).or_default() += 1;
        }
    }
    Ok(found)
}

fn name_of(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any())
}

/// A connection that strict would refuse; `None`: it would not.
fn plain(connection: &Value, workload: &str, named: &HashMap<String, String>) -> Option<Plain> {
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
    let peer = named.get(ip).cloned().unwrap_or_else(|| ip.to_owned());
    Some(Plain { workload: workload.to_owned(), direction, peer, port: port.to_owned() })
}

async fn move_to_strict(client: &Client, args: &StrictArgs) -> Result<()> {
    let params = PatchParams::default();
    if let Some(namespace) = &args.namespace {
        let api: Api<Namespace> = Api::all(client.clone());
        let patch = json!({ "metadata": { "annotations": { "countersign.dev/mode": "strict" } } });
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
        let line = |direction: &str, mode: &str| json!({ "direction": direction, "mode": mode, "source": "10.0.0.9:4000", "destination": "10.0.0.1:8080" });
        let inbound = plain(&line("inbound", "plain"), "shop/web", &named).unwrap();
        assert_eq!((inbound.peer.as_str(), inbound.port.as_str(), inbound.direction), ("pod old/cron", "8080", "in"));
        let outbound = plain(&line("outbound", "plain"), "shop/web", &named).unwrap();
        assert_eq!((outbound.peer.as_str(), outbound.port.as_str()), ("10.0.0.1", "8080"));
        assert!(plain(&line("inbound", "mtls"), "shop/web", &named).is_none());
        assert!(plain(&line("inbound", "refused"), "shop/web", &named).is_none());
        assert!(plain(&json!({ "mode": "plain" }), "shop/web", &named).is_none());
    }
}
