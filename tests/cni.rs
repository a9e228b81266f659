//! The CNI plugin as a node has it: its component installs the program itself as the plugin, and a container runtime starts that.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::roles::Role;
use crate::support::{able, wait_for};

const LIST: &str =
    "{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"pods\",\n  \"plugins\": [\n    {\"type\": \"ptp\"}\n  ]\n}\n";

/// A kubeconfig whose API server nobody runs.
pub fn no_api_server(dir: &Path) -> PathBuf {
    let path = dir.join("kubeconfig");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{ "name": "c", "cluster": { "server": "http://127.0.0.1:1" } }], "users": [{ "name": "u", "user": {} }],
        "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
    });
    std::fs::write(&path, config.to_string()).unwrap();
    path
}

/// Runs the plugin as a runtime does.
fn call(plugin: &Path, variables: &[(&str, &str)], config: &Value) -> Output {
    let mut child = Command::new(plugin)
        .env_clear()
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn the_component_installs_a_plugin_that_holds_nobody_up_and_keeps_it_while_nobody_tells_it_to_go() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);
    let list = place("conf/10-pods.conflist");
    ["bin", "conf"].into_iter().for_each(|name| std::fs::create_dir(place(name)).unwrap());
    std::fs::write(&list, LIST).unwrap();
    // The entry is added only where the runtime finds the other plugins of the list.
    let all: Value = serde_json::from_str(LIST).unwrap();
    for other in all["plugins"].as_array().unwrap() {
        std::fs::write(place("bin").join(other["type"].as_str().unwrap()), "").unwrap();
    }
    let args = [
        "cni-node".to_owned(),
        "--node-name=n1".to_owned(),
        format!("--bin-dir={}", place("bin").display()),
        format!("--conf-dir={}", place("conf").display()),
        format!("--socket={}", place("cni.sock").display()),
        "--daemon-set=mesh/agents".to_owned(),
    ];
    let component = Role::start_with(dir.path(), "cni", &args, ("KUBECONFIG", &no_api_server(dir.path())));
    let entry = || {
        let read: Value = serde_json::from_str(&std::fs::read_to_string(&list).unwrap()).unwrap();
        read["plugins"].as_array().unwrap().iter().find(|p| p["type"] == "countersign-cni").cloned()
    };
    let mut config = wait_for("the entry", Duration::from_secs(30), entry);
    std::fs::write(&list, LIST).unwrap();
    assert_eq!(wait_for("the entry again", Duration::from_secs(5), entry), config);
    let plugin = place("bin/countersign-cni");

    let explained = call(&plugin, &[], &json!({}));
    assert!(explained.status.success() && String::from_utf8_lossy(&explained.stderr).contains("CNI plugin"));
    config["cniVersion"] = "1.0.0".into();
    config["name"] = "pods".into();
    let versions = call(&plugin, &[("CNI_COMMAND", "VERSION")], &config);
    assert!(versions.status.success() && String::from_utf8_lossy(&versions.stdout).contains("\"1.1.0\""));
    config["prevResult"] = json!({ "cniVersion": "1.0.0", "ips": [{ "address": "10.0.0.2/24" }] });
    let add = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/proc/self/ns/net"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=7f1a"),
    ];
    // With a component that cannot ask the API server, and with none at all.
    let passes = |why: &str| {
        let added = call(&plugin, &add, &config);
        let warning = String::from_utf8_lossy(&added.stderr).into_owned();
        assert!(added.status.success() && warning.contains(why), "{warning}");
        assert_eq!(serde_json::from_slice::<Value>(&added.stdout).unwrap(), config["prevResult"]);
    };
    passes("the API server");
    let pid = nix::unistd::Pid::from_raw(component.pid().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    wait_for("the end", Duration::from_secs(20), || component.log().contains("the plugin stays").then_some(()));
    drop(component);
    passes("the node's component does not answer");
    assert!(entry().is_some() && plugin.exists());
    let removed = call(&plugin, &[("CNI_COMMAND", "DEL")], &json!("nonsense"));
    assert!(removed.status.success() && removed.stdout.is_empty());
}
