//! `countersign explain pod NAME`: the way of a pod into the mesh, step by step, and where it stops.

use std::process::ExitCode;

use anyhow::{Context, Result};
use countersign_controller::crd::SpiffeID;
use countersign_controller::injector::{INJECT, SIDECAR};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::Api;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::cluster::{SIDECAR_PORT, client, is_meshed, is_ready, page, pods, sidecar_log};
use crate::metrics_page::metric;
use crate::operator::block;
use crate::operator::output::{Output, Table};

/// Connections that are shown.
const SHOWN: usize = 5;

/// Kubernetes: explain how a pod came into the mesh, or why it is not in it.
///
/// Step by step: injection, entry, agent, attestation, SVID, mode, last handshakes. Exit 1 when one is missing.
#[derive(Debug, clap::Args)]
pub struct ExplainArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// One pod.
    Pod {
        /// Its name.
        name: String,
        /// Its namespace.
        #[arg(long, short, value_name = "NAMESPACE", default_value = "default")]
        namespace: String,
        /// Namespace of the installation.
        #[arg(long, value_name = "NAMESPACE", default_value = "countersign")]
        mesh_namespace: String,
        #[command(flatten)]
        output: Output,
    },
}

/// A step: what was found, or what is missing.
struct Step {
    name: &'static str,
    outcome: Result<String, String>,
}

/// Explains; exit 1 when a step fails.
pub fn explain(args: &ExplainArgs) -> Result<ExitCode> {
    let What::Pod { name, namespace, mesh_namespace, output } = &args.what;
    let (steps, connections) = block(find(name, namespace, mesh_namespace))?;
    let mut table = Table::new(&["step", "result", "found"]);
    let mut all = vec![];
    for Step { name, outcome } in &steps {
        let (ok, found) = match outcome {
            Ok(found) => (true, found),
            Err(found) => (false, found),
        };
        table.row(vec![(*name).to_owned(), if ok { "ok" } else { "MISSING" }.to_owned(), found.clone()]);
        all.push(json!({ "step": name, "ok": ok, "found": found }));
    }
    for c in connections.iter().rev().take(SHOWN) {
        table.row(vec!["connection".into(), c["mode"].as_str().unwrap_or_default().into(), sentence(c)]);
    }
    let good = steps.iter().all(|s| s.outcome.is_ok());
    output.print(&table, &json!({ "ok": good, "steps": all, "connections": connections }))?;
    Ok(ExitCode::from(u8::from(!good)))
}

/// A connection's line of the access log in words.
fn sentence(c: &Value) -> String {
    let text = |key: &str| c[key].as_str().unwrap_or("?").to_owned();
    let (from, to) =
        (c["source_id"].as_str().unwrap_or("plaintext"), c["destination_id"].as_str().unwrap_or("plaintext"));
    let how = c["reason"].as_str().map_or_else(|| text("tls"), |why| format!("refused: {why}"));
    format!(
        "{} {}: {from} at {} to {to} at {}, {how}",
        text("time"),
        text("direction"),
        text("source"),
        text("destination")
    )
}

async fn find(name: &str, namespace: &str, mesh: &str) -> Result<(Vec<Step>, Vec<Value>)> {
    let client = client().await?;
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pod = api.get(name).await.with_context(|| format!("cannot read pod {namespace}/{name}"))?;
    let mut steps = vec![Step { name: "injection", outcome: injection(&client, &pod, namespace).await }];
    steps.push(Step { name: "registration", outcome: registration(&client, name, namespace).await });
    steps.push(Step { name: "agent", outcome: agent(&client, &pod, mesh).await });
    if !is_meshed(&pod) {
        return Ok((steps, vec![]));
    }
    let (lines, connections) = sidecar_log(&client, &pod, 2_000).await.unwrap_or_default();
    steps.push(Step { name: "attestation", outcome: attestation(&lines) });
    let metrics = page(&client, &pod, SIDECAR_PORT, "/metrics").await;
    steps.push(Step { name: "SVID", outcome: svid(metrics.as_deref().map_err(ToString::to_string)) });
    let mode = page(&client, &pod, SIDECAR_PORT, "/mode").await;
    let mode = mode.map(|m| m.trim().to_owned()).map_err(|e| format!("the sidecar does not know its policy yet ({e})"));
    steps.push(Step { name: "mode", outcome: mode });
    let handshakes = connections.iter().filter(|c| c["mode"] == "mtls").count();
    let refused = connections.iter().filter(|c| c["mode"] == "refused").count();
    let said = format!("{handshakes} over mTLS and {refused} refused among the last {} connections", connections.len());
    steps.push(Step { name: "handshakes", outcome: Ok(said) });
    Ok((steps, connections))
}

async fn injection(client: &Client, pod: &Pod, namespace: &str) -> Result<String, String> {
    if is_meshed(pod) {
        return Ok(format!("it has container {SIDECAR}"));
    }
    let own = pod.labels().get(INJECT).map(String::as_str);
    let spaces: Api<Namespace> = Api::all(client.clone());
    let theirs = spaces.get(namespace).await.ok().and_then(|n| n.labels().get(INJECT).cloned());
    let host = pod.spec.as_ref().and_then(|s| s.host_network) == Some(true);
    Err(match (own, theirs.as_deref()) {
        _ if host => "it uses its node's network, where a redirect would catch the node's traffic".into(),
        (Some("disabled"), _) => format!("its label {INJECT} is disabled"),
        (Some("enabled"), _) | (_, Some("enabled")) => {
            "it asks for a sidecar and has none: it is older than the label; delete it, or restart what it belongs to"
                .into()
        }
        _ => format!("neither the pod nor its namespace is labelled {INJECT}=enabled"),
    })
}

async fn registration(client: &Client, name: &str, namespace: &str) -> Result<String, String> {
    let api: Api<SpiffeID> = Api::namespaced(client.clone(), namespace);
    let object = api.get_opt(name).await.map_err(|e| e.to_string())?;
    let object = object.ok_or("it has no SpiffeID object: is its namespace left out, and is the registrar running?")?;
    let status = object.status.unwrap_or_default();
    match (status.entry_id, status.conditions.first()) {
        (Some(entry), Some(c)) if c.status == "True" => Ok(format!("{} by entry {entry}", object.spec.spiffe_id)),
        (_, Some(c)) => Err(format!("{}: {}", object.spec.spiffe_id, c.message)),
        _ => Err(format!("{}: the registrar has not registered it yet", object.spec.spiffe_id)),
    }
}

async fn agent(client: &Client, pod: &Pod, mesh: &str) -> Result<String, String> {
    let node = pod.spec.as_ref().and_then(|s| s.node_name.clone()).ok_or("it is on no node yet")?;
    let agents = pods(client, mesh, "app.kubernetes.io/component=agent").await.map_err(|e| e.to_string())?;
    let here = agents.iter().find(|a| a.spec.as_ref().and_then(|s| s.node_name.as_ref()) == Some(&node));
    match here {
        Some(agent) if is_ready(agent) => Ok(format!("{} on node {node} is ready", agent.name_any())),
        Some(agent) => Err(format!("{} on node {node} is not ready; see its log", agent.name_any())),
        None => Err(format!("there is none on node {node}")),
    }
}

/// What the agent last answered the sidecar.
fn attestation(lines: &[String]) -> Result<String, String> {
    let refusal = lines.iter().rposition(|l| l.contains("no identity from the agent"));
    let success = lines.iter().rposition(|l| l.contains("identity in use") || l.contains("\"mode\":\"mtls\""));
    match (refusal, success) {
        (Some(at), then) if then.is_none_or(|s| s < at) => {
            let said = lines[at].split_once("status=").map_or(lines[at].as_str(), |(_, said)| said);
            Err(said.trim_matches('"').to_owned())
        }
        _ => Ok("the agent has not refused the sidecar lately".into()),
    }
}

fn svid(metrics: Result<&str, String>) -> Result<String, String> {
    let metrics = metrics.map_err(|e| format!("the sidecar does not answer: {e}"))?;
    let now = OffsetDateTime::now_utc().unix_timestamp();
    #[allow(clippy::cast_possible_truncation)] // seconds since 1970
    let end = metric(metrics, "countersign_proxy_svid_expiry_timestamp_seconds").next().map(|(_, end)| end as i64);
    match end {
        Some(end) if end > now => Ok(format!("{} s left", end - now)),
        Some(0) | None => Err("the sidecar has none".into()),
        Some(end) => Err(format!("it ended {} s ago; is the agent connected to its server?", now - end)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_last_word_counts() {
        let refused = "WARN no identity from the agent; trying again in 1s status=\"no identity issued: attested x; the closest entry also needs y\"".to_owned();
        let good = "{\"direction\":\"outbound\",\"mode\":\"mtls\"}".to_owned();
        assert!(attestation(&[good.clone(), refused.clone()]).unwrap_err().ends_with("also needs y"));
        assert!(attestation(&[refused, good]).is_ok());
        assert!(attestation(&[]).is_ok());
    }

    #[test]
    fn an_svid_that_is_over_is_none() {
        let page = |end: i64| format!("countersign_proxy_svid_expiry_timestamp_seconds {end}\n");
        let now = OffsetDateTime::now_utc().unix_timestamp();
        assert!(svid(Ok(&page(now + 60))).is_ok());
        assert!(svid(Ok(&page(now - 60))).unwrap_err().contains("ended"));
        assert!(svid(Ok(&page(0))).unwrap_err().contains("none"));
        assert!(svid(Err("gone".into())).unwrap_err().contains("gone"));
    }
}
