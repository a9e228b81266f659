//! Repairs in real network namespaces, with processes that the test makes up.

use std::path::Path;

use countersign_redirect::Redirect;
use serde_json::{Value, json};

use super::*;
use crate::testing::{ASKERS, FakeProc, Namespace, UID, meshed, plain};

fn repair(proc: &FakeProc) -> Repair {
    let mut repair = Repair::new("n1".parse().unwrap(), Installer::new(ASKERS, false), Arc::default());
    repair.proc = proc.path().into();
    repair
}

fn pod(value: Value) -> Pod {
    serde_json::from_value(value).unwrap()
}

fn list(repair: &Repair, pods: &[Value]) {
    repair.take(Event::Init);
    pods.iter().for_each(|p| repair.take(Event::InitApply(pod(p.clone()))));
    repair.take(Event::InitDone);
}

/// Its sidecar runs, in container `a`, and waits.
fn waiting() -> Value {
    let mut pod = started();
    pod["status"]["initContainerStatuses"][0]["started"] = false.into();
    pod["status"]["initContainerStatuses"][0]["containerID"] = format!("containerd://{}", "a".repeat(64)).into();
    pod
}

/// It goes on: its sidecar has started.
fn started() -> Value {
    let mut pod = meshed();
    pod["status"]["initContainerStatuses"] = json!([{ "name": "countersign-proxy", "image": "i", "imageID": "",
        "ready": true, "started": true, "restartCount": 0, "state": { "running": {} } }]);
    pod
}

/// Waits for the next pod that is due, and looks at it.
async fn once(repair: &Repair) {
    tokio::time::timeout(Duration::from_secs(60), repair.next()).await.unwrap();
    repair.pass().await;
}

#[tokio::test]
async fn a_pod_that_waits_gets_its_redirect_once_it_has_a_process() {
    let Some(ns) = Namespace::new("repair") else { return };
    let proc = FakeProc::new();
    let repair = repair(&proc);
    list(&repair, &[waiting()]);
    proc.add(9, UID, 'b', ns.path());
    once(&repair).await;
    assert!(ns.has_nothing() && repair.metrics.repaired.get() == 0, "no process of the sidecar's yet");
    proc.add(10, UID, 'a', ns.path());
    once(&repair).await;
    assert!(ns.has_redirect(&Redirect::for_proxy(2102)));
    assert_eq!((repair.metrics.repaired.get(), repair.metrics.waiting.get()), (1, 1));
    once(&repair).await;
    assert_eq!(repair.metrics.repaired.get(), 1, "it is in force");
    repair.take(Event::Apply(pod(started())));
    assert_eq!(repair.metrics.waiting.get(), 0, "the pod goes on");
}

#[tokio::test]
async fn the_resolvers_of_the_sidecars_own_file_count() {
    let Some(ns) = Namespace::new("resolvers") else { return };
    let (proc, mut waiting) = (FakeProc::new(), waiting());
    waiting["spec"]["dnsPolicy"] = "Default".into();
    waiting["spec"]["initContainers"][0]["args"][2] = "--redirect=--proxy-uid=2102 --other-protocols=drop".into();
    let repair = repair(&proc);
    let root = proc.add(11, UID, 'a', ns.path());
    std::fs::create_dir(root.join("etc")).unwrap();
    std::fs::write(root.join("etc/resolv.conf"), "nameserver 192.0.2.53\n").unwrap();
    list(&repair, std::slice::from_ref(&waiting));
    once(&repair).await;
    let with = |resolver: &str| {
        let order = (ASKERS.read)(&["--other-protocols=drop".into()], &[resolver.parse().unwrap()].into());
        order.unwrap().redirect
    };
    assert!(ns.has_redirect(&with("192.0.2.53")));
    std::fs::write(root.join("etc/resolv.conf"), "nameserver 203.0.113.1\n").unwrap();
    list(&repair, std::slice::from_ref(&waiting));
    once(&repair).await;
    assert!(ns.has_redirect(&with("192.0.2.53")), "what an app has written since does not count");
    waiting["spec"]["dnsPolicy"] = "None".into();
    waiting["spec"]["dnsConfig"] = json!({ "nameservers": ["198.51.100.1"] });
    list(&repair, &[waiting]);
    once(&repair).await;
    assert!(ns.has_redirect(&with("198.51.100.1")), "where the pod names its resolvers, its file is not asked");
}

#[tokio::test]
async fn nobody_else_is_touched() {
    let Some(ns) = Namespace::new("others") else { return };
    let proc = FakeProc::new();
    proc.add(10, UID, 'a', ns.path());
    let repair = repair(&proc);
    let mut elsewhere = meshed();
    elsewhere["spec"]["nodeName"] = "n2".into();
    for other in [plain(), started(), elsewhere] {
        list(&repair, std::slice::from_ref(&other));
        repair.take(Event::Apply(pod(other)));
        repair.pass().await;
        assert!(repair.waiting().is_empty() && ns.has_nothing());
    }
    list(&repair, &[meshed()]);
    repair.take(Event::Delete(pod(meshed())));
    repair.pass().await;
    assert!(ns.has_nothing());
}

#[tokio::test]
async fn the_nodes_own_namespace_is_never_repaired() {
    if Namespace::new("node").is_none() {
        return;
    }
    let proc = FakeProc::new();
    proc.add(10, UID, 'a', Path::new("/proc/self/ns/net"));
    let repair = repair(&proc);
    list(&repair, &[waiting()]);
    once(&repair).await;
    assert_eq!((repair.metrics.repaired.get(), repair.metrics.repairs_failed.get()), (0, 1));
    assert_eq!(countersign_redirect::installed().unwrap(), []);
}

#[tokio::test]
async fn pods_beyond_the_bound_are_left_to_the_plugin() {
    let repair = repair(&FakeProc::new());
    let numbered = |n: usize| {
        let mut pod = meshed();
        pod["metadata"]["uid"] = n.to_string().into();
        pod
    };
    list(&repair, &(0..MAX_PODS + 10).map(numbered).collect::<Vec<_>>());
    repair.take(Event::Apply(pod(numbered(MAX_PODS + 20))));
    assert_eq!(repair.waiting().len(), MAX_PODS);
}
