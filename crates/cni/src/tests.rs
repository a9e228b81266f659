//! A whole component: it installs the plugin, serves it, and leaves only the plugin's file once its DaemonSet is gone.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use countersign_redirect::Redirect;

use super::*;
use crate::plugin::Environment;
use crate::testing::{ASKERS, Namespace, UID, api_server, meshed, not_found};

const LIST: &str = "{\"cniVersion\": \"1.0.0\", \"name\": \"pods\", \"plugins\": [{\"type\": \"ptp\"}]}\n";

fn config(dir: &Path) -> Config {
    Config {
        node: "n1".parse().unwrap(),
        bin_dir: dir.join("bin"),
        conf_dir: dir.join("conf"),
        socket: dir.join("run/cni.sock"),
        plugin_socket: dir.join("run/cni.sock"),
        sidecar_socket: Some(dir.join("agent/sidecar.sock")),
        sidecar_by_cgroup: false,
        repair: false,
        daemon_set: Some("mesh/agents".parse().unwrap()),
        metrics: None,
    }
}

/// What the runtime gives the plugin: the entry of the list as it is, with what libcni adds.
fn as_libcni_calls(list: &str) -> Value {
    let list: Value = serde_json::from_str(list).unwrap();
    let mut config = list["plugins"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(config["type"], plugin::NAME);
    config["cniVersion"] = list["cniVersion"].clone();
    config["name"] = list["name"].clone();
    config["prevResult"] = json!({ "cniVersion": "1.0.0", "ips": [{ "address": "10.0.0.2/24" }] });
    config
}

#[tokio::test]
async fn a_component_installs_its_plugin_answers_it_and_removes_its_entry() {
    let Some(ns) = Namespace::new("whole") else { return };
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("conf/10-pods.conflist");
    ["bin", "conf"].into_iter().for_each(|name| std::fs::create_dir(dir.path().join(name)).unwrap());
    std::fs::write(&list, LIST).unwrap();
    std::fs::write(dir.path().join("bin/ptp"), "ptp").unwrap();
    // The DaemonSet is not there.
    let (client, _) =
        api_server(|path| if path == "/api/v1/namespaces/shop/pods/web-0" { (200, meshed()) } else { not_found() });
    let (stop, config) = (CancellationToken::new(), config(dir.path()));
    let running = tokio::spawn(run_with(client, config.clone(), ASKERS, stop.clone(), || {}));
    let installed = async {
        while std::fs::read_to_string(&list).unwrap() == LIST {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), installed).await.unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&config.socket), mode(&config.bin_dir.join(plugin::NAME))), (0o600, 0o755));
    let environment = Environment {
        command: "ADD".into(),
        container: Some("c1".into()),
        netns: Some(ns.path().display().to_string()),
        interface: Some("eth0".into()),
        arguments: Some(format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID={UID}")),
    };
    let called = as_libcni_calls(&std::fs::read_to_string(&list).unwrap());
    let expected = called["prevResult"].clone();
    let run = move || plugin::run(&environment, &mut called.to_string().as_bytes());
    let added = tokio::task::spawn_blocking(run).await.unwrap();
    assert_eq!((added.success, added.warning, added.output), (true, None, Some(expected)));
    assert!(ns.has_redirect(&Redirect::for_proxy(2102)));
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(30), running).await.unwrap().unwrap().unwrap();
    assert_eq!(std::fs::read_to_string(&list).unwrap(), LIST);
    // What still names the plugin has to find it.
    assert_eq!(mode(&dir.path().join("bin").join(plugin::NAME)), 0o755);
}
