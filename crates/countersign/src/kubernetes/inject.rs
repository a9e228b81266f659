//! `countersign inject`: applies the webhook's changes to manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_controller::injector::{
    self, Asks, IN_MANIFEST, INJECTED, Sidecar, Surroundings, Verdict, new_probe_secret,
};
use countersign_csi::DriverName;
use countersign_identity::policy::Mode;
use serde_json::Value;

use super::api_server;
use super::injects::Injects;
use super::install::yaml;
use super::named_args::Named;
use crate::one_line;
use crate::operator::block;
use crate::roles::controller::SidecarArgs;
use crate::settings::Mistake;

/// The CSI driver of an installation that says nothing of it.
const DRIVER: &str = "csi.countersign.dev";
/// Longest look at the installation.
const CALL: Duration = Duration::from_secs(10);
/// Largest file that is read, in bytes.
const MAX_BYTES: u64 = 64 * 1024 * 1024;

/// Kubernetes: add redirect and sidecar to the pods of a file, as the webhook would: `countersign inject -f app.yaml |
/// kubectl apply -f -`.
///
/// Handles pods and all objects with pod templates: deployments, stateful sets, daemon sets, replica sets, jobs, cron
/// jobs, and lists of them. Every other object passes unchanged. A summary is printed on standard error. Image, mode and all else
/// that is not named are those of the installation in the cluster of the current KUBECONFIG. Where no cluster is configured, or it has
/// no installation, they are the defaults of this version, which is said. A cluster that cannot be asked is an error, because its mesh
/// may be strict, unless --mode says the mode.
#[derive(Debug, clap::Args)]
pub struct InjectArgs {
    /// YAML or JSON file; `-` reads standard input.
    #[arg(short = 'f', long = "filename", value_name = "FILE")]
    file: PathBuf,
    /// Mode of the mesh and of the pods' namespace: off, permissive or strict. In strict mode, protocols other than TCP
    /// are dropped [default: those of the installation; permissive without one].
    #[arg(long, value_name = "MODE")]
    mode: Option<String>,
    /// Namespace of objects that name none.
    #[arg(long, short, value_name = "NAMESPACE", default_value = "default")]
    namespace: String,
    /// CSI driver that mounts the agent's folder into pods (the chart's agent.csi.driverName) [default: what the installation mounts it
    /// by; csi.countersign.dev without one].
    #[arg(long, value_name = "NAME", conflicts_with = "host_path")]
    csi_driver: Option<DriverName>,
    /// Mount the agent's folder by `hostPath`, for a mesh without the CSI driver (agent.csi.enabled=false).
    #[arg(long)]
    host_path: bool,
    /// Namespace of the installation whose injector is asked for what is not named here.
    #[arg(long, value_name = "NAMESPACE", default_value = "countersign", conflicts_with = "ignore_cluster")]
    mesh_namespace: String,
    /// Ask no cluster, as without KUBECONFIG: what is not named has the default of this version.
    #[arg(long)]
    ignore_cluster: bool,
    #[command(flatten)]
    sidecar: Named<SidecarArgs>,
}

/// Prints the file with sidecars added.
pub fn inject(args: InjectArgs) -> Result<()> {
    let is_stdin = args.file.as_os_str() == "-";
    let name = if is_stdin { "standard input".to_owned() } else { args.file.display().to_string() };
    let mut text = String::new();
    let read = if is_stdin {
        std::io::stdin().take(MAX_BYTES).read_to_string(&mut text)
    } else {
        std::fs::File::open(&args.file).and_then(|f| f.take(MAX_BYTES).read_to_string(&mut text))
    };
    read.map_err(|e| Mistake(format!("{name}: cannot be read: {e}")))?;
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(&text).map_err(|e| Mistake(format!("{name}: {}", e.without_snippet())))?;
    let documents: Vec<Value> = documents.into_iter().filter(|d| !d.is_null()).collect();
    objects_all(&documents).map_err(|why| Mistake(format!("{name}: {why}")))?;
    let mut named = BTreeSet::new();
    documents.iter().for_each(|document| namespaces(document, &args.namespace, &mut named));
    let installed = if args.ignore_cluster { None } else { block(installed(&args, &named))? };
    let by = By::new(args, installed)?;
    let mut out = vec![];
    for mut document in documents {
        by.document(&mut document).with_context(|| name.clone())?;
        out.push(yaml(&document)?);
    }
    Ok(crate::stdout::put(&out.join("---\n"))?)
}

/// Fails if something is no Kubernetes object, such as a line of text, which is YAML too.
fn objects_all(documents: &[Value]) -> Result<(), String> {
    let is_object = |document: &Value| ["apiVersion", "kind"].into_iter().all(|key| document[key].is_string());
    let none = "no Kubernetes object was found, which has apiVersion and kind";
    match documents.iter().position(|document| !is_object(document)) {
        None if documents.is_empty() => Err(format!("{none}: the file is empty")),
        None => Ok(()),
        Some(_) if !documents.iter().any(is_object) => Err(none.into()),
        Some(n) => Err(format!(
            "document {} of {} is no Kubernetes object: it has no apiVersion and kind",
            n + 1,
            documents.len()
        )),
    }
}

/// The namespaces of all objects.
fn namespaces(document: &Value, default: &str, found: &mut BTreeSet<String>) {
    if document["kind"] == "List" {
        document["items"].as_array().into_iter().flatten().for_each(|item| namespaces(item, default, found));
    } else {
        found.insert(document["metadata"]["namespace"].as_str().unwrap_or(default).to_owned());
    }
}

/// What the installation injects; `None`, and why on standard error, where there is none or only the mode must be known, which is named.
/// Error: it is not known whether there is one, or what it injects.
async fn installed(args: &InjectArgs, namespaces: &BTreeSet<String>) -> Result<Option<Injects>> {
    // A mode that is named counts in all of them.
    let (nobody, mode) = (BTreeSet::new(), args.mode.as_deref());
    let namespaces = if mode.is_some() { &nobody } else { namespaces };
    let why = match (ask(&args.mesh_namespace, namespaces).await, mode) {
        (Ok(Asked::Injects(injects)), _) => return Ok(Some(injects)),
        (Ok(Asked::Nothing(why)), _) => why,
        (Err(why), _) if why.downcast_ref::<Mistake>().is_some() => return Err(why),
        (Err(why), Some(_)) => one_line(&why),
        (Err(why), None) => return Err(why.context(UNKNOWN)),
    };
    eprintln!(
        "what is not named has the defaults of this version, such as its image, and not what an installation has; mode {}: {why}",
        mode.unwrap_or("permissive")
    );
    Ok(None)
}

/// What is said where an installation may be another one than the defaults.
const UNKNOWN: &str = "what the installation injects is not known; --mode MODE says at least its mode, and --ignore-cluster takes the \
                       defaults of this version";

/// What the cluster tells.
enum Asked {
    Injects(Injects),
    /// There is no installation; why that is so, in words.
    Nothing(String),
}

async fn ask(mesh_namespace: &str, namespaces: &BTreeSet<String>) -> Result<Asked> {
    let Some(config) = api_server::configured().await? else {
        return Ok(Asked::Nothing("no cluster is configured (KUBECONFIG)".into()));
    };
    let client = api_server::reach_by(config, &api_server::source()).await?.client;
    let asked = tokio::time::timeout(CALL, Injects::read(&client, mesh_namespace, namespaces)).await;
    let asked = asked.map_err(|_| anyhow!("no answer within {} s", CALL.as_secs()))?;
    Ok(asked?.map_or_else(
        || Asked::Nothing(format!("there is no installation in namespace {mesh_namespace}; say --mesh-namespace")),
        Asked::Injects,
    ))
}

/// What is injected, and into what.
struct By {
    sidecar: Sidecar,
    around: Surroundings,
    /// Modes of namespaces that are other ones than the mesh's.
    modes: BTreeMap<String, Mode>,
}

impl By {
    /// By the flags, and where they say nothing by the installation.
    fn new(args: InjectArgs, installed: Option<Injects>) -> Result<Self, Mistake> {
        let mode = args.mode.map(|mode| mode.parse::<Mode>().map_err(|e| Mistake::flag("--mode", &format!("{e}"))));
        let mode = mode.transpose()?;
        let Named { args: sidecar, named } = args.sidecar;
        let (mut sidecar, mesh, modes) = if let Some(Injects { sidecar: injected, mesh, namespaces }) = installed {
            (sidecar.over(&named, injected), mesh, namespaces)
        } else {
            let own = Sidecar { csi_driver: Some(DRIVER.to_owned()), ..sidecar.sidecar(None) };
            (own, Mode::Permissive, BTreeMap::new())
        };
        if args.host_path {
            sidecar.csi_driver = None;
        } else if let Some(driver) = args.csi_driver {
            sidecar.csi_driver = Some(driver.as_str().to_owned());
        }
        // One that is named counts everywhere.
        let modes = if mode.is_some() { BTreeMap::new() } else { modes };
        let around = Surroundings {
            namespace: args.namespace,
            asks: Asks::Yes,
            mode: mode.unwrap_or(mesh),
            probe_secret: new_probe_secret(),
        };
        Ok(Self { sidecar, around, modes })
    }

    /// Injects into each pod of a document.
    fn document(&self, document: &mut Value) -> Result<()> {
        let kind = document["kind"].as_str().unwrap_or_default().to_owned();
        let place = match kind.as_str() {
            "List" => {
                for item in document["items"].as_array_mut().into_iter().flatten() {
                    self.document(item)?;
                }
                return Ok(());
            }
            "Pod" => "",
            "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "ReplicationController" | "Job" => {
                "/spec/template"
            }
            "CronJob" => "/spec/jobTemplate/spec/template",
            _ => return Ok(()),
        };
        let name = document["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let namespace = document["metadata"]["namespace"].as_str().unwrap_or(&self.around.namespace).to_owned();
        let mode = self.modes.get(&namespace).copied().unwrap_or(self.around.mode);
        let around = Surroundings { namespace, mode, probe_secret: new_probe_secret(), ..self.around.clone() };
        let pod = document.pointer_mut(place).with_context(|| format!("{kind} {name} has no pod template"))?;
        match injector::inject(pod, &self.sidecar, &around).map_err(|e| Mistake(format!("{kind} {name}: {e}")))? {
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use serde_json::json;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: InjectArgs,
    }

    fn by(flags: &[&str], installed: Option<Injects>) -> By {
        let cli = Cli::parse_from([&["inject", "-f", "-"], flags].concat());
        By::new(cli.args, installed).unwrap()
    }

    fn installation() -> Injects {
        let sidecar = Sidecar { native: false, csi_driver: None, cni: true, ..Sidecar::new("registry/cs:2".into()) };
        let namespaces = [("pay".to_owned(), Mode::Strict)].into();
        Injects { sidecar, mesh: Mode::Permissive, namespaces }
    }

    #[test]
    fn what_is_not_named_is_as_the_installation_has_it() {
        let as_installed = by(&[], Some(installation()));
        assert_eq!(as_installed.sidecar, installation().sidecar);
        let image = concat!("docker.io/countersign/countersign:", env!("CARGO_PKG_VERSION"));
        // The default counts too where it is named.
        let flags = ["--image", image, "--native-sidecars=true", "--csi-driver=a.b", "--sidecar-cpu-limit=1"];
        let named = by(&flags, Some(installation())).sidecar;
        assert_eq!((named.image.as_str(), named.native, named.csi_driver.as_deref()), (image, true, Some("a.b")));
        assert_eq!(named.resources.sidecar.cpu.limit, "1".parse().unwrap());
        assert!(named.cni, "of the installation");
        let alone = by(&[], None);
        assert_eq!(
            (alone.sidecar.image.as_str(), alone.sidecar.csi_driver.as_deref()),
            (image, Some("csi.countersign.dev"))
        );
        assert_eq!(by(&["--host-path"], None).sidecar.csi_driver, None);
        let drops = |by: &By, namespace: &str| {
            let spec = json!({ "containers": [{ "name": "a", "image": "i" }] });
            let mut pod = json!({ "kind": "Pod", "metadata": { "namespace": namespace }, "spec": spec });
            by.document(&mut pod).unwrap();
            pod.to_string().contains("--other-protocols=drop")
        };
        assert!(drops(&as_installed, "pay") && !drops(&as_installed, "shop"));
        assert!(!drops(&by(&["--mode=permissive"], Some(installation())), "pay"), "what is named counts");
        assert!(drops(&by(&["--mode=strict"], None), "shop"));
    }

    #[test]
    fn what_is_no_object_is_a_mistake() {
        let judged = |text: &str| {
            let all: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
            objects_all(&all.into_iter().filter(|d| !d.is_null()).collect::<Vec<_>>())
        };
        assert_eq!(judged("apiVersion: v1\nkind: Pod\n---\n---\napiVersion: v1\nkind: Service\n"), Ok(()));
        for text in ["some plain text", "a: b", "- a", "", "# nothing\n"] {
            assert!(judged(text).unwrap_err().contains("no Kubernetes object was found"), "{text}");
        }
        assert!(judged("apiVersion: v1\nkind: Pod\n---\nsome text\n").unwrap_err().starts_with("document 2 of 2"));
    }

    #[test]
    fn the_namespaces_of_all_objects_are_asked_about() {
        let list = json!({ "kind": "List", "items": [{ "kind": "Pod", "metadata": { "namespace": "a" } }, { "kind": "Pod" }] });
        let mut found = BTreeSet::new();
        namespaces(&list, "default", &mut found);
        assert_eq!(found, ["a", "default"].map(ToOwned::to_owned).into());
    }

    #[test]
    fn every_kind_that_holds_a_pod_is_injected_and_the_rest_passes() {
        let pod = json!({ "spec": { "containers": [{ "name": "a", "image": "i" }] } });
        let marked = format!(r#""{INJECTED}":"{}{IN_MANIFEST}""#, env!("CARGO_PKG_VERSION"));
        let by = by(&[], None);
        let with = |mut document: Value| {
            // Twice is as once.
            for _ in 0..2 {
                by.document(&mut document).unwrap();
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
