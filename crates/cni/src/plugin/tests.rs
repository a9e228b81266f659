//! The plugin as a runtime runs it, with a component behind a real socket.

use std::path::PathBuf;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::installer::Installer;
use crate::metrics::Metrics;
use crate::requests::Service;
use crate::testing::{ASKERS, Namespace, UID, api_server, meshed, not_found, plain};

/// A component whose API server knows this pod, or none.
struct Component {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Component {
    fn start(pod: Option<Value>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (socket, stop) = (dir.path().join("cni.sock"), CancellationToken::new());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (path, end) = (socket.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (client, _) = api_server(move |path| match &pod {
                    Some(pod) if path == "/api/v1/namespaces/shop/pods/web-0" => (200, pod.clone()),
                    _ => not_found(),
                });
                let listener = countersign_api::transport::bind_unix(&path, 0o600).unwrap();
                ready.send(()).unwrap();
                let installer = Installer::new(ASKERS, false);
                let node = "n1".parse().unwrap();
                Service::new(client, node, installer, Metrics::default().into(), true).serve(listener, end).await;
            });
        });
        is_ready.recv().unwrap();
        Self { _dir: dir, socket, stop, thread: Some(thread) }
    }

    fn config(&self) -> Value {
        config(&self.socket)
    }
}

impl Drop for Component {
    fn drop(&mut self) {
        self.stop.cancel();
        let _ = self.thread.take().unwrap().join();
    }
}

/// The configuration that libcni makes for a plugin of a list.
fn config(socket: &Path) -> Value {
    json!({
        "cniVersion": "0.4.0", "name": "pods", "type": NAME, "capabilities": { "dns": true }, "socket": socket,
        "runtimeConfig": { "dns": { "Servers": ["10.96.0.10"], "Searches": ["svc"], "Options": null } },
        "prevResult": { "cniVersion": "0.4.0", "ips": [{ "version": "4", "address": "10.0.0.2/24" }] },
    })
}

fn environment(command: &str, netns: &Path) -> Environment {
    let arguments = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID={UID}");
    Environment {
        command: command.into(),
        container: Some("c1".into()),
        netns: Some(netns.display().to_string()),
        interface: Some("eth0".into()),
        arguments: Some(arguments),
    }
}

fn call(environment: &Environment, config: &Value) -> Outcome {
    run(environment, &mut config.to_string().as_bytes())
}

fn strict() -> Value {
    let mut pod = meshed();
    pod["spec"]["initContainers"][0]["args"][2] = "--redirect=--proxy-uid=2102 --other-protocols=drop".into();
    pod
}

#[test]
fn a_meshed_pod_gets_its_redirect_with_the_runtimes_resolvers() {
    let Some(ns) = Namespace::new("add") else { return };
    let component = Component::start(Some(strict()));
    let missing = call(&environment("CHECK", ns.path()), &component.config());
    assert_eq!(missing.output.unwrap()["msg"], "the redirect is not in force");
    for _ in 0..2 {
        let added = call(&environment("ADD", ns.path()), &component.config());
        assert_eq!((added.success, added.warning), (true, None));
        assert_eq!(added.output.unwrap(), component.config()["prevResult"], "what the plugin before said");
    }
    let order = (ASKERS.read)(&["--other-protocols=drop".into()], &["10.96.0.10".parse().unwrap()].into());
    assert!(ns.has_redirect(&order.unwrap().redirect));
    assert_eq!(call(&environment("CHECK", ns.path()), &component.config()), Outcome::silent());
    let mut other = component.config();
    other["runtimeConfig"]["dns"]["Servers"] = json!(["10.96.0.11"]);
    let differs = call(&environment("CHECK", ns.path()), &other);
    assert!(differs.success && differs.warning.unwrap().contains("another redirect"), "a running pod is not broken");
}

#[test]
fn a_strict_pod_with_its_nodes_resolvers_is_left_to_be_repaired_where_the_runtime_does_not_name_them() {
    let Some(ns) = Namespace::new("later") else { return };
    let mut pod = strict();
    pod["spec"]["dnsPolicy"] = "Default".into();
    let component = Component::start(Some(pod));
    let mut unnamed = component.config();
    unnamed["runtimeConfig"] = Value::Null;
    let passed = call(&environment("ADD", ns.path()), &unnamed);
    assert!(passed.success && passed.warning.unwrap().contains("once its containers run"));
    assert!(ns.has_nothing());
    assert!(call(&environment("ADD", ns.path()), &component.config()).success);
    assert!(!ns.has_nothing());
}

#[test]
fn a_pod_outside_of_the_mesh_is_left_alone() {
    let Some(ns) = Namespace::new("plain") else { return };
    let component = Component::start(Some(plain()));
    for command in ["ADD", "CHECK"] {
        let done = call(&environment(command, ns.path()), &component.config());
        assert_eq!((done.success, done.warning), (true, None));
    }
    let mut other = environment("ADD", ns.path());
    other.arguments = Some("IgnoreUnknown=1".into());
    assert!(call(&other, &component.config()).success, "a container of another tool");
    assert!(ns.has_nothing());
}

#[test]
fn a_pod_that_is_not_known_passes_with_a_warning_and_without_a_redirect() {
    let Some(ns) = Namespace::new("unknown") else { return };
    let mut successor = meshed();
    successor["metadata"]["uid"] = "0f1a6c1e-2c57-4a4f-9f3c-0d9b7f6b2a11".into();
    let mut elsewhere = meshed();
    elsewhere["spec"]["nodeName"] = "n2".into();
    let cases = [(None, "does not know"), (Some(successor), "by another UID"), (Some(elsewhere), "not on this node")];
    for (pod, why) in cases {
        let component = Component::start(pod);
        let done = call(&environment("ADD", ns.path()), &component.config());
        assert!(done.success && done.output.is_some() && done.warning.unwrap().contains(why));
    }
    // No component at all, and one that is stopped: its socket takes nothing.
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    let done = call(&environment("ADD", ns.path()), &config(&socket));
    assert!(done.success && done.warning.unwrap().contains("does not answer"));
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(call(&environment("ADD", ns.path()), &config(&socket)).success);
    assert!(call(&environment("CHECK", ns.path()), &config(&socket)).success, "the file outlives the component");
    let mut without_uid = environment("ADD", ns.path());
    without_uid.arguments = Some("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0".into());
    assert!(call(&without_uid, &config(&socket)).warning.unwrap().contains("UID"));
    assert!(ns.has_nothing());
}

#[test]
fn a_meshed_pod_whose_redirect_fails_is_held_up() {
    let Some(ns) = Namespace::new("fails") else { return };
    let mut wrong = meshed();
    wrong["spec"]["initContainers"][0]["args"][2] = "--redirect=--nonsense".into();
    let component = Component::start(Some(wrong));
    let failed = call(&environment("ADD", ns.path()), &component.config());
    let said = failed.output.unwrap();
    assert_eq!((failed.success, &said["code"], &said["cniVersion"]), (false, &json!(100), &json!("0.4.0")));
    let message = said["msg"].as_str().unwrap();
    assert!(message.contains("--nonsense") && !message.contains('\u{1b}'), "{message:?}");
    // The node's own namespace is nobody's pod.
    let component = Component::start(Some(meshed()));
    let failed = call(&environment("ADD", Path::new("/proc/self/ns/net")), &component.config());
    assert!(failed.output.unwrap()["msg"].as_str().unwrap().contains("the node's own"));
    assert!(ns.has_nothing());
}

#[test]
fn the_end_of_a_pod_never_fails() {
    let nowhere = Environment { command: "DEL".into(), ..Environment::default() };
    for input in ["", "{", r#"{"cniVersion":"9.9.9"}"#] {
        for command in ["DEL", "GC"] {
            let environment = Environment { command: command.into(), ..nowhere.clone() };
            assert_eq!(run(&environment, &mut input.as_bytes()), Outcome::silent());
        }
    }
}

#[test]
fn errors_have_the_specifications_codes() {
    let code = |environment: &Environment, input: &str| {
        let failed = run(environment, &mut input.as_bytes());
        assert!(!failed.success);
        failed.output.unwrap()["code"].as_u64().unwrap()
    };
    let add = environment("ADD", Path::new("/nowhere"));
    let good = config(Path::new("/nowhere.sock")).to_string();
    assert_eq!(code(&add, &good.replace("0.4.0", "7.0.0")), 1);
    assert_eq!(code(&Environment { container: None, ..add.clone() }, &good), 4);
    assert_eq!(code(&Environment { netns: None, ..add.clone() }, &good), 4);
    assert_eq!(code(&Environment { interface: None, ..add.clone() }, &good), 4);
    assert_eq!(code(&environment("FLY", Path::new("/")), &good), 4);
    assert_eq!(code(&add, &good), 5, "no such namespace");
    assert_eq!(code(&add, "{"), 6);
    assert_eq!(code(&add, r#"{"cniVersion":"1.0.0"}"#), 7, "not behind another plugin");
    assert_eq!(code(&add, &" ".repeat(2 << 20)), 7);
}

#[test]
fn versions_and_status_are_told_without_a_component() {
    let told = |command: &str, input: &str| {
        run(&Environment { command: command.into(), ..Environment::default() }, &mut input.as_bytes())
    };
    let versions = told("VERSION", r#"{"cniVersion":"0.3.1"}"#).output.unwrap();
    assert_eq!(versions, json!({ "cniVersion": "0.3.1", "supportedVersions": VERSIONS }));
    assert_eq!(told("VERSION", r#"{"cniVersion":"5.0.0"}"#).output.unwrap()["cniVersion"], LATEST);
    assert_eq!(told("STATUS", r#"{"cniVersion":"1.1.0"}"#), Outcome::silent());
}

#[test]
fn a_runtime_that_never_ends_its_configuration_is_given_up() {
    let (read, _write) = std::io::pipe().unwrap();
    let mut input = InTime { input: read, end: Instant::now() + Duration::from_millis(50) };
    let failed = run(&environment("ADD", Path::new("/")), &mut input);
    assert_eq!(failed.output.unwrap()["code"], 5);
}
