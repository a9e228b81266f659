//! The driver over its sockets, called as a kubelet calls it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use countersign_api::csi::identity_client::IdentityClient;
use countersign_api::csi::node_client::NodeClient;
use countersign_api::csi::volume_capability::{AccessType, MountVolume};
use countersign_api::csi::{
    GetPluginCapabilitiesRequest, GetPluginInfoRequest, NodeGetCapabilitiesRequest, NodeGetInfoRequest,
    NodePublishVolumeRequest, NodeUnpublishVolumeRequest, ProbeRequest, VolumeCapability,
};
use countersign_api::plugin_registration::registration_client::RegistrationClient;
use countersign_api::plugin_registration::registration_server::Registration;
use countersign_api::plugin_registration::{InfoRequest, RegistrationStatus};
use countersign_api::transport::unix_channel;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::*;
use crate::testing::{Node, mounted, on_a_node};

const NAME: &str = "csi.countersign.dev";

fn config(node: &Node) -> Config {
    Config {
        driver: NAME.parse().unwrap(),
        node: "node1".parse().unwrap(),
        kubelet: node.kubelet().to_str().unwrap().parse().unwrap(),
        agent_dir: node.agent(),
        metrics: None,
    }
}

/// Runs a driver and its caller on one thread, so that both have the test's mounts.
fn with_driver(node: &Node, caller: impl AsyncFnOnce(PathBuf)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (stop, config) = (CancellationToken::new(), config(node));
    let registration = config.kubelet.registration(&config.driver);
    runtime.block_on(async {
        let called = async {
            caller(registration).await;
            stop.cancel();
        };
        let both = async { tokio::join!(run(config, stop.clone(), || {}), called).0 };
        tokio::time::timeout(Duration::from_secs(30), both).await.unwrap().unwrap();
    });
}

fn publish(node: &Node) -> NodePublishVolumeRequest {
    NodePublishVolumeRequest {
        volume_id: "csi-1".into(),
        target_path: node.mount().display().to_string(),
        volume_capability: Some(VolumeCapability { access_type: Some(AccessType::Mount(MountVolume::default())) }),
        readonly: true,
        volume_context: [("csi.storage.k8s.io/ephemeral".to_owned(), "true".to_owned())].into(),
    }
}

fn unpublish(node: &Node) -> NodeUnpublishVolumeRequest {
    NodeUnpublishVolumeRequest { volume_id: "csi-1".into(), target_path: node.mount().display().to_string() }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Calls a method that the driver does not have, with an empty message.
async fn unknown(channel: &Channel, path: &'static str) -> Status {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<ProbeRequest, ProbeRequest>::default();
    grpc.unary(tonic::Request::new(ProbeRequest {}), path.parse().unwrap(), codec).await.unwrap_err()
}

#[test]
fn a_kubelet_finds_the_driver_and_gets_its_volumes() {
    on_a_node(|node| {
        with_driver(node, async |registration| {
            let mut found = RegistrationClient::new(unix_channel(&registration));
            let info = found.get_info(InfoRequest {}).await.unwrap().into_inner();
            assert_eq!((info.r#type.as_str(), info.name.as_str()), ("CSIPlugin", NAME));
            assert_eq!(info.supported_versions, ["1.0.0"]);
            let socket = PathBuf::from(info.endpoint);
            assert_eq!(socket, node.kubelet().join("plugins").join(NAME).join("csi.sock"));
            assert_eq!((mode(&socket), mode(socket.parent().unwrap()), mode(&registration)), (0o600, 0o700, 0o600));

            let channel = unix_channel(&socket);
            let mut identity = IdentityClient::new(channel.clone());
            assert_eq!(identity.get_plugin_info(GetPluginInfoRequest {}).await.unwrap().into_inner().name, NAME);
            identity.get_plugin_capabilities(GetPluginCapabilitiesRequest {}).await.unwrap();
            assert_eq!(identity.probe(ProbeRequest {}).await.unwrap().into_inner().ready, Some(true));

            let mut driver = NodeClient::new(channel.clone());
            assert_eq!(driver.node_get_info(NodeGetInfoRequest {}).await.unwrap().into_inner().node_id, "node1");
            driver.node_get_capabilities(NodeGetCapabilitiesRequest {}).await.unwrap();
            for _ in 0..2 {
                driver.node_publish_volume(publish(node)).await.unwrap();
                assert_eq!(mounted(&node.mount()).len(), 1);
            }
            for _ in 0..2 {
                driver.node_unpublish_volume(unpublish(node)).await.unwrap();
                assert!(mounted(&node.mount()).is_empty() && !node.mount().exists());
            }
            let writable = NodePublishVolumeRequest { readonly: false, ..publish(node) };
            let refused = driver.node_publish_volume(writable).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument);
            assert!(refused.message().contains("readOnly: true"), "{refused}");
            let elsewhere = NodePublishVolumeRequest { target_path: "/etc".into(), ..publish(node) };
            let refused = driver.node_publish_volume(elsewhere).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument);
            let long = NodePublishVolumeRequest { volume_id: "x".repeat(MAX_REQUEST_BYTES), ..publish(node) };
            assert_eq!(driver.node_publish_volume(long).await.unwrap_err().code(), Code::OutOfRange);
            for path in ["/csi.v1.Node/NodeStageVolume", "/csi.v1.Controller/CreateVolume"] {
                assert_eq!(unknown(&channel, path).await.code(), Code::Unimplemented, "{path}");
            }
        });
    });
}

#[test]
fn a_driver_that_starts_again_goes_on_with_the_mounts_of_the_one_before() {
    on_a_node(|node| {
        let socket = |registration: PathBuf| {
            registration.parent().unwrap().with_file_name("plugins").join(NAME).join("csi.sock")
        };
        with_driver(node, async |registration| {
            let mut driver = NodeClient::new(unix_channel(socket(registration)));
            driver.node_publish_volume(publish(node)).await.unwrap();
        });
        assert!(!node.kubelet().join("plugins_registry").join(format!("{NAME}-reg.sock")).exists());
        assert_eq!(mounted(&node.mount()).len(), 1);
        with_driver(node, async |registration| {
            let mut driver = NodeClient::new(unix_channel(socket(registration)));
            driver.node_unpublish_volume(unpublish(node)).await.unwrap();
        });
        assert!(mounted(&node.mount()).is_empty() && !node.mount().exists());
    });
}

#[test]
fn the_driver_is_ready_once_the_kubelet_has_registered_it() {
    on_a_node(|node| {
        let metrics = Arc::new(Metrics::default());
        let config = Arc::new(config(node));
        let driver = Driver::new(config.clone(), metrics.clone());
        let registrar = Registrar::new(config.driver.clone(), "/x".into(), metrics.clone());
        let handler = pages(metrics, driver, registrar.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let tell = |plugin_registered, error: &str| {
            let said = RegistrationStatus { plugin_registered, error: error.into() };
            runtime.block_on(registrar.notify_registration_status(tonic::Request::new(said))).unwrap();
        };
        let page = || {
            let local = "127.0.0.1:1".parse().unwrap();
            let answer = runtime.block_on(handler(http::Asked {
                path: "/ready".into(),
                query: String::new(),
                local,
                near: true,
            }));
            answer.map(|a| (a.status, a.text)).unwrap()
        };
        assert!(page().1.contains("has not registered the driver"), "{}", page().1);
        tell(false, "no such\nversion");
        assert!(page().1.contains("the kubelet refuses the driver: no such\\nversion"), "{}", page().1);
        tell(true, "");
        assert_eq!(page().0, 200);
        std::fs::remove_dir(node.agent()).unwrap();
        assert!(page().1.contains("the agent's folder is not there"));
    });
}
