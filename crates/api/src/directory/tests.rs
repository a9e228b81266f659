//! An agent between a server and its sidecars, over real sockets: a greedy follower harms only itself.

#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use countersign_identity::directory::{Answer, Workload};
use countersign_identity::policy::Policy;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::*;
use crate::push::directory_server::{Directory, DirectoryServer};
use crate::push::{PublishRequest, PublishResponse, ResolveRequest, ResolveResponse};
use crate::transport::{accept_unix, bind_unix, unix_channel};

/// Knows a workload with a long name at every address.
struct Everywhere(watch::Sender<u64>);

impl Source for Everywhere {
    type Handle = ();

    fn follow(&self, _: IpAddr) {}

    fn answer(&self, address: IpAddr, (): &()) -> Option<Answer> {
        let workload = Workload {
            uid: address.to_string(),
            name: "n".repeat(300),
            addresses: vec![address],
            spiffe_ids: ["spiffe://td/w".to_owned()].into(),
            mesh_port: 15008,
            policy: Policy::default(),
            place: Default::default(),
        };
        Some(Answer::Meshed(Arc::new(workload)))
    }

    fn revisions(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}

/// Serves a source to callers that name themselves.
struct Endpoint<S> {
    source: Arc<S>,
    quota: Arc<Quota<String>>,
}

#[async_trait]
impl<S: Source + 'static> Directory for Endpoint<S> {
    type ResolveStream = ReceiverStream<Result<ResolveResponse, Status>>;

    async fn publish(&self, _: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn resolve(
        &self,
        request: Request<Streaming<ResolveRequest>>,
    ) -> Result<Response<Self::ResolveStream>, Status> {
        let caller = request.metadata().get("caller").map_or(String::new(), |c| c.to_str().unwrap().to_owned());
        let share = self.quota.join(caller).map_err(|e| Status::resource_exhausted(e.to_string()))?;
        let (tx, rx) = mpsc::channel(1);
        let source = self.source.clone();
        tokio::spawn(async move {
            if let Some(status) = serve(&*source, share, request.into_inner(), &tx).await {
                let _ = tx.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(rx)))
    }
}

struct Running {
    socket: PathBuf,
    _dir: tempfile::TempDir,
    _stop: DropGuard,
}

fn start<S: Source + 'static>(source: Arc<S>, quota: Quota<String>) -> Running {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("directory.sock");
    let incoming = accept_unix(bind_unix(&socket, 0o600).unwrap(), socket.clone(), 0o600);
    let service = DirectoryServer::new(Endpoint { source, quota: Arc::new(quota) });
    let stop = CancellationToken::new();
    let server = crate::grpc::server(256).add_service(service);
    tokio::spawn(server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned()));
    Running { socket, _dir: dir, _stop: stop.drop_guard() }
}

fn follower(socket: PathBuf, most: usize) -> (Subscriptions, DropGuard) {
    let (subscriptions, stop) = (Subscriptions::with_room_for(most), CancellationToken::new());
    let (own, end) = (subscriptions.clone(), stop.clone());
    tokio::spawn(async move { own.run(unix_channel(socket), end).await });
    (subscriptions, stop.drop_guard())
}

fn address(n: u32) -> IpAddr {
    Ipv4Addr::from_bits(0x0a00_0000 + n).into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_addresses_at_once_are_all_answered() {
    let server = start(Arc::new(Everywhere(watch::Sender::new(0))), Quota::new(100_000, 60_000));
    let (followed, _stop) = follower(server.socket.clone(), 20_000);
    let receivers: Vec<_> = (0..20_000).map(|n| followed.follow(address(n))).collect();
    let all = async {
        for mut receiver in receivers {
            receiver.wait_for(Option::is_some).await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(30), all).await.expect("both ends waited for each other");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_follows_without_end_starves_itself_alone() {
    let server = start(Arc::new(Everywhere(watch::Sender::new(0))), Quota::new(100_000, 100_000));
    let (agent, _stop) = follower(server.socket.clone(), 2_000);
    let agent_socket = start(Arc::new(agent.clone()), Quota::new(2_000, 1_000));
    // The greedy one names more addresses than all may follow together, and continues after it was rejected.
    let (tx, rx) = mpsc::channel(4);
    let channel = unix_channel(agent_socket.socket.clone());
    let mut client = crate::push::directory_client::DirectoryClient::new(channel);
    let mut request = Request::new(ReceiverStream::new(rx));
    request.metadata_mut().insert("caller", "greedy".parse().unwrap());
    let mut answers = client.resolve(request).await.unwrap().into_inner();
    let greedy = tokio::spawn(async move {
        let wire = |n| crate::convert::address_to_wire(address(n));
        for n in 0..1_990 {
            tx.send(ResolveRequest { subscribe: vec![wire(100_000 + n)], unsubscribe: vec![] }).await.unwrap();
        }
        tx
    });
    let held = tokio::time::timeout(Duration::from_secs(20), greedy).await.unwrap().unwrap();
    let mut told = 0;
    while let Ok(Ok(Some(message))) = tokio::time::timeout(Duration::from_secs(2), answers.message()).await {
        told += message.answers.len();
    }
    assert_eq!(told, 1_000, "its own share, and its stream lives on");
    assert!(agent.len() <= 1_000, "{}", agent.len());
    let (other, _stop) = follower(agent_socket.socket.clone(), 500);
    for n in 0..100 {
        let answer = other.resolve(address(n), Duration::from_secs(2)).await;
        assert!(matches!(answer, Some(Answer::Meshed(_))), "address {n}: {answer:?}");
    }
    // A caller that keeps naming is rejected; the streams of others stay.
    let subscribe = (0..100).map(|n| crate::convert::address_to_wire(address(200_000 + n))).collect();
    held.send(ResolveRequest { subscribe, unsubscribe: vec![] }).await.unwrap();
    let refused = tokio::time::timeout(Duration::from_secs(5), answers.message()).await.unwrap();
    assert_eq!(refused.unwrap_err().code(), tonic::Code::ResourceExhausted);
    assert!(other.resolve(address(101), Duration::from_secs(2)).await.is_some());
}

#[tokio::test]
async fn addresses_that_nobody_watches_make_room_and_watched_ones_stay() {
    let subscriptions = Subscriptions::with_room_for(32);
    let watched: Vec<_> = (0..20).map(|n| subscriptions.follow(address(n))).collect();
    for n in 100..300 {
        drop(subscriptions.follow(address(n)));
        assert!(subscriptions.len() <= 32);
    }
    let more: Vec<_> = (20..32).map(|n| subscriptions.follow(address(n))).collect();
    assert_eq!(subscriptions.len(), 32);
    let mut beyond = subscriptions.follow(address(400));
    assert!(beyond.changed().await.is_err(), "there is no room, and it is said at once");
    assert_eq!(subscriptions.resolve(address(401), Duration::from_secs(60)).await, None);
    assert_eq!(subscriptions.len(), 32);
    drop((watched, more));
    assert!(subscriptions.follow(address(402)).has_changed().is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_was_forgotten_and_is_asked_for_again_is_answered() {
    let server = start(Arc::new(Everywhere(watch::Sender::new(0))), Quota::new(100_000, 60_000));
    let (followed, _stop) = follower(server.socket.clone(), 16);
    for round in 0..300 {
        let known = followed.resolve(address(0), Duration::from_secs(5)).await;
        assert!(known.is_some(), "round {round}");
        // Forgotten because so many others are requested, and requested again before the connection has noticed.
        (1..40).for_each(|n| drop(followed.follow(address(n))));
    }
}
