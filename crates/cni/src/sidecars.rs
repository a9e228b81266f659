//! The service for sidecars: one that asks, and is its pod's sidecar, is told that the pod's redirect is in force and
//! admitted to pass it.
//!
//! Any process of the node's pods may connect. Who it is, is known by the kernel's word on its cgroup; that its container is the
//! sidecar, by the runtime's record or the API server's. Neither is the caller's to change: an app that takes on the sidecar's
//! user ID, or that is given the socket, is refused.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use countersign_api::admission::Limits;
use countersign_api::calls::{CallLayer, of_local_callers};
use countersign_api::grpc;
use countersign_api::peer::UnixPeer;
use countersign_api::push::sidecar_admission_server::{SidecarAdmission, SidecarAdmissionServer};
use countersign_api::push::{AdmitRequest, AdmitResponse};
use countersign_api::sampled::Sampled;
use countersign_api::transport::{accept_unix, bind_unix};
use countersign_identity::shown::sentence;
use countersign_redirect::netns::{NetNs, run_in};
use countersign_redirect::sidecar::{Known, is_asked_for};
use countersign_redirect::{RedirectError, is_whole};
use countersign_watch::cgroup::{Container, container_of};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::cgroups::Cgroups;
use crate::metrics::Metrics;
use crate::pod::container_id;
use crate::runtime::Records;
use crate::turns::Turns;

/// Mode of the socket: sidecars run as a user of their own.
const SOCKET_MODE: u32 = 0o666;
/// Most concurrent calls per connection. A sidecar makes one.
const CALLS_AT_ONCE: u32 = 4;
/// Most open calls, in total and per user, and most whose request is not whole.
const OPEN_CALLS: (usize, usize) = (1_024, 512);
const UNFINISHED_CALLS: (usize, usize) = (256, 128);
/// Longest request, in bytes: two names of objects.
const MAX_REQUEST_BYTES: usize = 4_096;
/// How long the API server may know nothing of a container yet, and the pause between two questions.
const REPORTED: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(500);
/// Most containers that are remembered as sidecars. A node has some hundred pods.
const MAX_FOUND: usize = 4_096;
/// Longest name of a pod or a namespace, in bytes (RFC 1123).
const MAX_NAME: usize = 253;
/// Longest reason that is passed on, in characters.
const MAX_REASON: usize = 500;

/// Admits sidecars.
#[derive(Clone)]
pub struct Sidecars {
    client: Client,
    /// Name of the sidecars' container.
    container: &'static str,
    /// `None` where sidecars are known by their user ID alone.
    cgroups: Option<Cgroups>,
    records: Records,
    metrics: Arc<Metrics>,
    turns: Turns,
    said: Arc<Sampled<String>>,
    /// IDs of containers that were found to be sidecars, which they stay. Emptied when there are [`MAX_FOUND`].
    found: Arc<Mutex<BTreeSet<String>>>,
    /// IDs of the containers that ask right now.
    asking: Arc<Mutex<BTreeSet<String>>>,
}

/// The one call of a container, while it lasts.
struct OneCall(Sidecars, String);

impl Drop for OneCall {
    fn drop(&mut self) {
        self.0.asking.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

impl Sidecars {
    /// `container`: name of the sidecars' container.
    pub fn new(
        client: Client,
        container: &'static str,
        cgroups: Option<Cgroups>,
        records: Records,
        metrics: Arc<Metrics>,
    ) -> Self {
        let turns = Turns::default();
        Self {
            client,
            container,
            cgroups,
            records,
            metrics,
            turns,
            said: Arc::default(),
            found: Arc::default(),
            asking: Arc::default(),
        }
    }

    /// Serves on the socket until `shutdown`.
    ///
    /// # Errors
    /// The socket cannot be bound.
    pub fn serve(self, socket: PathBuf, shutdown: CancellationToken) -> io::Result<impl Future<Output = ()> + use<>> {
        let listener = bind_unix(&socket, SOCKET_MODE)?;
        let incoming = accept_unix(listener, socket, SOCKET_MODE);
        let service = SidecarAdmissionServer::new(self).max_decoding_message_size(MAX_REQUEST_BYTES);
        let limits = |name, (total, per_group)| Limits { name, total, per_group };
        let bounds =
            of_local_callers(limits("open calls", OPEN_CALLS), limits("unfinished requests", UNFINISHED_CALLS));
        let served = grpc::server(CALLS_AT_ONCE)
            .layer(CallLayer(bounds))
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned());
        Ok(async {
            if let Err(error) = served.await {
                tracing::error!(%error, "the sidecars' socket has failed");
            }
        })
    }

    /// Admits the caller if a redirect is in force in its pod and it is the sidecar: whether it is known by its cgroup.
    async fn admit(&self, peer: &UnixPeer, asked: AdmitRequest) -> Result<bool, Status> {
        let container = container(peer)?;
        let _call = self.one_call(&container)?;
        // Before anything is looked at that the caller may have made: an app chooses its network namespace and what is in it.
        self.is_the_sidecar(&container, &asked).await?;
        let netns = self.netns_of_redirect(peer).await?;
        let Some(cgroups) = self.cgroups.clone() else { return self.by_user_id(netns).await };
        let (pid, id) = (peer.pid, container.id.clone());
        let seen = cgroups.clone();
        let cgroup = self.turns.run(move || seen.of(pid, &id)).await.map_err(unavailable)?;
        is_still_there(peer)?;
        let admitted = self.turns.run(move || cgroups.admit(&netns, cgroup)).await.map_err(unavailable)?;
        let before = admitted.map_err(|e| Status::unavailable(format!("the kernel refuses the rule: {e}")))?;
        // It asks each minute, too.
        if before == Known::Otherwise {
            tracing::info!(
                pod = container.pod_uid,
                container = container.id,
                cgroup = cgroup.id,
                "a sidecar is admitted"
            );
        }
        Ok(before != Known::ByUserId)
    }

    /// The caller's network namespace, in which a redirect is in force.
    async fn netns_of_redirect(&self, peer: &UnixPeer) -> Result<OwnedFd, Status> {
        let pid = peer.pid;
        let look = move || {
            let netns = OwnedFd::from(NetNs::at(format!("/proc/{pid}/ns/net")).open()?);
            let whole = run_in(netns.as_fd(), || Ok(is_whole()))?;
            Ok((netns, whole))
        };
        let (netns, whole) = self.turns.run(look).await.map_err(unavailable)?;
        is_still_there(peer)?;
        if whole.map_err(unreadable)? {
            Ok(netns)
        } else {
            Err(Status::unavailable("no redirect is in force in the pod's network namespace"))
        }
    }

    /// For a node that tells sidecars by their user ID: `false`, if the caller's redirect does so too. One from before the
    /// setting was changed still asks for a cgroup, and nothing of its sidecar passes.
    async fn by_user_id(&self, netns: OwnedFd) -> Result<bool, Status> {
        let asks = self.turns.run(move || run_in(netns.as_fd(), || Ok(is_asked_for()))).await.map_err(unavailable)?;
        if asks.map_err(unreadable)? {
            return Err(Status::unavailable(
                "the pod's redirect asks for the sidecar's cgroup, and its node does not tell it any more \
                 (cni.sidecarByCgroup, or the log of container cni): make the pod anew",
            ));
        }
        Ok(false)
    }

    fn one_call(&self, container: &Container) -> Result<OneCall, Status> {
        let first = self.asking.lock().unwrap_or_else(PoisonError::into_inner).insert(container.id.clone());
        if first {
            Ok(OneCall(self.clone(), container.id.clone()))
        } else {
            Err(Status::resource_exhausted("one call at a time"))
        }
    }

    /// Whether a container is its pod's sidecar. Each asks every minute, and is looked up once.
    async fn is_the_sidecar(&self, container: &Container, asked: &AdmitRequest) -> Result<(), Status> {
        if self.found.lock().unwrap_or_else(PoisonError::into_inner).contains(&container.id) {
            return Ok(());
        }
        self.look_up(container, asked).await?;
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if found.len() >= MAX_FOUND {
            found.clear();
        }
        found.insert(container.id.clone());
        Ok(())
    }

    /// Looks a container up by the runtime's record, and where there is none by the API server's.
    async fn look_up(&self, container: &Container, asked: &AdmitRequest) -> Result<(), Status> {
        let (records, id) = (self.records.clone(), container.id.clone());
        if let Some(name) = self.turns.run(move || Ok(records.name_of(&id))).await.map_err(unavailable)? {
            return if name == self.container { Ok(()) } else { Err(self.not_the_sidecar()) };
        }
        let is_name = |name: &str| (1..=MAX_NAME).contains(&name.len());
        if !is_name(&asked.namespace) || !is_name(&asked.name) {
            return Err(Status::invalid_argument("the request does not name the caller's pod"));
        }
        let pods = Api::<Pod>::namespaced(self.client.clone(), &asked.namespace);
        let deadline = Instant::now() + REPORTED;
        loop {
            let got = tokio::time::timeout_at(deadline, pods.get(&asked.name)).await;
            let got = got.map_err(|_| Status::unavailable("the API server does not answer"))?;
            let pod = got.map_err(|e| {
                Status::unavailable(format!(
                    "the API server says nothing about the pod: {}",
                    sentence(&e.to_string(), MAX_REASON)
                ))
            })?;
            if pod.metadata.uid.as_deref() != Some(&container.pod_uid) {
                return Err(Status::permission_denied("the caller is in another pod than the one that it names"));
            }
            match container_name(&pod, &container.id) {
                Some(name) if name == self.container => return Ok(()),
                Some(_) => return Err(self.not_the_sidecar()),
                None if Instant::now() + PAUSE >= deadline => {
                    return Err(Status::unavailable("the kubelet has not reported the container yet"));
                }
                None => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    fn not_the_sidecar(&self) -> Status {
        Status::permission_denied(format!("the caller is not in container {}", self.container))
    }
}

/// What was read of a caller's process ID is about the caller only if it is still there.
fn is_still_there(peer: &UnixPeer) -> Result<(), Status> {
    if peer.is_there() { Ok(()) } else { Err(Status::failed_precondition("the caller has ended")) }
}

fn unreadable(why: RedirectError) -> Status {
    unavailable(format!("the redirect cannot be read: {why}"))
}

fn unavailable(why: String) -> Status {
    Status::unavailable(sentence(&why, MAX_REASON).to_string())
}

#[tonic::async_trait]
impl SidecarAdmission for Sidecars {
    async fn admit(&self, request: Request<AdmitRequest>) -> Result<Response<AdmitResponse>, Status> {
        let peer = request.extensions().get::<UnixPeer>().cloned();
        let peer = peer.ok_or_else(|| Status::internal("the caller's credentials are missing"))?;
        let admitted = Self::admit(self, &peer, request.into_inner()).await;
        self.metrics.sidecar(&admitted);
        // Any pod may call, as often as it likes.
        let source = || container(&peer).map_or_else(|_| format!("uid {}", peer.uid), |container| container.pod_uid);
        if let Err(status) = &admitted
            && let Some(unsaid) = self.said.next(source(), "not admitted", std::time::Instant::now())
        {
            tracing::warn!(
                pid = peer.pid,
                uid = peer.uid,
                why = status.message(),
                unsaid,
                "a caller is not admitted as a sidecar"
            );
        }
        Ok(Response::new(AdmitResponse { by_cgroup: admitted?, in_force: true }))
    }
}

/// The container of a caller, by what the kernel said when it connected.
fn container(peer: &UnixPeer) -> Result<Container, Status> {
    let seen = peer.at_accept.as_ref().filter(|_| peer.pid > 0);
    let seen = seen.ok_or_else(|| Status::permission_denied("the caller's process is not visible"))?;
    let container = container_of(&seen.cgroup).map_err(|e| Status::permission_denied(e.to_string()))?;
    container.ok_or_else(|| Status::permission_denied("the caller is in no pod"))
}

/// The name of a pod's container with this ID, by what the kubelet has reported; `None` if it has reported no such container.
fn container_name<'a>(pod: &'a Pod, id: &str) -> Option<&'a str> {
    let status = pod.status.as_ref()?;
    let lists = [&status.init_container_statuses, &status.container_statuses, &status.ephemeral_container_statuses];
    let mut all = lists.into_iter().flatten().flatten();
    all.find(|c| container_id(c) == Some(id)).map(|c| c.name.as_str())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use countersign_api::process::{Snapshot, start_time};
    use countersign_redirect::{Backend, Redirect, install};
    use serde_json::json;
    use tonic::Code;

    use super::*;
    use crate::testing::{ASKERS, Namespace, UID, api_server, meshed, not_found};

    const RECORDS: &str = "run/containerd/io.containerd.runtime.v2.task/k8s.io";

    fn id(digit: char) -> String {
        digit.to_string().repeat(64)
    }

    fn asked() -> AdmitRequest {
        AdmitRequest { namespace: "shop".into(), name: "web-0".into() }
    }

    /// A service with the runtime's records below a folder, and an API server whose pod has a sidecar `a` and an app `b`.
    fn sidecars(root: &Path) -> (Sidecars, Arc<Mutex<Vec<String>>>) {
        let (client, paths) = api_server(|path| {
            let of = |name: &str, digit| {
                json!({ "name": name, "image": "i", "imageID": "", "ready": true, "restartCount": 0,
                        "containerID": format!("containerd://{}", id(digit)) })
            };
            let mut pod = meshed();
            pod["status"]["initContainerStatuses"] = json!([of("countersign-proxy", 'a')]);
            pod["status"]["containerStatuses"] = json!([of("app", 'b')]);
            if path == "/api/v1/namespaces/shop/pods/web-0" { (200, pod) } else { not_found() }
        });
        (Sidecars::new(client, ASKERS.sidecar, None, Records::below(root), Arc::default()), paths)
    }

    async fn judged(sidecars: &Sidecars, pod_uid: &str, digit: char, asked: AdmitRequest) -> Option<Code> {
        let container = Container { pod_uid: pod_uid.into(), id: id(digit) };
        sidecars.look_up(&container, &asked).await.err().map(|status| status.code())
    }

    #[tokio::test]
    async fn the_runtimes_record_decides_without_the_api_server() {
        let root = tempfile::tempdir().unwrap();
        for (digit, name) in [('b', "countersign-proxy"), ('a', "app")] {
            let folder = root.path().join(RECORDS).join(id(digit));
            std::fs::create_dir_all(&folder).unwrap();
            let text = json!({ "annotations": { "io.kubernetes.cri.container-name": name } }).to_string();
            std::fs::write(folder.join("config.json"), text).unwrap();
        }
        let (sidecars, paths) = sidecars(root.path());
        assert_eq!(judged(&sidecars, UID, 'b', AdmitRequest::default()).await, None);
        assert_eq!(judged(&sidecars, UID, 'a', asked()).await, Some(Code::PermissionDenied));
        assert!(paths.lock().unwrap().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_record_the_kubelets_report_decides() {
        let root = tempfile::tempdir().unwrap();
        let (sidecars, _) = sidecars(root.path());
        assert_eq!(judged(&sidecars, UID, 'a', asked()).await, None);
        assert_eq!(judged(&sidecars, UID, 'b', asked()).await, Some(Code::PermissionDenied), "the app");
        let anothers = UID.replace('7', "8");
        assert_eq!(
            judged(&sidecars, &anothers, 'a', asked()).await,
            Some(Code::PermissionDenied),
            "another's pod named"
        );
        assert_eq!(judged(&sidecars, UID, 'c', asked()).await, Some(Code::Unavailable), "not reported yet");
        let elsewhere = AdmitRequest { name: "web-1".into(), ..asked() };
        assert_eq!(judged(&sidecars, UID, 'a', elsewhere).await, Some(Code::Unavailable));
        assert_eq!(judged(&sidecars, UID, 'a', AdmitRequest::default()).await, Some(Code::InvalidArgument));
    }

    #[tokio::test]
    async fn a_sidecar_is_looked_up_once_and_an_app_each_time() {
        let root = tempfile::tempdir().unwrap();
        let (sidecars, paths) = sidecars(root.path());
        let asks = async |digit| {
            let container = Container { pod_uid: UID.into(), id: id(digit) };
            sidecars.is_the_sidecar(&container, &asked()).await.is_ok()
        };
        assert!(asks('a').await && asks('a').await && asks('a').await);
        assert_eq!(paths.lock().unwrap().len(), 1);
        assert!(!asks('b').await && !asks('b').await);
        assert_eq!(paths.lock().unwrap().len(), 3);
    }

    /// A process in a network namespace of its own, as a caller.
    struct Caller {
        ns: Namespace,
        child: std::process::Child,
    }

    impl Caller {
        fn new(test: &str) -> Option<Self> {
            let ns = Namespace::new(test)?;
            let child = run_in(ns.open().as_fd(), || Command::new("sleep").arg("60").spawn()).unwrap();
            Some(Self { ns, child })
        }

        fn in_cgroup(&self, cgroup: &str) -> UnixPeer {
            let pid = i32::try_from(self.child.id()).unwrap();
            let seen = Snapshot { cgroup: cgroup.into(), ..Snapshot::read(pid).unwrap() };
            UnixPeer {
                pid,
                uid: 2102,
                gid: 2102,
                pidfd: None,
                started: start_time(pid),
                at_accept: Some(Arc::new(seen)),
            }
        }

        fn in_pod(&self) -> UnixPeer {
            self.in_cgroup(&format!("0::/kubepods/pod{UID}/{}\n", id('a')))
        }

        fn redirected(&self, by_cgroup: bool) {
            let redirect = Redirect { by_cgroup, ..Redirect::for_proxy(2102) };
            run_in(self.ns.open().as_fd(), move || Ok(install(&redirect, Backend::Nftables).map(drop)))
                .unwrap()
                .unwrap();
        }
    }

    impl Drop for Caller {
        fn drop(&mut self) {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }

    #[tokio::test]
    async fn a_container_has_one_call_at_a_time_and_callers_outside_of_pods_have_none() {
        let Some(caller) = Caller::new("onecall") else { return };
        let root = tempfile::tempdir().unwrap();
        let (sidecars, _) = sidecars(root.path());
        caller.redirected(false);
        let pods = caller.in_pod();
        assert!(!sidecars.admit(&pods, asked()).await.unwrap(), "here sidecars are known by their user ID");
        let first = sidecars.one_call(&container(&pods).unwrap()).unwrap();
        assert_eq!(sidecars.admit(&pods, asked()).await.unwrap_err().code(), Code::ResourceExhausted);
        drop(first);
        assert!(sidecars.admit(&pods, asked()).await.is_ok());
        for stranger in ["0::/system.slice/x.service\n", "0::/\n"] {
            let refused = sidecars.admit(&caller.in_cgroup(stranger), asked()).await.unwrap_err();
            assert_eq!(refused.code(), Code::PermissionDenied);
        }
    }

    #[tokio::test]
    async fn a_sidecar_without_a_redirect_is_not_admitted_until_there_is_one() {
        let Some(caller) = Caller::new("none") else { return };
        let root = tempfile::tempdir().unwrap();
        let (sidecars, _) = sidecars(root.path());
        let refused = sidecars.admit(&caller.in_pod(), asked()).await.unwrap_err();
        assert!(refused.code() == Code::Unavailable && refused.message().starts_with("no redirect is in force"));
        caller.redirected(false);
        assert!(sidecars.admit(&caller.in_pod(), asked()).await.is_ok());
    }

    #[tokio::test]
    async fn a_sidecar_whose_redirect_still_asks_for_a_cgroup_is_not_told_that_it_passes() {
        let Some(caller) = Caller::new("byuser") else { return };
        let root = tempfile::tempdir().unwrap();
        let (sidecars, _) = sidecars(root.path());
        caller.redirected(true);
        let refused = sidecars.admit(&caller.in_pod(), asked()).await.unwrap_err();
        assert!(refused.code() == Code::Unavailable && refused.message().contains("make the pod anew"), "{refused}");
    }
}
