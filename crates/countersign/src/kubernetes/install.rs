//! `countersign install`: the manifests of an installation, printed or applied, after a comparison with the settings of
//! an earlier one.

mod plan;

use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use k8s_openapi::api::core::v1::Namespace;
use kube::Client;
use kube::api::ObjectMeta;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::changes::{self, Consent};
use super::chart;
use super::memory::{self, Memory, Seen};
use super::values::{ValuesArgs, host_path};
use crate::operator::output::{Output, json_text};
use crate::settings::Mistake;
use crate::settings::words::escaped;
use plan::{NO_CLUSTER, plan};

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
mod tests;
