//! `countersign check`: checks a cluster before an installation, and an installation afterwards.

use std::collections::BTreeSet;
use std::process::ExitCode;

use anyhow::Result;
use countersign_controller::injector::INJECT;
use countersign_controller::store::MODE;
use countersign_identity::X509Authority;
use countersign_identity::bundle::certificates_from_pem;
use countersign_identity::policy::Mode;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, ListParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::json;
use time::OffsetDateTime;

use super::cluster::{client, is_meshed, is_ready, page, pods, words};
use super::exceptions::{exceptions, leave};
use super::pod_source;
use crate::metrics_page::{label, metric};
use crate::operator::block;
use crate::operator::output::{Output, Table};
use crate::settings::MeshSettings;

/// The oldest supported version of Kubernetes.
const OLDEST: (u32, u32) = (1, 24);
/// The first version with native sidecars.
const NATIVE_SIDECARS: (u32, u32) = (1, 29);
/// The first version in which the API server evaluates admission policies.
const ADMISSION_POLICY: (u32, u32) = (1, 30);
/// The first version whose kubelets support `nodes/pods`.
const NARROW_KUBELET: (u32, u32) = (1, 33);
/// Largest tolerated difference between clocks, in seconds: SVIDs are backdated by as much.
const MAX_SKEW: i64 = 10;
/// How long before its expiry a warning about an upstream root appears, in seconds: people have to renew it.
const UPSTREAM_WARNING: i64 = 30 * 86_400;
/// TCP port of the server's metrics page.
const SERVER_PAGES: u16 = 9464;

/// Kubernetes: check a cluster before an installation, and an installation afterwards.
///
/// Each finding comes with a fix. Exit code 1 if there is any.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Namespace of the installation.
    #[arg(long, short, value_name = "NAMESPACE", default_value = "countersign")]
    namespace: String,
    /// Only check whether the cluster is ready for an installation.
    #[arg(long)]
    before: bool,
    #[command(flatten)]
    output: Output,
}

/// Result of one check.
struct Finding {
    check: &'static str,
    outcome: Outcome,
}

/// Runs all checks and prints the findings.
pub fn check(args: &CheckArgs) -> Result<ExitCode> {
    let findings = block(find(args))?;
    let mut table = Table::new(&["check", "result", "found", "mend"]);
    let mut all = vec![];
    for Finding { check, outcome } in &findings {
        let (ok, found, mend) = match outcome {
            Ok(found) => (true, words(found), ""),
            Err((found, mend)) => (false, words(found), *mend),
        };
        let row = [*check, if ok { "ok" } else { "FAILED" }, &found, mend];
        table.row(row.into_iter().map(ToOwned::to_owned).collect());
        all.push(json!({ "check": check, "ok": ok, "found": found, "mend": mend }));
    }
    let good = findings.iter().all(|f| f.outcome.is_ok());
    args.output.print(&table, &json!({ "ok": good, "checks": all }))?;
    Ok(ExitCode::from(u8::from(!good)))
}

async fn find(args: &CheckArgs) -> Result<Vec<Finding>> {
    let client = client().await?;
    let namespace = &args.namespace;
    let version = client.apiserver_version().await?;
    let number = |text: &str| text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0);
    let version = (number(&version.major), number(&version.minor));
    let native = if args.before { None } else { native_sidecars(&client, namespace).await };
    let mut findings = vec![
        Finding { check: "API version", outcome: api_version(version, native) },
        Finding { check: "permissions", outcome: permissions(&client, namespace).await },
        Finding { check: "clocks", outcome: clocks(&client).await },
    ];
    if args.before {
        findings.push(Finding { check: "pod source", outcome: pod_source::before(&client).await });
        return Ok(findings);
    }
    let (server, map) = (server(&client, namespace).await, configmap(&client, namespace).await);
    findings.extend([
        Finding { check: "SpiffeID resource", outcome: resource(&client).await },
        Finding { check: "server", outcome: server_ready(&client, namespace).await },
        Finding { check: "agents", outcome: agents(&client, namespace, version).await },
        Finding { check: "pod source", outcome: pod_source::installed(&client, namespace).await },
        Finding { check: "injector", outcome: injector(&client, namespace).await },
        Finding { check: "settings", outcome: settings(&client, namespace).await },
        Finding { check: "authorities", outcome: authorities(server.as_ref()) },
        Finding { check: "roots", outcome: roots(server.as_ref()) },
        Finding { check: "bundle", outcome: bundle(server.as_ref(), map.as_deref()) },
        Finding { check: "webhook's caBundle", outcome: webhook_bundle(&client, map.as_deref()).await },
        Finding { check: "webhook", outcome: webhook(&client).await },
        Finding { check: "labels", outcome: labels(&client).await },
        Finding { check: "exceptions", outcome: past_sidecars(&client, namespace).await },
    ]);
    Ok(findings)
}

/// What is fine; or what is wrong, and how to fix it.
pub type Outcome = Result<String, (String, &'static str)>;

/// A part of an installation is missing.
#[allow(clippy::needless_pass_by_value)] // taken by `map_err`
fn absent(error: kube::Error) -> (String, &'static str) {
    (error.to_string(), "apply the manifests of `countersign install`")
}

/// `native`: whether an installed injector uses native sidecars; `None` if none is installed.
fn api_version(version: (u32, u32), native: Option<bool>) -> Outcome {
    let found = format!("Kubernetes {}.{}", version.0, version.1);
    match native {
        _ if version < OLDEST => Err((found, "Countersign needs Kubernetes 1.24 or newer")),
        Some(true) if version < NATIVE_SIDECARS => {
            Err((format!("{found} has no native sidecars"), "install with injector.nativeSidecars=false"))
        }
        None if version < NATIVE_SIDECARS => Ok(format!(
            "{found}; install with injector.nativeSidecars=false, agent.nodesProxyPermission=true, admissionPolicy=false"
        )),
        None if version < ADMISSION_POLICY => {
            Ok(format!("{found}; install with agent.nodesProxyPermission=true, admissionPolicy=false"))
        }
        None if version < NARROW_KUBELET => Ok(format!("{found}; install with agent.nodesProxyPermission=true")),
        _ => Ok(found),
    }
}

/// Whether the installed injector uses native sidecars; `None` if none is installed.
async fn native_sidecars(client: &Client, namespace: &str) -> Option<bool> {
    let api: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let spec = api.get("countersign-injector").await.ok()?.spec?.template.spec?;
    let args = spec.containers.first()?.args.clone().unwrap_or_default();
    Some(!args.iter().any(|a| a == "--native-sidecars=false"))
}

/// Checks whether we may create what an installation needs.
async fn permissions(client: &Client, namespace: &str) -> Outcome {
    let needed = [
        ("", "namespaces", ""),
        ("", "persistentvolumes", ""),
        ("", "persistentvolumeclaims", namespace),
        ("apiextensions.k8s.io", "customresourcedefinitions", ""),
        ("rbac.authorization.k8s.io", "clusterroles", ""),
        ("rbac.authorization.k8s.io", "clusterrolebindings", ""),
        ("admissionregistration.k8s.io", "mutatingwebhookconfigurations", ""),
        ("admissionregistration.k8s.io", "validatingadmissionpolicies", ""),
        ("apps", "daemonsets", namespace),
        ("apps", "statefulsets", namespace),
        ("apps", "deployments", namespace),
    ];
    let api: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let mut lacking = vec![];
    for (group, resource, namespace) in needed {
        let attributes = ResourceAttributes {
            group: Some(group.into()),
            resource: Some(resource.into()),
            verb: Some("create".into()),
            namespace: (!namespace.is_empty()).then(|| namespace.to_owned()),
            ..ResourceAttributes::default()
        };
        let spec = SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() };
        let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
        let answer = api.create(&PostParams::default(), &review).await;
        if !answer.is_ok_and(|a| a.status.is_some_and(|s| s.allowed)) {
            lacking.push(resource);
        }
    }
    match lacking.as_slice() {
        [] => Ok("you may install".into()),
        some => Err((format!("you may not create {}", some.join(", ")), "install as an administrator of the cluster")),
    }
}

/// Compares the time in each kubelet's lease with the API server's time of the same write.
async fn clocks(client: &Client) -> Outcome {
    let api: Api<Lease> = Api::namespaced(client.clone(), "kube-node-lease");
    let leases = api.list(&ListParams::default()).await;
    let leases = leases.map_err(|e| (format!("cannot read the nodes' leases: {e}"), "see whether nodes are ready"))?;
    let (mut worst, mut whose) = (0, String::new());
    for lease in &leases.items {
        let written = lease
            .metadata
            .managed_fields
            .iter()
            .flatten()
            .filter_map(|f| f.time.as_ref())
            .map(|t| t.0.as_second())
            .max();
        let renewed = lease.spec.as_ref().and_then(|s| s.renew_time.as_ref()).map(|t| t.0.as_second());
        if let (Some(written), Some(renewed)) = (written, renewed)
            && (renewed - written).abs() > worst
        {
            (worst, whose) = ((renewed - written).abs(), lease.name_any());
        }
    }
    if worst > MAX_SKEW {
        return Err((
            format!("node {whose} is {worst} s off the API server's clock"),
            "set the clocks by NTP: certificates are dated",
        ));
    }
    Ok(format!("{} nodes, at most {worst} s off", leases.items.len()))
}

async fn resource(client: &Client) -> Outcome {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let definition = countersign_controller::crd::definition();
    match api.get(&definition.name_any()).await {
        Ok(_) => Ok("defined".into()),
        Err(e) => Err(absent(e)),
    }
}

/// Facts from a server's metrics page.
struct Server {
    /// The text of the metrics page.
    metrics: String,
    /// Whether its authorities are below an upstream root.
    has_upstream: bool,
}

async fn server(client: &Client, namespace: &str) -> Result<Server, String> {
    let found = pods(client, namespace, "app.kubernetes.io/component=server").await.map_err(|e| e.to_string())?;
    let ready = found.iter().find(|p| is_ready(p)).ok_or("no server is ready")?;
    let args = ready.spec.iter().flat_map(|s| &s.containers).flat_map(|c| c.args.iter().flatten());
    let has_upstream = args.into_iter().any(|a| a.starts_with("--upstream-cert"));
    let metrics = page(client, ready, SERVER_PAGES, "/metrics").await.map_err(|e| e.to_string())?;
    Ok(Server { metrics, has_upstream })
}

async fn configmap(client: &Client, namespace: &str) -> Result<String, String> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let map = api.get("countersign-bundle").await.map_err(|e| e.to_string())?;
    map.data.unwrap_or_default().remove("bundle.crt").ok_or_else(|| "it holds no bundle.crt yet".to_owned())
}

/// Checks the current settings of the mesh. Every role rejects an invalid value.
async fn settings(client: &Client, namespace: &str) -> Outcome {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let map = api.get("countersign-mesh").await.map_err(absent)?;
    let wrong = |why: String| (format!("ConfigMap countersign-mesh: {why}"), "mend it; until then the last ones stand");
    let found = MeshSettings::read(&map.data.unwrap_or_default()).map_err(|e| wrong(e.to_string()))?;
    match (found.transparent, found.mode, found.svid_ttl, found.ca_ttl) {
        (Some(true), ..) => {
            Err(("the mesh is transparent: nothing is encrypted".into(), "remove `transparent` from it"))
        }
        (_, None, ..) => Err(wrong("it names no mode, so the mesh is strict".into())),
        (_, _, Some(svid), Some(ca)) if svid.0 > ca.0 => Err(wrong(format!("svidTTL {svid} is more than caTTL {ca}"))),
        (_, Some(mode), ..) => Ok(format!("the mesh is {mode}")),
    }
}

fn replicas(found: Option<i32>, wanted: Option<i32>, what: &str, mend: &'static str) -> Outcome {
    let (found, wanted) = (found.unwrap_or(0), wanted.unwrap_or(1));
    let said = format!("{found} of {wanted} {what} ready");
    if found >= wanted { Ok(said) } else { Err((said, mend)) }
}

async fn server_ready(client: &Client, namespace: &str) -> Outcome {
    let api: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
    let mend = "see `kubectl describe` and the log of pod countersign-server-0";
    let found = api.get("countersign-server").await.map_err(absent)?;
    replicas(found.status.and_then(|s| s.ready_replicas), found.spec.and_then(|s| s.replicas), "servers", mend)
}

async fn injector(client: &Client, namespace: &str) -> Outcome {
    let api: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let mend = "see the injector's log: it is ready when the agent of its node has given it a certificate";
    let found = api.get("countersign-injector").await.map_err(absent)?;
    replicas(found.status.and_then(|s| s.ready_replicas), found.spec.and_then(|s| s.replicas), "injectors", mend)
}

async fn agents(client: &Client, namespace: &str, version: (u32, u32)) -> Outcome {
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), namespace);
    sets.get("countersign-agent").await.map_err(absent)?;
    let nodes: Api<Node> = Api::all(client.clone());
    let nodes = nodes.list(&ListParams::default()).await.map_err(absent)?;
    let running = pods(client, namespace, "app.kubernetes.io/component=agent").await;
    let running = running.map_err(|e| (e.to_string(), "see whether you may list pods"))?;
    let ready: BTreeSet<&str> =
        running.iter().filter(|p| is_ready(p)).filter_map(|p| p.spec.as_ref()?.node_name.as_deref()).collect();
    let lacking: Vec<String> =
        nodes.items.iter().map(ResourceExt::name_any).filter(|n| !ready.contains(n.as_str())).collect();
    if lacking.is_empty() {
        return Ok(format!("{} agents ready, one per node", ready.len()));
    }
    let mend = if version < NARROW_KUBELET {
        "see the agent's log; before Kubernetes 1.33 install with agent.nodesProxyPermission=true"
    } else {
        "see the agent's log on that node: it is ready when the server has attested it"
    };
    Err((format!("no agent is ready on {}", lacking.join(", ")), mend))
}

/// Checks when the server's authorities expire, by its metrics.
fn authorities(server: Result<&Server, &String>) -> Outcome {
    let page = &server.map_err(|e| (e.clone(), "see the server's log"))?.metrics;
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let ends = metric(page, "countersign_server_authority_expiry_timestamp_seconds");
    #[allow(clippy::cast_possible_truncation)] // seconds since 1970
    let active = ends.filter(|(l, _)| label(l, "status") == Some("active")).map(|(_, end)| end as i64 - now).max();
    match active {
        None => Err((
            "no authority is active".into(),
            "see the server's log; `countersign authority prepare`, then `activate`",
        )),
        Some(left) if left <= 0 => {
            Err((format!("the active authority ended {} s ago", -left), "see the server's log: it should have rotated"))
        }
        Some(left) => Ok(format!("the active one has {left} s left")),
    }
}

/// Checks whether a root outlasts the next weeks: its own authorities are replaced automatically, an upstream's are
/// not.
fn roots(server: Result<&Server, &String>) -> Outcome {
    let server = server.map_err(|e| (e.clone(), "see the server's log"))?;
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let ends = metric(&server.metrics, "countersign_server_bundle_authority_expiry_timestamp_seconds");
    #[allow(clippy::cast_possible_truncation)] // seconds since 1970
    let left = ends.map(|(_, end)| end as i64 - now).max();
    let warn = if server.has_upstream { UPSTREAM_WARNING } else { 0 };
    match left {
        None => Err(("the trust bundle is empty".into(), "see the server's log")),
        Some(left) if left <= warn => Err((
            format!("the last root of trust ends in {left} s"),
            if server.has_upstream {
                "bring a new upstream CA, then start the server and every agent anew with it"
            } else {
                "see the server's log: it should have rotated"
            },
        )),
        Some(left) => Ok(format!("the last one has {left} s left")),
    }
}

/// Checks whether the bundle that agents start with matches the server's authorities.
fn bundle(server: Result<&Server, &String>, map: Result<&str, &String>) -> Outcome {
    let map = map.map_err(|e| {
        (format!("ConfigMap countersign-bundle: {e}"), "see the server's log: it publishes the bundle there")
    })?;
    let server = server.map_err(|e| (e.clone(), "see the server's log"))?;
    let unreadable =
        |e: String| (format!("ConfigMap countersign-bundle: {e}"), "see the server's log; it mends what others change");
    let published = certificates_from_pem(map.as_bytes()).map_err(|e| unreadable(e.to_string()))?;
    let published = published.into_iter().map(|c| X509Authority::from_der(c.to_vec()));
    let published = published.collect::<Result<Vec<_>, _>>().map_err(|e| unreadable(e.to_string()))?;
    let ids: BTreeSet<&str> = published.iter().map(X509Authority::id).collect();
    let ends = metric(&server.metrics, "countersign_server_authority_expiry_timestamp_seconds");
    let own: BTreeSet<&str> = ends.filter_map(|(l, _)| label(l, "authority")).collect();
    match own.iter().filter(|id| ids.contains(*id)).count() {
        // With an upstream root, the bundle contains that root and none of our own.
        0 if server.has_upstream && !ids.is_empty() => Ok(format!("{} roots above our own authorities", ids.len())),
        n if n == own.len() => Ok(format!("all {n} authorities of the server are published")),
        n => Err((
            format!("{n} of {} authorities of the server are published", own.len()),
            "see the server's log: it may not write the ConfigMap",
        )),
    }
}

async fn webhook_bundle(client: &Client, map: Result<&str, &String>) -> Outcome {
    let api: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let found = api.get("countersign-injector").await.map_err(absent)?;
    let hooks = found.webhooks.unwrap_or_default();
    if map.is_ok_and(|m| m.trim().is_empty()) {
        return Err((
            "ConfigMap countersign-bundle is empty".into(),
            "see the server's log: it publishes the bundle there, and does not with another trust domain's data",
        ));
    }
    let same = hooks
        .iter()
        .filter(|h| h.client_config.ca_bundle.as_ref().map(|b| b.0.as_slice()) == map.ok().map(str::as_bytes));
    match same.count() {
        n if n == hooks.len() && n > 0 => Ok("the same as the ConfigMap's".into()),
        n => Err((
            format!("{n} of {} webhooks have the bundle of the ConfigMap", hooks.len()),
            "see the server's log: it may not change the webhook configuration",
        )),
    }
}

/// Most mistakes that are named; of others their number is.
const MISTAKES_SHOWN: usize = 20;

/// Checks labels and annotations of namespaces and pods for invalid or incomplete values.
async fn labels(client: &Client) -> Outcome {
    let api: Api<Namespace> = Api::all(client.clone());
    let all = api.list(&ListParams::default()).await.map_err(absent)?;
    // In one that is being deleted nothing is created any more, and nothing can be corrected.
    let live = all.items.iter().filter(|n| n.metadata.deletion_timestamp.is_none());
    let mut wrong: Vec<String> = live.filter_map(label_mistake).collect();
    let api: Api<Pod> = Api::all(client.clone());
    let pods = api.list(&ListParams::default()).await.map_err(|e| (e.to_string(), "see whether you may list pods"))?;
    let called = |pod: &Pod| format!("pod {}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
    wrong.extend(pods.items.iter().filter_map(|pod| word_mistake(&called(pod), &pod.metadata)));
    if wrong.is_empty() {
        let (namespaces, pods) = (all.items.len(), pods.items.len());
        return Ok(format!("{namespaces} namespaces and {pods} pods, each with words that mean something"));
    }
    let more = wrong.len().saturating_sub(MISTAKES_SHOWN);
    wrong.truncate(MISTAKES_SHOWN);
    if more > 0 {
        wrong.push(format!("and {more} more"));
    }
    Err((wrong.join("; "), "correct them: `kubectl label`, `kubectl annotate` with --overwrite"))
}

/// A word that means nothing in one of our labels or annotations.
fn word_mistake(object: &str, metadata: &ObjectMeta) -> Option<String> {
    let places = [&metadata.annotations, &metadata.labels];
    let said = |key: &str| places.into_iter().flatten().filter_map(|words| words.get(key)).collect::<Vec<_>>();
    if let Some(value) = said(INJECT).iter().find(|v| !["enabled", "disabled"].contains(&v.as_str())) {
        return Some(format!("{object}: {INJECT} is `{value}`, neither enabled nor disabled"));
    }
    let modes = said(MODE);
    let value = modes.iter().find(|v| v.parse::<Mode>().is_err())?;
    Some(format!("{object}: {MODE} is `{value}`, no mode, so it is strict"))
}

fn label_mistake(namespace: &Namespace) -> Option<String> {
    let name = namespace.name_any();
    if let Some(mistake) = word_mistake(&format!("namespace {name}"), &namespace.metadata) {
        return Some(mistake);
    }
    let modes = [namespace.annotations().get(MODE), namespace.labels().get(MODE)];
    let is_strict = |said: Option<&String>| said.and_then(|m| m.parse().ok()) == Some(Mode::Strict);
    (is_strict(modes[0]) && !is_strict(modes[1])).then(|| {
        format!("namespace {name}: strict by annotation and not by label, so new pods do not drop what is not TCP")
    })
}

/// Finds pods that let traffic bypass their sidecars without permission.
async fn past_sidecars(client: &Client, namespace: &str) -> Outcome {
    let leave = leave(client, namespace).await.map_err(absent)?;
    let api: Api<Pod> = Api::all(client.clone());
    let all = api.list(&ListParams::default()).await.map_err(|e| (e.to_string(), "see whether you may list pods"))?;
    let (mut allowed, mut not) = (vec![], vec![]);
    for pod in all.items.iter().filter(|p| is_meshed(p)) {
        let (of, which) = (pod.namespace().unwrap_or_default(), exceptions(pod));
        if which.is_empty() {
            continue;
        }
        let list = if leave.is_given(&of) { &mut allowed } else { &mut not };
        list.push(format!("{of}/{} ({})", pod.name_any(), which.join(" ")));
    }
    match not.as_slice() {
        [] if allowed.is_empty() => Ok("no pod lets traffic past its sidecar".into()),
        [] => {
            let count = allowed.len();
            allowed.truncate(MISTAKES_SHOWN);
            let more = if count > allowed.len() { ", …" } else { "" };
            Ok(format!("{count} pods let traffic past their sidecars by your leave: {}{more}", allowed.join(", ")))
        }
        some => Err((
            format!("{} pods let traffic past their sidecars: {}", some.len(), some.join(", ")),
            "remove the annotations, or allow them by mesh.allowExceptions",
        )),
    }
}

/// Has the API server ask the webhook about a pod that is never created.
async fn webhook(client: &Client) -> Outcome {
    let pod = json!({
        "metadata": { "name": "countersign-check", "labels": { "countersign.dev/inject": "enabled" } },
        "spec": { "containers": [{ "name": "app", "image": "none" }] },
    });
    let pod: Pod = serde_json::from_value(pod).map_err(|e| (e.to_string(), ""))?;
    let api: Api<Pod> = Api::namespaced(client.clone(), "default");
    match api.create(&PostParams { dry_run: true, ..PostParams::default() }, &pod).await {
        Ok(made) if super::cluster::is_meshed(&made) => Ok("it injects".into()),
        Ok(_) => Err((
            "a pod that asks for it is not injected".into(),
            "see the webhook configuration's selectors and the injector's log",
        )),
        Err(e) => Err((e.to_string(), "is the injector ready, and may the API server reach its port 9443?")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_identity::profile::issue_root;

    #[test]
    fn an_old_cluster_and_an_authority_without_time_are_found() {
        assert_eq!(api_version((1, 34), None), Ok("Kubernetes 1.34".into()));
        assert!(api_version((1, 30), None).unwrap().contains("nodesProxyPermission"));
        assert!(!api_version((1, 30), None).unwrap().contains("admissionPolicy"));
        assert!(api_version((1, 29), None).unwrap().contains("admissionPolicy=false"));
        assert!(api_version((1, 28), None).unwrap().contains("nativeSidecars=false"));
        assert!(api_version((1, 28), Some(true)).unwrap_err().1.contains("nativeSidecars=false"));
        assert!(api_version((1, 28), Some(false)).is_ok());
        assert!(api_version((1, 23), Some(false)).unwrap_err().1.contains("1.24"));
        let now = OffsetDateTime::now_utc().unix_timestamp();
        assert!(authorities(Ok(&server(&[("a", now + 60)], false))).is_ok());
        assert!(authorities(Ok(&server(&[("a", now - 60)], false))).unwrap_err().0.contains("ended"));
        assert!(authorities(Ok(&server(&[], false))).unwrap_err().0.contains("no authority"));
    }

    fn server(authorities: &[(&str, i64)], has_upstream: bool) -> Server {
        let line = |(id, end): &(&str, i64)| {
            format!(
                "countersign_server_authority_expiry_timestamp_seconds{{authority=\"{id}\",status=\"active\"}} {end}\n"
            )
        };
        Server { metrics: authorities.iter().map(line).collect(), has_upstream }
    }

    #[test]
    fn an_upstream_root_that_ends_soon_is_told_of_in_time() {
        let in_days = |days: i64, has_upstream| {
            let end = OffsetDateTime::now_utc().unix_timestamp() + days * 86_400;
            let name = "countersign_server_bundle_authority_expiry_timestamp_seconds";
            roots(Ok(&Server { metrics: format!("{name}{{authority=\"a\"}} {end}\n"), has_upstream }))
        };
        assert!(in_days(31, true).is_ok());
        assert!(in_days(29, true).unwrap_err().1.contains("new upstream CA"));
        assert!(in_days(1, false).is_ok(), "our own follow each other");
        assert!(in_days(-1, false).is_err());
        assert!(roots(Ok(&server(&[], false))).unwrap_err().0.contains("empty"));
    }

    #[test]
    fn a_bundle_that_lacks_an_authority_is_found() {
        let key = countersign_identity::PrivateKey::generate(countersign_identity::KeyType::EcP256).unwrap();
        let td = countersign_identity::TrustDomain::new("td").unwrap();
        let made = issue_root(&td, &key, std::time::Duration::from_secs(60), OffsetDateTime::now_utc()).unwrap();
        let made = X509Authority::from_der(made.to_vec()).unwrap();
        let pem = countersign_identity::bundle::certificates_to_pem([made.der().as_ref()]);
        let judged = |own: &[(&str, i64)], upstream, pem: &str| bundle(Ok(&server(own, upstream)), Ok(pem));
        assert!(judged(&[(made.id(), 1)], false, &pem).unwrap().contains("all 1 authorities"));
        assert!(judged(&[(made.id(), 1), ("other", 1)], false, &pem).unwrap_err().0.contains("1 of 2"));
        assert!(judged(&[("other", 1)], false, &pem).unwrap_err().0.contains("0 of 1"), "somebody else's certificate");
        assert!(judged(&[("other", 1)], true, &pem).unwrap().contains("1 roots above"));
        assert!(judged(&[(made.id(), 1)], false, "garbage").is_err());
    }

    #[test]
    fn a_word_that_means_nothing_on_a_pod_is_found() {
        let said = |metadata: serde_json::Value| word_mistake("pod a/b", &serde_json::from_value(metadata).unwrap());
        assert_eq!(said(json!({ "labels": { INJECT: "disabled", MODE: "strict" } })), None);
        assert!(said(json!({ "labels": { INJECT: "true" } })).unwrap().starts_with("pod a/b: "));
        // The annotation is fine; the label beside it counts too.
        let both = json!({ "annotations": { INJECT: "enabled" }, "labels": { INJECT: "yes" } });
        assert!(said(both).unwrap().contains("`yes`"));
        assert!(said(json!({ "labels": { MODE: "stict" } })).unwrap().contains("`stict`, no mode"));
    }

    #[test]
    fn a_label_that_means_nothing_is_found() {
        let said = |labels: serde_json::Value, annotations: serde_json::Value| {
            let namespace = json!({ "metadata": { "name": "shop", "labels": labels, "annotations": annotations } });
            label_mistake(&serde_json::from_value(namespace).unwrap())
        };
        assert_eq!(said(json!({ INJECT: "enabled" }), json!({})), None);
        assert!(said(json!({ INJECT: "true" }), json!({})).unwrap().contains("`true`, neither"));
        assert!(said(json!({}), json!({ "countersign.dev/mode": "stict" })).unwrap().contains("`stict`, no mode"));
        assert!(said(json!({}), json!({ "countersign.dev/mode": "strict" })).unwrap().contains("not by label"));
        let both = json!({ "countersign.dev/mode": "strict" });
        assert_eq!(said(both.clone(), both), None);
    }
}
