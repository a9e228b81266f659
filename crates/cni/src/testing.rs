//! Shared test helpers: network namespaces, processes and an API server of a test's own.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use countersign_redirect::netns::NetNs;
use countersign_redirect::{Backend, Guard, Redirect, in_force, installed};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

use crate::pod::{Askers, Order};

/// UID of the test's pod.
pub const UID: &str = "7f1a6c1e-2c57-4a4f-9f3c-0d9b7f6b2a11";

/// Reads the two flags that these tests use.
pub const ASKERS: Askers = Askers { validator: "countersign-redirect", sidecar: "countersign-proxy", read };

fn read(flags: &[String], resolvers: &BTreeSet<IpAddr>) -> Result<Order, String> {
    let mut redirect = Redirect::for_proxy(2102);
    for flag in flags {
        match flag.as_str() {
            "--validate" | "--proxy-uid=2102" => {}
            "--by-cgroup" => redirect.by_cgroup = true,
            "--other-protocols=drop" => {
                redirect.guard = Some(Guard { resolvers: resolvers.clone(), ..Guard::default() });
            }
            other => return Err(format!("unexpected flag {other}\u{1b}")),
        }
    }
    Ok(Order { redirect, backend: Backend::Nftables })
}

/// A pod of node `n1` that waits for its redirect, as the API server shows it.
pub fn meshed() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "web-0", "namespace": "shop", "uid": UID },
        "spec": {
            "nodeName": "n1", "hostNetwork": null, "dnsPolicy": "ClusterFirst", "dnsConfig": {},
            "initContainers": [
                { "name": "countersign-proxy", "args": ["proxy", "--log=info", "--redirect=--proxy-uid=2102"] },
            ],
            "containers": [{ "name": "app" }],
        },
        "status": { "phase": "Pending" },
    })
}

/// The same with a plain sidecar: an init container holds it up.
pub fn validated() -> Value {
    let mut pod = meshed();
    pod["spec"]["initContainers"] =
        json!([{ "name": "countersign-redirect", "args": ["redirect", "--validate", "--proxy-uid=2102"] }]);
    pod
}

/// A pod outside of the mesh.
pub fn plain() -> Value {
    let mut pod = meshed();
    pod["spec"]["initContainers"] = json!([]);
    pod
}

/// A network namespace that is gone when dropped.
pub struct Namespace(NetNs);

impl Namespace {
    /// `None` without root: the test says so and passes, but in CI it fails.
    pub fn new(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI runs as root");
            eprintln!("skipped: network namespaces need root");
            return None;
        }
        Some(Self(NetNs::create(&format!("cs-cni-{test}-{}", std::process::id())).unwrap()))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn open(&self) -> OwnedFd {
        self.0.open().unwrap().into()
    }

    /// Whether no redirect is there.
    pub fn has_nothing(&self) -> bool {
        self.0.run(|| Ok(installed().unwrap())).unwrap().is_empty()
    }

    /// Whether exactly this redirect is in force.
    pub fn has_redirect(&self, redirect: &Redirect) -> bool {
        let found = self.0.run(|| Ok(installed().unwrap())).unwrap();
        in_force(redirect, &found)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.remove();
    }
}

/// A folder of processes.
pub struct FakeProc(tempfile::TempDir);

impl FakeProc {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Adds a process of a pod's container, whose ID is `id` 64 times. Returns the folder that is the root of its
    /// files.
    pub fn add(&self, pid: u32, pod: &str, id: char, netns: &Path) -> PathBuf {
        let dir = self.path().join(pid.to_string());
        let root = self.path().join(format!("root-{pid}"));
        std::fs::create_dir_all(dir.join("ns")).unwrap();
        std::fs::create_dir(&root).unwrap();
        std::fs::write(dir.join("cgroup"), format!("0::/kubepods/pod{pod}/{}\n", id.to_string().repeat(64))).unwrap();
        symlink(netns, dir.join("ns/net")).unwrap();
        symlink(&root, dir.join("root")).unwrap();
        root
    }
}

/// A client of an API server that answers a path with a status and an object, and the paths that it was asked for.
pub fn api_server(answer: impl Fn(&str) -> (u16, Value) + Send + Sync + 'static) -> (Client, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::new(Mutex::new(vec![]));
    let (answer, log) = (Arc::new(answer), asked.clone());
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let path = request.uri().path().to_owned();
        let (status, object) = answer(&path);
        log.lock().unwrap().push(path);
        async move {
            let body: BoxBody<_, Infallible> = Full::from(object.to_string()).boxed();
            Ok::<_, Infallible>(http::Response::builder().status(status).body(body).unwrap())
        }
    });
    (Client::new(service, "default"), asked)
}

/// The answer about an object that is not there.
pub fn not_found() -> (u16, Value) {
    let status = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404,
                         "message": "not found" });
    (404, status)
}
