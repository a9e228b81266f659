//! `countersign uninstall`: makes every sidecar forward plaintext, then removes everything that was installed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use super::cluster::{SIDECAR_PORT, client, is_meshed, page};
use super::install::manifests;
use super::values::ValuesArgs;
use crate::settings::Mistake;

/// Interval between two polls.
const LOOK: Duration = Duration::from_millis(500);

/// Kubernetes: remove an installation from the cluster of the current KUBECONFIG, without failing a request.
///
/// First the mesh becomes transparent: every sidecar forwards plaintext, whatever the modes are. Once all do, webhook,
/// control plane, identities and the namespace are removed. Pods keep their idle sidecars until they are restarted.
#[derive(Debug, clap::Args)]
pub struct UninstallArgs {
    /// Namespace of the installation.
    #[arg(long, short, value_name = "NAMESPACE", default_value = "countersign")]
    namespace: String,
    /// Confirm that traffic will no longer be encrypted.
    #[arg(long)]
    yes: bool,
    /// How long to wait until every sidecar is transparent, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    patience: u64,
}

/// Removes the installation.
pub async fn uninstall(args: UninstallArgs) -> Result<()> {
    if !args.yes {
        return Err(Mistake(
            "traffic between the pods will no longer be encrypted nor authenticated; run it again with --yes".into(),
        )
        .into());
    }
    let client = client().await?;
    let until = Instant::now() + Duration::from_secs(args.patience);
    make_transparent(&client, &args.namespace).await?;
    wait_for_sidecars(&client, until).await?;
    remove(&client, &args.namespace).await
}

async fn make_transparent(client: &Client, namespace: &str) -> Result<()> {
    let api = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    let patch = json!({ "data": { "transparent": "true" } });
    match api.patch("countersign-mesh", &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => {
            eprintln!("the mesh is told to be transparent");
            Ok(())
        }
        Err(kube::Error::Api(e)) if e.code == 404 => {
            Err(Mistake(format!("there is no installation in namespace `{namespace}` (no ConfigMap countersign-mesh)"))
                .into())
        }
        Err(error) => Err(error).context("cannot change the mesh's settings"),
    }
}

/// Waits until every running sidecar reports mode off.
async fn wait_for_sidecars(client: &Client, until: Instant) -> Result<()> {
    let mut said = usize::MAX;
    loop {
        let (mut waiting, mut why) = (vec![], String::new());
        let pods: Api<Pod> = Api::all(client.clone());
        for pod in pods.list(&ListParams::default()).await.context("cannot list pods")?.items {
            let running = pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running");
            if !running || pod.metadata.deletion_timestamp.is_some() || !is_meshed(&pod) {
                continue;
            }
            let name = format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
            match page(client, &pod, SIDECAR_PORT, "/mode").await {
                Ok(mode) if mode.trim() == "off" => {}
                Ok(mode) => {
                    why = format!("its mode is {}", mode.trim());
                    waiting.push(name);
                }
                Err(error) => {
                    why = error.to_string();
                    waiting.push(name);
                }
            }
        }
        if waiting.is_empty() {
            eprintln!("every sidecar is transparent");
            return Ok(());
        }
        if waiting.len() != said {
            said = waiting.len();
            eprintln!("waiting for {said} sidecars, {} among them", waiting[0]);
        }
        if Instant::now() > until {
            return Err(anyhow!(
                "{} sidecars are not transparent yet, {} among them ({why}); nothing was removed. Restart or delete these pods, or give more --patience",
                waiting.len(),
                waiting[0]
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Plural name of a kind that we install, for API paths.
fn plural(kind: &str) -> String {
    match kind {
        "NetworkPolicy" => "networkpolicies".to_owned(),
        "ValidatingAdmissionPolicy" => "validatingadmissionpolicies".to_owned(),
        other => format!("{}s", other.to_lowercase()),
    }
}

/// Removes what `install` prints in reverse order: first injection stops, then nothing requests identities any more,
/// then the identities are removed.
async fn remove(client: &Client, namespace: &str) -> Result<()> {
    let printed = manifests(namespace, &ValuesArgs::default())?;
    let objects: Vec<Value> = serde_saphyr::from_multiple(&printed)?;
    for object in objects.iter().rev() {
        let (version, kind) =
            (object["apiVersion"].as_str().unwrap_or_default(), object["kind"].as_str().unwrap_or_default());
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), &plural(kind));
        let api: Api<DynamicObject> = match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
            None => Api::all_with(client.clone(), &resource),
        };
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        match api.delete(name, &DeleteParams::foreground()).await {
            Ok(_) => eprintln!("{kind} {name} is removed"),
            Err(kube::Error::Api(e)) if e.code == 404 => {}
            Err(error) => return Err(error).with_context(|| format!("cannot remove {kind} {name}")),
        }
        // The issuers of identities must be gone before the identities: a sidecar keeps the one it has.
        if matches!(kind, "DaemonSet" | "StatefulSet" | "Deployment") {
            while api.get_opt(name).await?.is_some() {
                tokio::time::sleep(LOOK).await;
            }
        }
    }
    let namespaces: Api<Namespace> = Api::all(client.clone());
    while namespaces.get_opt(namespace).await?.is_some() {
        tokio::time::sleep(LOOK).await;
    }
    eprintln!("nothing of Countersign is left; pods lose their idle sidecars when they are restarted");
    Ok(())
}
