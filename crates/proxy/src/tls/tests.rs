//! The stream against rustls' own buffered streams, over real sockets: same bytes, same ends, bounded memory.

use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{RootCertStore, version};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::engine::MAX_HELLO;
use super::*;

fn configs() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let made = rcgen::generate_simple_self_signed(["peer.test".to_owned()]).unwrap();
    let certificate: CertificateDer<'static> = made.cert.der().clone();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let client = ClientConfig::builder_with_protocol_versions(&[&version::TLS13])
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut server = ServerConfig::builder_with_protocol_versions(&[&version::TLS13])
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    server.send_tls13_tickets = 0;
    (Arc::new(client), Arc::new(server))
}

fn name() -> ServerName<'static> {
    ServerName::try_from("peer.test").unwrap()
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (a, b) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (a.unwrap(), b.unwrap().0)
}

/// A client and a server of ours, connected.
async fn pair() -> (ClientStream, ServerStream) {
    let (client, server) = configs();
    let (a, b) = sockets().await;
    let dial = async {
        let mut tls = connect(client, name(), a).await.unwrap();
        tls.flush().await.unwrap();
        tls
    };
    tokio::join!(dial, async { accept(server, b).await.unwrap() })
}

fn bytes(n: usize, seed: u8) -> Vec<u8> {
    (0..n).map(|i| u8::try_from((i.wrapping_mul(31) >> 3) % 256).unwrap() ^ seed).collect()
}

/// Sends `up`, ends, and reads to the end.
async fn talk(stream: impl AsyncRead + AsyncWrite + Unpin, up: Vec<u8>) -> Vec<u8> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let send = async {
        writer.write_all(&up).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let mut down = vec![];
    let ((), got) = tokio::join!(send, reader.read_to_end(&mut down));
    got.unwrap();
    down
}

#[tokio::test]
async fn megabytes_go_both_ways_at_once_and_both_ends_are_heard() {
    let (client, server) = pair().await;
    let (up, down) = (bytes(9_000_001, 1), bytes(7_000_003, 2));
    let (got_down, got_up) = tokio::join!(talk(client, up.clone()), talk(server, down.clone()));
    assert!(got_up == up && got_down == down);
}

#[tokio::test]
async fn it_speaks_with_the_buffered_streams_in_both_roles() {
    let (client, server) = configs();
    let (up, down) = (bytes(3_000_001, 3), bytes(2_000_003, 4));
    let (a, b) = sockets().await;
    let ours = async { talk(connect(client.clone(), name(), a).await.unwrap(), up.clone()).await };
    let theirs = async { talk(TlsAcceptor::from(server.clone()).accept(b).await.unwrap(), down.clone()).await };
    let (got_down, got_up) = tokio::join!(ours, theirs);
    assert!(got_up == up && got_down == down);
    let (a, b) = sockets().await;
    let theirs = async { talk(TlsConnector::from(client).connect(name(), a).await.unwrap(), up.clone()).await };
    let ours = async { talk(accept(server, b).await.unwrap(), down.clone()).await };
    let (got_down, got_up) = tokio::join!(theirs, ours);
    assert!(got_up == up && got_down == down);
}

#[tokio::test]
async fn a_change_of_keys_in_the_middle_is_followed_and_answered() {
    let (client, server) = configs();
    let (a, b) = sockets().await;
    let ours = async { accept(server, b).await.unwrap() };
    let theirs = async { TlsConnector::from(client).connect(name(), a).await.unwrap() };
    let (mut ours, mut theirs) = tokio::join!(ours, theirs);
    for round in 0..3 {
        let (up, down) = (bytes(100_000, round), bytes(50_000, round + 9));
        theirs.get_mut().1.refresh_traffic_keys().unwrap();
        let (mut got_up, mut got_down) = (vec![0; up.len()], vec![0; down.len()]);
        let there = async {
            theirs.write_all(&up).await.unwrap();
            theirs.flush().await.unwrap();
            theirs.read_exact(&mut got_down).await.unwrap();
        };
        let here = async {
            ours.read_exact(&mut got_up).await.unwrap();
            ours.write_all(&down).await.unwrap();
            ours.flush().await.unwrap();
        };
        tokio::join!(there, here);
        assert!(got_up == up && got_down == down);
    }
}

/// Passes on the client's bytes one by one, so that every record and handshake message arrives in pieces.
async fn crumble(mut from: TcpStream, mut to: TcpStream) {
    to.set_nodelay(true).unwrap();
    let (mut heard, mut said) = from.split();
    let (mut answered, mut asked) = to.split();
    let forth = async {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = heard.read(&mut buffer).await.unwrap();
            for byte in &buffer[..count] {
                asked.write_all(&[*byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
            if count == 0 {
                return asked.shutdown().await.unwrap();
            }
        }
    };
    tokio::join!(forth, async { tokio::io::copy(&mut answered, &mut said).await.unwrap() });
}

#[tokio::test]
async fn bytes_that_come_one_by_one_make_the_same_stream() {
    let (client, server) = configs();
    let ((a, from), (to, b)) = (sockets().await, sockets().await);
    let between = tokio::spawn(crumble(from, to));
    let (up, down) = (bytes(20_000, 5), bytes(20_000, 6));
    let there = async { talk(connect(client, name(), a).await.unwrap(), up.clone()).await };
    let here = async { talk(accept(server, b).await.unwrap(), down.clone()).await };
    let (got_down, got_up) = tokio::join!(there, here);
    assert!(got_up == up && got_down == down);
    between.abort();
}

#[tokio::test]
async fn a_cut_is_no_end() {
    let (mut client, mut server) = pair().await;
    client.write_all(b"half of it").await.unwrap();
    drop(client);
    let mut got = vec![];
    let error = server.read_to_end(&mut got).await.unwrap_err();
    assert_eq!((error.kind(), &got[..]), (io::ErrorKind::UnexpectedEof, &b"half of it"[..]));
}

#[tokio::test]
async fn a_forged_record_ends_the_connection_and_the_peer_is_told() {
    let (client, server) = configs();
    let (a, b) = sockets().await;
    let ours = async { accept(server, b).await.unwrap() };
    let theirs = async { TlsConnector::from(client).connect(name(), a).await.unwrap() };
    let (mut ours, mut theirs) = tokio::join!(ours, theirs);
    theirs.get_mut().0.write_all(&[23, 3, 3, 0, 32, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]).await.unwrap();
    theirs.get_mut().0.write_all(&[9; 20]).await.unwrap();
    let error = ours.read_u8().await.unwrap_err();
    let told = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    assert!(matches!(told, Some(rustls::Error::DecryptError)), "{error}");
    let error = theirs.read_u8().await.unwrap_err();
    assert!(error.to_string().contains("BadRecordMac"), "{error}");
    // Afterwards nothing more is read or written.
    assert!(ours.read_u8().await.is_err() && ours.write_all(b"x").await.is_err());
}

#[tokio::test]
async fn a_certificate_of_a_stranger_is_refused_with_an_alert() {
    let ((client, _), (_, server)) = (configs(), configs());
    let (a, b) = sockets().await;
    let (here, there) = tokio::join!(connect(client, name(), a), accept(server, b));
    let refused = here.err().unwrap();
    let tls = refused.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    assert!(matches!(tls, Some(rustls::Error::InvalidCertificate(_))), "{refused}");
    let told = there.err().unwrap();
    let tls = told.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    assert!(matches!(tls, Some(rustls::Error::AlertReceived(_))), "{told}");
}

#[tokio::test]
async fn a_handshake_message_without_end_is_bounded() {
    let (_, server) = configs();
    let (mut a, b) = sockets().await;
    let accepting = tokio::spawn(async move { accept(server, b).await.err().unwrap() });
    // A ClientHello that announces 16 MiB, in records of 16 KiB.
    let mut record = vec![22, 3, 1, 0x40, 0];
    record.extend([1, 255, 255, 255]);
    record.resize(5 + 16 * 1024, 7);
    let mut sent = 0;
    while sent < 1024 * 1024 && a.write_all(&record).await.is_ok() {
        sent += record.len();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let error = tokio::time::timeout(Duration::from_secs(5), accepting).await.unwrap().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
}

#[tokio::test]
async fn a_peer_that_makes_us_answer_and_does_not_listen_is_not_read_for_ever() {
    let (client, server) = configs();
    let (a, b) = sockets().await;
    let ours = async { accept(server, b).await.unwrap() };
    let theirs = async { TlsConnector::from(client).connect(name(), a).await.unwrap() };
    let (mut ours, mut theirs) = tokio::join!(ours, theirs);
    let reading = tokio::spawn(async move {
        let mut one = [0; 1];
        let _ = ours.read(&mut one).await;
        ours
    });
    let flood = async {
        for _ in 0..200_000 {
            if theirs.get_mut().1.refresh_traffic_keys().is_err() || theirs.flush().await.is_err() {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(5), flood).await;
    // Either it has given up or it waits; it holds one buffer at most.
    assert!(!reading.is_finished() || reading.await.unwrap().failed);
}

#[tokio::test]
async fn an_idle_connection_holds_nothing() {
    let (mut client, mut server) = pair().await;
    let mut got = [0; 1000];
    client.write_all(&[1; 1000]).await.unwrap();
    server.read_exact(&mut got).await.unwrap();
    server.write_all(&[2; 1000]).await.unwrap();
    client.read_exact(&mut got).await.unwrap();
    assert_eq!((client.incoming.capacity(), client.plain.capacity(), client.outgoing.is_none()), (0, 0, true));
    assert_eq!((server.incoming.capacity(), server.plain.capacity(), server.outgoing.is_none()), (0, 0, true));
}

#[tokio::test]
async fn a_client_hello_that_is_longer_than_any_of_ours_is_not_waited_for() {
    let (_, server) = configs();
    let (mut a, b) = sockets().await;
    let accepting = tokio::spawn(async move { accept(server, b).await.err().unwrap() });
    // One record of 16 KiB, of which less than half arrives and the rest never does.
    let mut record = vec![22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3];
    record.resize(MAX_HELLO + 1, 7);
    a.write_all(&record).await.unwrap();
    let error = tokio::time::timeout(Duration::from_secs(5), accepting).await.unwrap().unwrap();
    assert!(error.to_string().contains("a handshake message of more than 6144 bytes"), "{error}");
}

#[tokio::test]
async fn an_alert_is_heard_by_a_peer_that_has_sent_more_than_was_read() {
    for _ in 0..50 {
        let (_, server) = configs();
        let (mut a, b) = sockets().await;
        let accepting = tokio::spawn(async move { accept(server, b).await.err().unwrap() });
        // Not a ClientHello, followed by enough bytes that a close would find unread ones.
        let mut sent = vec![22, 3, 1, 0, 8, 9, 0, 0, 4, 1, 2, 3, 4];
        sent.resize(100_000, 7);
        a.write_all(&sent).await.unwrap();
        let mut head = [0; 3];
        a.read_exact(&mut head).await.expect("the alert came before any reset");
        assert_eq!(head[0], 21, "an alert");
        drop(a);
        assert!(accepting.await.unwrap().to_string().len() > 1);
    }
}

#[tokio::test]
async fn what_was_said_before_a_reset_is_read_though_a_write_has_failed() {
    let (mut client, mut server) = pair().await;
    server.write_all(&vec![5; 30_000]).await.unwrap();
    server.flush().await.unwrap();
    // Wait until it has arrived; then the server goes away with a reset.
    while crate::kernel::standing(server.tcp()).unacknowledged > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    crate::copy::reset_on_close(server.tcp());
    drop(server);
    while client.write_all(&[1; 1000]).await.is_ok() {}
    let mut got = vec![];
    assert!(client.read_to_end(&mut got).await.is_err());
    assert_eq!(got.len(), 30_000);
}

#[tokio::test]
async fn a_peer_that_stops_in_the_middle_while_memory_is_short_makes_us_hold_little() {
    crate::buffer::SHORT.set(true);
    let (mut client, mut server) = pair().await;
    // It sends and takes nothing.
    let flood = bytes(1 << 20, 6);
    let sending = async {
        for part in flood.chunks(4 * 1024).cycle() {
            server.write_all(part).await.unwrap();
        }
    };
    assert!(tokio::time::timeout(Duration::from_millis(300), sending).await.is_err());
    let held = server.outgoing.as_ref().map_or(0, Buffer::held);
    assert!((1..=9 * 1024).contains(&held), "{held} bytes to be sent");
    let mut got = vec![0; 4 * 1024];
    client.read_exact(&mut got).await.unwrap();
    assert_eq!(got, flood[..got.len()]);
    let held = client.incoming.capacity() + client.plain.capacity();
    assert!(held <= 2 * crate::buffer::RECORD, "{held} bytes received");
}

#[tokio::test]
async fn an_unfinished_flight_holds_little_more_than_has_come() {
    let (config, _) = configs();
    let (a, mut b) = sockets().await;
    let engine = UnbufferedClientConnection::new(config, name()).unwrap();
    let mut stream = TlsStream::new(a, engine);
    // A ServerHello of 40 kB, of which half comes and the rest never.
    let mut sent = vec![22, 3, 3, 0x40, 0, 2, 0, 0x9c, 0x40];
    sent.resize(5 + 16 * 1024, 7);
    sent.extend([22, 3, 3, 0x40, 0]);
    sent.resize(20_000, 7);
    b.write_all(&sent).await.unwrap();
    let all = std::future::poll_fn(|cx| {
        let polled = stream.poll_shake_hands(cx);
        if stream.received < sent.len() { polled.map(Result::unwrap) } else { Poll::Ready(()) }
    });
    tokio::time::timeout(Duration::from_secs(5), all).await.unwrap();
    let (length, capacity) = (stream.incoming.len(), stream.incoming.capacity());
    assert!(length >= 16 * 1024 && capacity <= length + FLIGHT_STEP, "{length} bytes in {capacity}");
}
