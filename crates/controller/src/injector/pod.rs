//! Adds redirect and sidecar to a pod. Works on the JSON object as received, so that unknown fields are kept.

use countersign_identity::policy::Mode;
use serde_json::{Map, Value, json};

use super::containers::{proxy, redirect};
use super::namespace::WORDS;
use super::nearest::did_you_mean;
use super::settings::{self, Mistake, Settings};
use super::{Asks, IN_MANIFEST, INJECT, INJECTED, PROXY_UID, REDIRECT, SIDECAR, Sidecar, Surroundings, probes};
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
    /// The pod would never end, because its sidecar keeps running. Holds the restart policy.
    #[error(
        "the pod is to end by itself (restartPolicy {0}), but its sidecar, a plain container, would go on for ever: native sidecars (Kubernetes 1.29, injector.nativeSidecars) end with it; or label it countersign.dev/inject: disabled"
    )]
    NeverEnds(String),
    /// The object is not a pod.
    #[error("the pod has no spec with containers")]
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
    if pod["spec"]["containers"].as_array().is_none_or(Vec::is_empty) {
        return Err(Refused::Malformed);
    }
    let annotations = pod["metadata"]["annotations"].as_object().cloned().unwrap_or_default();
    let in_manifest = annotations.get(INJECTED).and_then(Value::as_str).is_some_and(|by| by.ends_with(IN_MANIFEST))
        && pod["spec"]["volumes"].as_array().is_some_and(|all| all.iter().any(|v| v["name"] == VOLUME));
    let settings = Settings::read(annotations.iter().filter_map(|(k, v)| Some((k.as_str(), v.as_str()?))))?;
    let mode = around.mode.narrowed_by(own_mode(pod)?);
    refuse_exceptions(&settings, mode, sidecar, &around.namespace)?;
    if let Some(policy) = pod["spec"]["restartPolicy"].as_str().filter(|p| *p != "Always" && !sidecar.native) {
        return Err(Refused::NeverEnds(policy.to_owned()));
    }
    let resources = sidecar.resources.narrowed_by(&settings.resources)?;
    let earlier = take_ours(pod, &volumes(sidecar))?;
    refuse_proxy_uid(&pod["spec"], &["initContainers", "containers"])?;
    refuse_mounts(&pod["spec"], &["initContainers", "containers"])?;
    let mut written = earlier.probes;
    for list in ["initContainers", "containers"] {
        let all = pod["spec"][list].as_array_mut().into_iter().flatten();
        all.for_each(|container| probes::rewrite(container, &around.probe_secret, &mut written));
    }
    let spec = &mut pod["spec"];
    let proxy = proxy(sidecar, &settings, &written, resources.sidecar.manifest(earlier.sidecar.as_ref()));
    put_first(spec, if sidecar.native { "initContainers" } else { "containers" }, proxy);
    let redirect = redirect(sidecar, &settings, mode, resources.redirect.manifest(earlier.redirect.as_ref()));
    put_first(spec, "initContainers", redirect);
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
pub fn judge_ephemeral(pod: &Value) -> Result<(), Refused> {
    let lists = ["initContainers", "containers"];
    let mut all = lists.iter().flat_map(|list| pod["spec"][*list].as_array().into_iter().flatten());
    if !all.any(|c| c["name"] == SIDECAR) {
        return Ok(());
    }
    refuse_targets(&pod["spec"])?;
    refuse_proxy_uid(&pod["spec"], &["ephemeralContainers"])?;
    refuse_mounts(&pod["spec"], &["ephemeralContainers"])
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
mod tests {
    use super::super::new_probe_secret;
    use super::*;

    fn sidecar() -> Sidecar {
        Sidecar::new("countersign:1".into())
    }

    fn pod() -> Value {
        json!({
            "metadata": { "name": "web" },
            "spec": {
                "initContainers": [{ "name": "migrate", "image": "m" }],
                "containers": [{ "name": "app", "image": "a", "x-unknown": 1, "readinessProbe": { "httpGet": { "port": 80 } } }],
                "volumes": [{ "name": "data", "emptyDir": {} }],
            },
        })
    }

    /// A namespace that requests injection, in a permissive mesh.
    fn asks() -> Surroundings {
        Surroundings {
            namespace: "shop".into(),
            asks: Asks::Yes,
            mode: Mode::Permissive,
            probe_secret: "s3cret".into(),
        }
    }

    fn asks_not() -> Surroundings {
        Surroundings { asks: Asks::No, ..asks() }
    }

    fn strict() -> Surroundings {
        Surroundings { mode: Mode::Strict, ..asks() }
    }

    fn injected(mut pod: Value) -> Value {
        assert_eq!(inject(&mut pod, &sidecar(), &asks()), Ok(Verdict::Injected));
        pod
    }

    fn annotated(key: &str, value: &str) -> Value {
        let mut pod = pod();
        pod["metadata"]["annotations"] = json!({ key: value });
        pod
    }

    fn names(pod: &Value, list: &str) -> Vec<String> {
        pod["spec"][list].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn redirect_then_sidecar_stand_before_the_apps_own_init_containers() {
        let pod = injected(pod());
        assert_eq!(names(&pod, "initContainers"), [REDIRECT, SIDECAR, "migrate"]);
        assert_eq!(names(&pod, "containers"), ["app"]);
        assert_eq!(pod["spec"]["initContainers"][1]["restartPolicy"], "Always");
        assert_eq!(pod["spec"]["containers"][0]["x-unknown"], 1, "what we do not know stays");
        assert_eq!(pod["spec"]["containers"][0]["readinessProbe"]["httpGet"]["port"], 15020);
        assert_eq!(names(&pod, "volumes"), ["data", VOLUME]);
    }

    #[test]
    fn a_plain_sidecar_stands_first_among_the_containers_and_gates_and_drains() {
        let plain = Sidecar { native: false, ..sidecar() };
        let mut pod = pod();
        assert_eq!(inject(&mut pod, &plain, &asks()), Ok(Verdict::Injected));
        assert_eq!(names(&pod, "initContainers"), [REDIRECT, "migrate"]);
        assert_eq!(names(&pod, "containers"), [SIDECAR, "app"]);
        let proxy = &pod["spec"]["containers"][0];
        assert!(proxy["restartPolicy"].is_null());
        assert_eq!(proxy["lifecycle"]["postStart"]["exec"]["command"], json!(["/countersign", "sidecar-hook", "gate"]));
        assert_eq!(proxy["lifecycle"]["preStop"]["exec"]["command"], json!(["/countersign", "sidecar-hook", "drain"]));
        let once = pod.clone();
        assert_eq!(inject(&mut pod, &plain, &asks()), Ok(Verdict::Injected));
        assert_eq!(pod, once, "twice is as once");
        pod["spec"]["restartPolicy"] = "OnFailure".into();
        assert_eq!(inject(&mut pod, &plain, &asks()), Err(Refused::NeverEnds("OnFailure".into())));
        assert_eq!(inject(&mut pod, &sidecar(), &asks()), Ok(Verdict::Injected));
    }

    #[test]
    fn the_sidecar_needs_no_privilege_and_the_redirect_one() {
        let pod = injected(pod());
        let (redirect, proxy) = (&pod["spec"]["initContainers"][0], &pod["spec"]["initContainers"][1]);
        assert_eq!(redirect["securityContext"]["capabilities"], json!({ "drop": ["ALL"], "add": ["NET_ADMIN"] }));
        assert_eq!(proxy["securityContext"]["capabilities"], json!({ "drop": ["ALL"] }));
        assert_eq!(proxy["securityContext"]["runAsNonRoot"], true);
        for container in [redirect, proxy] {
            assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
            assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
            assert_eq!(container["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        }
        assert_eq!(proxy["volumeMounts"][0]["readOnly"], true);
    }

    #[test]
    fn with_the_cni_plugin_no_container_needs_a_privilege() {
        let by_plugin = Sidecar { cni: true, csi_driver: Some("csi.countersign.dev".into()), ..sidecar() };
        let with = |mut pod: Value| {
            assert_eq!(inject(&mut pod, &by_plugin, &strict()), Ok(Verdict::Injected));
            pod
        };
        let once = with(pod());
        let (redirect, proxy) = (&once["spec"]["initContainers"][0], &once["spec"]["initContainers"][1]);
        assert_eq!(redirect["args"][1], "--validate");
        for container in [redirect, proxy] {
            assert_eq!(container["securityContext"]["capabilities"], json!({ "drop": ["ALL"] }));
            assert_eq!(container["securityContext"]["runAsNonRoot"], true);
            assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
        }
        assert_ne!(redirect["securityContext"]["runAsUser"], proxy["securityContext"]["runAsUser"]);
        let mut without = pod();
        inject(&mut without, &Sidecar { cni: false, ..by_plugin.clone() }, &strict()).unwrap();
        let flags = |pod: &Value| {
            let args = pod["spec"]["initContainers"][0]["args"].as_array().unwrap().clone();
            args.into_iter().filter(|a| a != "--validate" && a != "--by-cgroup").collect::<Vec<_>>()
        };
        assert_eq!(flags(&once), flags(&without), "the plugin reads the same rules");
        assert_eq!(with(once.clone()), once);
        assert_eq!(with(without), once, "a template that was injected before the plugin is changed");
    }

    #[test]
    fn the_sidecars_probe_gets_its_answer_before_it_gives_up() {
        let probe = injected(pod())["spec"]["initContainers"][1]["startupProbe"].clone();
        let path = probe["httpGet"]["path"].as_str().unwrap();
        let wait: u64 = path.strip_prefix("/ready?wait=").unwrap().parse().unwrap();
        assert!(wait > 0 && wait < probe["timeoutSeconds"].as_u64().unwrap(), "{probe}");
    }

    #[test]
    fn a_driver_mounts_the_agents_folder_and_no_host_path_is_left() {
        let by_driver = Sidecar { csi_driver: Some("csi.countersign.dev".into()), ..sidecar() };
        let volume = json!({ "name": VOLUME, "csi": { "driver": "csi.countersign.dev", "readOnly": true } });
        let with = |mut pod: Value| {
            assert_eq!(inject(&mut pod, &by_driver, &asks()), Ok(Verdict::Injected));
            pod
        };
        let once = with(pod());
        assert_eq!(once["spec"]["volumes"][1], volume);
        assert!(!once.to_string().contains("hostPath"));
        assert_eq!(with(once.clone()), once, "twice is as once");
        assert_eq!(with(injected(pod())), once, "an injection of before the driver is replaced");
        // Another driver's volume of this name is not ours, whatever the pod claims.
        let mut foreign = once;
        foreign["spec"]["volumes"][1]["csi"]["driver"] = "csi.example.org".into();
        assert!(matches!(inject(&mut foreign, &by_driver, &asks()), Err(Refused::Reserved { .. })));
    }

    #[test]
    fn injecting_again_changes_nothing() {
        let once = injected(pod());
        assert_eq!(injected(once.clone()), once);
        // A reinvocation brings a new secret; the probes keep the first one, which the sidecar knows.
        let mut again = once.clone();
        let other = Surroundings { probe_secret: new_probe_secret(), ..asks() };
        assert_eq!(inject(&mut again, &sidecar(), &other), Ok(Verdict::Injected));
        assert_eq!(again, once);
        assert_eq!(once["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"], "/probe/s3cret/app/readiness");
        assert!(new_probe_secret().len() == 32 && new_probe_secret() != new_probe_secret());
    }

    #[test]
    fn a_limit_ranges_defaults_survive_a_reinvocation_and_no_annotation_is_passed_over() {
        let mut limited = injected(annotated("countersign.dev/memory-limit", "64Mi"));
        // What the API server adds between two calls of the webhook.
        let defaults = json!({ "limits": { "cpu": "1", "memory": "64Mi" }, "requests": { "cpu": "1" } });
        for n in [0, 1] {
            limited["spec"]["initContainers"][n]["resources"] = defaults.clone();
        }
        assert_eq!(injected(limited.clone()), limited);
        limited["metadata"]["annotations"]["countersign.dev/redirect-cpu-limit"] = "2".into();
        let again = injected(limited);
        assert_eq!(again["spec"]["initContainers"][0]["resources"]["limits"]["cpu"], "2");
        assert_eq!(again["spec"]["initContainers"][1]["resources"]["limits"]["cpu"], "1");
        let lots = annotated("countersign.dev/redirect-memory-limit", "lots");
        let said = inject(&mut lots.clone(), &sidecar(), &asks()).unwrap_err().to_string();
        assert!(said.starts_with("annotation countersign.dev/redirect-memory-limit: `lots` is no quantity"), "{said}");
    }

    #[test]
    fn the_stricter_of_a_pods_two_modes_counts_and_one_that_is_none_is_refused() {
        let moded = |label: &str| {
            let mut pod = annotated(MODE, "permissive");
            pod["metadata"]["labels"] = json!({ MODE: label });
            let injected = inject(&mut pod, &sidecar(), &asks());
            injected.map(|_| pod["spec"]["initContainers"][0]["args"].to_string().contains("--other-protocols=drop"))
        };
        assert_eq!((moded("strict"), moded("off")), (Ok(true), Ok(false)));
        assert!(moded("stict").unwrap_err().to_string().ends_with("did you mean `strict`?"));
    }

    #[test]
    fn the_pods_label_wins_over_its_namespace() {
        let mut labelled = pod();
        labelled["metadata"]["labels"] = json!({ INJECT: "disabled" });
        let before = labelled.clone();
        assert!(matches!(inject(&mut labelled, &sidecar(), &asks()), Ok(Verdict::Left(_))));
        assert_eq!(labelled, before);
        labelled["metadata"]["labels"] = json!({ INJECT: "enabled" });
        assert_eq!(inject(&mut labelled, &sidecar(), &asks_not()), Ok(Verdict::Injected));
        assert!(matches!(inject(&mut pod(), &sidecar(), &asks_not()), Ok(Verdict::Left(_))));
        let mut host = pod();
        host["spec"]["hostNetwork"] = true.into();
        assert!(matches!(inject(&mut host, &sidecar(), &asks()), Ok(Verdict::Left(_))));
    }

    #[test]
    fn a_container_under_the_sidecars_user_is_refused() {
        let mut one = pod();
        one["spec"]["containers"][0]["securityContext"] = json!({ "runAsUser": 2102 });
        assert_eq!(inject(&mut one, &sidecar(), &asks()), Err(Refused::ProxyUid("app".into())));
        let mut wide = pod();
        wide["spec"]["securityContext"] = json!({ "runAsUser": 2102 });
        assert_eq!(inject(&mut wide, &sidecar(), &asks()), Err(Refused::ProxyUid("migrate".into())));
        wide["spec"]["initContainers"][0]["securityContext"] = json!({ "runAsUser": 1 });
        wide["spec"]["containers"][0]["securityContext"] = json!({ "runAsUser": 1 });
        assert_eq!(inject(&mut wide, &sidecar(), &asks()), Ok(Verdict::Injected));
    }

    #[test]
    fn an_ephemeral_container_under_the_sidecars_user_or_beside_its_processes_is_refused() {
        let mut pod = injected(pod());
        pod["spec"]["ephemeralContainers"] = json!([{ "name": "debug", "securityContext": { "runAsUser": 1 } }]);
        assert_eq!(judge_ephemeral(&pod), Ok(()), "the sidecar itself is no offence");
        for (target, is_refused) in [("app", false), (SIDECAR, true), (REDIRECT, true)] {
            pod["spec"]["ephemeralContainers"][0]["targetContainerName"] = target.into();
            assert_eq!(judge_ephemeral(&pod).is_err(), is_refused, "{target}");
        }
        pod["spec"]["ephemeralContainers"][0]["targetContainerName"] = Value::Null;
        pod["spec"]["ephemeralContainers"][0]["securityContext"]["runAsUser"] = 2102.into();
        assert_eq!(judge_ephemeral(&pod), Err(Refused::ProxyUid("debug".into())));
    }

    #[test]
    fn annotations_reach_redirect_and_sidecar() {
        let mut asked = pod();
        asked["metadata"]["annotations"] = json!({
            "countersign.dev/ignore-inbound-ports": "9090, 9091", "countersign.dev/ignore-outbound-cidrs": "10.8.0.0/16",
            "countersign.dev/log-level": "debug", "countersign.dev/memory-limit": "64Mi",
        });
        let asked = injected(asked);
        let args = asked["spec"]["initContainers"][0]["args"].to_string();
        assert!(args.contains("--exclude-inbound-ports=15020,9090,9091"), "{args}");
        assert!(args.contains("--exclude-outbound-ports=53\""), "{args}");
        assert!(args.contains("--exclude-outbound-cidrs=10.8.0.0/16"), "{args}");
        let proxy = &asked["spec"]["initContainers"][1];
        assert!(proxy["args"].to_string().contains("--log=debug"));
        assert_eq!(proxy["resources"]["limits"]["memory"], "64Mi");
        assert_eq!(asked["spec"]["initContainers"][0]["resources"], json!({}), "each container has its own");
        let mut wrong = pod();
        wrong["metadata"]["annotations"] = json!({ "countersign.dev/mode": "tight" });
        let said = inject(&mut wrong, &sidecar(), &asks()).unwrap_err().to_string();
        assert!(said.contains("`tight` is no mode"), "{said}");
    }

    #[test]
    fn what_is_in_a_pods_own_specification_stays_marked_until_it_is_taken_out() {
        let mut pod = pod();
        inject(&mut pod, &sidecar(), &asks()).unwrap();
        let version = pod["metadata"]["annotations"][INJECTED].as_str().unwrap().to_owned();
        assert!(!version.ends_with(IN_MANIFEST), "{version}");
        let marked = format!("{version}{IN_MANIFEST}");
        pod["metadata"]["annotations"][INJECTED] = marked.clone().into();
        inject(&mut pod, &sidecar(), &asks()).unwrap();
        assert_eq!(pod["metadata"]["annotations"][INJECTED], marked);
        let mut without = self::pod();
        without["metadata"]["annotations"] = json!({ INJECTED: marked });
        inject(&mut without, &sidecar(), &asks()).unwrap();
        assert_eq!(without["metadata"]["annotations"][INJECTED], version, "the annotation alone is no volume");
    }

    #[test]
    fn a_name_of_ours_on_something_of_the_apps_own_is_refused() {
        let said = |pod: Value| inject(&mut pod.clone(), &sidecar(), &asks()).unwrap_err().to_string();
        let mut own_volume = pod();
        own_volume["spec"]["volumes"] = json!([{ "name": VOLUME, "emptyDir": {} }]);
        own_volume["spec"]["containers"][0]["volumeMounts"] = json!([{ "name": VOLUME, "mountPath": "/x" }]);
        assert!(said(own_volume.clone()).starts_with("volume `countersign-agent`"));
        own_volume["metadata"]["annotations"] = json!({ INJECTED: "0.1.0" });
        assert!(said(own_volume.clone()).starts_with("volume `countersign-agent`"), "an annotation is easily written");
        own_volume["spec"]["volumes"] = json!(volumes(&sidecar()));
        assert!(said(own_volume).starts_with("the mount of container `app` `countersign-agent`"));
        for list in ["containers", "initContainers"] {
            let mut mount = pod();
            mount["spec"][list][0]["volumeMounts"] = json!([{ "name": VOLUME, "mountPath": "/x" }]);
            assert!(said(mount).contains("`countersign-agent` has a name that the injection uses"));
            for name in [SIDECAR, REDIRECT] {
                let mut container = pod();
                container["spec"][list][0]["name"] = name.into();
                assert_eq!(
                    said(container),
                    format!("container `{name}` has a name that the injection uses: rename it")
                );
            }
        }
    }

    #[test]
    fn a_label_that_means_nothing_is_refused_with_what_was_meant() {
        for value in ["enable", "true"] {
            let mut labelled = pod();
            labelled["metadata"]["labels"] = json!({ INJECT: value });
            for around in [asks(), asks_not()] {
                let said = inject(&mut labelled.clone(), &sidecar(), &around).unwrap_err().to_string();
                assert_eq!(
                    said,
                    format!(
                        "countersign.dev/inject: `{value}` is neither enabled nor disabled; did you mean `enabled`?"
                    )
                );
            }
        }
        let unclear = Surroundings { asks: Asks::Unclear, ..asks() };
        assert_eq!(inject(&mut pod(), &sidecar(), &unclear), Err(Refused::UnclearNamespace("shop".into())));
        let mut clear = pod();
        clear["metadata"]["labels"] = json!({ INJECT: "disabled" });
        assert!(matches!(inject(&mut clear, &sidecar(), &unclear), Ok(Verdict::Left(_))));
        clear["metadata"]["labels"] = json!({ INJECT: "enabled" });
        assert_eq!(inject(&mut clear, &sidecar(), &unclear), Ok(Verdict::Injected));
    }

    #[test]
    fn exceptions_of_a_strict_mesh_need_the_administrators_leave() {
        let leave = Sidecar { leave: super::super::Leave::of(["shop".to_owned()]), ..sidecar() };
        for (key, value) in [
            ("ignore-inbound-ports", "8080"),
            ("ignore-outbound-ports", "5432"),
            ("ignore-inbound-cidrs", "10.0.0.0/8"),
            ("ignore-outbound-cidrs", "10.0.0.0/8"),
            ("allow-udp-ports", "4433"),
            ("allow-other-cidrs", "10.0.0.0/8"),
        ] {
            let pod = || annotated(&format!("countersign.dev/{key}"), value);
            assert_eq!(inject(&mut pod(), &sidecar(), &asks()), Ok(Verdict::Injected), "{key}");
            let said = inject(&mut pod(), &sidecar(), &strict()).unwrap_err().to_string();
            assert!(said.contains(key) && said.contains("mesh.allowExceptions"), "{said}");
            assert_eq!(inject(&mut pod(), &leave, &strict()), Ok(Verdict::Injected), "{key}");
            let mut own = pod();
            own["metadata"]["annotations"][MODE] = "strict".into();
            assert!(inject(&mut own, &sidecar(), &asks()).is_err(), "a pod's own strict is one too");
            let elsewhere = Surroundings { namespace: "other".into(), ..strict() };
            assert!(inject(&mut pod(), &leave, &elsewhere).is_err());
        }
        let everything = || annotated("countersign.dev/ignore-inbound-cidrs", "0.0.0.0/0");
        assert!(inject(&mut everything(), &sidecar(), &asks()).is_err(), "out of the mesh altogether, in any mode");
        assert_eq!(inject(&mut everything(), &leave, &strict()), Ok(Verdict::Injected));
        let nobody = Sidecar { leave: super::super::Leave::of([" ".to_owned()]), ..sidecar() };
        assert!(inject(&mut everything(), &nobody, &asks()).is_err(), "an empty list is nobody");
        let all = Sidecar { leave: super::super::Leave::of(["*".to_owned()]), ..sidecar() };
        assert_eq!(inject(&mut everything(), &all, &strict()), Ok(Verdict::Injected));
    }

    #[test]
    fn other_protocols_are_dropped_where_the_pod_is_strict() {
        let args = |around: &Surroundings, mut pod: Value| {
            let leave = Sidecar { leave: super::super::Leave::of(["*".to_owned()]), ..sidecar() };
            inject(&mut pod, &leave, around).unwrap();
            pod["spec"]["initContainers"][0]["args"].to_string()
        };
        assert!(!args(&asks(), pod()).contains("--other-protocols"));
        assert!(args(&strict(), pod()).contains("--other-protocols=drop"));
        assert!(args(&asks(), annotated(MODE, "strict")).contains("--other-protocols=drop"));
        assert!(args(&strict(), annotated(MODE, "off")).contains("--other-protocols=drop"), "strict is not weakened");
        let named = annotated("countersign.dev/allow-udp-ports", "4433");
        assert!(args(&strict(), named.clone()).contains("--allow-udp-ports=4433"));
        assert!(!args(&asks(), named).contains("--allow-udp-ports"), "the redirect knows it with the other flag alone");
        assert!(args(&asks(), pod()).contains("--in-pod"));
    }

    #[test]
    fn an_ephemeral_container_is_judged_by_the_sidecar_and_not_by_a_label() {
        let mut pod = injected(pod());
        pod["metadata"]["labels"] = json!({ INJECT: "disabled" });
        pod["spec"]["ephemeralContainers"] = json!([{ "name": "debug", "securityContext": { "runAsUser": 2102 } }]);
        assert_eq!(judge_ephemeral(&pod), Err(Refused::ProxyUid("debug".into())));
        pod["spec"]["ephemeralContainers"] =
            json!([{ "name": "debug", "volumeMounts": [{ "name": VOLUME, "mountPath": "/x" }] }]);
        assert!(judge_ephemeral(&pod).unwrap_err().to_string().contains("the mount of container `debug`"));
        pod["spec"]["initContainers"] = json!([]);
        assert_eq!(judge_ephemeral(&pod), Ok(()), "a pod without a sidecar has nothing to bypass");
    }
}
