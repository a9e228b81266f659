//! `check`'s findings about meshed namespaces whose own rules refuse meshed pods: Pod Security, LimitRanges and
//! ResourceQuotas.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use countersign_controller::injector::{ENFORCE, INJECT, Privileges, REDIRECT, Resources, SIDECAR, Settings};
use countersign_identity::policy::Mode;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::CronJob;
use k8s_openapi::api::core::v1::{ConfigMap, LimitRange, Namespace, PodTemplateSpec, ResourceQuota};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, ListParams};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;

use super::check::{Fault, Outcome};
use super::cluster::listed;
use super::injects::own_mode;
use super::limits::{Objection, objections};
use super::live_settings;

/// Most objections that are listed; of others their number is.
const MAX_LISTED: usize = 20;

const MAY_LIST: &str = "see whether you may list namespaces";
const MAY_GET: &str = "see whether you may get deployments";

/// Which meshed namespaces are looked at.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// Namespace of the installation.
    pub own: &'a str,
    /// The only one; `None` for all.
    pub only: Option<&'a str>,
}

/// Whether Pod Security refuses meshed pods.
pub async fn security(client: &Client, scope: Scope<'_>, trusting: &[String]) -> Outcome {
    let meshed = meshed(client, scope).await.map_err(|e| Fault::unread(&e, MAY_LIST))?;
    let injector = installed(client, scope.own).await.map_err(|e| Fault::unread(&e, MAY_GET))?;
    let privileges = injector.unwrap_or_default().privileges;
    let well = pod_security(privileges, &meshed)?;
    // Where pods need more than `restricted` allows nobody can be told to enforce it.
    if trusting.is_empty() || privileges.are_refused_by("restricted") {
        return Ok(well);
    }
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), scope.own);
    let map =
        maps.get_opt(live_settings::NAME).await.map_err(|e| Fault::unread(&e, "see whether you may get configmaps"))?;
    Ok(match open_to_apps(&meshed, live_settings::mode(map.as_ref())).as_slice() {
        [] => well,
        some => format!(
            "{well}; sidecars are told by their user ID alone on {}, where an app that may change its user can pass for one; strict \
             without {ENFORCE}=restricted: {}. Label them so where the apps permit it",
            listed(trusting),
            listed(some)
        ),
    })
}

/// Strict namespaces whose apps may choose their user.
fn open_to_apps(meshed: &[Namespace], mesh: Mode) -> Vec<String> {
    let is_open = |n: &&Namespace| {
        mesh.narrowed_by(own_mode(n)) == Mode::Strict
            && n.labels().get(ENFORCE).is_none_or(|level| level != "restricted")
    };
    meshed.iter().filter(is_open).map(ResourceExt::name_any).collect()
}

/// What LimitRanges and ResourceQuotas refuse.
pub async fn refusals(client: &Client, scope: Scope<'_>) -> Vec<Outcome> {
    match limited_in(client, scope).await {
        Ok(limited) => limits(&limited),
        Err(fault) => vec![Err(fault)],
    }
}

async fn limited_in(client: &Client, scope: Scope<'_>) -> Result<Vec<Limited>, Fault> {
    let meshed = meshed(client, scope).await.map_err(|e| Fault::unread(&e, MAY_LIST))?;
    let injector = installed(client, scope.own).await.map_err(|e| Fault::unread(&e, MAY_GET))?;
    // Without an injector nothing is meshed.
    let Some(injector) = injector else { return Ok(vec![]) };
    let may = "see whether you may list limitranges, resourcequotas, deployments, statefulsets, daemonsets and cronjobs in all \
               namespaces";
    limited(client, &injector, &meshed).await.map_err(|e| Fault::unread(&e, may))
}

/// Namespaces in which the webhook injects. In one that is being deleted nothing is created any more.
async fn meshed(client: &Client, scope: Scope<'_>) -> Result<Vec<Namespace>, kube::Error> {
    let api: Api<Namespace> = Api::all(client.clone());
    let labelled = api.list(&ListParams::default().labels(&format!("{INJECT}=enabled"))).await?.items;
    let live = labelled.into_iter().filter(|n| n.metadata.deletion_timestamp.is_none());
    let live = live.filter(|n| scope.only.is_none_or(|only| n.name_any() == only));
    Ok(live.filter(|n| !["kube-system", "kube-public", scope.own].contains(&n.name_any().as_str())).collect())
}

fn pod_security(needed: Privileges, meshed: &[Namespace]) -> Outcome {
    let level = |n: &Namespace| n.labels().get(ENFORCE).filter(|level| needed.are_refused_by(level)).cloned();
    let refusing: Vec<_> = meshed.iter().filter_map(|n| Some(format!("{} ({})", n.name_any(), level(n)?))).collect();
    if refusing.is_empty() {
        return Ok(format!("{} meshed namespaces, none enforces a level that refuses meshed pods", meshed.len()));
    }
    Err(Fault::new(
        format!("namespace {} refuses meshed pods, which need {needed}", listed(&refusing)),
        format!("turn on {}, or label it {ENFORCE}=privileged", needed.spared_by()),
    ))
}

/// A meshed namespace with limits, and what runs there.
struct Limited {
    name: String,
    /// Resources of pods without annotations.
    defaults: Resources,
    /// The containers that they get.
    added: &'static [&'static str],
    ranges: Vec<LimitRange>,
    quotas: Vec<ResourceQuota>,
    workloads: Vec<Workload>,
}

/// What makes pods, by its template.
struct Workload {
    namespace: String,
    /// Kind and name.
    name: String,
    template: PodTemplateSpec,
}

impl Workload {
    fn is_meshed(&self) -> bool {
        let metadata = self.template.metadata.as_ref();
        let label = metadata.and_then(|m| m.labels.as_ref()?.get(INJECT));
        let label = label.or_else(|| metadata.and_then(|m| m.annotations.as_ref()?.get(INJECT)));
        let host_network = self.template.spec.as_ref().and_then(|s| s.host_network) == Some(true);
        label.is_none_or(|label| label != "disabled") && !host_network
    }

    /// What its pods' containers get. Errors: an annotation that the webhook refuses.
    fn resources(&self, defaults: &Resources) -> Result<Resources, String> {
        let annotations = self.template.metadata.iter().filter_map(|m| m.annotations.as_ref()).flatten();
        let settings = Settings::read(annotations.map(|(key, value)| (key.as_str(), value.as_str())));
        let narrowed = settings.and_then(|settings| defaults.narrowed_by(&settings.resources));
        narrowed.map_err(|mistake| mistake.to_string())
    }
}

/// Reads what limits meshed namespaces, and their workloads if anything does.
async fn limited(client: &Client, injector: &Injector, meshed: &[Namespace]) -> Result<Vec<Limited>, kube::Error> {
    let names: BTreeSet<String> = meshed.iter().map(ResourceExt::name_any).collect();
    let ranges = in_namespaces::<LimitRange>(client, &names).await?;
    let quotas = in_namespaces::<ResourceQuota>(client, &names).await?;
    if ranges.is_empty() && quotas.is_empty() {
        return Ok(vec![]);
    }
    let mut workloads = workloads(client, &names).await?;
    let all = names.into_iter().map(|name| Limited {
        ranges: ranges.iter().filter(|r| r.namespace().as_ref() == Some(&name)).cloned().collect(),
        quotas: quotas.iter().filter(|q| q.namespace().as_ref() == Some(&name)).cloned().collect(),
        workloads: workloads.extract_if(.., |w| w.namespace == name).collect(),
        defaults: injector.defaults.clone(),
        added: injector.added(),
        name,
    });
    Ok(all.filter(|l| !l.ranges.is_empty() || !l.quotas.is_empty()).collect())
}

/// What makes pods in some namespaces.
async fn workloads(client: &Client, names: &BTreeSet<String>) -> Result<Vec<Workload>, kube::Error> {
    let mut all = vec![];
    let mut add = |kind: &str, metadata: &ObjectMeta, template: Option<PodTemplateSpec>| {
        let (namespace, name) = (metadata.namespace.clone(), metadata.name.as_deref().unwrap_or_default());
        let name = format!("{kind} {name}");
        all.extend(namespace.zip(template).map(|(namespace, template)| Workload { namespace, name, template }));
    };
    for one in in_namespaces::<Deployment>(client, names).await? {
        add("deployment", &one.metadata, one.spec.map(|s| s.template));
    }
    for one in in_namespaces::<StatefulSet>(client, names).await? {
        add("statefulset", &one.metadata, one.spec.map(|s| s.template));
    }
    for one in in_namespaces::<DaemonSet>(client, names).await? {
        add("daemonset", &one.metadata, one.spec.map(|s| s.template));
    }
    for one in in_namespaces::<CronJob>(client, names).await? {
        add("cronjob", &one.metadata, one.spec.and_then(|s| Some(s.job_template.spec?.template)));
    }
    Ok(all)
}

/// All objects of a kind in some namespaces, in one request.
async fn in_namespaces<K>(client: &Client, names: &BTreeSet<String>) -> Result<Vec<K>, kube::Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
{
    let api: Api<K> = Api::all(client.clone());
    let all = api.list(&ListParams::default()).await?.items;
    Ok(all.into_iter().filter(|o| o.namespace().is_some_and(|n| names.contains(&n))).collect())
}

/// What the injector's flags say of the pods that it injects.
struct Injector {
    /// Resources of pods without annotations.
    defaults: Resources,
    privileges: Privileges,
    native: bool,
}

/// As with no flags.
impl Default for Injector {
    fn default() -> Self {
        Self::by_flags(&[])
    }
}

impl Injector {
    fn by_flags(args: &[String]) -> Self {
        let privileges = Privileges {
            net_admin: !args.iter().any(|arg| arg == "--cni"),
            host_path: !args.iter().any(|arg| arg.starts_with("--csi-driver=")),
        };
        Self { defaults: resources(args), privileges, native: !args.iter().any(|arg| arg == "--native-sidecars=false") }
    }

    /// The containers that a pod gets. With the CNI plugin a native sidecar is alone.
    fn added(&self) -> &'static [&'static str] {
        if self.native && !self.privileges.net_admin { &[SIDECAR] } else { &[SIDECAR, REDIRECT] }
    }
}

/// The installed injector; `None` if there is none.
async fn installed(client: &Client, namespace: &str) -> Result<Option<Injector>, kube::Error> {
    let api: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let injector = api.get_opt("countersign-injector").await?;
    let container = injector.and_then(|i| i.spec?.template.spec?.containers.into_iter().next());
    Ok(container.map(|c| Injector::by_flags(&c.args.unwrap_or_default())))
}

/// Reads flags such as `--sidecar-cpu-request=10m`.
fn resources(args: &[String]) -> Resources {
    let mut all = Resources::default();
    for (flag, value) in args.iter().filter_map(|arg| arg.strip_prefix("--")?.split_once('=')) {
        if !flag.starts_with("sidecar-") && !flag.starts_with("redirect-") {
            continue;
        }
        if let (Some(amount), Ok(value)) = (all.amount(flag.trim_start_matches("sidecar-")), value.parse()) {
            *amount = value;
        }
    }
    all
}

/// One finding for each objection, or one that there is none.
fn limits(limited: &[Limited]) -> Vec<Outcome> {
    let mut all: Vec<(String, &'static str)> = limited.iter().flat_map(Limited::refusals).collect();
    if all.is_empty() {
        return vec![Ok(format!("{} meshed namespaces have limits, none refuses meshed pods", limited.len()))];
    }
    let more = all.len().saturating_sub(MAX_LISTED);
    all.truncate(MAX_LISTED);
    if more > 0 {
        all.push((format!("{more} more objections of LimitRanges and ResourceQuotas"), "mend these first"));
    }
    all.into_iter().map(|(why, mend)| Err(Fault::new(why, mend))).collect()
}

impl Limited {
    /// Where its workloads' pods, or without workloads those without annotations, will be refused.
    fn refusals(&self) -> Vec<(String, &'static str)> {
        let judge = |resources: &Resources| objections(self.added, resources, &self.ranges, &self.quotas);
        let meshed: Vec<_> = self.workloads.iter().filter(|w| w.is_meshed()).collect();
        let mut by_reason: BTreeMap<(String, &'static str), Vec<String>> = BTreeMap::new();
        for workload in &meshed {
            let found = match workload.resources(&self.defaults) {
                Ok(resources) => judge(&resources),
                Err(why) => vec![Objection { why, mend: "correct the annotation in the workload's pod template" }],
            };
            for Objection { why, mend } in found {
                by_reason.entry((why, mend)).or_default().push(workload.name.clone());
            }
        }
        if meshed.is_empty() {
            let found = judge(&self.defaults).into_iter();
            by_reason.extend(found.map(|o| ((o.why, o.mend), vec!["pods without annotations".to_owned()])));
        }
        let shown = by_reason.into_iter().map(|((why, mend), whose)| {
            let more = if whose.len() > 1 { format!(" and {} more", whose.len() - 1) } else { String::new() };
            (format!("namespace {}, {}{more}: {why}", self.name, whose[0]), mend)
        });
        shown.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_controller::store::MODE;
    use serde_json::{Value, json};

    fn limited(workloads: &[(&str, Value)]) -> Limited {
        let quota = json!({ "metadata": { "name": "team" }, "spec": { "hard": { "limits.cpu": "1" } } });
        let workload = |(name, template): &(&str, Value)| Workload {
            namespace: "tight".into(),
            name: (*name).to_owned(),
            template: serde_json::from_value(template.clone()).unwrap(),
        };
        Limited {
            name: "tight".into(),
            defaults: resources(&["--redirect-cpu-limit=1".into(), "--sidecar-log=info".into(), "--bind=x".into()]),
            added: &[SIDECAR, REDIRECT],
            ranges: vec![],
            quotas: vec![serde_json::from_value(quota).unwrap()],
            workloads: workloads.iter().map(workload).collect(),
        }
    }

    #[test]
    fn with_the_cni_plugin_a_native_sidecar_is_alone() {
        let added =
            |args: &[&str]| Injector::by_flags(&args.iter().map(ToString::to_string).collect::<Vec<_>>()).added();
        assert_eq!(added(&["--cni"]), [SIDECAR]);
        assert_eq!(added(&["--cni", "--native-sidecars=false"]), [SIDECAR, REDIRECT]);
        assert_eq!(added(&[]), [SIDECAR, REDIRECT]);
        let quota = json!({ "metadata": { "name": "team" }, "spec": { "hard": { "limits.memory": "1Gi" } } });
        let with = |added| Limited {
            added,
            defaults: resources(&["--sidecar-memory-limit=64Mi".into(), "--redirect-memory-limit=".into()]),
            quotas: vec![serde_json::from_value(quota.clone()).unwrap()],
            ..limited(&[])
        };
        assert_eq!(with(&[SIDECAR]).refusals(), []);
        assert_eq!(with(&[SIDECAR, REDIRECT]).refusals().len(), 1);
    }

    fn annotated(annotations: Value) -> Value {
        json!({ "metadata": { "annotations": annotations } })
    }

    #[test]
    fn the_workloads_that_will_be_refused_are_named_with_the_annotation() {
        let found = limited(&[]).refusals();
        let why = "ResourceQuota team refuses countersign-proxy: it has no cpu limit, which the quota requires";
        assert_eq!(found[0].0, format!("namespace tight, pods without annotations: {why}"));
        assert!(found.len() == 1 && found[0].1.contains("countersign.dev/cpu-limit"));
        let fine = annotated(json!({ "countersign.dev/cpu-limit": "100m" }));
        let out = json!({ "metadata": { "labels": { INJECT: "disabled" } } });
        let host = json!({ "spec": { "hostNetwork": true, "containers": [] } });
        let all = [("deployment web", fine.clone()), ("cronjob out", out), ("daemonset host", host)];
        assert_eq!(limited(&all).refusals(), [], "what is refused without annotations has them");
        let two = [("deployment a", json!({})), ("deployment web", fine), ("statefulset b", json!({}))];
        assert_eq!(limited(&two).refusals()[0].0, format!("namespace tight, deployment a and 1 more: {why}"));
        let wrong = [("deployment web", annotated(json!({ "countersign.dev/cpu-limit": "lots" })))];
        assert!(limited(&wrong).refusals()[0].0.contains("`lots` is no quantity"));
        assert!(limits(&[limited(&all)])[0].is_ok() && limits(&[limited(&two)])[0].is_err());
        let many: Vec<_> = (0..30).map(|_| limited(&[])).collect();
        assert_eq!(limits(&many).len(), MAX_LISTED + 1);
    }

    #[test]
    fn a_strict_namespace_whose_apps_may_choose_their_user_is_named() {
        let space = |name: &str, labels: Value, annotations: Value| {
            let metadata = json!({ "name": name, "labels": labels, "annotations": annotations });
            serde_json::from_value::<Namespace>(json!({ "metadata": metadata })).unwrap()
        };
        let all = [
            space("none", json!({}), json!({})),
            space("baseline", json!({ ENFORCE: "baseline" }), json!({})),
            space("restricted", json!({ ENFORCE: "restricted", MODE: "strict" }), json!({})),
            space("by-annotation", json!({}), json!({ MODE: "strict" })),
        ];
        assert_eq!(open_to_apps(&all, Mode::Strict), ["none", "baseline", "by-annotation"]);
        assert_eq!(open_to_apps(&all, Mode::Permissive), ["by-annotation"]);
    }

    #[tokio::test]
    async fn that_is_a_note_and_only_where_the_plugin_makes_restricted_possible() {
        use crate::kubernetes::check::fake_api::{Answer, Asked, client, list};
        let with = |args: &'static [&'static str]| {
            client(move |asked: &Asked| match asked.path.as_str() {
                "/api/v1/namespaces" => list(
                    "NamespaceList",
                    vec![json!({ "metadata": { "name": "shop", "labels": { INJECT: "enabled", MODE: "strict" } } })],
                ),
                path if path.ends_with("/deployments/countersign-injector") => {
                    let pod = json!({ "spec": { "containers": [{ "name": "injector", "args": args }] } });
                    Answer::Now(200, json!({ "metadata": {}, "spec": { "selector": {}, "template": pod } }))
                }
                path if path.ends_with("/configmaps/countersign-mesh") => {
                    Answer::Now(200, json!({ "metadata": {}, "data": { "mode": "permissive" } }))
                }
                path => panic!("{path}"),
            })
        };
        let scope = Scope { own: "mesh", only: None };
        let node = ["n1".to_owned()];
        let noted = security(&with(&["--cni", "--csi-driver=csi.countersign.dev"]), scope, &node).await.unwrap();
        assert!(noted.contains("alone on n1,") && noted.contains("restricted: shop. "), "{noted}");
        let no_node = security(&with(&["--cni", "--csi-driver=csi.countersign.dev"]), scope, &[]).await.unwrap();
        let no_plugin = security(&with(&["--csi-driver=csi.countersign.dev"]), scope, &node).await.unwrap();
        assert!(!no_node.contains("shop") && !no_plugin.contains("shop"), "{no_node}; {no_plugin}");
    }

    #[test]
    fn a_namespace_that_enforces_a_level_is_named() {
        let judged_with = |needed, level: Option<&str>| {
            let mut labels = json!({ INJECT: "enabled" });
            labels.as_object_mut().unwrap().extend(level.map(|l| (ENFORCE.to_owned(), l.into())));
            let one = json!({ "metadata": { "name": "shop", "labels": labels } });
            pod_security(needed, &[serde_json::from_value(one).unwrap()])
        };
        let judged = |level| judged_with(Injector::default().privileges, level);
        assert!(judged(None).is_ok() && judged(Some("privileged")).is_ok());
        let Fault { found, mend, .. } = judged(Some("baseline")).unwrap_err();
        assert_eq!(found, "namespace shop (baseline) refuses meshed pods, which need NET_ADMIN and a hostPath");
        assert!(mend.contains("enforce=privileged"));
        assert!(judged(Some("restricted")).unwrap_err().found.contains("shop (restricted)"));
        let injector = Injector::by_flags(&["--cni".to_owned(), "--csi-driver=csi.countersign.dev".to_owned()]);
        assert!(judged_with(injector.privileges, Some("restricted")).is_ok());
    }
}
