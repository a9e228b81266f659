//! Adds redirect and sidecar to a pod. Works on the JSON object as received, so that unknown fields are kept.

use countersign_identity::policy::Mode;
use serde_json::{Map, Value, json};

use super::containers::{proxy, redirect, redirect_flags};
use super::namespace::WORDS;
use super::nearest::did_you_mean;
use super::settings::{self, Mistake, Settings};
use super::{
    Asks, IN_MANIFEST, INJECT, INJECTED, Leave, PROXY_UID, REDIRECT, SIDECAR, Sidecar, Surroundings, probes,
    raw_sockets,
};
use crate::store::MODE;

/// Name of the volume with the agent's socket.
pub const VOLUME: &str = "countersign-agent";

/// Why a pod is rejected.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refused {
    /// An annotation is invalid.
    #[error(transparent)]
    Annotation(#[from] Mistake),
    /// The pod's label is neither `enabled` nor `disabled`.
    #[error("countersign.dev/inject: `{value}` is neither enabled nor disabled{hint}")]
    Unclear {
        /// Value of the label.
        value: String,
        /// Suggestion of the intended value; may be empty.
        hint: String,
    },
    /// The namespace's label is neither `enabled` nor `disabled`. Holds the namespace.
    #[error(
        "the label countersign.dev/inject of namespace {0} is neither enabled nor disabled, so nobody knows whether this pod belongs into the mesh: set it to one of them, or label the pod"
    )]
    UnclearNamespace(String),
    /// A container, volume or mount of the pod uses one of our names.
    #[error("{what} `{name}` has a name that the injection uses: rename it")]
    Reserved {
        /// Kind of the object: a container, a volume, a mount of a container.
        what: String,
        /// The name that is reserved.
        name: String,
    },
    /// The pod would weaken a strict mesh without permission.
    #[error(
        "annotation countersign.dev/{key}: `{value}` lets traffic past the sidecar{because}; an administrator can allow it for namespace {namespace} by the setting mesh.allowExceptions"
    )]
    Exception {
        /// Name of the annotation, without its prefix.
        key: &'static str,
        /// Value of the annotation.
        value: String,
        /// Why permission is required.
        because: &'static str,
        /// Namespace of the pod.
        namespace: String,
    },
    /// The pod names a resolver of its own, which it could send anything to on port 53.
    #[error(
        "dnsConfig.nameservers: `{resolver}` lets DNS to it past the sidecar, and strict is not to be weakened; an administrator can allow it for namespace {namespace} by the setting mesh.allowExceptions"
    )]
    Resolver {
        /// The first resolver that it names.
        resolver: String,
        /// Namespace of the pod.
        namespace: String,
    },
    /// A container would bypass the sidecar, because it runs as the sidecar's user. Holds its name.
    #[error(
        "container `{0}` runs as UID 2102, which is the sidecar's: its traffic would bypass the mesh; give it another runAsUser"
    )]
    ProxyUid(String),
    /// An ephemeral container would see the processes of one of ours.
    #[error("container `{container}` has the target `{target}`, whose processes are the mesh's: name another --target")]
    Target {
        /// Name of the container.
        container: String,
        /// The container whose processes it would see.
        target: String,
    },
    /// An ephemeral container would run before the pod's redirect.
    #[error(
        "the sidecar has not started: an ephemeral container would run outside of a mesh that is strict; see `countersign explain pod`"
    )]
    Early,
    /// The pod would never end, because its sidecar keeps running. Holds the restart policy.
    #[error(
        "the pod is to end by itself (restartPolicy {0}), but its sidecar, a plain container, would go on for ever: native sidecars (Kubernetes 1.29, injector.nativeSidecars) end with it; or label it countersign.dev/inject: disabled"
    )]
    NeverEnds(String),
    /// The object is not a pod, or one without an app.
    #[error("the pod has no spec with containers of its own")]
    Malformed,
}

/// Outcome for a pod that is accepted.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Redirect and sidecar were added.
    Injected,
    /// The pod is unchanged, for this reason.
    Left(&'static str),
}

/// Injects into a pod or a pod template: an object with `metadata` and `spec`.
pub fn inject(pod: &mut Value, sidecar: &Sidecar, around: &Surroundings) -> Result<Verdict, Refused> {
    let label = pod["metadata"]["labels"][INJECT].as_str().or(pod["metadata"]["annotations"][INJECT].as_str());
    match (label, around.asks) {
        (Some("disabled"), _) => return Ok(Verdict::Left("the pod is labelled countersign.dev/inject: disabled")),
        (Some("enabled"), _) | (None, Asks::Yes) => {}
        (None, Asks::No) => {
            return Ok(Verdict::Left("neither the pod nor its namespace is labelled countersign.dev/inject: enabled"));
        }
        (None, Asks::Unclear) => return Err(Refused::UnclearNamespace(around.namespace.clone())),
        (Some(value), _) => {
            return Err(Refused::Unclear { value: value.to_owned(), hint: did_you_mean(value, &WORDS) });
        }
    }
    if pod["spec"]["hostNetwork"].as_bool() == Some(true) {
        return Ok(Verdict::Left("the pod uses its node's network, where a redirect would catch the node's traffic"));
    }
    refuse_none(pod)?;
    let annotations = pod["metadata"]["annotations"].as_object().cloned().unwrap_or_default();
    let in_manifest = annotations.get(INJECTED).and_then(Value::as_str).is_some_and(|by| by.ends_with(IN_MANIFEST))
        && pod["spec"]["volumes"].as_array().is_some_and(|all| all.iter().any(|v| v["name"] == VOLUME));
    let settings = Settings::read(annotations.iter().filter_map(|(k, v)| Some((k.as_str(), v.as_str()?))))?;
    let mode = around.mode.narrowed_by(own_mode(pod)?);
    refuse_exceptions(&settings, mode, sidecar, &around.namespace)?;
    refuse_resolvers(&pod["spec"], mode, sidecar, &around.namespace)?;
    if let Some(policy) = pod["spec"]["restartPolicy"].as_str().filter(|p| *p != "Always" && !sidecar.native) {
        return Err(Refused::NeverEnds(policy.to_owned()));
    }
    let resources = sidecar.resources.narrowed_by(&settings.resources)?;
    let earlier = take_ours(pod, &volumes(sidecar))?;
    // Where the sidecar were the only container, a command that names none would run in it, past the policy countersign-commands.
    refuse_none(pod)?;
    refuse_proxy_uid(&pod["spec"], &["initContainers", "containers"])?;
    refuse_mounts(&pod["spec"], &["initContainers", "containers"])?;
    let mut written = earlier.probes;
    for list in ["initContainers", "containers"] {
        let all = pod["spec"][list].as_array_mut().into_iter().flatten();
        all.for_each(|container| {
            probes::rewrite(container, &around.probe_secret, &mut written);
            if mode == Mode::Strict && !sidecar.leave.is_given(&around.namespace) {
                raw_sockets::drop_from(container);
            }
        });
    }
    let spec = &mut pod["spec"];
    let flags = redirect_flags(sidecar, &settings, mode);
    let proxy = proxy(sidecar, &settings, &flags, &written, resources.sidecar.manifest(earlier.sidecar.as_ref()));
    put_first(spec, if sidecar.native { "initContainers" } else { "containers" }, proxy);
    if let Some(redirect) = redirect(sidecar, &flags, resources.redirect.manifest(earlier.redirect.as_ref())) {
        put_first(spec, "initContainers", redirect);
    }
    let mut all = spec["volumes"].as_array().cloned().unwrap_or_default();
    all.extend(volumes(sidecar).into_iter().next());
    spec["volumes"] = Value::Array(all);
    if !pod["metadata"]["annotations"].is_object() {
        pod["metadata"]["annotations"] = json!({});
    }
    let kept = if in_manifest { IN_MANIFEST } else { "" };
    pod["metadata"]["annotations"][INJECTED] = format!("{}{kept}", env!("CARGO_PKG_VERSION")).into();
    Ok(Verdict::Injected)
}

/// Rejects what has no containers.
fn refuse_none(pod: &Value) -> Result<(), Refused> {
    if pod["spec"]["containers"].as_array().is_none_or(Vec::is_empty) { Err(Refused::Malformed) } else { Ok(()) }
}

/// The pod's own mode: the stricter one of annotation and label. Errors: one of them is no mode.
fn own_mode(pod: &Value) -> Result<Option<Mode>, Refused> {
    let said = ["annotations", "labels"].into_iter().filter_map(|place| pod["metadata"][place][MODE].as_str());
    let modes = said.map(|text| settings::mode(MODE, text)).collect::<Result<Vec<Mode>, _>>()?;
    Ok(modes.into_iter().max())
}

/// The volumes by which an injection gives the sidecar the agent's folder: first the one that is used now, then those of
/// earlier settings.
fn volumes(sidecar: &Sidecar) -> Vec<Value> {
    let by_driver = |driver: &String| json!({ "name": VOLUME, "csi": { "driver": driver, "readOnly": true } });
    let by_path = json!({ "name": VOLUME, "hostPath": { "path": sidecar.agent_dir, "type": "DirectoryOrCreate" } });
    sidecar.csi_driver.iter().map(by_driver).chain([by_path]).collect()
}

/// Rejects exceptions to strict mode unless the namespace has permission: who may only create pods must not weaken it.
/// Exceptions that take a pod out of the mesh completely need permission in every mode.
fn refuse_exceptions(settings: &Settings, mode: Mode, sidecar: &Sidecar, namespace: &str) -> Result<(), Refused> {
    if sidecar.leave.is_given(namespace) {
        return Ok(());
    }
    let refused = |(key, value), because| Refused::Exception { key, value, because, namespace: namespace.to_owned() };
    if let Some(opens) = settings.opens_everything() {
        return Err(refused(opens, ", whole"));
    }
    match settings.exceptions().into_iter().next() {
        Some(first) if mode == Mode::Strict => Err(refused(first, ", and strict is not to be weakened")),
        _ => Ok(()),
    }
}

/// Rejects resolvers of the pod's own in strict mode, unless the namespace has permission: the redirect leaves DNS to a pod's resolvers
/// alone, and nobody sees what is sent there.
fn refuse_resolvers(spec: &Value, mode: Mode, sidecar: &Sidecar, namespace: &str) -> Result<(), Refused> {
    match spec["dnsConfig"]["nameservers"].as_array().and_then(|all| all.first()) {
        Some(first) if mode == Mode::Strict && !sidecar.leave.is_given(namespace) => Err(Refused::Resolver {
            resolver: first.as_str().unwrap_or_default().to_owned(),
            namespace: namespace.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// What an earlier injection left in a pod.
#[derive(Default)]
struct Earlier {
    /// The health checks that it recorded.
    probes: Map<String, Value>,
    /// `resources` of its sidecar.
    sidecar: Option<Value>,
    /// `resources` of its redirect.
    redirect: Option<Value>,
}

/// Removes what an earlier injection added, and returns what has to be kept of it. An object with one of our names that
/// is not from an injection belongs to the app and is rejected: it would be replaced, or would give access to our own
/// files.
fn take_ours(pod: &mut Value, ours: &[Value]) -> Result<Earlier, Refused> {
    let injected = pod["metadata"]["annotations"][INJECTED].is_string();
    let reserved = |what: &str, name: &str| Refused::Reserved { what: what.to_owned(), name: name.to_owned() };
    let spec = &mut pod["spec"];
    let mut earlier = Earlier::default();
    for list in ["initContainers", "containers"] {
        let Some(all) = spec[list].as_array_mut() else { continue };
        let is_ours = |c: &Value| [SIDECAR, REDIRECT].contains(&c["name"].as_str().unwrap_or_default());
        for container in all.iter().filter(|c| is_ours(c)) {
            let name = container["name"].as_str().unwrap_or_default();
            if !injected {
                return Err(reserved("container", name));
            }
            if name == SIDECAR {
                let env = container["env"].as_array().into_iter().flatten();
                let probes = env.filter(|e| e["name"] == "COUNTERSIGN_PROBES").filter_map(|e| e["value"].as_str());
                let read = probes.filter_map(|p| serde_json::from_str::<Map<String, Value>>(p).ok());
                read.for_each(|p| earlier.probes.extend(p));
                earlier.sidecar = container.get("resources").cloned();
            } else {
                earlier.redirect = container.get("resources").cloned();
            }
        }
        all.retain(|c| !is_ours(c));
    }
    if let Some(volumes) = spec["volumes"].as_array_mut() {
        if volumes.iter().any(|v| v["name"] == VOLUME && !(injected && ours.contains(v))) {
            return Err(reserved("volume", VOLUME));
        }
        volumes.retain(|v| v["name"] != VOLUME);
    }
    Ok(earlier)
}

/// Rejects mounts of our volume: it is the node's agent folder, which would be writable in an app's container.
fn refuse_mounts(spec: &Value, lists: &[&str]) -> Result<(), Refused> {
    for container in lists.iter().flat_map(|list| spec[*list].as_array().into_iter().flatten()) {
        let mounts = ["volumeMounts", "volumeDevices"].into_iter().filter_map(|m| container[m].as_array()).flatten();
        if mounts.into_iter().any(|m| m["name"] == VOLUME) {
            let what = format!("the mount of container `{}`", container["name"].as_str().unwrap_or_default());
            return Err(Refused::Reserved { what, name: VOLUME.to_owned() });
        }
    }
    Ok(())
}

fn put_first(spec: &mut Value, list: &str, container: Value) {
    let mut all = vec![container];
    all.extend(spec[list].as_array().cloned().unwrap_or_default());
    spec[list] = Value::Array(all);
}

/// Validates ephemeral containers (`kubectl debug`): they are added after the injection, and their traffic is
/// redirected too. The presence of the sidecar decides, not a label, which may have changed since.
///
/// `before`: the pod as the API server has it. A kubelet starts ephemeral containers before all others, so before the redirect.
/// What else the request says of the pod the API server drops, so it counts for nothing.
pub fn judge_ephemeral(asked: &Value, before: Option<&Value>) -> Result<(), Refused> {
    let mut pod = before.unwrap_or(asked).clone();
    pod["spec"]["ephemeralContainers"] = asked["spec"]["ephemeralContainers"].clone();
    let pod = &pod;
    let lists = ["initContainers", "containers"];
    let mut all = lists.iter().flat_map(|list| pod["spec"][*list].as_array().into_iter().flatten());
    if !all.any(|c| c["name"] == SIDECAR) {
        return Ok(());
    }
    if drops_other_protocols(pod) && !before.is_some_and(has_started) {
        return Err(Refused::Early);
    }
    refuse_targets(&pod["spec"])?;
    refuse_proxy_uid(&pod["spec"], &["ephemeralContainers"])?;
    refuse_mounts(&pod["spec"], &["ephemeralContainers"])
}

/// Takes from the new ephemeral containers of a strict pod what its other containers do not have either. `before`: the pod without
/// them; those that are there already cannot be changed.
pub fn confine_ephemeral(pod: &mut Value, before: Option<&Value>, leave: &Leave, namespace: &str) {
    if leave.is_given(namespace) || !drops_other_protocols(before.unwrap_or(pod)) {
        return;
    }
    let names = |pod: &Value| -> Vec<String> {
        let all = pod["spec"]["ephemeralContainers"].as_array().into_iter().flatten();
        all.filter_map(|c| c["name"].as_str().map(ToOwned::to_owned)).collect()
    };
    let old = before.map(names).unwrap_or_default();
    let all = pod["spec"]["ephemeralContainers"].as_array_mut().into_iter().flatten();
    let new = all.filter(|c| c["name"].as_str().is_some_and(|name| !old.iter().any(|o| o == name)));
    new.for_each(raw_sockets::drop_from);
}

/// Whether a pod was strict when it was made, by the rules of its redirect.
fn drops_other_protocols(pod: &Value) -> bool {
    let all = pod["spec"]["initContainers"].as_array().into_iter().flatten();
    let ours = all.filter(|c| [SIDECAR, REDIRECT].contains(&c["name"].as_str().unwrap_or_default()));
    let mut args = ours.filter_map(|c| c["args"].as_array()).flatten().filter_map(Value::as_str);
    args.any(|arg| arg.contains("--other-protocols=drop"))
}

/// Whether a pod's sidecar has started, by the kubelet's word.
fn has_started(pod: &Value) -> bool {
    let lists = ["initContainerStatuses", "containerStatuses"];
    let mut all = lists.iter().flat_map(|list| pod["status"][*list].as_array().into_iter().flatten());
    all.any(|status| status["name"] == SIDECAR && status["started"] == true)
}

/// Rejects ephemeral containers that see the processes of our own.
fn refuse_targets(spec: &Value) -> Result<(), Refused> {
    let all = spec["ephemeralContainers"].as_array().into_iter().flatten();
    let ours = |c: &&Value| [SIDECAR, REDIRECT].contains(&c["targetContainerName"].as_str().unwrap_or_default());
    match all.into_iter().find(ours) {
        Some(container) => Err(Refused::Target {
            container: container["name"].as_str().unwrap_or_default().to_owned(),
            target: container["targetContainerName"].as_str().unwrap_or_default().to_owned(),
        }),
        None => Ok(()),
    }
}

/// Rejects containers that run as the sidecar's user, because the redirect would not catch their traffic.
fn refuse_proxy_uid(spec: &Value, lists: &[&str]) -> Result<(), Refused> {
    let pod_wide = spec["securityContext"]["runAsUser"].as_u64();
    for list in lists {
        for container in spec[*list].as_array().into_iter().flatten() {
            if container["securityContext"]["runAsUser"].as_u64().or(pod_wide) == Some(PROXY_UID.into()) {
                return Err(Refused::ProxyUid(container["name"].as_str().unwrap_or_default().to_owned()));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
