//! `countersign inject`: applies the webhook's changes to manifests.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result};
use countersign_controller::injector::{
    self, Asks, IN_MANIFEST, INJECTED, Sidecar, Surroundings, Verdict, new_probe_secret,
};
use countersign_csi::DriverName;
use countersign_identity::policy::Mode;
use serde_json::Value;

use super::install::yaml;
use crate::roles::controller::SidecarArgs;
use crate::settings::Mistake;

/// Largest file that is read, in bytes.
const MAX_BYTES: u64 = 64 * 1024 * 1024;

/// Kubernetes: add redirect and sidecar to the pods of a file, as the webhook would: `countersign inject -f app.yaml |
/// kubectl apply -f -`.
///
/// Handles pods and all objects with pod templates: deployments, stateful sets, daemon sets, replica sets, jobs, cron
/// jobs, and lists of them. Everything else passes unchanged. A summary is printed on standard error.
#[derive(Debug, clap::Args)]
pub struct InjectArgs {
    /// YAML or JSON file; `-` reads standard input.
    #[arg(short = 'f', long = "filename", value_name = "FILE")]
    file: PathBuf,
    /// Mode of the mesh and of the pods' namespace: off, permissive or strict. In strict mode, protocols other than TCP
    /// are dropped.
    #[arg(long, value_name = "MODE", default_value = "permissive")]
    mode: String,
    /// Namespace of objects that name none.
    #[arg(long, short, value_name = "NAMESPACE", default_value = "default")]
    namespace: String,
    /// CSI driver that mounts the agent's folder into pods (the chart's agent.csi.driverName).
    #[arg(long, value_name = "NAME", default_value = "csi.countersign.dev", conflicts_with = "host_path")]
    csi_driver: DriverName,
    /// Mount the agent's folder by `hostPath`, for a mesh without the CSI driver (agent.csi.enabled=false).
    #[arg(long)]
    host_path: bool,
    #[command(flatten)]
    sidecar: SidecarArgs,
}

/// Prints the file with sidecars added.
pub fn inject(args: InjectArgs) -> Result<()> {
    let name = args.file.display().to_string();
    let mut text = String::new();
    let read = if name == "-" {
        std::io::stdin().take(MAX_BYTES).read_to_string(&mut text)
    } else {
        std::fs::File::open(&args.file).and_then(|f| f.take(MAX_BYTES).read_to_string(&mut text))
    };
    read.map_err(|e| Mistake(format!("{name}: cannot be read: {e}")))?;
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(&text).map_err(|e| Mistake(format!("{name}: {}", e.without_snippet())))?;
    let mode: Mode = args.mode.parse().map_err(|e| Mistake::flag("--mode", &format!("{e}")))?;
    let around = Surroundings { namespace: args.namespace, asks: Asks::Yes, mode, probe_secret: new_probe_secret() };
    let sidecar = args.sidecar.sidecar((!args.host_path).then_some(args.csi_driver));
    let mut out = vec![];
    for mut document in documents.into_iter().filter(|d| !d.is_null()) {
        document_in(&mut document, &sidecar, &around).with_context(|| name.clone())?;
        out.push(yaml(&document)?);
    }
    Ok(crate::stdout::put(&out.join("---\n"))?)
}

/// Injects into each pod of a document.
fn document_in(document: &mut Value, sidecar: &Sidecar, around: &Surroundings) -> Result<()> {
    let kind = document["kind"].as_str().unwrap_or_default().to_owned();
    let place = match kind.as_str() {
        "List" => {
            for item in document["items"].as_array_mut().into_iter().flatten() {
                document_in(item, sidecar, around)?;
            }
            return Ok(());
        }
        "Pod" => "",
        "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "ReplicationController" | "Job" => "/spec/template",
        "CronJob" => "/spec/jobTemplate/spec/template",
        _ => return Ok(()),
    };
    let name = document["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let namespace = document["metadata"]["namespace"].as_str().unwrap_or(&around.namespace).to_owned();
    let around = Surroundings { namespace, probe_secret: new_probe_secret(), ..around.clone() };
    let pod = document.pointer_mut(place).with_context(|| format!("{kind} {name} has no pod template"))?;
    match injector::inject(pod, sidecar, &around).map_err(|e| Mistake(format!("{kind} {name}: {e}")))? {
        Verdict::Injected => {
            let by = &mut pod["metadata"]["annotations"][INJECTED];
            let version = by.as_str().unwrap_or_default().trim_end_matches(IN_MANIFEST);
            *by = format!("{version}{IN_MANIFEST}").into();
            eprintln!("{kind} {name}: injected");
        }
        Verdict::Left(why) => eprintln!("{kind} {name}: left as it is: {why}"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_kind_that_holds_a_pod_is_injected_and_the_rest_passes() {
        let pod = json!({ "spec": { "containers": [{ "name": "a", "image": "i" }] } });
        let marked = format!(r#""{INJECTED}":"{}{IN_MANIFEST}""#, env!("CARGO_PKG_VERSION"));
        let sidecar = Sidecar::new("cs:1".into());
        let with = |mut document: Value| {
            let around = Surroundings {
                namespace: "n".into(),
                asks: Asks::Yes,
                mode: Mode::Permissive,
                probe_secret: "s3cret".into(),
            };
            // Twice is as once.
            for _ in 0..2 {
                document_in(&mut document, &sidecar, &around).unwrap();
            }
            let text = document.to_string();
            assert_eq!(text.contains("countersign-proxy"), text.contains(&marked), "{text}");
            text.contains("countersign-proxy")
        };
        assert!(with(json!({ "kind": "Pod", "spec": pod["spec"] })));
        for kind in ["Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"] {
            assert!(with(json!({ "kind": kind, "spec": { "template": pod } })), "{kind}");
        }
        assert!(with(json!({ "kind": "CronJob", "spec": { "jobTemplate": { "spec": { "template": pod } } } })));
        assert!(with(json!({ "kind": "List", "items": [{ "kind": "Pod", "spec": pod["spec"] }] })));
        assert!(!with(json!({ "kind": "Service", "spec": {} })));
    }
}
