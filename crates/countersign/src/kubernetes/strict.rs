//! `countersign strict`: who would be cut off by strict, and the move to it.

mod plan;

use std::collections::HashMap;
use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Context, Result};
use countersign_controller::publisher::{API_SERVER, API_SERVER_NAMESPACE, api_server, policy_in};
use countersign_controller::store::{self, Store};
use countersign_identity::policy::{Egress, Mode};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::{Client, ResourceExt};
use serde_json::json;

use self::plan::Plan;
use super::absent;
use super::api_server::client;
use super::cluster::{is_meshed, name_of};
use super::exceptions::{drops_others, exceptions, leave};
use super::sidecars::ask_each;
use super::{live_settings, transparency};
use crate::operator::output::Output;
use crate::operator::{block, when};
use crate::settings::Mistake;

/// Kubernetes: move a namespace, or the whole mesh, to strict: first see with --plan which plaintext peers that would cut off.
///
/// The peers are those in the sidecars' own tables, which hold each from its first connection on. A sidecar that cannot be asked, or
/// whose table was full, is named and stops the move, and so does a pod whose annotations let traffic past its sidecar without the
/// administrator's leave. Go namespace by namespace (-n), then the whole mesh (--mesh); both take
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

/// Plans, or moves; exit 1 when somebody would be cut off.
pub fn strict(args: &StrictArgs) -> Result<ExitCode> {
    if !args.plan && !args.mesh && args.namespace.is_none() {
        return Err(Mistake("say what: --plan, -n NAMESPACE, or --mesh".into()).into());
    }
    block(run(args))
}

async fn run(args: &StrictArgs) -> Result<ExitCode> {
    let client = client().await?;
    absent::refuse(&client, &args.mesh_namespace, "--mesh-namespace").await?;
    let open = transparency::without_effect(&client, &args.mesh_namespace).await;
    if let Some(why) = open.as_ref().filter(|_| !args.plan) {
        return Err(Mistake(why.clone()).into());
    }
    let plan = plan(&client, args.namespace.as_deref(), &args.mesh_namespace).await?;
    let moves = !args.plan && (plan.is_clear() || args.force);
    if moves {
        move_to_strict(&client, args).await?;
    }
    args.output.print(&plan.table(), &plan.json(moves))?;
    say(&plan, args.plan, moves);
    if let Some(why) = &open {
        eprintln!("{why}");
    }
    Ok(ExitCode::from(u8::from(open.is_some() || (!plan.is_clear() && !moves))))
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
    if let Some(youngest) = plan.asked.iter().max_by_key(|a| a.since) {
        let (count, since) = (plan.asked.len(), when(youngest.since));
        eprintln!("{count} sidecars were asked; all have looked since {since} at least ({})", youngest.workload);
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
    let egress = strict_egress(client).await?;
    let services: Api<Service> = Api::all(client.clone());
    // Names only: who may not list Services reads addresses.
    let services = services.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default();
    let names = names(&all, &services);
    let here = |p: &&Pod| is_meshed(p) && !is_over(p) && namespace.is_none_or(|n| p.namespace().as_deref() == Some(n));
    let pods: Vec<&Pod> = all.iter().filter(here).collect();
    let mut plan = Plan::default();
    for pod in &pods {
        let given = leave.is_given(&pod.namespace().unwrap_or_default());
        let list = if given { &mut plan.allowed } else { &mut plan.exceptions };
        list.extend(exceptions(pod).into_iter().map(|which| (name_of(pod), which)));
        if !drops_others(pod) {
            plan.unguarded.push(name_of(pod));
        }
    }
    for (pod, answer) in pods.iter().zip(ask_each(client, &pods).await) {
        match answer {
            Ok(status) => {
                let own = store::Pod::read(pod).unwrap_or_default();
                plan.take(&name_of(pod), status, &names, &policy_in(Mode::Strict, &own, &leave, &egress));
            }
            Err(why) => plan.unknown.push((name_of(pod), why)),
        }
    }
    Ok(plan)
}

/// What addresses are called. A pod that is over has lost its address, which may be another one's by now.
fn names(pods: &[Pod], services: &[Service]) -> HashMap<IpAddr, String> {
    let mut names = HashMap::new();
    let mut call = |address: Option<&String>, name: &dyn Fn() -> String| {
        if let Some(address) = address.and_then(|a| a.parse::<IpAddr>().ok()) {
            names.insert(address, name());
        }
    };
    for service in services {
        let name = || format!("service {}/{}", service.namespace().unwrap_or_default(), service.name_any());
        let addresses = service.spec.iter().flat_map(|s| s.cluster_ip.iter().chain(s.cluster_ips.iter().flatten()));
        addresses.for_each(|address| call(Some(address), &name));
    }
    // Whoever lives comes last, and wins.
    for over in [true, false] {
        for pod in pods.iter().filter(|p| is_over(p) == over) {
            if pod.spec.as_ref().and_then(|s| s.host_network) == Some(true) {
                continue;
            }
            let name = || format!("pod {}", name_of(pod));
            let Some(status) = &pod.status else { continue };
            call(status.pod_ip.as_ref(), &name);
            status.pod_ips.iter().flatten().for_each(|ip| call(Some(&ip.ip), &name));
        }
    }
    names
}

/// Whether a pod has ended for good.
fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    phase.is_some_and(|phase| ["Succeeded", "Failed"].contains(&phase))
}

/// What strict lets out of every pod, by the code that tells the sidecars.
async fn strict_egress(client: &Client) -> Result<Vec<Egress>> {
    let services: Api<Service> = Api::namespaced(client.clone(), API_SERVER_NAMESPACE);
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), API_SERVER_NAMESPACE);
    let service = services.get(API_SERVER).await.context("cannot read Service default/kubernetes")?;
    let slice = slices.get_opt(API_SERVER).await.context("cannot read EndpointSlice default/kubernetes")?;
    let key = || (API_SERVER_NAMESPACE.to_owned(), API_SERVER.to_owned());
    let store = Store {
        services: store::Service::read(&service).map(|s| (key(), s)).into_iter().collect(),
        slices: slice.as_ref().and_then(store::Slice::read).map(|s| (key(), s)).into_iter().collect(),
        ..Store::default()
    };
    Ok(api_server(&store))
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
        api.patch(live_settings::NAME, &params, &Patch::Merge(patch))
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
    fn addresses_are_called_by_the_pods_that_live_and_by_services() {
        let pod = |name: &str, phase: &str, ip: &str, host: bool| -> Pod {
            serde_json::from_value(json!({
                "metadata": { "name": name, "namespace": "shop" }, "spec": { "containers": [], "hostNetwork": host },
                "status": { "phase": phase, "podIP": ip, "podIPs": [{ "ip": ip }, { "ip": "fd00::9" }] },
            }))
            .unwrap()
        };
        let service = |ip: &str| -> Service {
            serde_json::from_value(
                json!({ "metadata": { "name": "db", "namespace": "shop" }, "spec": { "clusterIP": ip } }),
            )
            .unwrap()
        };
        let pods = [pod("now", "Running", "10.0.0.1", false), pod("then", "Succeeded", "10.0.0.1", false)];
        let called = names(&pods, &[service("10.96.0.7"), service("None")]);
        assert_eq!(called[&"10.0.0.1".parse::<IpAddr>().unwrap()], "pod shop/now");
        assert_eq!(called[&"fd00::9".parse::<IpAddr>().unwrap()], "pod shop/now");
        assert_eq!(called[&"10.96.0.7".parse::<IpAddr>().unwrap()], "service shop/db");
        assert!(
            names(&[pod("agent", "Running", "10.0.0.2", true)], &[]).is_empty(),
            "the node's address is not its own"
        );
    }
}
