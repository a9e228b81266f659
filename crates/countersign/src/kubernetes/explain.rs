//! `countersign explain pod NAME`: the way of a pod into the mesh, step by step, and where it stops.

use std::process::ExitCode;

use anyhow::{Context, Result};
use countersign_controller::crd::SpiffeID;
use countersign_controller::injector::{INJECT, SIDECAR};
use countersign_proxy::plaintext::Row;
use countersign_proxy::status_page::{Carried, Direction, SidecarStatus};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::Api;
use kube::{Client, ResourceExt};
use serde_json::json;
use time::OffsetDateTime;

use super::cluster::{client, is_meshed, is_ready, pods};
use super::exceptions::exceptions;
use super::sidecars::{Unasked, ask};
use crate::operator::output::{Output, Table};
use crate::operator::{block, when};

/// Plaintext peers that the table shows: those that came last. JSON has all.
const SHOWN: usize = 5;

/// Kubernetes: explain how a pod came into the mesh, or why it is not in it.
///
/// Step by step: injection, entry, agent, sidecar, attestation, SVID, mode, handshakes; then what the sidecar refused, and its
/// plaintext peers. Exit 1 when a step is missing.
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
    let (steps, status) = block(find(name, namespace, mesh_namespace))?;
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
    if let Some(status) = &status {
        for refused in &status.refused {
            let found = format!("{} {}, {} times", refused.direction.as_str(), refused.reason, refused.count);
            table.row(vec!["refused".into(), String::new(), found]);
        }
        let mut latest: Vec<&Row> = status.plaintext.peers.iter().collect();
        latest.sort_by_key(|row| std::cmp::Reverse((row.open > 0, row.last_seen)));
        latest.iter().take(SHOWN).for_each(|row| table.row(vec!["plaintext".into(), String::new(), sentence(row)]));
    }
    let good = steps.iter().all(|s| s.outcome.is_ok());
    output.print(&table, &json!({ "ok": good, "steps": all, "sidecar": status }))?;
    Ok(ExitCode::from(u8::from(!good)))
}

/// A plaintext peer in words.
fn sentence(row: &Row) -> String {
    let how = if row.key.mode == Carried::Refused { "refused" } else { "carried" };
    let (key, last) = (&row.key, when(row.last_seen));
    format!(
        "{} {}, port {}: {how}, {} open, {} in all, last {last}",
        key.direction.as_str(),
        key.peer,
        key.port,
        row.open,
        row.total
    )
}

async fn find(name: &str, namespace: &str, mesh: &str) -> Result<(Vec<Step>, Option<SidecarStatus>)> {
    let client = client().await?;
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pod = api.get(name).await.with_context(|| format!("cannot read pod {namespace}/{name}"))?;
    let mut steps = vec![Step { name: "injection", outcome: injection(&client, &pod, namespace).await }];
    steps.push(Step { name: "registration", outcome: registration(&client, name, namespace).await });
    steps.push(Step { name: "agent", outcome: agent(&client, &pod, mesh).await });
    if !is_meshed(&pod) {
        return Ok((steps, None));
    }
    let asked = ask(&client, &pod).await;
    steps.extend(told(&asked, OffsetDateTime::now_utc().unix_timestamp()));
    Ok((steps, asked.ok()))
}

/// The steps that the sidecar itself tells of. `now`: seconds since 1970.
fn told(asked: &Result<SidecarStatus, Unasked>, now: i64) -> Vec<Step> {
    let status = match asked {
        Ok(status) => status,
        Err(why) => return vec![Step { name: "sidecar", outcome: Err(format!("{why}; {}", why.mend())) }],
    };
    let since = format!("version {}, started {}", status.version, when(status.started_at));
    vec![
        Step { name: "sidecar", outcome: Ok(since) },
        Step { name: "attestation", outcome: attestation(status) },
        Step { name: "SVID", outcome: svid(status, now) },
        Step { name: "mode", outcome: mode(status) },
        Step { name: "handshakes", outcome: Ok(handshakes(status)) },
    ]
}

async fn injection(client: &Client, pod: &Pod, namespace: &str) -> Result<String, String> {
    if is_meshed(pod) {
        let past = exceptions(pod);
        let past = if past.is_empty() { String::new() } else { format!("; exceptions: {}", past.join(" ")) };
        return Ok(format!("it has container {SIDECAR}{past}"));
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
fn attestation(status: &SidecarStatus) -> Result<String, String> {
    match &status.agent_refusal {
        Some(refusal) => Err(format!("{} ({}, {})", refusal.message, refusal.code, when(refusal.at))),
        None if status.identity.is_some() => Ok("the agent's last answer was an identity".into()),
        None => Err("the agent has not answered the sidecar yet".into()),
    }
}

fn svid(status: &SidecarStatus, now: i64) -> Result<String, String> {
    let identity = status.identity.as_ref().ok_or("the sidecar has none")?;
    match identity.expires_at - now {
        left @ 1.. => Ok(format!("{}, serial {}, {left} s left", identity.spiffe_id, identity.serial)),
        over => Err(format!("it ended {} s ago; is the agent connected to its server?", -over)),
    }
}

fn mode(status: &SidecarStatus) -> Result<String, String> {
    let missing = || format!(" ({})", status.missing.as_deref().unwrap_or("the directory has not answered"));
    status.mode.clone().ok_or_else(|| format!("the sidecar does not know its policy yet{}", missing()))
}

fn handshakes(status: &SidecarStatus) -> String {
    let count = |direction, mode| {
        let of = status.connections.iter().filter(|c| (c.direction, c.mode) == (direction, mode));
        of.map(|c| c.count).sum::<u64>()
    };
    let one = |direction: Direction| {
        format!(
            "{}: {} over mTLS, {} in the clear, {} refused",
            direction.as_str(),
            count(direction, Carried::Mtls),
            count(direction, Carried::Plain),
            count(direction, Carried::Refused)
        )
    };
    format!("{}; {}; {} open", one(Direction::Inbound), one(Direction::Outbound), status.open)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::sidecars::tests::page;
    use serde_json::Value;

    fn status(change: impl FnOnce(&mut Value)) -> SidecarStatus {
        let mut page = page();
        change(&mut page);
        serde_json::from_value(page).unwrap()
    }

    #[test]
    fn a_sidecar_that_is_well_passes_each_step() {
        let steps = told(&Ok(status(|_| {})), 1_000);
        let names: Vec<_> = steps.iter().map(|s| s.name).collect();
        assert_eq!(names, ["sidecar", "attestation", "SVID", "mode", "handshakes"]);
        assert!(steps.iter().all(|s| s.outcome.is_ok()));
        assert_eq!(steps[2].outcome.as_ref().unwrap(), "spiffe://a.org/ns/shop/sa/web, serial 0a, 3999999000 s left");
        let said = steps[4].outcome.as_ref().unwrap();
        let expected =
            "inbound: 7 over mTLS, 0 in the clear, 0 refused; outbound: 0 over mTLS, 0 in the clear, 0 refused; 1 open";
        assert_eq!(said, expected);
    }

    #[test]
    fn the_agents_last_word_counts() {
        let refusal = json!({ "at": 60, "code": "PermissionDenied", "message": "no identity issued: it also needs y" });
        let refused = status(|page| page["agent_refusal"] = refusal);
        let why = attestation(&refused).unwrap_err();
        assert_eq!(why, "no identity issued: it also needs y (PermissionDenied, 1970-01-01T00:01:00Z)");
        assert!(attestation(&status(|_| {})).is_ok());
        let silent = status(|page| page["identity"] = Value::Null);
        assert!(attestation(&silent).unwrap_err().contains("not answered"));
    }

    #[test]
    fn an_svid_that_is_over_is_none() {
        let ends = |end: i64| status(|page| page["identity"]["expires_at"] = json!(end));
        assert!(svid(&ends(61), 60).is_ok());
        assert!(svid(&ends(60), 60).unwrap_err().contains("ended 0 s ago"));
        assert!(svid(&status(|page| page["identity"] = Value::Null), 60).unwrap_err().contains("none"));
    }

    #[test]
    fn a_mode_that_is_not_known_says_what_is_missing() {
        let waiting = status(|page| (page["mode"], page["missing"]) = (Value::Null, json!("no SVID yet")));
        assert!(mode(&waiting).unwrap_err().contains("no SVID yet"));
    }

    #[test]
    fn a_sidecar_that_cannot_be_asked_is_one_step_with_what_to_do() {
        let steps = told(&Err(Unasked::Forbidden("no".into())), 0);
        assert_eq!((steps.len(), steps[0].name), (1, "sidecar"));
        let why = steps[0].outcome.as_ref().unwrap_err();
        assert!(why.contains("get and create on pods/portforward"), "{why}");
    }

    #[test]
    fn a_plaintext_peer_is_a_sentence() {
        let row = &status(|_| {}).plaintext.peers[0];
        let said = "inbound 10.0.0.9, port 8080: carried, 1 open, 3 in all, last 1970-01-01T00:02:00Z";
        assert_eq!(sentence(row), said);
    }
}
