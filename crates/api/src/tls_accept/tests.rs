//! Silent connections do not block the server, and a handshake is bounded in time and bytes.

#![allow(clippy::unwrap_used)]

use std::time::Instant;

use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;
use tokio_rustls::TlsConnector;
use tokio_stream::StreamExt;
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::tls::SvidVerifier;

/// A server without bundles, so that all its peers are anonymous, and a client that trusts the server.
fn config() -> (Arc<ServerTls>, Arc<rustls::ClientConfig>) {
    let key = rcgen::generate_simple_self_signed(vec!["server".into()]).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let secret = provider.key_provider.load_private_key(key.signing_key.serialize_der().try_into().unwrap()).unwrap();
    let own = Arc::new(CertifiedKey::new(vec![key.cert.der().clone()], secret));
    let verifier = SvidVerifier::new(Arc::default, |_| Ok(())).client_may_be_anonymous();
    let server = ServerTls::new(own, verifier, &[]).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(key.cert.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (Arc::new(server), Arc::new(client))
}

struct Served {
    at: SocketAddr,
    client: Arc<rustls::ClientConfig>,
    _task: AbortOnDropHandle<()>,
}

/// Greets each connection that is passed on.
async fn served() -> Served {
    crate::test_support::many_descriptors();
    let (server, client) = config();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let mut incoming = accept_tls(listener, move || server.clone());
    let task = tokio::spawn(async move {
        while let Some(Ok(mut io)) = incoming.next().await {
            tokio::spawn(async move {
                let _ = io.write_all(b"hello").await;
                let _ = io.flush().await;
                let _ = io.read_to_end(&mut vec![]).await;
            });
        }
    });
    Served { at, client, _task: AbortOnDropHandle::new(task) }
}

async fn dial(from: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from((from, 0))).unwrap();
    socket.connect(to).await.unwrap()
}

async fn greeted(served: &Served, from: [u8; 4]) -> bool {
    let asked = async {
        let tcp = dial(from, served.at).await;
        let name = ServerName::try_from("server").unwrap();
        let mut stream = TlsConnector::from(served.client.clone()).connect(name, tcp).await.ok()?;
        stream.write_all(PREFACE).await.ok()?;
        let mut greeting = [0; 5];
        stream.read_exact(&mut greeting).await.ok()?;
        Some(greeting == *b"hello")
    };
    tokio::time::timeout(Duration::from_secs(1), asked).await.ok().flatten() == Some(true)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_keep_no_agent_waiting() {
    let served = served().await;
    for (count, sources) in [(256, 1), (1_500, 1), (1_500, 200)] {
        let mut silent = vec![];
        for n in 0..count {
            silent.push(dial([127, 0, 11, u8::try_from(n % sources).unwrap() + 1], served.at).await);
        }
        for from in [[127, 0, 12, 1], [127, 0, 11, 1]] {
            for n in 0..30 {
                assert!(greeted(&served, from).await, "call {n} of 30 from {from:?}, {count} silent of {sources}");
            }
        }
    }
}

#[tokio::test]
async fn a_handshake_that_goes_on_and_on_is_cut_by_its_bytes() {
    let served = served().await;
    let mut endless = dial([127, 0, 13, 1], served.at).await;
    // A `ClientHello` that claims to be 16 MB long, in records of 16,000 bytes (RFC 8446 4, 5.1).
    let mut record = [&[22, 3, 1, 0x3e, 0x80][..], &[1, 0xff, 0xff, 0xff], &[0; 15_996]].concat();
    let began = Instant::now();
    let mut sent = 0;
    while endless.write_all(&record).await.is_ok() {
        sent += record.len();
        record[5..9].fill(0);
        assert!(sent < 8 * 1024 * 1024 && began.elapsed() < Duration::from_secs(5), "{sent} bytes were taken");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(greeted(&served, [127, 0, 13, 1]).await);
}

#[tokio::test]
async fn a_peer_that_speaks_no_http2_after_its_handshake_is_dropped() {
    let served = served().await;
    let name = ServerName::try_from("server").unwrap();
    let connector = TlsConnector::from(served.client.clone());
    let mut stream = connector.connect(name, dial([127, 0, 14, 1], served.at).await).await.unwrap();
    let began = Instant::now();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let _ = stream.read_to_end(&mut vec![]).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

/// A log in memory.
#[derive(Clone, Default)]
struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_flood_of_refused_connections_leaves_a_few_log_lines() {
    let (log, began) = (Log::default(), Instant::now());
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    // While there is one subscriber alone, a thread without it, such as another test's, that comes to a log statement first
    // switches the statement off for all threads.
    let _second = tracing::Dispatch::new(tracing::subscriber::NoSubscriber::default());
    let _guard = tracing::subscriber::set_default(subscriber);
    let served = served().await;
    for _ in 0..200 {
        tracing::callsite::rebuild_interest_cache();
        let mut tcp = dial([127, 0, 16, 1], served.at).await;
        tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        // An alert, or a reset.
        let _ = tcp.read_to_end(&mut vec![]).await;
    }
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let lines = text.lines().filter(|line| line.contains("TLS connection refused")).count();
    // Twenty lines in each window of ten seconds.
    let windows = usize::try_from(began.elapsed().as_secs() / 10).unwrap() + 1;
    assert!((1..=20 * windows).contains(&lines), "{lines} lines in {windows} windows");
}
