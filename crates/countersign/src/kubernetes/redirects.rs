//! Who installs the redirects of the running pods: each its own init container, or the CNI plugin of its node. Which of them it is
//! was fixed when the pod was made, so that a change of the plugin's settings does not reach pods that run.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, ListParams};
use serde_json::Value;

use super::changes::Change;
use super::check::{Fault, Outcome};
use super::cluster::{by_namespace, is_meshed, name_of, restarts};
use super::exceptions::RedirectFlags;
use crate::settings::words::count;

/// Longest look at the pods.
const CALL: Duration = Duration::from_secs(20);

/// Meshed pods, `NAMESPACE/NAME`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Redirects {
    /// Those whose sidecar or init container waits for the plugin, also whenever their sandbox is made anew.
    pub by_plugin: Vec<String>,
    /// Those whose own init container has `NET_ADMIN` and installs it.
    pub by_themselves: Vec<String>,
}

impl Redirects {
    fn among(pods: &[Pod]) -> Self {
        let mut all = Self::default();
        for pod in pods.iter().filter(|pod| is_meshed(pod) && lives_on(pod)) {
            let by_plugin = RedirectFlags::of(pod).is_some_and(|redirect| redirect.by_plugin);
            let list = if by_plugin { &mut all.by_plugin } else { &mut all.by_themselves };
            list.push(name_of(pod));
        }
        all
    }
}

/// Whether a pod may still have to make its sandbox anew.
fn lives_on(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default();
    !matches!(phase, "Succeeded" | "Failed") && pod.metadata.deletion_timestamp.is_none()
}

/// `check`'s finding. `plugin`: whether the plugin is on.
pub async fn check(client: &Client, plugin: bool) -> Outcome {
    let pods: Api<Pod> = Api::all(client.clone());
    let pods = pods.list(&ListParams::default()).await;
    let pods = pods.map_err(|e| Fault::unread(&e, "see whether you may list pods"))?.items;
    judge(&Redirects::among(&pods), plugin)
}

fn judge(redirects: &Redirects, plugin: bool) -> Outcome {
    let (waiting, own) = (&redirects.by_plugin, &redirects.by_themselves);
    if !plugin && !waiting.is_empty() {
        return Err(Fault::new(
            format!(
                "{} the CNI plugin for their redirect, and it is off: they hang when their node or their sandbox starts anew \
                 ({})",
                need(waiting.len()),
                by_namespace(waiting)
            ),
            format!("restart them, so that their own init container installs it: {}", restarts(waiting)),
        ));
    }
    Ok(format!("{} by the CNI plugin, {} by the pods' own init containers", waiting.len(), own.len()))
}

/// `1 pod needs`, `2 pods need`.
fn need(pods: usize) -> String {
    format!("{} {}", count(pods, "pod"), if pods == 1 { "needs" } else { "need" })
}

/// What an installation is told that turns the plugin on or off in one step.
pub async fn note(client: &Client, changes: &[Change], values: &Value) -> Option<String> {
    let change = changes.iter().find(|change| change.setting == "cni.enabled")?;
    let turned_on = change.after == Some(Value::Bool(true));
    let pods: Api<Pod> = Api::all(client.clone());
    let pods = tokio::time::timeout(CALL, pods.list(&ListParams::default())).await;
    // What cannot be counted is said without a number: the order of the steps is the same.
    let redirects = pods.ok().and_then(Result::ok).map(|pods| Redirects::among(&pods.items));
    if turned_on { on(redirects.as_ref(), values) } else { off(redirects.as_ref()) }
}

fn on(redirects: Option<&Redirects>, values: &Value) -> Option<String> {
    if values["injector"]["cniRedirect"] != true {
        return None;
    }
    let own = redirects.map_or(String::new(), |redirects| {
        format!(", and {} keep their own init container until they are restarted", redirects.by_themselves.len())
    });
    Some(format!(
        "cni.enabled: pods that begin before the plugin is on their node wait for it{own}. In two steps none waits: first with --set \
         injector.cniRedirect=false, then, once `countersign check` finds all agents ready, without it"
    ))
}

fn off(redirects: Option<&Redirects>) -> Option<String> {
    let (who, restart) = match redirects.map(|redirects| &redirects.by_plugin) {
        Some(waiting) if waiting.is_empty() => return None,
        Some(waiting) => {
            (format!("{} it for their redirect ({})", need(waiting.len()), by_namespace(waiting)), restarts(waiting))
        }
        None => ("running pods may need it for their redirect".into(), restarts(&[])),
    };
    Some(format!(
        "cni.enabled: {who}, and hang when their node or their sandbox starts anew without it. In two steps none does: first with \
         --set cni.enabled=true --set injector.cniRedirect=false, then restart them ({restart}), and turn it off after that"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::changes::Kind;
    use crate::kubernetes::check::fake_api::{Asked, client, list, refused};
    use countersign_controller::injector::{REDIRECT, SIDECAR};
    use serde_json::json;

    fn pod(name: &str, waits: bool, phase: &str) -> Value {
        let (namespace, name) = name.split_once('/').unwrap();
        let containers = if waits {
            json!([{ "name": SIDECAR, "args": ["proxy", "--redirect=--proxy-uid=2102"] }])
        } else {
            json!([{ "name": REDIRECT, "args": ["redirect"] }, { "name": SIDECAR }])
        };
        json!({ "metadata": { "namespace": namespace, "name": name }, "status": { "phase": phase },
                "spec": { "containers": [], "initContainers": containers } })
    }

    fn cluster() -> Client {
        client(|asked: &Asked| {
            assert_eq!(asked.path, "/api/v1/pods");
            let plain = json!({ "metadata": { "namespace": "shop", "name": "plain" }, "spec": { "containers": [] } });
            list(
                "PodList",
                vec![
                    pod("shop/a", true, "Running"),
                    pod("shop/b", true, "Pending"),
                    pod("pay/c", false, "Running"),
                    pod("shop/done", true, "Succeeded"),
                    plain,
                ],
            )
        })
    }

    #[tokio::test]
    async fn pods_that_need_the_plugin_while_it_is_off_are_a_finding_with_what_restarts_them() {
        assert_eq!(check(&cluster(), true).await.unwrap(), "2 by the CNI plugin, 1 by the pods' own init containers");
        let Fault { found, mend, .. } = check(&cluster(), false).await.unwrap_err();
        assert!(found.starts_with("2 pods need the CNI plugin") && found.ends_with("(shop 2)"), "{found}");
        assert!(mend.ends_with("kubectl -n shop rollout restart deployment,statefulset,daemonset"), "{mend}");
        let none = Redirects { by_themselves: vec!["pay/c".into()], ..Redirects::default() };
        assert!(judge(&none, false).is_ok());
    }

    #[tokio::test]
    async fn the_plugin_turned_on_or_off_in_one_step_is_noted_with_the_two_steps() {
        let change = |after: bool| Change {
            setting: "cni.enabled".into(),
            before: Some((!after).into()),
            after: Some(after.into()),
            kind: Kind::Free,
        };
        let values = |first: bool| json!({ "injector": { "cniRedirect": !first } });
        let off = note(&cluster(), &[change(false)], &values(false)).await.unwrap();
        assert!(off.contains("2 pods need it for their redirect (shop 2)"), "{off}");
        assert!(off.contains("--set cni.enabled=true --set injector.cniRedirect=false"), "{off}");
        let on = note(&cluster(), &[change(true)], &values(false)).await.unwrap();
        assert!(on.contains("1 keep their own init container"), "{on}");
        assert_eq!(note(&cluster(), &[change(true)], &values(true)).await, None, "it is the first of the two steps");
        assert_eq!(note(&cluster(), &[], &values(false)).await, None);
        let unseen = client(|_| refused(403, "no"));
        assert!(note(&unseen, &[change(false)], &values(false)).await.unwrap().contains("running pods may need it"));
        assert_eq!(super::off(Some(&Redirects::default())), None);
    }
}
