//! `countersign check`: checks a cluster before an installation, and an installation afterwards. Here is the list of
//! checks; each subject has a file.

mod admission;
pub mod csi;
#[cfg(test)]
pub mod fake_api;
mod finding;
pub mod installed;
pub mod nodes;
mod rbac;
mod rendered;
mod requirements;
mod running;
mod schedule;
mod spiffe_ids;
mod storage;
mod trust;
mod words;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::Client;
use serde_json::Value;

use self::finding::are_good;
use self::installed::Installed;
use self::nodes::Nodes;
use self::schedule::{Check, make};
use super::absent::absent;
use super::api_server::{ApiServer, reach};
use super::namespaces::{self, Scope};
use super::values::ValuesArgs;
use super::{pod_source, redirects};
use crate::operator::block;
use crate::operator::output::{Output, Table};
use crate::settings::Mistake;

pub use self::finding::{Fault, Finding, Outcome, json_of};
pub use self::words::misspelled;

/// Longest wait for what several checks look at.
const FACTS: Duration = Duration::from_secs(30);

/// Kubernetes: check a cluster before an installation, and an installation afterwards.
///
/// Each finding comes with a fix. Exit code 1 if there is any, or something could not be checked. With --before, --set and --values
/// name the settings that you will install with.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Namespace of the installation.
    #[arg(long, short, value_name = "NAMESPACE", default_value = "countersign")]
    namespace: String,
    /// Only check whether the cluster is ready for an installation.
    #[arg(long)]
    before: bool,
    #[command(flatten)]
    values: ValuesArgs,
    #[command(flatten)]
    output: Output,
}

/// Runs all checks and prints the findings.
pub fn check(args: &CheckArgs) -> Result<ExitCode> {
    if !args.before && args.values.is_given() {
        return Err(Mistake("--set and --values are for --before: an installation is checked as it is".into()).into());
    }
    let findings = block(find(args))?;
    let mut table = Table::new(&["check", "result", "found", "mend"]);
    findings.iter().for_each(|finding| table.row(finding.row().to_vec()));
    args.output.print(&table, &json_of(&findings))?;
    Ok(ExitCode::from(u8::from(!are_good(&findings))))
}

async fn find(args: &CheckArgs) -> Result<Vec<Finding>> {
    let values = args.values.read()?;
    let cluster = Cluster::reached(&args.namespace).await?;
    if args.before {
        return Ok(make(cluster.before(&values), true).await);
    }
    Ok(cluster.inspected(true).await)
}

/// The findings about an installation, as [`check`] prints them for programs.
pub async fn as_json(namespace: &str) -> Result<Value> {
    Ok(json_of(&Cluster::reached(namespace).await?.inspected(false).await))
}

/// Whom a look for causes is for.
#[derive(Debug, Clone, Copy)]
pub struct Affected<'a> {
    /// Namespace of the pod.
    pub namespace: &'a str,
    /// Node of the pod; `None` if it has none yet.
    pub node: Option<&'a str>,
}

/// What is wrong with an installation that may keep a pod out of the mesh. What cannot be checked is left out.
pub async fn causes(mesh: &str, affected: Affected<'_>) -> Result<Vec<Finding>> {
    let cluster = Cluster::reached(mesh).await?;
    if let Some(missing) = cluster.without_installation("--mesh-namespace").await {
        return Ok(vec![missing]);
    }
    let inspection = Box::pin(Inspection::begin(cluster, affected.node)).await;
    let found = make(inspection.causes(affected), false).await;
    Ok(found.into_iter().filter(|f| f.outcome.as_ref().is_err_and(|fault| fault.is_checked)).collect())
}

/// A cluster that answers.
struct Cluster<'a> {
    client: Client,
    /// One that takes 503 for an answer.
    pages: Client,
    /// Namespace of the installation.
    namespace: &'a str,
    /// Version of Kubernetes.
    version: (u32, u32),
}

impl<'a> Cluster<'a> {
    async fn reached(namespace: &'a str) -> Result<Self> {
        let ApiServer { client, pages, version } = reach().await?;
        let version =
            version.context("the API server does not tell you its version: have `get` on /version granted to you")?;
        let number = |text: &str| text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0);
        Ok(Self { version: (number(&version.major), number(&version.minor)), client, pages, namespace })
    }

    /// The findings about the installation. Where there is none, that is the only one: each check would find it missing.
    async fn inspected(self, shows_progress: bool) -> Vec<Finding> {
        if let Some(missing) = self.without_installation("-n").await {
            return vec![missing];
        }
        make(Box::pin(Inspection::begin(self, None)).await.checks(), shows_progress).await
    }

    /// That the namespace has no installation; `None` if it has. `flag` is the one that names it.
    async fn without_installation(&self, flag: &str) -> Option<Finding> {
        let absent = absent(&self.client, self.namespace).await?;
        Some(Finding { check: "installation", outcome: Err(Fault::new(absent.found(), absent.mend(flag))) })
    }

    /// What every cluster needs. `native`: as for [`requirements::api_version`].
    fn requirements(&self, native: Option<bool>) -> Vec<Check<'_>> {
        let (client, namespace, version) = (&self.client, self.namespace, self.version);
        vec![
            Check::one("API version", async move { requirements::api_version(version, native) }),
            Check::one("permissions", requirements::permissions(client, namespace)),
            Check::one("clocks", requirements::clocks(client)),
        ]
    }

    fn before<'b>(&'b self, values: &'b Value) -> Vec<Check<'b>> {
        let mut checks = self.requirements(None);
        checks.extend([
            Check::one("volume", storage::before(&self.client, self.namespace, values)),
            Check::one("pod source", pod_source::before(&self.client)),
            Check::one("CSI driver", csi::before(&self.client, values)),
            Check::one("agents' pods", admission::before(&self.client, self.namespace, values)),
        ]);
        checks
    }
}

/// What several checks look at.
struct Inspection<'a> {
    cluster: Cluster<'a>,
    installed: Installed,
    /// Why the workloads could not be read.
    unread: Option<Fault>,
    /// The chart as it would be rendered with the settings in force.
    manifests: Result<Vec<Value>>,
    nodes: Result<Nodes, Fault>,
    /// What the server says of itself.
    server: Result<trust::Server, String>,
    /// The published bundle.
    bundle: Result<String, String>,
}

impl<'a> Inspection<'a> {
    /// Looks. `only`: the only node that counts.
    async fn begin(cluster: Cluster<'a>, only: Option<&str>) -> Self {
        let (client, pages, namespace) = (&cluster.client, &cluster.pages, cluster.namespace);
        let late = || "no answer in time".to_owned();
        let (installed, nodes, server, bundle) = futures::join!(
            tokio::time::timeout(FACTS, Installed::read(client, namespace)),
            tokio::time::timeout(FACTS, Nodes::look(pages, namespace, only)),
            tokio::time::timeout(FACTS, trust::server(pages, namespace)),
            tokio::time::timeout(FACTS, trust::configmap(client, namespace)),
        );
        let see = "see whether the API server answers: kubectl get --raw /readyz";
        let installed = installed.unwrap_or_else(|_| Err(Fault::unchecked(late(), see)));
        let (installed, unread) = installed.map_or_else(|why| (Installed::default(), Some(why)), |found| (found, None));
        Self {
            manifests: installed.manifests(namespace, cluster.version),
            nodes: nodes.unwrap_or_else(|_| Err(Fault::unchecked(late(), see))),
            server: server.unwrap_or_else(|_| Err(late())),
            bundle: bundle.unwrap_or_else(|_| Err(late())),
            installed,
            unread,
            cluster,
        }
    }

    /// The workloads of the installation, if they could be read.
    fn installed(&self) -> Result<&Installed, Fault> {
        self.unread.clone().map_or(Ok(&self.installed), Err)
    }

    fn checks(&self) -> Vec<Check<'_>> {
        let Cluster { client, namespace, .. } = &self.cluster;
        let native = self.installed.native_sidecars();
        let mut checks = self.cluster.requirements(native);
        checks.push(Check::one("volume", storage::installed(client, namespace)));
        checks.extend(self.of_roles());
        checks.extend([
            Check::one("authorities", async { trust::authorities(self.server.as_ref()) }),
            Check::one("roots", async { trust::roots(self.server.as_ref()) }),
        ]);
        checks.extend(self.of_injection());
        checks.extend([
            Check::one("SpiffeIDs", spiffe_ids::made_by(client)),
            Check::one("labels", words::labels(client)),
            Check::one("exceptions", words::past_sidecars(client, namespace)),
        ]);
        checks.extend(self.of_namespaces(None));
        checks
    }

    /// The checks that bear on one pod.
    fn causes<'b>(&'b self, affected: Affected<'b>) -> Vec<Check<'b>> {
        let mut checks = self.of_roles();
        checks.extend(self.of_injection());
        checks.extend(self.of_namespaces(Some(affected.namespace)));
        checks
    }

    fn of_roles(&self) -> Vec<Check<'_>> {
        let Cluster { client, namespace, version, .. } = &self.cluster;
        let nodes = || self.nodes.as_ref().map_err(Clone::clone);
        vec![
            Check::several("RBAC", async {
                match self.installed() {
                    Ok(installed) => rbac::reviewed(client, &self.manifests, installed).await,
                    Err(fault) => vec![Err(fault)],
                }
            }),
            Check::one("SpiffeID resource", running::resource(client)),
            Check::one("server", running::server_ready(client, namespace)),
            Check::one("agents", async move {
                self.installed()?.has_agents()?;
                nodes()?.are_served(*version)
            }),
            Check::one("agent's socket", async move { nodes()?.sockets() }),
            Check::one("pod source", async move { pod_source::installed(nodes()?) }),
            Check::one("CSI driver", async move {
                csi::driver(client, self.installed()?, &self.manifests, self.nodes.as_ref()).await
            }),
            Check::one("settings", running::settings(client, namespace)),
            Check::one("redirects", async { redirects::check(client, self.installed()?.has_plugin()).await }),
            Check::one("bundle", async { trust::bundle(self.server.as_ref(), self.bundle.as_deref()) }),
        ]
    }

    fn of_injection(&self) -> Vec<Check<'_>> {
        let Cluster { client, namespace, version, .. } = &self.cluster;
        vec![
            Check::one("injector", running::injector(client, namespace)),
            Check::one("webhook's caBundle", trust::webhook_bundle(client, self.bundle.as_deref())),
            Check::one("webhook's rules", rendered::webhook(client, &self.manifests)),
            Check::one("webhook", running::webhook(client, namespace)),
            Check::one("admission policies", rendered::policies(client, &self.manifests, *version)),
        ]
    }

    fn of_namespaces<'b>(&'b self, only: Option<&'b str>) -> Vec<Check<'b>> {
        let (client, scope) = (&self.cluster.client, Scope { own: self.cluster.namespace, only });
        vec![
            Check::one("pod security", async move {
                let nodes = self.nodes.as_ref().map_or_else(|_| vec![], Nodes::that_trust_a_user_id);
                namespaces::security(client, scope, &nodes).await
            }),
            Check::several("limits", namespaces::refusals(client, scope)),
        ]
    }
}
