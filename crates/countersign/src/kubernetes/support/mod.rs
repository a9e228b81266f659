//! `countersign support`: one archive with what a supporter needs to know of an installation, without its secrets.

mod archive;
mod objects;
mod scrub;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use countersign_controller::injector::{REDIRECT, SIDECAR};
use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod};
use kube::api::{Api, ListParams, LogParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use time::OffsetDateTime;

use self::archive::{Archive, Written};
use self::objects::in_time;
use super::api_server::{ApiServer, reach};
use super::cluster::{is_meshed, page};
use super::sidecars::ask_each;
use super::{absent, check, explain};
use crate::one_line;
use crate::operator::block;
use crate::operator::output::{Output, Table};
use crate::settings::Mistake;

/// Most lines, and bytes, of one container's log.
const LOG_LINES: i64 = 5_000;
const LOG_BYTES: i64 = 4 * 1024 * 1024;
/// Most pods of the installation whose logs and pages are taken, and most sidecars that are asked: a large mesh has thousands.
const MAX_PODS: usize = 100;
const MAX_SIDECARS: usize = 200;

/// What is never taken.
const NEVER: [&str; 3] = [
    "Secrets: never taken",
    "pods without a sidecar, and logs and last words of apps: not taken",
    "commands, arguments, environment and other people's annotations of apps: replaced by (left out); so is what has the form of a private key, a token or a password in a URL",
];

/// Kubernetes: collect what a supporter needs into one archive.
///
/// Objects, events, logs and metrics of the installation, what each sidecar knows of itself, versions, and the output of
/// `countersign check`. Secrets are left out, and left-out.txt in the archive lists what is not in it and why. Look through it
/// before you send it.
#[derive(Debug, clap::Args)]
pub struct SupportArgs {
    /// Namespace of the installation.
    #[arg(long, short, value_name = "NAMESPACE", default_value = "countersign")]
    namespace: String,
    /// A meshed pod to look at closely, NAMESPACE/NAME: the logs of its sidecar, its events, and `explain`. May be repeated. Exit
    /// code 1 if it cannot be read; the archive is written all the same.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pod: Vec<String>,
    /// File to write, a compressed tar file. It must not exist [default: countersign-support-TIME.tar.gz].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Writes the archive and prints what became of it; exit code 1 if a pod that was named is not in it.
pub fn support(args: &SupportArgs) -> Result<ExitCode> {
    let (Written { path, bytes, parts, left_out }, missing) = block(collect(args))?;
    let mut table = Table::facts([
        ("archive".to_owned(), format!("{}, {bytes} bytes, {parts} parts", path.display())),
        ("readable by".to_owned(), "you alone; look through it before you send it".to_owned()),
    ]);
    left_out.iter().for_each(|what| table.row(vec!["left out".into(), what.clone()]));
    let json = json!({ "archive": path, "bytes": bytes, "parts": parts, "leftOut": left_out });
    args.output.print(&table, &json)?;
    // The archive is there all the same: what was asked for and is gone may be what is wrong.
    missing.iter().for_each(|why| eprintln!("{}", lacks(why)));
    Ok(ExitCode::from(u8::from(!missing.is_empty())))
}

/// What is said of a pod that was asked for and is not in the archive.
fn lacks(why: &str) -> String {
    format!(
        "countersign: the archive is written without a pod that you named: {why}; see kubectl get pods -A, and run it again"
    )
}

/// The archive, and why pods that were asked for are not in it.
async fn collect(args: &SupportArgs) -> Result<(Written, Vec<String>)> {
    let named = args.pod.iter().map(|pod| pair(pod)).collect::<Result<Vec<_>, _>>()?;
    // A page that answers 503 says what is missing, which is what is asked for.
    let ApiServer { pages: client, version, .. } = reach().await?;
    absent::refuse(&client, &args.namespace, "-n").await?;
    let now = OffsetDateTime::now_utc();
    let path = match &args.out {
        Some(path) => path.clone(),
        None => default_name(now).into(),
    };
    let archive = Archive::create(&path, now);
    let archive =
        archive.map_err(|e| Mistake(format!("cannot make {}: {e}; name another file with --out", path.display())))?;
    let mut collector = Collector { client, namespace: args.namespace.clone(), archive, missing: vec![] };
    NEVER.iter().for_each(|what| collector.archive.leave_out((*what).to_owned()));
    let versions = json!({ "command": env!("CARGO_PKG_VERSION"), "apiServer": version });
    collector.archive.json(&["versions.json"], versions)?;
    let collected = Box::pin(collector.everything(&named)).await;
    collected.with_context(|| format!("cannot write {}", path.display()))?;
    let Collector { archive, missing, .. } = collector;
    let written = archive.finish().with_context(|| format!("cannot write {}", path.display()))?;
    Ok((written, missing))
}

fn default_name(now: OffsetDateTime) -> String {
    let ((year, month, day), (hour, minute, second)) = (now.to_calendar_date(), now.to_hms());
    let month = u8::from(month);
    format!("countersign-support-{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z.tar.gz")
}

/// Namespace and name of a pod.
fn pair(text: &str) -> Result<(String, String), Mistake> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err(Mistake::flag("--pod", &format!("`{text}` is not NAMESPACE/NAME"))),
    }
}

/// Fills an archive. What cannot be had is recorded there and stops nothing; only an archive that cannot be written does.
struct Collector {
    client: Client,
    namespace: String,
    archive: Archive,
    /// Pods that were asked for and could not be read, and why.
    missing: Vec<String>,
}

impl Collector {
    async fn everything(&mut self, named: &[(String, String)]) -> Result<()> {
        step("check");
        match check::as_json(&self.namespace).await {
            Ok(findings) => self.archive.json(&["check.json"], findings)?,
            Err(error) => self.archive.leave_out(format!("check: {}", one_line(&error))),
        }
        self.objects().await?;
        for pod in self.installed().await {
            step(&format!("logs and pages of {}", pod.name_any()));
            self.logs(&pod, |_| true).await?;
            self.pages(&pod).await?;
        }
        self.sidecars().await?;
        for (namespace, name) in named {
            step(&format!("pod {namespace}/{name}"));
            self.closely(namespace, name).await?;
        }
        Ok(())
    }

    async fn objects(&mut self) -> Result<()> {
        step("objects and events");
        for kind in objects::kinds() {
            match kind.list(&self.client, &self.namespace).await {
                Ok(listed) => {
                    if listed.more {
                        self.archive.leave_out(format!("{}: only the first {}", kind.name(), listed.objects.len()));
                    }
                    let file = format!("{}.json", kind.name());
                    self.archive.json(&["objects", &file], Value::Array(listed.objects))?;
                }
                Err(why) => self.archive.leave_out(format!("{}: {why}", kind.name())),
            }
        }
        Ok(())
    }

    /// The pods of the installation.
    async fn installed(&mut self) -> Vec<Pod> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let ours = ListParams::default().labels("app.kubernetes.io/name=countersign");
        let mut pods = self.pods(&api, &ours, "pods of the installation").await;
        if pods.len() > MAX_PODS {
            self.archive
                .leave_out(format!("logs and pages of {} pods of the installation: too many", pods.len() - MAX_PODS));
            pods.truncate(MAX_PODS);
        }
        pods
    }

    async fn pods(&mut self, api: &Api<Pod>, which: &ListParams, what: &str) -> Vec<Pod> {
        match in_time(api.list(which)).await {
            Ok(listed) => listed.items,
            Err(why) => {
                self.archive.leave_out(format!("{what}: {why}"));
                vec![]
            }
        }
    }

    /// Logs of a pod's containers; of one that has restarted, also what it said before.
    async fn logs(&mut self, pod: &Pod, wanted: impl Fn(&Container) -> bool) -> Result<()> {
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
        let spec = pod.spec.iter();
        let all = spec.flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers));
        for container in all.filter(|c| wanted(c)) {
            let runs: &[bool] = if restarts(pod, &container.name) > 0 { &[false, true] } else { &[false] };
            for previous in runs {
                let params = LogParams {
                    container: Some(container.name.clone()),
                    tail_lines: Some(LOG_LINES),
                    limit_bytes: Some(LOG_BYTES),
                    timestamps: true,
                    previous: *previous,
                    ..LogParams::default()
                };
                let file = format!("{}{}.log", container.name, if *previous { "-previous" } else { "" });
                match in_time(api.logs(&name, &params)).await {
                    Ok(log) => self.archive.text(&["logs", &namespace, &name, &file], &log)?,
                    Err(why) => self.archive.leave_out(format!("log {name}/{file}: {why}")),
                }
            }
        }
        Ok(())
    }

    /// What a role says on the ports of its pages.
    async fn pages(&mut self, pod: &Pod) -> Result<()> {
        let ports = pod.spec.iter().flat_map(|spec| &spec.containers).flat_map(|c| c.ports.iter().flatten());
        let named = ports.filter_map(|port| Some((port.name.clone()?, u16::try_from(port.container_port).ok()?)));
        for (name, port) in named.filter(|(name, _)| ["metrics", "registrar", "csi", "cni"].contains(&name.as_str())) {
            for path in ["/ready", "/metrics"] {
                let asked = page(&self.client, pod, port, path).await;
                // A role that is not ready answers 503, and its reason is in the error.
                let text = asked.unwrap_or_else(|why| format!("{why}\n"));
                let file = format!("{name}{}.txt", path.replace('/', "-"));
                self.archive.text(&["pages", &pod.name_any(), &file], &text)?;
            }
        }
        Ok(())
    }

    /// Every meshed pod, and what its sidecar knows of itself.
    async fn sidecars(&mut self) -> Result<()> {
        step("sidecars");
        let api: Api<Pod> = Api::all(self.client.clone());
        let mut meshed = self.pods(&api, &ListParams::default(), "meshed pods").await;
        meshed.retain(is_meshed);
        if meshed.len() > MAX_SIDECARS {
            self.archive.leave_out(format!("{} meshed pods and their sidecars: too many", meshed.len() - MAX_SIDECARS));
            meshed.truncate(MAX_SIDECARS);
        }
        let answers = ask_each(&self.client, &meshed.iter().collect::<Vec<_>>()).await;
        let told = meshed.iter().zip(answers).map(|(pod, answer)| {
            let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
            let (status, error) = (answer.as_ref().ok(), answer.as_ref().err().map(ToString::to_string));
            json!({ "namespace": namespace, "pod": name, "status": status, "error": error })
        });
        self.archive.json(&["sidecars.json"], told.collect())?;
        let pods = meshed.into_iter().map(|pod| {
            let mut pod = serde_json::to_value(pod)?;
            scrub::object(&mut pod, false);
            Ok(pod)
        });
        self.archive.json(&["meshed-pods.json"], pods.collect::<Result<Vec<Value>, serde_json::Error>>()?.into())?;
        Ok(())
    }

    /// One pod: the logs of its sidecar and its redirect, its events, and `explain`.
    async fn closely(&mut self, namespace: &str, name: &str) -> Result<()> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let pod = match in_time(api.get(name)).await {
            Ok(pod) => pod,
            Err(why) => {
                let why = format!("pod {namespace}/{name}: {why}");
                self.archive.leave_out(why.clone());
                self.missing.push(why);
                return Ok(());
            }
        };
        self.logs(&pod, |c| [SIDECAR, REDIRECT].contains(&c.name.as_str())).await?;
        match objects::events_of(&self.client, namespace, name).await {
            Ok(events) => self.archive.json(&["pods", namespace, name, "events.json"], Value::Array(events))?,
            Err(why) => self.archive.leave_out(format!("events of pod {namespace}/{name}: {why}")),
        }
        match Box::pin(explain::as_json(name, namespace, &self.namespace)).await {
            Ok(steps) => self.archive.json(&["pods", namespace, name, "explain.json"], steps)?,
            Err(error) => {
                self.archive.leave_out(format!("explain of {namespace}/{name}: {}", one_line(&error)));
            }
        }
        Ok(())
    }
}

/// Progress: collecting from a large cluster takes minutes.
fn step(what: &str) {
    eprintln!("collecting {what}");
}

/// How often a container has restarted.
fn restarts(pod: &Pod, container: &str) -> i32 {
    let Some(status) = &pod.status else { return 0 };
    let lists = [&status.init_container_statuses, &status.container_statuses];
    let mut all = lists.into_iter().flatten().flatten();
    all.find(|c: &&ContainerStatus| c.name == container).map_or(0, |c| c.restart_count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::check::fake_api::{client, refused};

    #[test]
    fn a_pod_is_named_with_its_namespace() {
        assert_eq!(pair("shop/web-0").unwrap(), ("shop".to_owned(), "web-0".to_owned()));
        for wrong in ["web-0", "/web-0", "shop/", "a/b/c", ""] {
            assert_eq!(pair(wrong).unwrap_err().to_string(), format!("--pod: `{wrong}` is not NAMESPACE/NAME"));
        }
    }

    #[tokio::test]
    async fn a_pod_that_was_named_and_is_not_there_is_no_success() {
        let folder = tempfile::tempdir().unwrap();
        let archive = Archive::create(&folder.path().join("a.tar.gz"), OffsetDateTime::UNIX_EPOCH).unwrap();
        let client = client(|_| refused(404, "pods \"none\" not found"));
        let mut collector = Collector { client, namespace: "mesh".into(), archive, missing: vec![] };
        collector.closely("shop", "none").await.unwrap();
        assert_eq!(collector.missing, ["pod shop/none: pods \"none\" not found"]);
        assert!(lacks(&collector.missing[0]).contains("shop/none"));
    }

    #[test]
    fn a_file_is_named_for_its_time() {
        let now = OffsetDateTime::from_unix_timestamp(1_000_000_000).unwrap();
        assert_eq!(default_name(now), "countersign-support-20010909T014640Z.tar.gz");
    }
}
