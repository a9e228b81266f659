//! `countersign install`: the manifests of an installation, printed or applied, after a comparison with the settings of
//! an earlier one.

use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_identity::policy::Mode;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::Client;
use kube::api::{Api, ObjectMeta};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::changes::{self, Change, Consent};
use super::chart;
use super::check::csi;
use super::existing::Existing;
use super::former::Revision;
use super::given::Given;
use super::memory::{self, Memory, Seen};
use super::values::{ValuesArgs, host_path};
use super::{api_server, live_settings, redirects};
use crate::operator::output::{Output, json_text};
use crate::settings::Mistake;
use crate::settings::words::escaped;

/// Longest run of kubectl.
const KUBECTL: Duration = Duration::from_secs(300);

/// Kubernetes: print the manifests of an installation: `countersign install --set trustDomain=example.org | kubectl
/// apply -f -`.
///
/// Equal to the Helm chart in charts/countersign: same templates, same values. The settings that are given are
/// remembered in the cluster (ConfigMap countersign-install). If the cluster of the current KUBECONFIG has an
/// installation, nothing is printed that changes its identities or its storage, or drops a setting given before,
/// unless flags allow it. One that remembers nothing, one in another namespace, and nodes whose Linux is too old for the CSI driver
/// that is turned on, need --force.
#[derive(Debug, clap::Args)]
#[allow(clippy::struct_excessive_bools)] // each is a flag
pub struct InstallArgs {
    /// Namespace of the installation, which is created.
    #[arg(long, short, value_name = "NAMESPACE", default_value = "countersign")]
    namespace: String,
    #[command(flatten)]
    values: ValuesArgs,
    /// Keep the settings of the existing installation, with the ones given now on top.
    #[arg(long, conflicts_with_all = ["reset_values", "ignore_cluster"])]
    reuse_values: bool,
    /// Drop the settings of the existing installation that are not given now.
    #[arg(long)]
    reset_values: bool,
    /// Allow everything that needs consent: other identities, other storage, dropped settings, an installation that
    /// remembers nothing or is in another namespace, and a CSI driver on nodes that cannot have it.
    #[arg(long)]
    force: bool,
    /// Apply the manifests by kubectl instead of printing them. Of two that do so at once, one is rejected before it
    /// applies anything.
    #[arg(long, conflicts_with_all = ["ignore_cluster", "dry_run"])]
    apply: bool,
    /// Print what would be remembered and changed instead of the manifests. Exit code 1 if that needs a flag that is
    /// not given.
    #[arg(long)]
    dry_run: bool,
    /// Do not compare with the cluster, as without KUBECONFIG.
    #[arg(long)]
    ignore_cluster: bool,
    /// Print all settings with their defaults, and exit.
    #[arg(long)]
    show_values: bool,
    #[command(flatten)]
    output: Output,
}

/// Prints or applies the manifests, or prints the settings.
pub async fn install(args: InstallArgs) -> Result<ExitCode> {
    if args.show_values {
        crate::stdout::put(chart::VALUES)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.output.is_json() && !args.dry_run {
        return Err(Mistake::flag("--output", "json is for --dry-run; manifests are YAML").into());
    }
    let plan = plan(&args).await?;
    if let Some(said) = host_path(&plan.memory.given.whole("the settings")?) {
        eprintln!("{said}");
    }
    plan.notes.iter().for_each(|note| eprintln!("{}", escaped(note)));
    let consent = Consent { force: args.force, reset: args.reset_values };
    let refused = !plan.is_allowed(consent);
    if args.dry_run {
        if args.output.is_json() {
            crate::stdout::line(&json_text(&plan.as_json(consent)))?;
        } else {
            crate::stdout::put(&plan.as_text()?)?;
        }
        eprintln!("{}", plan.tried(consent));
        return Ok(ExitCode::from(u8::from(refused)));
    }
    if !plan.changes.is_empty() {
        eprint!("{}", changes::table(&plan.changes).render());
    }
    if refused {
        return Err(Mistake(plan.needs(consent)).into());
    }
    match plan.cluster {
        Some((client, seen)) if args.apply => apply(&client, &args.namespace, seen, &plan.memory).await?,
        None if args.apply => return Err(Mistake::flag("--apply", NO_CLUSTER).into()),
        _ => crate::stdout::put(&manifests(&args.namespace, &plan.memory)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// What an installation would do.
struct Plan {
    namespace: String,
    memory: Memory,
    changes: Vec<Change>,
    /// What the cluster has beside what it remembers.
    existing: Existing,
    /// Why nodes cannot have what it turns on.
    unfit: Option<String>,
    /// How it would open the mesh unasked.
    opened: Option<String>,
    /// What else there is to be said of it.
    notes: Vec<String>,
    /// The cluster, and what it remembers; `None` if it is not asked.
    cluster: Option<(Client, Seen)>,
}

const NO_CLUSTER: &str = "there is no cluster to ask: set KUBECONFIG";

async fn plan(args: &InstallArgs) -> Result<Plan> {
    check_namespace(&args.namespace)?;
    let given = args.values.given()?;
    // Who names the mode now means it.
    let names_mode = given.leaves().contains_key("mesh.mode");
    let client = if args.ignore_cluster { None } else { cluster().await? };
    let cluster = match client {
        None => None,
        Some(client) => {
            let seen = memory::look(&client, &args.namespace, args.force).await?;
            Some((client, seen))
        }
    };
    let existing = match &cluster {
        Some((client, seen)) => Existing::look(client, &args.namespace, seen).await?,
        None => Existing::default(),
    };
    let earlier = cluster.as_ref().and_then(|(_, seen)| seen.memory.as_ref());
    let given = match (args.reuse_values, earlier) {
        (false, _) => given,
        (true, Some(earlier)) => given.over(earlier.given.clone()),
        (true, None) if cluster.is_none() => return Err(Mistake::flag("--reuse-values", NO_CLUSTER).into()),
        (true, None) => {
            let why = format!("namespace `{}` has no installation that remembers its settings", args.namespace);
            return Err(Mistake::flag("--reuse-values", &why).into());
        }
    };
    let mut notes = vec![];
    if let Some(pending) = cluster.as_ref().and_then(|(_, seen)| seen.pending.as_ref()) {
        notes.push(memory::unfinished(pending, &given));
    }
    let whole = given.whole("the settings of the existing installation and those given now")?;
    let (mut given, mut opened) = (given, None);
    if let Some((client, seen)) = &cluster {
        let maps = Api::<ConfigMap>::namespaced(client.clone(), &args.namespace);
        let mesh = memory::get(&maps, live_settings::NAME).await?;
        match stricter(mesh.as_ref(), &whole) {
            _ if names_mode => {}
            Some((live, _)) if args.reuse_values => {
                let mode = json!({ "mesh": { "mode": live.to_string() } });
                given = Given::of(mode).map_err(Mistake)?.over(given);
            }
            stricter => opened = stricter.map(|(live, next)| opens(live, next)),
        }
        if let (Some(mesh), Some(memory)) = (&mesh, &seen.memory) {
            notes.extend(live_settings::taken_back(mesh, &memory.values()?, &whole));
        }
    }
    // What runs shows all that differs from today's defaults.
    let earlier = earlier.map(|memory| (&memory.given, memory.defaults));
    let earlier = earlier.or(existing.unremembered.as_ref().map(|given| (given, Revision::NOW)));
    let changes =
        earlier.map_or_else(|| Ok(vec![]), |(earlier, revision)| changes::changes(earlier, revision, &given))?;
    // Where a driver runs already it has shown that it can.
    let turned_on = earlier.is_none()
        || changes.iter().any(|change| match change.setting.as_str() {
            "agent.csi.enabled" => change.before != Some(json!(true)),
            setting => setting.starts_with("agent.nodeSelector"),
        });
    let unfit = match &cluster {
        Some((client, _)) if turned_on => unfit(client, &given.whole("the settings")?).await,
        _ => None,
    };
    if let Some((client, _)) = &cluster {
        notes.extend(redirects::note(client, &changes, &whole).await);
    }
    let memory = Memory::new(given);
    Ok(Plan { namespace: args.namespace.clone(), memory, changes, existing, unfit, opened, notes, cluster })
}

/// The mode of a mesh that was made stricter since (`countersign strict --mesh`) than these settings make it, and theirs. What was
/// changed on the running mesh is not remembered.
fn stricter(mesh: Option<&ConfigMap>, values: &Value) -> Option<(Mode, Mode)> {
    let live: Mode = mesh?.data.as_ref()?.get("mode")?.trim().parse().ok()?;
    let next: Mode = values["mesh"]["mode"].as_str()?.parse().ok()?;
    (next < live).then_some((live, next))
}

/// What is said of settings that would open it.
fn opens(live: Mode, next: Mode) -> String {
    format!(
        "the mesh is {live} (ConfigMap countersign-mesh) and would become {next}: add --set mesh.mode={live}, or --set \
         mesh.mode={next} if that is meant"
    )
}

/// Longest look at the nodes.
const NODES: Duration = Duration::from_secs(20);

/// Why some nodes cannot have the CSI driver that these settings turn on. What cannot be seen is told and is no reason.
async fn unfit(client: &Client, values: &Value) -> Option<String> {
    let Ok(judged) = tokio::time::timeout(NODES, csi::before(client, values)).await else {
        eprintln!("whether the nodes can have the CSI driver was not checked: no answer within {} s", NODES.as_secs());
        return None;
    };
    let fault = judged.err()?;
    if !fault.is_checked {
        eprintln!("whether the nodes can have the CSI driver was not checked: {}", escaped(&fault.found));
        return None;
    }
    Some(format!("{}: {}, or keep agents off them by agent.nodeSelector", fault.found, fault.mend))
}

/// The cluster of the current KUBECONFIG; `None` where none is configured. Error: the configuration cannot be read.
async fn cluster() -> Result<Option<Client>> {
    let Some(config) = api_server::configured().await? else {
        eprintln!("no cluster is configured (KUBECONFIG): the settings are not compared with those of an installation");
        return Ok(None);
    };
    let reached = api_server::reach_by(config, &api_server::source()).await;
    Ok(Some(
        reached
            .context(
                "the settings cannot be compared with those of an installation, which --ignore-cluster leaves out",
            )?
            .client,
    ))
}

impl Plan {
    fn is_allowed(&self, consent: Consent) -> bool {
        let doubts = !consent.force && !self.doubts().is_empty();
        !doubts && self.changes.iter().all(|change| change.is_allowed(consent))
    }

    /// What needs consent to everything, in words; empty if nothing does.
    fn doubts(&self) -> Vec<String> {
        self.existing.doubts().into_iter().chain(self.unfit.clone()).chain(self.opened.clone()).collect()
    }

    fn as_json(&self, consent: Consent) -> Value {
        let shown = |memory: &Memory| json!({ "version": memory.version, "values": memory.given.tree() });
        let before = self.cluster.as_ref().and_then(|(_, seen)| seen.memory.as_ref()).map(shown);
        json!({
            "namespace": self.namespace, "compared": self.cluster.is_some(), "installed": before,
            "remembered": shown(&self.memory), "changes": changes::as_json(&self.changes, consent),
            "doubts": self.doubts(), "allowed": self.is_allowed(consent), "needs": self.needed(consent), "notes": self.notes,
        })
    }

    /// The changes, and what would be remembered.
    fn as_text(&self) -> Result<String> {
        let changes = changes::table(&self.changes).render();
        let values = yaml(&self.memory.given.tree())?;
        // Escaped line by line: some of it was read from the cluster.
        let values: Vec<String> = values.lines().map(escaped).collect();
        let doubts = self.doubts().into_iter().map(|doubt| format!("\n{}\n", escaped(&doubt)));
        let doubts: String = doubts.collect();
        Ok(format!("{changes}{doubts}\nremembered, version {}:\n{}\n", self.memory.version, values.join("\n")))
    }

    /// What a dry run says of itself.
    fn tried(&self, consent: Consent) -> String {
        let needed = escaped(&self.needed(consent).join("; "));
        match needed.as_str() {
            "" => "a dry run: nothing was changed".into(),
            _ => format!("a dry run: nothing was changed, and without --dry-run it would be refused: {needed}"),
        }
    }

    /// Why nothing was applied, in words.
    fn needs(&self, consent: Consent) -> String {
        let said = escaped(&self.needed(consent).join("; "));
        if self.changes.is_empty() {
            return format!("nothing was applied: {said}");
        }
        format!(
            "namespace `{}` has an installation with other settings, and nothing was applied: {said}",
            self.namespace
        )
    }

    /// Which flags it needs that were not given, in words; empty if none.
    fn needed(&self, consent: Consent) -> Vec<String> {
        let refused = || self.changes.iter().filter(|change| !change.is_allowed(consent));
        let names = |of: &dyn Fn(&Change) -> bool| {
            refused().filter(|c| of(c)).map(|c| c.setting.clone()).collect::<Vec<_>>().join(", ")
        };
        let fixed = names(&|c| matches!(c.kind, changes::Kind::Fixed(_)));
        let dropped = names(&|c| c.kind == changes::Kind::Dropped);
        let mut said = vec![];
        if !fixed.is_empty() {
            said.push(format!("{fixed} would change, which needs --force"));
        }
        if !dropped.is_empty() {
            said.push(format!(
                "{dropped} would no longer be set: --reuse-values keeps earlier settings, --reset-values drops them"
            ));
        }
        if !consent.force {
            said.extend(self.existing.doubts().into_iter().map(|doubt| format!("{doubt}, which needs --force")));
            said.extend(self.unfit.iter().map(|why| format!("{why}; --force installs it all the same")));
            said.extend(self.opened.clone());
        }
        said
    }
}

/// Has kubectl apply the manifests, and remembers the settings once it has. Objects belong to the same field manager as by hand, so
/// that a later `kubectl apply` still removes what is no longer in them.
async fn apply(client: &Client, namespace: &str, seen: Seen, memory: &Memory) -> Result<()> {
    let manifests = applied(namespace, memory)?;
    let spawned = Command::new("kubectl").args(["apply", "-f", "-"]).stdin(Stdio::piped()).kill_on_drop(true).spawn();
    let mut kubectl = spawned.map_err(|e| Mistake(format!("--apply: cannot run kubectl: {e}")))?;
    memory::begin(client, &own_namespace(namespace), seen, memory).await?;
    let work = async {
        let mut input = kubectl.stdin.take().context("kubectl has no standard input")?;
        // If it ends early its exit code and its own words say why.
        let _ = input.write_all(manifests.as_bytes()).await;
        drop(input);
        kubectl.wait().await.context("cannot wait for kubectl")
    };
    let status = tokio::time::timeout(KUBECTL, work).await;
    let status = status.map_err(|_| anyhow!("kubectl did not end within {} s", KUBECTL.as_secs()))??;
    if status.success() {
        return memory::remember(client, namespace, memory).await;
    }
    Err(anyhow!(
        "kubectl has not applied everything ({status}), and the settings are not remembered: mend what it named and run it again"
    ))
}

fn check_namespace(namespace: &str) -> Result<(), Mistake> {
    let form = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if namespace.is_empty() || namespace.len() > 63 || !namespace.bytes().all(form) {
        return Err(Mistake::flag("--namespace", &format!("`{namespace}` is no namespace's name")));
    }
    Ok(())
}

/// The namespace of an installation. The agent needs its node's view of processes, which Pod Security calls privileged;
/// the other pods do not.
fn own_namespace(name: &str) -> Namespace {
    let labels = [("app.kubernetes.io/name", "countersign"), ("pod-security.kubernetes.io/enforce", "privileged")];
    let labels = labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let metadata = ObjectMeta { name: Some(name.to_owned()), labels: Some(labels), ..ObjectMeta::default() };
    Namespace { metadata, ..Namespace::default() }
}

/// All manifests as one YAML stream, with what is remembered at its end: who is interrupted has not come so far.
fn manifests(namespace: &str, memory: &Memory) -> Result<String> {
    let remembered = yaml(&serde_json::to_value(memory.object(namespace)?)?)?;
    Ok(format!("{}---\n{remembered}", applied(namespace, memory)?))
}

/// All manifests but what is remembered, as one YAML stream.
pub fn applied(namespace: &str, memory: &Memory) -> Result<String> {
    check_namespace(namespace)?;
    let values = memory.given.whole("the settings")?;
    let crd = countersign_controller::crd::definition();
    let own = [serde_json::to_value(own_namespace(namespace))?, serde_json::to_value(crd)?];
    let mut out = String::new();
    for object in &own {
        out.push_str("---\n");
        out.push_str(&yaml(object)?);
    }
    out.push_str(&rendered(namespace, &values)?);
    Ok(out)
}

/// The chart's manifests as one YAML stream.
pub fn rendered(namespace: &str, values: &Value) -> Result<String> {
    let mut out = String::new();
    for (name, template) in chart::TEMPLATES {
        let rendered = chart::render(template, values, namespace).map_err(|e| anyhow!("{name}: {e}"))?;
        out.push_str("---\n");
        out.push_str(&rendered);
    }
    Ok(out)
}

/// Encodes a value as YAML.
pub fn yaml(value: &Value) -> Result<String> {
    Ok(serde_saphyr::to_string(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::check::fake_api::{client, list, refused as refused_by_api};
    use crate::kubernetes::existing::Elsewhere;
    use clap::Parser;
    use countersign_controller::injector::{INJECT, PROXY_UID, REDIRECT, Resources, SIDECAR};
    use countersign_controller::store::MODE;

    use crate::roles::resources::ResourceArgs;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: InstallArgs,
    }

    fn objects(args: &[&str]) -> Vec<Value> {
        let cli = Cli::parse_from([&["install"], args].concat());
        let memory = Memory::new(cli.args.values.given().unwrap());
        let text = manifests(&cli.args.namespace, &memory).unwrap();
        serde_saphyr::from_multiple(&text).unwrap()
    }

    fn one<'a>(all: &'a [Value], kind: &str, name: &str) -> &'a Value {
        all.iter().find(|o| o["kind"] == kind && o["metadata"]["name"] == name).unwrap()
    }

    #[test]
    fn every_manifest_is_an_object_and_settings_arrive() {
        let all = objects(&["--set", "trustDomain=example.org", "--set", "mesh.mode=strict", "-n", "mesh"]);
        assert!(all.iter().all(|o| o["kind"].is_string() && o["metadata"]["name"].is_string()));
        let server = one(&all, "StatefulSet", "countersign-server");
        assert_eq!(server["metadata"]["namespace"], "mesh");
        assert!(
            server["spec"]["template"]["spec"]["containers"][0]["args"]
                .to_string()
                .contains("--trust-domain=example.org")
        );
        assert_eq!(one(&all, "ConfigMap", "countersign-mesh")["data"]["mode"], "strict");
        assert!(!server.to_string().contains("upstream"));
        let with = objects(&["--set", "server.upstreamSecret=ca"]);
        let server = one(&with, "StatefulSet", "countersign-server");
        assert!(server.to_string().contains("--upstream-cert=/etc/countersign/upstream/tls.crt"));
    }

    #[test]
    fn the_manifests_say_what_was_given_and_the_chart_does_not() {
        let memory = |args: &[&str]| {
            let object = one(&objects(args), "ConfigMap", "countersign-install").clone();
            let values: Value = serde_saphyr::from_str(object["data"]["values.yaml"].as_str().unwrap()).unwrap();
            (object["data"]["version"].as_str().unwrap().to_owned(), values)
        };
        assert_eq!(memory(&[]), (memory::OURS.to_owned(), json!({})));
        let given = ["--set", "clusterName=7", "--set", "injector.replicas=3", "--reset-values"];
        assert_eq!(memory(&given).1, json!({ "clusterName": "7", "injector": { "replicas": 3 } }));
        assert!(chart::TEMPLATES.iter().all(|(_, text)| !text.contains("countersign-install")));
    }

    #[test]
    fn a_value_with_quotes_colons_and_lines_stays_the_value_that_it_is() {
        let text = "a\"b': {c}, #d\n- e: \\f <g> %s {{ h }}";
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("values.json");
        let values = json!({
            "image": { "name": text }, "registrar": { "idTemplate": text }, "agent": { "kubeletCA": text },
            "server": { "upstreamSecret": text, "priorityClassName": text, "persistence": { "storageClass": text },
                        "podLabels": { "a": text } },
            "injector": { "webhook": { "namespaceSelector": { "matchLabels": { text: text } } } },
        });
        std::fs::write(&path, values.to_string()).unwrap();
        let (plain, with) = (
            objects(&["--set", "agent.kubeletCA=x", "--set", "server.upstreamSecret=x"]),
            objects(&["--values", path.to_str().unwrap()]),
        );
        let names =
            |all: &[Value]| all.iter().map(|o| format!("{} {}", o["kind"], o["metadata"]["name"])).collect::<Vec<_>>();
        assert_eq!(names(&with), names(&plain));
        let server = &one(&with, "StatefulSet", "countersign-server")["spec"];
        let pod = &server["template"]["spec"];
        assert_eq!(pod["containers"][0]["image"], text);
        assert_eq!(pod["priorityClassName"], text);
        assert_eq!(server["volumeClaimTemplates"][0]["spec"]["storageClassName"], text);
        assert_eq!(server["template"]["metadata"]["labels"]["a"], text);
        let args = pod["containers"][1]["args"].as_array().unwrap();
        assert!(args.contains(&json!(format!("--id-template={text}"))), "{args:?}");
        let mut volumes = pod["volumes"].as_array().unwrap().iter();
        assert!(volumes.any(|v| v["secret"]["secretName"] == text));
        let hooks = &one(&with, "MutatingWebhookConfiguration", "countersign-injector")["webhooks"];
        assert_eq!(hooks[0]["namespaceSelector"]["matchLabels"], json!({ text: text }));
        // A namespace whose name YAML would take for a number is a name.
        assert!(
            objects(&["-n", "1e3"])
                .iter()
                .all(|o| o["metadata"]["namespace"] == "1e3" || o["metadata"]["namespace"].is_null())
        );
    }

    #[test]
    fn service_accounts_may_exist_already_under_other_names() {
        let roles = ["server", "agent", "injector"];
        let flags: Vec<String> = roles
            .iter()
            .flat_map(|role| {
                [format!("{role}.serviceAccount.create=false"), format!("{role}.serviceAccount.name=own-{role}")]
            })
            .collect();
        let flags: Vec<&str> = flags.iter().flat_map(|flag| ["--set", flag.as_str()]).collect();
        let all = objects(&flags);
        assert!(all.iter().all(|o| o["kind"] != "ServiceAccount"));
        assert_eq!(objects(&[]).iter().filter(|o| o["kind"] == "ServiceAccount").count(), 3);
        for (kind, role) in [("StatefulSet", "server"), ("DaemonSet", "agent"), ("Deployment", "injector")] {
            let pod = &one(&all, kind, &format!("countersign-{role}"))["spec"]["template"]["spec"];
            assert_eq!(pod["serviceAccountName"], format!("own-{role}"));
        }
        let subjects = all.iter().filter(|o| o["kind"].as_str().unwrap().ends_with("RoleBinding"));
        let subjects: Vec<&str> = subjects.map(|o| o["subjects"][0]["name"].as_str().unwrap()).collect();
        assert_eq!(subjects, ["own-server", "own-server", "own-agent"]);
        let server = one(&all, "StatefulSet", "countersign-server").to_string();
        assert!(server.contains("--k8s-psat-allow=countersign:own-agent"), "agents are attested by it");
    }

    #[test]
    fn the_webhook_fails_closed_unless_the_values_say_otherwise() {
        let policies = |args: &[&str]| {
            let hooks = one(&objects(args), "MutatingWebhookConfiguration", "countersign-injector")["webhooks"].clone();
            let all = hooks.as_array().unwrap().iter();
            let judges = |h: &Value| h["name"] == "judge-namespace.inject.countersign.dev";
            all.filter(|h| !judges(h)).map(|h| h["failurePolicy"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(policies(&[]), ["Fail"; 6]);
        assert_eq!(policies(&["--set", "injector.webhook.failurePolicy=Ignore"]), ["Ignore"; 6]);
    }

    #[test]
    fn a_pod_monitor_is_there_only_for_who_asks_for_it() {
        assert!(objects(&[]).iter().all(|o| o["kind"] != "PodMonitor"));
        let set = ["--set", "podMonitor.enabled=true", "--set", r#"podMonitor.labels={"release":"prometheus"}"#];
        let all = objects(&set);
        let monitor = one(&all, "PodMonitor", "countersign");
        assert_eq!(
            (&monitor["apiVersion"], &monitor["metadata"]["labels"]["release"]),
            (&json!("monitoring.coreos.com/v1"), &json!("prometheus"))
        );
        let ports: Vec<&str> = monitor["spec"]["podMetricsEndpoints"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| e["port"].as_str().unwrap())
            .collect();
        let named = all.iter().filter_map(|o| o["spec"]["template"]["spec"]["containers"].as_array()).flatten();
        let named: Vec<Value> =
            named.filter_map(|c| c["ports"].as_array()).flatten().map(|p| p["name"].clone()).collect();
        assert!(ports.iter().all(|port| named.contains(&json!(port))), "{ports:?} are ports of our pods");
    }

    #[test]
    fn what_needs_consent_names_the_settings_and_the_flags() {
        let given = |tree: Value| Given::of(tree).unwrap();
        let (before, after) =
            (json!({ "trustDomain": "a", "mesh": { "mode": "strict" } }), json!({ "trustDomain": "b" }));
        let changes = changes::changes(&given(before), Revision::NOW, &given(after.clone())).unwrap();
        let plan = Plan {
            namespace: "n".into(),
            memory: Memory::new(given(after)),
            changes,
            existing: Existing::default(),
            unfit: None,
            opened: None,
            notes: vec![],
            cluster: None,
        };
        let said = plan.needs(Consent::default());
        assert!(
            said.contains("trustDomain would change, which needs --force; mesh.mode would no longer be set"),
            "{said}"
        );
        let json = plan.as_json(Consent { force: true, reset: false });
        assert_eq!((&json["allowed"], &json["remembered"]["values"]["trustDomain"]), (&json!(true), &json!("b")));
        let text = plan.as_text().unwrap();
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().take(4).collect()).collect();
        assert!(rows.contains(&vec!["trustDomain", "a", "->", "b"]), "{text}");
        assert!(text.ends_with("remembered, version 0.1.0:\ntrustDomain: b\n"), "{text}");
        let reset = plan.needs(Consent { force: false, reset: true });
        assert!(reset.contains("trustDomain") && !reset.contains("mesh.mode"), "{reset}");
    }

    #[test]
    fn an_installation_in_another_namespace_and_one_without_memory_need_force_even_without_changes() {
        let plan = |existing| {
            let memory = Memory::new(Given::default());
            Plan {
                namespace: "n".into(),
                memory,
                changes: vec![],
                existing,
                unfit: None,
                opened: None,
                notes: vec![],
                cluster: None,
            }
        };
        let elsewhere = Elsewhere { object: "ClusterRoleBinding x".into(), namespace: "mesh".into() };
        let existing = [
            Existing { elsewhere: Some(elsewhere), ..Existing::default() },
            Existing { unremembered: Some(Given::default()), ..Existing::default() },
        ];
        for (plan, doubt) in existing.map(plan).iter().zip(["in namespace `mesh`", "does not remember"]) {
            let consent = |force| Consent { force, reset: true };
            assert!(!plan.is_allowed(consent(false)) && plan.is_allowed(consent(true)));
            let said = plan.needs(consent(false));
            assert!(said.starts_with("nothing was applied: ") && said.ends_with("which needs --force"), "{said}");
            assert!(said.contains(doubt) && plan.as_text().unwrap().contains(doubt), "{said}");
            assert_eq!(plan.as_json(consent(false))["allowed"], false);
        }
        assert!(plan(Existing::default()).is_allowed(Consent::default()));
    }

    #[tokio::test]
    async fn a_driver_that_nodes_cannot_have_is_not_turned_on_unasked() {
        let info = json!({
            "architecture": "", "bootID": "", "containerRuntimeVersion": "", "kernelVersion": "5.4.0", "kubeProxyVersion": "",
            "kubeletVersion": "", "machineID": "", "operatingSystem": "linux", "osImage": "", "systemUUID": "",
        });
        let node = json!({ "metadata": { "name": "old" }, "status": { "nodeInfo": info } });
        let cluster = client(move |_| list("NodeList", vec![node.clone()]));
        let mut values = super::super::values::defaults().unwrap();
        let why = unfit(&cluster, &values).await.unwrap();
        assert!(why.contains("old (5.4.0)") && why.contains("agent.csi.enabled=false"), "{why}");
        let plan = |unfit| Plan {
            namespace: "n".into(),
            memory: Memory::new(Given::default()),
            changes: vec![],
            existing: Existing::default(),
            unfit,
            opened: None,
            notes: vec![],
            cluster: None,
        };
        let refused = plan(Some(why.clone()));
        assert!(!refused.is_allowed(Consent::default()) && refused.is_allowed(Consent { force: true, reset: false }));
        assert!(refused.needs(Consent::default()).ends_with("; --force installs it all the same"));
        assert_eq!(refused.as_json(Consent::default())["doubts"], json!([why]));
        assert!(plan(None).is_allowed(Consent::default()));
        values["agent"]["csi"]["enabled"] = false.into();
        assert_eq!(unfit(&cluster, &values).await, None);
        let silent = client(|_| refused_by_api(403, "you may not list nodes"));
        assert_eq!(unfit(&silent, &super::super::values::defaults().unwrap()).await, None, "it is told, and no reason");
    }

    #[test]
    fn a_mesh_that_was_made_strict_since_is_not_opened_unasked() {
        let mesh = |mode: &str| {
            serde_json::from_value::<ConfigMap>(json!({ "metadata": {}, "data": { "mode": mode } })).unwrap()
        };
        let with = |mode: &str| json!({ "mesh": { "mode": mode } });
        let (live, next) = stricter(Some(&mesh("strict")), &with("permissive")).unwrap();
        let why = opens(live, next);
        assert!(why.contains("is strict") && why.contains("--set mesh.mode=strict"), "{why}");
        assert!(stricter(Some(&mesh("permissive")), &with("off")).is_some());
        for (live, next) in [("strict", "strict"), ("permissive", "strict"), ("off", "permissive"), ("", "off")] {
            assert_eq!(stricter(Some(&mesh(live)), &with(next)), None, "{live} to {next}");
        }
        assert_eq!(stricter(None, &with("off")), None);
        let plan = Plan {
            namespace: "n".into(),
            memory: Memory::new(Given::default()),
            changes: vec![],
            existing: Existing::default(),
            unfit: None,
            opened: Some(why.clone()),
            notes: vec![],
            cluster: None,
        };
        let tried = plan.tried(Consent::default());
        assert!(
            tried.starts_with("a dry run: nothing was changed, and without --dry-run it would be refused: "),
            "{tried}"
        );
        assert!(tried.ends_with(&why), "{tried}");
        assert_eq!(plan.tried(Consent { force: true, reset: false }), "a dry run: nothing was changed");
        assert!(!plan.is_allowed(Consent { force: false, reset: true }));
        assert!(plan.needs(Consent::default()).ends_with(&why));
    }

    #[test]
    fn what_is_remembered_comes_last_and_is_no_part_of_what_is_applied() {
        let last = objects(&[]).pop().unwrap();
        assert_eq!((&last["kind"], &last["metadata"]["name"]), (&json!("ConfigMap"), &json!("countersign-install")));
        let text = applied("mesh", &Memory::new(Given::default())).unwrap();
        assert!(!text.contains("countersign-install"), "who is interrupted remembers nothing");
    }

    #[test]
    fn without_persistence_the_servers_data_is_in_its_pod() {
        let server = |args: &[&str]| one(&objects(args), "StatefulSet", "countersign-server")["spec"].clone();
        let data = |spec: &Value| {
            let volumes = spec["template"]["spec"]["volumes"].as_array().unwrap().iter();
            volumes.filter(|v| v["name"] == "data").cloned().collect::<Vec<_>>()
        };
        let kept = server(&[]);
        assert_eq!(kept["volumeClaimTemplates"][0]["metadata"]["name"], "data");
        assert!(data(&kept).is_empty());
        let lost = server(&["--set", "server.persistence.enabled=false"]);
        assert!(lost["volumeClaimTemplates"].is_null());
        assert_eq!(data(&lost), [json!({ "name": "data", "emptyDir": { "sizeLimit": "1Gi" } })]);
    }

    #[test]
    fn the_server_may_make_its_own_configmap_and_no_other() {
        let rules = one(&objects(&[]), "Role", "countersign-server")["rules"].as_array().unwrap().clone();
        let may_create = rules
            .iter()
            .filter(|r| r["resources"] == json!(["configmaps"]))
            .filter(|r| r["verbs"].as_array().unwrap().contains(&json!("create")));
        let names: Vec<_> = may_create.map(|r| r["resourceNames"].clone()).collect();
        assert_eq!(names, [json!(["countersign-bundle"])]);
    }

    #[test]
    fn the_injector_gets_the_resources_of_the_values_which_are_the_flags_own_by_default() {
        let injected = |args: &[&str]| {
            let all = objects(args);
            let injector = one(&all, "Deployment", "countersign-injector");
            let flags = injector["spec"]["template"]["spec"]["containers"][0]["args"].as_array().unwrap().clone();
            let flags = flags.iter().filter_map(Value::as_str).filter(|f| {
                (f.starts_with("--sidecar-") || f.starts_with("--redirect-")) && !f.starts_with("--sidecar-log")
            });
            resources(&flags.collect::<Vec<_>>())
        };
        assert_eq!(injected(&[]), resources(&[]));
        let set = ["--set", "sidecar.resources.limits.cpu=2", "--set", "redirect.resources.limits.memory="];
        let mut expected = resources(&[]);
        *expected.amount("cpu-limit").unwrap() = "2".parse().unwrap();
        *expected.amount("redirect-memory-limit").unwrap() = "".parse().unwrap();
        assert_eq!(injected(&set), expected);
    }

    fn resources(flags: &[&str]) -> Resources {
        #[derive(Parser)]
        struct Flags {
            #[command(flatten)]
            resources: ResourceArgs,
        }
        Flags::parse_from([&["injector"], flags].concat()).resources.resources()
    }

    #[test]
    fn scheduling_labels_and_pull_secrets_reach_the_pods_and_no_label_of_ours_is_changed() {
        let roles = [("StatefulSet", "server"), ("DaemonSet", "agent"), ("Deployment", "injector")];
        for (kind, role) in roles {
            let set = |key: &str, json: &str| format!("{role}.{key}={json}");
            let settings = [
                set("tolerations", r#"[{"operator":"Exists"}]"#),
                set("nodeSelector", r#"{"disk":"ssd"}"#),
                set("affinity", r#"{"nodeAffinity":{}}"#),
                set("priorityClassName", "high"),
                set("podLabels", r#"{"team":"a","countersign.dev/inject":"enabled"}"#),
                set("podAnnotations", r#"{"note":"b: #c"}"#),
                set("resources.limits.memory", "1Gi"),
                r#"imagePullSecrets=[{"name":"registry"}]"#.to_owned(),
            ];
            let flags: Vec<&str> = settings.iter().flat_map(|s| ["--set", s.as_str()]).collect();
            let (all, plain) = (objects(&flags), objects(&[]));
            let name = format!("countersign-{role}");
            let pod = |all: &[Value]| one(all, kind, &name)["spec"]["template"].clone();
            let (spec, before) = (pod(&all)["spec"].clone(), pod(&plain)["spec"].clone());
            assert_eq!(spec["tolerations"], json!([{ "operator": "Exists" }]));
            assert_eq!(spec["nodeSelector"], json!({ "disk": "ssd" }));
            assert_eq!(spec["affinity"], json!({ "nodeAffinity": {} }));
            assert_eq!(spec["priorityClassName"], "high");
            assert_eq!(spec["imagePullSecrets"], json!([{ "name": "registry" }]));
            assert_eq!(spec["containers"][0]["resources"]["limits"]["memory"], "1Gi");
            for key in ["nodeSelector", "affinity", "imagePullSecrets"] {
                assert!(before[key].is_null(), "{key}");
            }
            let (mut labels, metadata) = (pod(&plain)["metadata"]["labels"].clone(), pod(&all)["metadata"].clone());
            assert_eq!(labels["countersign.dev/inject"], "disabled");
            labels["team"] = "a".into();
            assert_eq!(metadata["labels"], labels);
            assert_eq!(metadata["annotations"], json!({ "note": "b: #c" }));
            assert!(pod(&plain)["metadata"]["annotations"].is_null());
        }
        let spread = r#"server.topologySpreadConstraints=[{"maxSkew":1}]"#;
        let server = one(&objects(&["--set", spread]), "StatefulSet", "countersign-server").clone();
        assert_eq!(server["spec"]["template"]["spec"]["topologySpreadConstraints"], json!([{ "maxSkew": 1 }]));
    }

    #[test]
    fn what_runs_in_the_cluster_is_confined() {
        for object in objects(&[]) {
            let pod = &object["spec"]["template"]["spec"];
            for container in pod["containers"].as_array().into_iter().flatten() {
                let name = &container["name"];
                let context = &container["securityContext"];
                assert_eq!(context["readOnlyRootFilesystem"], true, "{name}");
                // Which has no narrower form: the next test.
                if name == "csi" {
                    continue;
                }
                assert_eq!(context["allowPrivilegeEscalation"], false, "{name}");
                assert_eq!(context["capabilities"], json!({ "drop": ["ALL"] }), "{name}");
                let seccomp = [&context["seccompProfile"]["type"], &pod["securityContext"]["seccompProfile"]["type"]];
                assert!(seccomp.contains(&&json!("RuntimeDefault")), "{name}");
                if name != "agent" {
                    assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{name}");
                }
                assert!(container["resources"]["requests"]["memory"].is_string(), "{name}");
                assert!(container["readinessProbe"].is_object() && container["livenessProbe"].is_object(), "{name}");
            }
        }
    }

    #[test]
    fn the_csi_driver_is_a_container_of_its_own_and_the_only_one_with_privileges_and_can_be_left_out() {
        let of_agent = |args: &[&str]| {
            let all = objects(args);
            (one(&all, "DaemonSet", "countersign-agent")["spec"]["template"]["spec"].clone(), all)
        };
        let (without, all) = of_agent(&["--set", "agent.csi.enabled=false"]);
        assert_eq!(without["containers"].as_array().unwrap().len(), 1);
        // The memory names the setting.
        let others: Vec<_> = all.iter().filter(|o| o["metadata"]["name"] != "countersign-install").collect();
        assert!(!json!(others).to_string().contains("csi"));
        assert!(one(&objects(&[]), "Deployment", "countersign-injector").to_string().contains("=csi.countersign.dev"));
        let named = ["--set", "agent.csi.driverName=csi.spiffe.io"];
        let (with, all) = of_agent(&named);
        let [agent, driver] = with["containers"].as_array().unwrap().as_slice() else { panic!("{with}") };
        assert_eq!(agent["securityContext"], without["containers"][0]["securityContext"]);
        assert_eq!((&driver["name"], &driver["securityContext"]["privileged"]), (&json!("csi"), &json!(true)));
        let mounts = driver["volumeMounts"].as_array().unwrap();
        let writable = |m: &&Value| m["readOnly"] != true;
        let paths: Vec<_> = mounts.iter().filter(writable).map(|m| m["mountPath"].as_str().unwrap()).collect();
        let kubelet = "/var/lib/kubelet";
        let plugin = format!("{kubelet}/plugins/csi.spiffe.io");
        let expected = [&plugin, &format!("{kubelet}/plugins_registry"), &format!("{kubelet}/pods")];
        assert_eq!(paths, expected);
        assert_eq!(one(&all, "CSIDriver", "csi.spiffe.io")["spec"]["volumeLifecycleModes"], json!(["Ephemeral"]));
        let injector = |all: &[Value]| one(all, "Deployment", "countersign-injector").to_string();
        assert!(injector(&all).contains("--csi-driver=csi.spiffe.io"));
        let (_, back) = of_agent(&[&named[..], &["--set", "injector.csiVolumes=false"]].concat());
        assert!(!injector(&back).contains("--csi-driver"));
    }

    #[test]
    fn the_cni_component_has_three_capabilities_its_folders_and_a_narrow_role_and_the_injector_knows_of_it() {
        let all = |args: &[&str]| objects(args);
        let pod = |all: &[Value]| one(all, "DaemonSet", "countersign-agent")["spec"]["template"].clone();
        let (without, with) = (all(&[]), all(&["-n", "mesh", "--set", "cni.enabled=true"]));
        // The policy on its folder stands in any case.
        let others: Vec<_> = without.iter().filter(|o| o["kind"] != "ValidatingAdmissionPolicy").collect();
        assert!(!json!(others).to_string().contains("cni"));
        let [agent, _, component] = pod(&with)["spec"]["containers"].as_array().unwrap().clone().try_into().unwrap();
        assert_eq!(agent["securityContext"], pod(&without)["spec"]["containers"][0]["securityContext"]);
        assert_eq!(component["name"], countersign_cni::CONTAINER);
        let context = &component["securityContext"];
        let capabilities = json!({ "drop": ["ALL"], "add": ["SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE"] });
        assert_eq!((&context["privileged"], &context["capabilities"]), (&json!(false), &capabilities));
        let paths: Vec<_> =
            component["volumeMounts"].as_array().unwrap().iter().map(|m| m["mountPath"].clone()).collect();
        assert_eq!(paths[..4], ["/run/countersign/cni", "/run/countersign/agent", "/opt/cni/bin", "/etc/cni/net.d"]);
        let by_cgroup = |set: &str| pod(&all(&["--set", "cni.enabled=true", "--set", set])).to_string();
        assert!(by_cgroup("cni.sidecarByCgroup=true").contains("\"--sidecar-by-cgroup\""));
        assert!(!by_cgroup("cni.sidecarByCgroup=false").contains("\"--sidecar-by-cgroup\""));
        let args = component["args"].to_string();
        assert!(args.contains("--daemon-set=mesh/countersign-agent") && args.contains("--repair"));
        let role = &one(&with, "Role", "countersign-agent")["rules"];
        assert_eq!(role[0]["resourceNames"], json!(["countersign-agent"]));
        assert_eq!((&role[0]["verbs"], role.as_array().unwrap().len()), (&json!(["get"]), 1));
        let injected_for =
            |all: &[Value]| one(all, "Deployment", "countersign-injector").to_string().contains("\"--cni\"");
        let first = all(&["--set", "cni.enabled=true", "--set", "injector.cniRedirect=false"]);
        assert!(injected_for(&with) && !injected_for(&first));
        assert_eq!(pod(&first), pod(&all(&["--set", "cni.enabled=true"])), "the second step restarts no agent");
        let less = all(&["--set", "cni.enabled=true", "--set", "cni.repair=false", "--set", "agent.watchPods=false"]);
        assert!(!pod(&less).to_string().contains("--repair"));
        let rules = |all: &[Value]| one(all, "ClusterRole", "countersign-agent")["rules"].to_string();
        assert!(
            !rules(&less).contains("watch") && rules(&less).contains("[\"get\"]") && rules(&with).contains("watch")
        );
        for kind in ["Role", "RoleBinding"] {
            // Turned off, the components that end still have to ask.
            let kept = &one(&with, kind, "countersign-agent")["metadata"]["annotations"]["helm.sh/resource-policy"];
            assert_eq!(kept, "keep", "{kind}");
        }
        let monitored = |set: &[&str]| {
            let monitor = all(&[["--set", "podMonitor.enabled=true"].as_slice(), set].concat());
            one(&monitor, "PodMonitor", "countersign")["spec"]["podMetricsEndpoints"].to_string()
        };
        assert!(monitored(&["--set", "cni.enabled=true"]).contains("\"cni\"") && !monitored(&[]).contains("\"cni\""));
        let noted = all(&["--set", "cni.enabled=true", "--set", r#"agent.podAnnotations={"note":"b"}"#]);
        let unconfined = "container.apparmor.security.beta.kubernetes.io/cni";
        assert_eq!(pod(&noted)["metadata"]["annotations"], json!({ "note": "b", unconfined: "unconfined" }));
    }

    #[test]
    fn the_api_servers_policies_name_what_the_code_names_and_can_be_left_out() {
        let policies = |args: &[&str]| {
            let all = objects(args).into_iter().filter(|o| o["kind"] == "ValidatingAdmissionPolicy");
            all.map(|o| o["spec"].to_string()).collect::<Vec<_>>()
        };
        let [words, pods, commands, images] = policies(&["-n", "mesh"]).try_into().unwrap();
        for policy in [&pods, &commands, &images] {
            assert!(policy.contains(&format!("'{SIDECAR}', '{REDIRECT}'")), "{policy}");
        }
        assert!(commands.contains(&format!("namespace(\\\"mesh\\\").name('{}')", live_settings::NAME)), "{commands}");
        for key in [INJECT, MODE] {
            assert!(words.contains(&format!("labels[?'{key}']")) && words.contains(&format!("annotations[?'{key}']")));
        }
        for part in [
            format!("'{SIDECAR}'").as_str(),
            format!("== {PROXY_UID}").as_str(),
            INJECT,
            "ephemeralContainers",
            "[\"mesh\"]",
            "countersign(/+[.]?)*(/cni(/.*)?)?$",
        ] {
            assert!(pods.contains(part), "{part}");
        }
        assert!(policies(&["--set", "admissionPolicy=false"]).is_empty());
    }

    #[test]
    fn the_charts_definition_of_the_resource_is_the_codes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../charts/countersign/crds/spiffeids.yaml");
        let written: Value = serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(written, serde_json::to_value(countersign_controller::crd::definition()).unwrap());
    }
}
