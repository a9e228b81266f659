//! `countersign uninstall`: makes every sidecar forward plaintext, then removes everything that was installed.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::core::v1::Namespace;
use kube::Client;
use kube::api::{Api, DeleteParams, DynamicObject};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::Value;
use tokio::time::Instant;

use super::absent;
use super::api_server::client;
use super::csi_volumes::{self, Holders};
use super::given::Given;
use super::install::applied;
use super::leftovers;
use super::memory::Memory;
use super::transparency::Way;
use super::without::Without;
use crate::settings::Mistake;

/// Interval between two polls.
const LOOK: Duration = Duration::from_millis(500);
/// Interval between two looks at all pods of the cluster, which may be many.
const LOOK_AT_PODS: Duration = Duration::from_secs(2);
/// How long an object may take to be gone after its deletion.
const GONE: Duration = Duration::from_secs(300);
/// Time after which it is told what is waited for.
const TELL: Duration = Duration::from_secs(10);

/// Kubernetes: remove an installation from the cluster of the current KUBECONFIG, without failing a request.
///
/// First the mesh becomes transparent, whatever the modes are: every sidecar accepts plaintext, and once all do, every sidecar
/// sends it. Then webhook, control plane, identities and the namespace are removed. Pods with a volume of the CSI driver, which are
/// all meshed ones unless they mount the agent's folder by `hostPath`, are waited for: restart them meanwhile, because without the
/// driver they could never end. Other pods keep their idle sidecars until they are restarted.
#[derive(Debug, clap::Args)]
pub struct UninstallArgs {
    /// Namespace of the installation.
    #[arg(long, short, value_name = "NAMESPACE", default_value = "countersign")]
    namespace: String,
    /// Confirm that traffic will no longer be encrypted.
    #[arg(long)]
    yes: bool,
    /// Only make the mesh transparent and stop the injection, so that the pods can be restarted before anything else goes. Tells which
    /// ones have a volume of the CSI driver.
    #[arg(long)]
    prepare: bool,
    /// Have every sidecar send plaintext at once, for a control plane of an older version, which does not know the step between: until
    /// all are told, those that are still strict refuse some connections.
    #[arg(long)]
    at_once: bool,
    /// How long to wait for each step, until every sidecar has taken it, and then each time until one pod less has a volume of the CSI
    /// driver, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    patience: u64,
    /// Do not wait for the pods of a namespace, or for one pod: neither for their sidecars nor for their volumes of the CSI driver. What
    /// is sent to them may be refused, and those with a volume do not end until they are deleted with --force. May be repeated.
    #[arg(long, value_name = "NAMESPACE[/POD]")]
    without: Vec<Without>,
}

/// What is said to who has not confirmed it.
const UNCONFIRMED: &str = "traffic between the pods will no longer be encrypted nor authenticated, and nothing was changed. First \
                           `uninstall --yes --prepare`, which stops the injection and tells which pods to restart; then, once they \
                           are, `uninstall --yes`, which removes the rest. --yes alone does both, and waits for the restarts meanwhile";

/// Removes the installation.
pub async fn uninstall(args: UninstallArgs) -> Result<()> {
    if !args.yes {
        return Err(Mistake(UNCONFIRMED.into()).into());
    }
    let client = client().await?;
    absent::refuse(&client, &args.namespace, "-n").await?;
    let patience = Duration::from_secs(args.patience);
    let stop = crate::stop::on_signal()?;
    let way = Way { namespace: args.namespace.clone(), patience, at_once: args.at_once, without: args.without.clone() };
    way.go(&client, &stop).await?;
    tokio::select! {
        done = remove_rest(&client, &args, patience) => done,
        () = stop.cancelled() => Err(anyhow!("interrupted; the mesh is transparent: run it again to remove the rest")),
    }
}

/// What is done once the mesh is transparent.
async fn remove_rest(client: &Client, args: &UninstallArgs, patience: Duration) -> Result<()> {
    // Restarted pods must not get a volume again.
    stop_injection(client).await?;
    let drivers = csi_volumes::drivers(client).await?;
    let holders = async || Ok(csi_volumes::holders(client, &drivers).await?.without(&args.without));
    if args.prepare {
        eprintln!("{}", prepared(&holders().await?));
        return Ok(());
    }
    if !drivers.is_empty() {
        wait_for_volumes(holders, patience).await?;
        csi_volumes::remove(client, &drivers).await?;
    }
    remove(client, &args.namespace).await
}

/// What is to be done before the rest is removed.
fn prepared(held: &Holders) -> String {
    if held.count() == 0 {
        return "nothing is injected any more, and no pod needs the CSI driver to end: uninstall without --prepare"
            .to_owned();
    }
    format!("nothing is injected any more. There are {held}: {RESTART}; then uninstall without --prepare")
}

async fn stop_injection(client: &Client) -> Result<()> {
    let webhooks: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    match webhooks.delete("countersign-injector", &DeleteParams::default()).await {
        Ok(_) => eprintln!("MutatingWebhookConfiguration countersign-injector is removed"),
        Err(kube::Error::Api(e)) if e.code == 404 => {}
        Err(error) => return Err(error).context("cannot remove the webhook"),
    }
    Ok(())
}

/// What makes an end of pods with a volume.
const RESTART: &str = "restart them (kubectl -n NAMESPACE rollout restart deployment,statefulset,daemonset), delete those that nothing \
                       makes anew, and take the volume out of specifications that name it, such as those that `countersign inject` \
                       wrote";

/// Waits until no pod has a volume of the driver, as long as their number falls.
async fn wait_for_volumes(holders: impl AsyncFn() -> Result<Holders>, patience: Duration) -> Result<()> {
    let (mut least, mut since, mut said) = (usize::MAX, Instant::now(), None::<Instant>);
    loop {
        let held = holders().await?;
        if held.count() == 0 {
            return Ok(());
        }
        if held.count() < least {
            (least, since) = (held.count(), Instant::now());
            if said.is_none() {
                eprintln!("there are {held}. They could never end without it, so they come first: {RESTART}");
                said = Some(since);
            } else if said.is_some_and(|said| said.elapsed() > TELL) {
                eprintln!("waiting for {held}");
                said = Some(since);
            }
        }
        if since.elapsed() > patience {
            return Err(anyhow!(
                "there are still {held}. The mesh is transparent and nothing is injected any more, but the control plane stays, \
                 because these pods could never end without the driver: {RESTART}, and delete those on lost nodes with --force; then \
                 run it again, with --without NAMESPACE/POD for those that nobody can end"
            ));
        }
        tokio::time::sleep(LOOK_AT_PODS).await;
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

/// Waits until an object is gone. On a node that is not ready, its pods never end.
async fn wait_until_gone(what: &str, is_gone: impl AsyncFn() -> Result<bool, kube::Error>) -> Result<()> {
    let (began, mut said) = (Instant::now(), false);
    while !is_gone().await? {
        if began.elapsed() > GONE {
            return Err(Mistake(format!(
                "{what} is still there after {} s: see `kubectl get nodes` and what its pods and finalizers wait for, delete pods on lost nodes with --force, and run this again",
                GONE.as_secs()
            ))
            .into());
        }
        if !said && began.elapsed() > TELL {
            said = true;
            eprintln!("waiting until {what} is gone");
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// Removes what `install` applies in reverse order: first injection stops, then nothing requests identities any more,
/// then the identities are removed. What it remembers goes with the namespace.
async fn remove(client: &Client, namespace: &str) -> Result<()> {
    let printed = applied(namespace, &Memory::new(Given::default()))?;
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
            wait_until_gone(&format!("{kind} {name}"), async || Ok(api.get_opt(name).await?.is_none())).await?;
        }
    }
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let what = format!("Namespace {namespace}");
    wait_until_gone(&what, async || Ok(namespaces.get_opt(namespace).await?.is_none())).await?;
    eprintln!("{}", leftovers::told(client, namespace).await);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn the_agents_end_while_they_may_still_ask_whether_it_is_for_good() {
        // Of what is only there with the CNI plugin, the namespace's end makes an end.
        let printed = applied("mesh", &Memory::new(Given::default())).unwrap();
        let objects: Vec<Value> = serde_saphyr::from_multiple(&printed).unwrap();
        let place = |kind: &str, name: &str| {
            let found = objects.iter().rev().position(|o| o["kind"] == kind && o["metadata"]["name"] == name);
            found.unwrap_or_else(|| panic!("no {kind} {name}"))
        };
        let agents = place("DaemonSet", "countersign-agent");
        for kind in ["ClusterRoleBinding", "ServiceAccount"] {
            assert!(agents < place(kind, "countersign-agent"), "{kind}");
        }
        assert!(agents < place("Namespace", "mesh"));
    }

    #[tokio::test(start_paused = true)]
    async fn pods_with_a_volume_are_waited_for_as_long_as_they_become_fewer() {
        let patience = Duration::from_secs(120);
        let pods = |count: usize| Holders { injected: vec!["shop/web".to_owned(); count], ..Holders::default() };
        let began = Instant::now();
        // One less each 100 s.
        let fewer = async || Ok(pods(9 - usize::try_from(began.elapsed().as_secs() / 100).unwrap()));
        wait_for_volumes(fewer, patience).await.unwrap();
        assert!(began.elapsed() >= Duration::from_secs(900));
        let began = Instant::now();
        assert!(prepared(&pods(2)).contains("shop 2"));
        assert!(prepared(&pods(0)).contains("no pod needs the CSI driver"));
        let why = wait_for_volumes(async || Ok(pods(2)), patience).await.unwrap_err().to_string();
        assert!(began.elapsed() < patience * 2, "{:?}", began.elapsed());
        assert!(
            why.starts_with("there are still 2 pods") && why.contains("shop 2") && why.contains("run it again"),
            "{why}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_never_goes_is_named_and_what_goes_is_waited_for() {
        let stuck = wait_until_gone("DaemonSet x", async || Ok(false)).await.unwrap_err().to_string();
        assert!(stuck.starts_with("DaemonSet x is still there after 300 s"), "{stuck}");
        let looks = AtomicUsize::new(0);
        wait_until_gone("Namespace y", async || Ok(looks.fetch_add(1, Ordering::Relaxed) > 100)).await.unwrap();
    }
}
