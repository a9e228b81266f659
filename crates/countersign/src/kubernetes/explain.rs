//! `countersign explain KIND/NAME`: the way of a pod into the mesh, step by step, where it stops, and what is wrong with the mesh
//! that may be the cause. Objects, conditions, events and the sidecar's own page are read, and no log.

mod events;
mod objects;
mod owner;
mod sidecar;
mod target;

use std::process::ExitCode;

use anyhow::{Result, anyhow};
use countersign_proxy::plaintext::Row;
use countersign_proxy::status_page::SidecarStatus;
use countersign_watch::in_words;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::Api;
use serde_json::{Value, json};
use time::OffsetDateTime;

use self::events::{About, Warning};
use self::sidecar::Around;
use self::target::{Kind, Target};
use super::api_server::client;
use super::check::{self, Affected, Finding};
use super::cluster::{is_meshed, node_of};
use super::sidecars::ask;
use super::{pod_state, transparency};
use crate::one_line;
use crate::operator::block;
use crate::operator::output::{Output, Table};

/// Plaintext peers that the table shows: those that came last. JSON has all.
const SHOWN: usize = 5;

/// Kubernetes: explain how a pod came into the mesh, or why it is not in it.
///
/// Step by step: the pod, injection, entry, agent, sidecar, attestation, SVID, mode, handshakes; then what the sidecar refused, its
/// plaintext peers, and the last warnings among the pod's events. Of what makes pods: its conditions, whether its pods are ready and
/// in the mesh, and its events.
/// Where a step is missing, what `check` finds wrong with the mesh is added. Exit code 1 when a step is missing.
#[derive(Debug, clap::Args)]
pub struct ExplainArgs {
    /// Kind and name, also as KIND/NAME. Kinds are pod, deployment, replicaset, statefulset, daemonset and job.
    #[arg(required = true, num_args = 1..=2, value_names = ["KIND", "NAME"])]
    what: Vec<String>,
    /// Its namespace.
    #[arg(long, short, value_name = "NAMESPACE", default_value = "default")]
    namespace: String,
    /// Namespace of the installation.
    #[arg(long, value_name = "NAMESPACE", default_value = "countersign")]
    mesh_namespace: String,
    #[command(flatten)]
    output: Output,
}

/// A step: what was found, or what is missing.
#[derive(Debug)]
struct Step {
    name: &'static str,
    outcome: Result<String, String>,
}

impl Step {
    /// Whether it is there, and what was found.
    fn parts(&self) -> (bool, &str) {
        match &self.outcome {
            Ok(found) => (true, found),
            Err(found) => (false, found),
        }
    }
}

/// Everything that is known of a pod, or of what makes pods.
#[derive(Debug, Default)]
struct Explained {
    steps: Vec<Step>,
    /// What the sidecar knows of itself.
    sidecar: Option<SidecarStatus>,
    /// The last warnings among the events.
    warnings: Vec<Warning>,
    /// What could not be read.
    notes: Vec<String>,
    /// What is wrong with the mesh.
    causes: Vec<Finding>,
    /// Whether it should be in the mesh.
    is_wanted: bool,
    /// The pod's node.
    node: Option<String>,
}

/// Explains; exit code 1 when a step fails.
pub fn explain(args: &ExplainArgs) -> Result<ExitCode> {
    let target = Target::read(&args.what)?;
    let explained = block(find(&target, &args.namespace, &args.mesh_namespace))?;
    args.output.print(&explained.table(), &explained.json())?;
    Ok(ExitCode::from(u8::from(!explained.is_good())))
}

/// The JSON of [`explain`] for one pod.
pub async fn as_json(name: &str, namespace: &str, mesh: &str) -> Result<Value> {
    let target = Target { kind: Kind::Pod, name: name.to_owned() };
    Ok(find(&target, namespace, mesh).await?.json())
}

impl Explained {
    fn is_good(&self) -> bool {
        self.steps.iter().all(|s| s.outcome.is_ok())
    }

    fn json(&self) -> Value {
        let all = self.steps.iter().map(|step| {
            let (ok, found) = step.parts();
            json!({ "step": step.name, "ok": ok, "found": found })
        });
        let causes = check::json_of(&self.causes)["checks"].clone();
        json!({
            "ok": self.is_good(), "steps": all.collect::<Vec<_>>(), "sidecar": self.sidecar, "events": self.warnings,
            "notRead": self.notes, "causes": causes,
        })
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&["step", "result", "found"]);
        let mut row = |name: &str, result: &str, found: String| table.row(vec![name.into(), result.into(), found]);
        for step in &self.steps {
            let (ok, found) = step.parts();
            row(step.name, if ok { "ok" } else { "MISSING" }, found.to_owned());
        }
        if let Some(status) = &self.sidecar {
            for refused in &status.refused {
                row(
                    "refused",
                    "",
                    format!("{} {}, {} times", refused.direction.as_str(), refused.reason, refused.count),
                );
            }
            let mut latest: Vec<&Row> = status.plaintext.peers.iter().collect();
            latest.sort_by_key(|row| std::cmp::Reverse((row.open > 0, row.last_seen)));
            latest.iter().take(SHOWN).for_each(|peer| row("plaintext", "", sidecar::sentence(peer)));
        }
        self.warnings.iter().for_each(|warning| row("event", "", warning.sentence()));
        self.notes.iter().for_each(|note| row("not read", "", note.clone()));
        for cause in &self.causes {
            let [check, result, found, mend] = cause.row();
            row(&check, &result, format!("{found}; {mend}"));
        }
        table
    }
}

async fn find(target: &Target, namespace: &str, mesh: &str) -> Result<Explained> {
    let client = client().await?;
    let mut explained = if target.kind == Kind::Pod {
        of_pod(&client, &target.name, namespace, mesh).await?
    } else {
        owner::explain(&client, namespace, target).await?
    };
    if !explained.is_good() && explained.is_wanted {
        let affected = Affected { namespace, node: explained.node.as_deref() };
        match check::causes(mesh, affected).await {
            Ok(causes) => explained.causes = causes,
            Err(error) => explained.notes.push(format!("the mesh was not checked: {}", one_line(&error))),
        }
    }
    Ok(explained)
}

async fn of_pod(client: &Client, name: &str, namespace: &str, mesh: &str) -> Result<Explained> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pod = api.get_opt(name).await.map_err(|e| anyhow!("cannot read pod {namespace}/{name}: {}", in_words(&e)))?;
    let Some(pod) = pod else { return of_missing_pod(client, name, namespace).await };
    let space = objects::space(client, &[&pod], namespace).await;
    let injection = objects::injection(&pod, space.as_ref());
    let mut steps = vec![
        Step { name: "pod", outcome: pod_state::state(&pod) },
        Step { name: "injection", outcome: injection.outcome },
        Step { name: "registration", outcome: objects::registration(client, &pod, namespace).await },
        Step { name: "agent", outcome: objects::agent(client, &pod, mesh).await },
    ];
    let (mut sidecar, node) = (None, node_of(&pod).map(ToOwned::to_owned));
    if is_meshed(&pod) && node.is_some() {
        let (asked, open) = futures::join!(ask(client, &pod), transparency::open(client, mesh));
        let shares_processes = pod.spec.as_ref().and_then(|s| s.share_process_namespace) == Some(true);
        let around = Around { open, shares_processes };
        steps.extend(sidecar::told(&asked, OffsetDateTime::now_utc().unix_timestamp(), &around));
        sidecar = asked.ok();
    }
    let (warnings, notes) = match events::about(client, namespace, About { kind: Kind::Pod, name }).await {
        Ok(warned) => (events::warnings(&warned), vec![]),
        Err(why) => (vec![], vec![format!("events were not read: {why}")]),
    };
    // The mesh is not to blame for a pod that has no node.
    let is_wanted = injection.is_wanted && node.is_some();
    Ok(Explained { steps, sidecar, warnings, notes, causes: vec![], is_wanted, node })
}

/// A pod that is not there: perhaps it was refused, which its controller's events tell.
async fn of_missing_pod(client: &Client, name: &str, namespace: &str) -> Result<Explained> {
    let missing = || format!("there is no pod {namespace}/{name}");
    let maker = owner::of_missing_pod(client, namespace, name).await;
    let maker = maker.map_err(|why| anyhow!("{}, and events were not read: {why}", missing()))?;
    let maker = maker.ok_or_else(|| {
        anyhow!(
            "{}, and no event tells of one that could not be made; see `countersign explain deployment/NAME`",
            missing()
        )
    })?;
    let mut explained = owner::explain(client, namespace, &maker).await?;
    let found = format!("{}; {} {} makes pods of such a name", missing(), maker.kind.name(), maker.name);
    explained.steps.insert(0, Step { name: "pod", outcome: Err(found) });
    Ok(explained)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::check::Fault;
    use crate::kubernetes::check::fake_api::{Answer, Asked, client, list, refused};

    #[tokio::test]
    async fn of_a_pod_without_a_node_neither_sidecar_nor_registrar_is_asked() {
        let client = client(|asked: &Asked| match asked.path.as_str() {
            path if path.ends_with("/pods/web") => {
                let condition = json!({ "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes" });
                let spec = json!({ "containers": [{ "name": "countersign-proxy" }] });
                let metadata = json!({ "name": "web", "namespace": "shop" });
                let status = json!({ "phase": "Pending", "conditions": [condition] });
                Answer::Now(200, json!({ "metadata": metadata, "spec": spec, "status": status }))
            }
            path if path.ends_with("/spiffeids/web") => refused(404, "not found"),
            path if path.ends_with("/events") => list("EventList", vec![]),
            path => panic!("{path}"),
        });
        let explained = of_pod(&client, "web", "shop", "mesh").await.unwrap();
        let steps: Vec<_> = explained.steps.iter().map(|s| (s.name, s.outcome.is_ok())).collect();
        assert_eq!(steps, [("pod", false), ("injection", true), ("registration", false), ("agent", false)]);
        assert!(explained.steps[2].outcome.as_ref().unwrap_err().contains("not scheduled"));
        assert!(!explained.is_wanted, "the mesh is not searched for a cause");
    }

    #[test]
    fn steps_events_and_causes_are_rows_and_json() {
        let step = |name, outcome| Step { name, outcome };
        let warning = Warning {
            object: "Pod web".into(),
            reason: "BackOff".into(),
            message: "m".into(),
            count: 2,
            last: 60,
            names: ["web".into()].into(),
        };
        let cause = Finding { check: "RBAC", outcome: Err(Fault::new("no binding", "apply")) };
        let explained = Explained {
            steps: vec![step("pod", Ok("Running".into())), step("agent", Err("there is none".into()))],
            warnings: vec![warning],
            notes: vec!["n".into()],
            causes: vec![cause],
            ..Explained::default()
        };
        let table = explained.table().render();
        for row in
            ["pod       ok       Running", "agent     MISSING  there is none", "RBAC      FAILED   no binding; apply"]
        {
            assert!(table.contains(row), "{row} in\n{table}");
        }
        assert!(
            table.contains("event              Pod web BackOff: m (2 times, last 1970-01-01T00:01:00Z)"),
            "{table}"
        );
        let json = explained.json();
        assert_eq!((&json["ok"], &json["causes"][0]["mend"]), (&json!(false), &json!("apply")));
        assert_eq!((&json["events"][0]["count"], &json["notRead"][0]), (&json!(2), &json!("n")));
    }
}
