#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};

use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

use super::*;

/// A kubelet on loopback, and what an agent knows it by.
pub struct FakeKubelet {
    dir: tempfile::TempDir,
    address: String,
    /// Connections, and requests that came over one.
    pub seen: Arc<(AtomicUsize, AtomicUsize)>,
    _serving: AbortOnDropHandle<()>,
}

impl FakeKubelet {
    /// One that answers with this pod list. `verified`: whether the agent's CA is its certificate's.
    pub async fn start(list: String, verified: bool) -> Self {
        let own = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).unwrap();
        let another = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let ca = if verified { &own } else { &another };
        std::fs::write(dir.path().join("ca.crt"), ca.cert.pem()).unwrap();
        std::fs::write(dir.path().join("token"), "secret").unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![own.cert.der().clone()],
                PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap(),
            )
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (acceptor, seen) = (TlsAcceptor::from(Arc::new(tls)), Arc::<(AtomicUsize, AtomicUsize)>::default());
        let counted = seen.clone();
        let serving = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                counted.0.fetch_add(1, Ordering::Relaxed);
                let Ok(mut tls) = acceptor.accept(tcp).await else { continue };
                let mut request = vec![];
                while !request.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = tls.read_u8().await else { break };
                    request.push(byte);
                }
                if request.is_empty() {
                    continue;
                }
                counted.1.fetch_add(1, Ordering::Relaxed);
                let answer =
                    format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{list}", list.len());
                let _ = tls.write_all(answer.as_bytes()).await;
                let _ = tls.shutdown().await;
            }
        });
        Self { dir, address, seen, _serving: AbortOnDropHandle::new(serving) }
    }

    /// A client of it; `second`: beside a watch.
    pub fn client(&self, second: bool) -> Client {
        let file = |name: &str| self.dir.path().join(name);
        Client::new(Kubelet { address: self.address.clone(), ca: file("ca.crt"), token: file("token") }, second)
            .unwrap()
    }
}

/// A pod list that is valid and empty.
pub fn nothing() -> String {
    r#"{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[]}"#.into()
}

#[tokio::test]
async fn a_kubelet_that_signs_itself_is_told_no_token_and_is_left_alone_beside_a_watch() {
    let kubelet = FakeKubelet::start(nothing(), false).await;
    let client = kubelet.client(true);
    assert!(matches!(client.standing(), Standing::Fails { .. }));
    for _ in 0..3 {
        let why = client.pods().await.err().unwrap().to_string();
        assert!(why.contains("certificate"), "{why}");
    }
    assert_eq!(kubelet.seen.0.load(Ordering::Relaxed), 1, "one attempt");
    assert_eq!(kubelet.seen.1.load(Ordering::Relaxed), 0, "nothing was sent to it");
    assert!(matches!(client.standing(), Standing::Fails { why, .. } if why.contains("certificate")));
    // As the only source it is tried each time.
    let alone = kubelet.client(false);
    for _ in 0..3 {
        assert!(alone.pods().await.is_err());
    }
    assert_eq!(kubelet.seen.0.load(Ordering::Relaxed), 4);
}

#[tokio::test]
async fn a_kubelet_whose_certificate_verifies_is_asked() {
    let kubelet = FakeKubelet::start(nothing(), true).await;
    let client = kubelet.client(true);
    assert!(client.pods().await.unwrap().get("u1").is_none());
    assert_eq!(client.standing(), Standing::Works);
    assert_eq!(kubelet.seen.1.load(Ordering::Relaxed), 1);
}
