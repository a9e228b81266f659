//! The containers that the injection adds: redirect and sidecar.

use countersign_identity::policy::Mode;
use serde_json::{Map, Value, json};

use super::pod::VOLUME;
use super::settings::{Settings, joined};
use super::{PROXY_UID, REDIRECT, SIDECAR, Sidecar, VALIDATOR_UID};

/// Folder of the agent's socket in the sidecar, and of the socket where the node's CNI component answers sidecars.
const SOCKET_DIR: &str = "/run/countersign/agent";

/// The flags of a pod's redirect. They decide about other protocols for the pod's life, because the sidecar, which
/// learns of changes of the mode, may not change rules.
pub fn redirect_flags(sidecar: &Sidecar, settings: &Settings, mode: Mode) -> Vec<String> {
    let mut flags = vec![format!("--proxy-uid={PROXY_UID}"), "--in-pod".to_owned()];
    if sidecar.cni {
        flags.push("--by-cgroup".to_owned());
    }
    let mut list = |flag: &str, value: String| {
        if !value.is_empty() {
            flags.push(format!("{flag}={value}"));
        }
    };
    let ports = |always: u16, more: &[u16]| joined(&[&[always], more].concat());
    list("--exclude-inbound-ports", ports(15020, &settings.inbound_ports));
    list("--exclude-outbound-ports", ports(53, &settings.outbound_ports));
    list("--exclude-inbound-cidrs", joined(&settings.inbound_cidrs));
    list("--exclude-outbound-cidrs", joined(&settings.outbound_cidrs));
    if mode == Mode::Strict {
        list("--other-protocols", "drop".to_owned());
        list("--allow-udp-ports", joined(&settings.udp_ports));
        list("--allow-other-cidrs", joined(&settings.other_cidrs));
    }
    flags
}

/// The init container that installs the redirect before anything else in the pod runs. With the CNI plugin it waits for
/// the plugin to have done so. `None` where the sidecar waits itself, before all other containers.
pub fn redirect(sidecar: &Sidecar, flags: &[String], resources: Value) -> Option<Value> {
    if sidecar.waits_for_redirect() {
        return None;
    }
    let validate = sidecar.cni.then(|| "--validate".to_owned());
    let args: Vec<String> = ["redirect".to_owned()].into_iter().chain(validate).chain(flags.iter().cloned()).collect();
    let installing = json!({
        "runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": false, "privileged": false, "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN"] },
        "seccompProfile": { "type": "RuntimeDefault" },
    });
    Some(json!({
        "name": REDIRECT, "image": sidecar.image, "imagePullPolicy": sidecar.pull_policy, "args": args,
        "securityContext": if sidecar.cni { confined(VALIDATOR_UID) } else { installing },
        "resources": resources,
    }))
}

/// What Pod Security `restricted` asks of a container, and no more.
fn confined(uid: u32) -> Value {
    json!({
        "runAsUser": uid, "runAsGroup": uid, "runAsNonRoot": true, "privileged": false, "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] }, "seccompProfile": { "type": "RuntimeDefault" },
    })
}

/// The sidecar's container. A native one is an init container that keeps running: it starts before the app's init
/// containers and ends after the app. A plain one blocks the containers after it until it is ready, and ends once they
/// have ended. `flags`: the redirect's.
pub fn proxy(
    sidecar: &Sidecar,
    settings: &Settings,
    flags: &[String],
    written: &Map<String, Value>,
    resources: Value,
) -> Value {
    let from = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let mut env = vec![
        from("POD_NAME", "metadata.name"),
        from("POD_NAMESPACE", "metadata.namespace"),
        from("POD_UID", "metadata.uid"),
        from("NODE_NAME", "spec.nodeName"),
        // Whose probes strangers do not crowd out.
        from("HOST_IP", "status.hostIP"),
    ];
    if !written.is_empty() {
        env.push(json!({ "name": "COUNTERSIGN_PROBES", "value": Value::Object(written.clone()).to_string() }));
    }
    let level = settings.log_level.as_ref().unwrap_or(&sidecar.log_level);
    let mut args = vec!["proxy".to_owned(), format!("--agent-socket={SOCKET_DIR}/agent.sock")];
    if sidecar.cni {
        args.push(format!("--cni-socket={SOCKET_DIR}/sidecars.sock"));
    }
    if sidecar.waits_for_redirect() {
        args.push(format!("--redirect={}", flags.join(" ")));
    }
    args.push(format!("--log={level}"));
    let get = |path: &str| json!({ "path": path, "port": 15020 });
    let hook = |what: &str| json!({ "exec": { "command": ["/countersign", "sidecar-hook", what] } });
    let (key, kind) = if sidecar.native {
        ("restartPolicy", "Always".into())
    } else {
        ("lifecycle", json!({ "postStart": hook("gate"), "preStop": hook("drain") }))
    };
    json!({
        "name": SIDECAR, "image": sidecar.image, "imagePullPolicy": sidecar.pull_policy, key: kind,
        "args": args,
        "env": env,
        "ports": [{ "name": "countersign", "containerPort": 15008 }, { "name": "cs-http", "containerPort": 15020 }],
        // The sidecar holds the answer until it is ready: a probe that fails leaves a warning at the pod.
        "startupProbe": {
            "httpGet": get("/ready?wait=28"), "periodSeconds": 1, "timeoutSeconds": 30, "failureThreshold": 300,
        },
        "securityContext": confined(PROXY_UID),
        "resources": resources,
        "volumeMounts": [{ "name": VOLUME, "mountPath": SOCKET_DIR, "readOnly": true }],
    })
}
