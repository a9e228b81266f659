//! Puts redirect and sidecar into a pod. Works on the object as it came, so that fields that we do not know stay.

use serde_json::{Map, Value, json};

use super::settings::{Mistake, Settings};
use super::{INJECT, INJECTED, PROXY_UID, REDIRECT, SIDECAR, Sidecar, probes};

/// The volume with the agent's socket.
const VOLUME: &str = "countersign-agent";
/// Where the sidecar finds the agent's socket.
const SOCKET_DIR: &str = "/run/countersign/agent";

/// Why a pod is not let in.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refused {
    /// An annotation.
    #[error(transparent)]
    Annotation(#[from] Mistake),
    /// It would bypass the sidecar.
    #[error(
        "container `{0}` runs as UID 2102, which is the sidecar's: its traffic would bypass the mesh; give it another runAsUser"
    )]
    ProxyUid(String),
    /// It would never end.
    #[error(
        "the pod is to end by itself (restartPolicy {0}), but its sidecar, a plain container, would go on for ever: native sidecars (Kubernetes 1.29, injector.nativeSidecars) end with it; or label it countersign.dev/inject: disabled"
    )]
    NeverEnds(String),
    /// No pod.
    #[error("the pod has no spec with containers")]
    Malformed,
}

/// What became of a pod.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is meshed.
    Injected,
    /// It stays as it is, for this reason.
    Left(&'static str),
}

/// Injects into a pod, or a pod template: an object with `metadata` and `spec`. `namespace_enabled`: its namespace asks for it.
pub fn inject(pod: &mut Value, sidecar: &Sidecar, namespace_enabled: bool) -> Result<Verdict, Refused> {
    let label = pod["metadata"]["labels"][INJECT].as_str().or(pod["metadata"]["annotations"][INJECT].as_str());
    match (label, namespace_enabled) {
        (Some("disabled"), _) => return Ok(Verdict::Left("the pod is labelled countersign.dev/inject: disabled")),
        (Some("enabled"), _) | (None, true) => {}
        (None, false) => {
            return Ok(Verdict::Left("neither the pod nor its namespace is labelled countersign.dev/inject: enabled"));
        }
        (Some(_), _) => return Ok(Verdict::Left("countersign.dev/inject is neither enabled nor disabled")),
    }
    if pod["spec"]["hostNetwork"].as_bool() == Some(true) {
        return Ok(Verdict::Left("the pod uses its node's network, where a redirect would catch the node's traffic"));
    }
    if pod["spec"]["containers"].as_array().is_none_or(Vec::is_empty) {
        return Err(Refused::Malformed);
    }
    let annotations = pod["metadata"]["annotations"].as_object().cloned().unwrap_or_default();
    let settings = Settings::read(annotations.iter().filter_map(|(k, v)| Some((k.as_str(), v.as_str()?))))?;
    if let Some(policy) = pod["spec"]["restartPolicy"].as_str().filter(|p| *p != "Always" && !sidecar.native) {
        return Err(Refused::NeverEnds(policy.to_owned()));
    }
    let before = take_ours(&mut pod["spec"]);
    refuse_proxy_uid(&pod["spec"], &["initContainers", "containers"])?;
    let mut written = before;
    for list in ["initContainers", "containers"] {
        let all = pod["spec"][list].as_array_mut().into_iter().flatten();
        all.for_each(|container| probes::rewrite(container, &mut written));
    }
    let spec = &mut pod["spec"];
    let proxy = proxy(sidecar, &settings, &written);
    put_first(spec, if sidecar.native { "initContainers" } else { "containers" }, proxy);
    put_first(spec, "initContainers", redirect(sidecar, &settings));
    let mut volumes = spec["volumes"].as_array().cloned().unwrap_or_default();
    volumes.push(json!({ "name": VOLUME, "hostPath": { "path": sidecar.agent_dir, "type": "DirectoryOrCreate" } }));
    spec["volumes"] = Value::Array(volumes);
    if !pod["metadata"]["annotations"].is_object() {
        pod["metadata"]["annotations"] = json!({});
    }
    pod["metadata"]["annotations"][INJECTED] = env!("CARGO_PKG_VERSION").into();
    Ok(Verdict::Injected)
}

/// Takes out what an earlier injection put in, whoever put it there; returns the probes that it wrote down.
fn take_ours(spec: &mut Value) -> Map<String, Value> {
    let mut written = Map::new();
    for list in ["initContainers", "containers"] {
        let Some(all) = spec[list].as_array_mut() else { continue };
        all.retain(|container| {
            let name = container["name"].as_str().unwrap_or_default();
            if name == SIDECAR {
                let env = container["env"].as_array().into_iter().flatten();
                let probes = env.filter(|e| e["name"] == "COUNTERSIGN_PROBES").filter_map(|e| e["value"].as_str());
                let read = probes.filter_map(|p| serde_json::from_str::<Map<String, Value>>(p).ok());
                read.for_each(|p| written.extend(p));
            }
            name != SIDECAR && name != REDIRECT
        });
    }
    if let Some(volumes) = spec["volumes"].as_array_mut() {
        volumes.retain(|v| v["name"] != VOLUME);
    }
    written
}

fn put_first(spec: &mut Value, list: &str, container: Value) {
    let mut all = vec![container];
    all.extend(spec[list].as_array().cloned().unwrap_or_default());
    spec[list] = Value::Array(all);
}

/// Judges a pod that is given ephemeral containers (`kubectl debug`): they come after the injection, and are caught as well.
pub fn judge_ephemeral(pod: &Value) -> Result<(), Refused> {
    refuse_proxy_uid(&pod["spec"], &["ephemeralContainers"])
}

/// A container under the sidecar's user would not be caught by the redirect.
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

fn joined<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Installs the redirect, before anything else of the pod runs.
fn redirect(sidecar: &Sidecar, settings: &Settings) -> Value {
    let mut args = vec!["redirect".to_owned(), format!("--proxy-uid={PROXY_UID}")];
    let mut list = |flag: &str, value: String| {
        if !value.is_empty() {
            args.push(format!("{flag}={value}"));
        }
    };
    let ports = |always: u16, more: &[u16]| joined(&[&[always], more].concat());
    list("--exclude-inbound-ports", ports(15020, &settings.inbound_ports));
    list("--exclude-outbound-ports", ports(53, &settings.outbound_ports));
    list("--exclude-inbound-cidrs", joined(&settings.inbound_cidrs));
    list("--exclude-outbound-cidrs", joined(&settings.outbound_cidrs));
    json!({
        "name": REDIRECT, "image": sidecar.image, "imagePullPolicy": sidecar.pull_policy, "args": args,
        "securityContext": {
            "runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": false, "privileged": false, "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN"] },
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "resources": { "requests": { "cpu": "10m", "memory": "16Mi" }, "limits": { "memory": "64Mi" } },
    })
}

/// The sidecar. A native one is an init container that goes on: it is there before the app's own init containers and after
/// the app's end. A plain one holds back the containers behind it until it is ready, and ends when they have gone.
fn proxy(sidecar: &Sidecar, settings: &Settings, written: &Map<String, Value>) -> Value {
    let from = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let mut env = vec![
        from("POD_NAME", "metadata.name"),
        from("POD_NAMESPACE", "metadata.namespace"),
        from("POD_UID", "metadata.uid"),
        from("NODE_NAME", "spec.nodeName"),
    ];
    if !written.is_empty() {
        env.push(json!({ "name": "COUNTERSIGN_PROBES", "value": Value::Object(written.clone()).to_string() }));
    }
    let mut resources = json!({ "requests": { "cpu": "10m", "memory": "16Mi" }, "limits": { "memory": "256Mi" } });
    for ((kind, what), value) in &settings.resources {
        resources[*kind][*what] = value.as_str().into();
    }
    let level = settings.log_level.as_ref().unwrap_or(&sidecar.log_level);
    let get = |path: &str| json!({ "path": path, "port": 15020 });
    let hook = |what: &str| json!({ "exec": { "command": ["/countersign", "sidecar-hook", what] } });
    let (key, kind) = if sidecar.native {
        ("restartPolicy", "Always".into())
    } else {
        ("lifecycle", json!({ "postStart": hook("gate"), "preStop": hook("drain") }))
    };
    json!({
        "name": SIDECAR, "image": sidecar.image, "imagePullPolicy": sidecar.pull_policy, key: kind,
        "args": ["proxy", format!("--agent-socket={SOCKET_DIR}/agent.sock"), format!("--log={level}")],
        "env": env,
        "ports": [{ "name": "countersign", "containerPort": 15008 }, { "name": "cs-http", "containerPort": 15020 }],
        "startupProbe": { "httpGet": get("/ready"), "periodSeconds": 1, "timeoutSeconds": 3, "failureThreshold": 300 },
        "securityContext": {
            "runAsUser": PROXY_UID, "runAsGroup": PROXY_UID, "runAsNonRoot": true, "privileged": false,
            "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] },
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "resources": resources,
        "volumeMounts": [{ "name": VOLUME, "mountPath": SOCKET_DIR, "readOnly": true }],
    })
}

#[cfg(test)]
mod tests {
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

    fn injected(mut pod: Value) -> Value {
        assert_eq!(inject(&mut pod, &sidecar(), true), Ok(Verdict::Injected));
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
        assert_eq!(inject(&mut pod, &plain, true), Ok(Verdict::Injected));
        assert_eq!(names(&pod, "initContainers"), [REDIRECT, "migrate"]);
        assert_eq!(names(&pod, "containers"), [SIDECAR, "app"]);
        let proxy = &pod["spec"]["containers"][0];
        assert!(proxy["restartPolicy"].is_null());
        assert_eq!(proxy["lifecycle"]["postStart"]["exec"]["command"], json!(["/countersign", "sidecar-hook", "gate"]));
        assert_eq!(proxy["lifecycle"]["preStop"]["exec"]["command"], json!(["/countersign", "sidecar-hook", "drain"]));
        let once = pod.clone();
        assert_eq!(inject(&mut pod, &plain, true), Ok(Verdict::Injected));
        assert_eq!(pod, once, "twice is as once");
        pod["spec"]["restartPolicy"] = "OnFailure".into();
        assert_eq!(inject(&mut pod, &plain, true), Err(Refused::NeverEnds("OnFailure".into())));
        assert_eq!(inject(&mut pod, &sidecar(), true), Ok(Verdict::Injected));
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
    fn injecting_again_changes_nothing() {
        let once = injected(pod());
        assert_eq!(injected(once.clone()), once);
    }

    #[test]
    fn the_pods_label_wins_over_its_namespace() {
        let mut labelled = pod();
        labelled["metadata"]["labels"] = json!({ INJECT: "disabled" });
        let before = labelled.clone();
        assert!(matches!(inject(&mut labelled, &sidecar(), true), Ok(Verdict::Left(_))));
        assert_eq!(labelled, before);
        labelled["metadata"]["labels"] = json!({ INJECT: "enabled" });
        assert_eq!(inject(&mut labelled, &sidecar(), false), Ok(Verdict::Injected));
        assert!(matches!(inject(&mut pod(), &sidecar(), false), Ok(Verdict::Left(_))));
        let mut host = pod();
        host["spec"]["hostNetwork"] = true.into();
        assert!(matches!(inject(&mut host, &sidecar(), true), Ok(Verdict::Left(_))));
    }

    #[test]
    fn a_container_under_the_sidecars_user_is_refused() {
        let mut one = pod();
        one["spec"]["containers"][0]["securityContext"] = json!({ "runAsUser": 2102 });
        assert_eq!(inject(&mut one, &sidecar(), true), Err(Refused::ProxyUid("app".into())));
        let mut wide = pod();
        wide["spec"]["securityContext"] = json!({ "runAsUser": 2102 });
        assert_eq!(inject(&mut wide, &sidecar(), true), Err(Refused::ProxyUid("migrate".into())));
        wide["spec"]["initContainers"][0]["securityContext"] = json!({ "runAsUser": 1 });
        wide["spec"]["containers"][0]["securityContext"] = json!({ "runAsUser": 1 });
        assert_eq!(inject(&mut wide, &sidecar(), true), Ok(Verdict::Injected));
    }

    #[test]
    fn an_ephemeral_container_under_the_sidecars_user_is_refused() {
        let mut pod = injected(pod());
        pod["spec"]["ephemeralContainers"] = json!([{ "name": "debug", "securityContext": { "runAsUser": 1 } }]);
        assert_eq!(judge_ephemeral(&pod), Ok(()), "the sidecar itself is no offence");
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
        let mut wrong = pod();
        wrong["metadata"]["annotations"] = json!({ "countersign.dev/mode": "tight" });
        let said = inject(&mut wrong, &sidecar(), true).unwrap_err().to_string();
        assert!(said.contains("`tight` is no mode"), "{said}");
    }
}
