//! The service on the wire: an agent's state that the test changes, and a client of its socket.

mod delta;
mod refusals;
mod state_of_the_world;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use countersign_api::calls::CallLayer;
use countersign_api::grpc;
use countersign_api::peer::UnixPeer;
use countersign_api::sds::secret::Type;
use countersign_api::sds::secret_discovery_service_client::SecretDiscoveryServiceClient;
use countersign_api::sds::{
    CertificateValidationContext, SECRET_TYPE, Secret, SpiffeCertValidatorConfig, TlsCertificate,
};
use countersign_api::transport::{peer_credentials, unix_channel};
use countersign_identity::EntryId;
use countersign_identity::bundle::certificates_from_pem;
use countersign_identity::trust_domain::parse_trust_domain;
use prost::Message;
use prost_types::Any;
use time::OffsetDateTime;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::body::Body;
use tonic::codegen::http;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use tower::util::MapRequestLayer;

use crate::endpoints::{Core, bounds, routes, tests::core};
use crate::testing::{Ca, cached};
use crate::workload_attestor::Unix;

const TD: &str = "spiffe://test.local";
const FIRST: &str = "spiffe://test.local/first";
const SECOND: &str = "spiffe://test.local/second";
const FOREIGN: &str = "spiffe://partner.test";

/// An agent with a caller that has two identities.
struct World {
    core: Arc<Core>,
    ca: Ca,
    client: SecretDiscoveryServiceClient<Channel>,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        Self::with(|_| ()).await
    }

    /// With settings of its own.
    async fn with(change: impl FnOnce(&mut crate::Config)) -> Self {
        let (own, _other_end) = UnixStream::pair().unwrap();
        Self::of_caller(peer_credentials(&own).unwrap(), change).await
    }

    /// Whose calls are this process's.
    async fn of_caller(peer: UnixPeer, change: impl FnOnce(&mut crate::Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut core = core(dir.path());
        core.attestors = vec![Arc::new(Unix::new(false, 0))];
        change(Arc::make_mut(&mut core.config));
        let core = Arc::new(core);
        let client = SecretDiscoveryServiceClient::new(serve(&core, &dir.path().join("s"), peer).await);
        let world = Self { core, ca: Ca::new(OffsetDateTime::now_utc()), client, _dir: dir };
        let bundle = Arc::new(world.ca.bundle());
        world.core.cache.change(|state| {
            state.synced = true;
            state.bundle = Some(bundle);
        });
        world.sign("second", 2);
        world.sign("first", 1);
        world
    }

    /// Signs an SVID of an entry, which is made if there is none. `age` says which is the oldest.
    fn sign(&self, name: &str, age: i64) {
        let svid = self.ca.svid(&format!("/{name}"), Duration::from_secs(3_600), OffsetDateTime::now_utc());
        self.core.cache.change(|state| {
            let mut one = cached(name, 1);
            let entry = Arc::make_mut(&mut one.entry);
            entry.created_at += Duration::from_secs(age.unsigned_abs());
            entry.selectors =
                std::iter::once(format!("unix:uid:{}", nix::unistd::geteuid()).parse().unwrap()).collect();
            let one = state.entries.entry(entry.id.clone()).or_insert(one);
            one.svid = Some(Arc::new(svid));
        });
    }

    /// The second entry federates with another trust domain.
    fn federate(&self) -> Ca {
        let ca = Ca::new(OffsetDateTime::now_utc());
        let mut bundle = ca.bundle();
        bundle.trust_domain = parse_trust_domain("partner.test").unwrap();
        self.core.cache.change(|state| {
            let entry = &mut state.entries.get_mut(&key("second")).unwrap().entry;
            Arc::make_mut(entry).federates_with.insert(bundle.trust_domain.clone());
            state.federated.insert("partner.test".into(), Arc::new(bundle));
        });
        ca
    }

    fn forget(&self, name: &str) {
        self.core.cache.change(|state| state.entries.remove(&key(name))).unwrap();
    }

    /// The leaf that an entry has now.
    fn leaf(&self, name: &str) -> Vec<u8> {
        let state = self.core.cache.read();
        state.entries[&key(name)].svid.as_ref().unwrap().chain()[0].to_vec()
    }
}

fn key(name: &str) -> EntryId {
    name.parse().unwrap()
}

/// Serves the agent's endpoints; every call is this peer's.
async fn serve(core: &Arc<Core>, path: &Path, peer: UnixPeer) -> Channel {
    let listener = UnixListener::bind(path).unwrap();
    let as_peer = move |mut request: http::Request<Body>| {
        request.extensions_mut().insert(peer.clone());
        request
    };
    let server =
        grpc::server(16).layer(MapRequestLayer::new(as_peer)).layer(CallLayer(bounds())).add_routes(routes(core).await);
    tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
    unix_channel(path)
}

/// A stream of requests and responses.
struct Talk<Q, A> {
    ask: mpsc::Sender<Q>,
    hear: Streaming<A>,
}

impl<Q: Send + 'static, A> Talk<Q, A> {
    fn requests() -> (mpsc::Sender<Q>, ReceiverStream<Q>) {
        let (ask, asked) = mpsc::channel(16);
        (ask, ReceiverStream::new(asked))
    }

    async fn say(&self, request: Q) {
        self.ask.send(request).await.unwrap();
    }

    /// The next response, or how the stream ends.
    async fn heard(&mut self) -> Result<A, Status> {
        let heard = tokio::time::timeout(Duration::from_secs(10), self.hear.message()).await.expect("an answer");
        heard.map(|answer| answer.expect("the stream goes on"))
    }

    /// Nothing comes for a while.
    async fn is_quiet(&mut self) {
        let heard = tokio::time::timeout(Duration::from_millis(300), self.hear.message()).await;
        assert!(heard.is_err(), "something was sent");
    }
}

/// A secret as an Envoy reads it.
#[derive(Debug, PartialEq, Eq)]
enum Read {
    /// The leaf's DER.
    Svid(Vec<u8>),
    /// Trust domains with the DER of their roots.
    Spiffe(Vec<(String, Vec<Vec<u8>>)>),
    /// Roots alone.
    Chain(Vec<Vec<u8>>),
}

fn certificates(pem: &[u8]) -> Vec<Vec<u8>> {
    certificates_from_pem(pem).unwrap().iter().map(|der| der.to_vec()).collect()
}

fn read(resource: &Any) -> (String, Read) {
    assert_eq!(resource.type_url, SECRET_TYPE);
    let secret = Secret::decode(&*resource.value).unwrap();
    let read = match secret.r#type.unwrap() {
        Type::TlsCertificate(TlsCertificate { certificate_chain, private_key }) => {
            let key =
                rcgen::KeyPair::from_pem(std::str::from_utf8(&private_key.unwrap().inline_bytes).unwrap()).unwrap();
            let leaf = certificates(&certificate_chain.unwrap().inline_bytes).remove(0);
            let of_key = rcgen::PublicKeyData::subject_public_key_info(&key);
            assert!(leaf.windows(of_key.len()).any(|part| part == of_key), "the key is the certificate's");
            Read::Svid(leaf)
        }
        Type::ValidationContext(CertificateValidationContext {
            trusted_ca: Some(roots),
            custom_validator_config: None,
        }) => Read::Chain(certificates(&roots.inline_bytes)),
        Type::ValidationContext(context) => {
            assert_eq!(context.trusted_ca, None);
            let validator = context.custom_validator_config.unwrap();
            assert_eq!(validator.name, "envoy.tls.cert_validator.spiffe");
            let config = validator.typed_config.unwrap();
            assert!(config.type_url.ends_with("/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig"));
            let config = SpiffeCertValidatorConfig::decode(&*config.value).unwrap();
            let read = |td: countersign_api::sds::spiffe_cert_validator_config::TrustDomain| {
                (td.name, certificates(&td.trust_bundle.unwrap().inline_bytes))
            };
            Read::Spiffe(config.trust_domains.into_iter().map(read).collect())
        }
    };
    (secret.name, read)
}

fn roots(ca: &Ca) -> Vec<Vec<u8>> {
    ca.bundle().authorities.iter().map(|authority| authority.der().to_vec()).collect()
}
