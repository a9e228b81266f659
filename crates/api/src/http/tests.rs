//! A health check is answered within a second, whatever connections others hold open.

#![allow(clippy::unwrap_used)]

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio_util::task::AbortOnDropHandle;

use std::io;

use super::*;

const STRANGER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 7, 1));
const KUBELET: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 7, 2));

struct Served {
    at: SocketAddr,
    _task: AbortOnDropHandle<()>,
}

async fn served() -> Served {
    served_within(DEADLINES).await
}

async fn served_within(deadlines: Deadlines) -> Served {
    crate::test_support::many_descriptors();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let handler: Arc<Handler> = Arc::new(|asked| {
        Box::pin(async move {
            match asked.path.as_str() {
                "/ready" => Some(Answer::ready(None)),
                "/slow" => std::future::pending().await,
                _ => None,
            }
        })
    });
    let task =
        AbortOnDropHandle::new(tokio::spawn(serve_within(deadlines, listener, handler, CancellationToken::new())));
    Served { at, _task: task }
}

async fn dial(from: IpAddr, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(SocketAddr::new(from, 0)).unwrap();
    socket.connect(to).await.unwrap()
}

async fn ask(stream: &mut TcpStream, path: &str) -> io::Result<()> {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await
}

/// Whether a health check is answered with 200 within a second.
async fn probe(from: IpAddr, to: SocketAddr) -> bool {
    let asked = async {
        let mut stream = dial(from, to).await;
        ask(&mut stream, "/ready").await.ok()?;
        let mut answer = [0; 15];
        stream.read_exact(&mut answer).await.ok()?;
        Some(answer == *b"HTTP/1.1 200 OK")
    };
    tokio::time::timeout(Duration::from_secs(1), asked).await.ok().flatten() == Some(true)
}

async fn all_probes_succeed(to: SocketAddr) {
    for from in [KUBELET, STRANGER] {
        for n in 0..30 {
            assert!(probe(from, to).await, "probe {n} of 30 from {from}");
        }
    }
}

#[tokio::test]
async fn silent_connections_keep_no_probe_waiting() {
    for count in [64, 256, 1_500] {
        let served = served().await;
        let mut silent = vec![];
        for _ in 0..count {
            silent.push(dial(STRANGER, served.at).await);
        }
        all_probes_succeed(served.at).await;
        drop(silent);
    }
}

#[tokio::test]
async fn connections_that_send_a_byte_now_and_then_keep_no_probe_waiting() {
    let served = served().await;
    let mut slow = vec![];
    for _ in 0..256 {
        slow.push(dial(STRANGER, served.at).await);
    }
    let drip = tokio::spawn(async move {
        for byte in b"GET /ready HTTP/1.1\r\nx: ".iter().chain(std::iter::repeat(&b'y')) {
            for stream in &mut slow {
                let _ = stream.write_all(&[*byte]).await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let drip = AbortOnDropHandle::new(drip);
    all_probes_succeed(served.at).await;
    drop(drip);
}

#[tokio::test]
async fn connections_that_ask_again_and_again_keep_no_probe_waiting() {
    let served = served().await;
    let mut kept = vec![];
    for n in 0..=255u8 {
        // From many addresses too: each is its own source.
        let mut stream = dial(IpAddr::from([127, 0, 9, n.max(1)]), served.at).await;
        let _ = ask(&mut stream, "/ready").await;
        kept.push(stream);
    }
    all_probes_succeed(served.at).await;
    for stream in &mut kept {
        let _ = ask(stream, "/ready").await;
    }
    all_probes_succeed(served.at).await;
}

#[tokio::test]
async fn requests_that_are_never_answered_keep_no_probe_waiting() {
    let served = served().await;
    let mut slow = vec![];
    for n in 0..600u16 {
        let mut stream = dial(IpAddr::from([127, 0, 10, u8::try_from(n % 20).unwrap() + 1]), served.at).await;
        let _ = ask(&mut stream, "/slow").await;
        slow.push(stream);
    }
    all_probes_succeed(served.at).await;
}

/// Reads until the other end closes.
async fn closed(stream: &mut TcpStream) {
    let mut bytes = vec![];
    let _ = stream.read_to_end(&mut bytes).await;
}

#[tokio::test]
async fn heads_idle_connections_and_whole_lives_have_an_end() {
    let ms = Duration::from_millis;
    let served =
        served_within(Deadlines { handshake: ms(300), head: ms(300), life: ms(1_000), last_answer: ms(100) }).await;
    let began = std::time::Instant::now();
    let (mut silent, mut idle) = (dial(STRANGER, served.at).await, dial(STRANGER, served.at).await);
    ask(&mut idle, "/ready").await.unwrap();
    closed(&mut silent).await;
    closed(&mut idle).await;
    assert!((ms(250)..ms(900)).contains(&began.elapsed()), "{:?}", began.elapsed());
    // A connection that sends its requests in time lives longer, but not forever; nor does one that waits for its
    // answer.
    let (mut busy, mut waits) = (dial(STRANGER, served.at).await, dial(STRANGER, served.at).await);
    let began = std::time::Instant::now();
    ask(&mut waits, "/slow").await.unwrap();
    let mut bytes = [0; 4096];
    while ask(&mut busy, "/ready").await.is_ok() && busy.read(&mut bytes).await.unwrap_or(0) > 0 {
        tokio::time::sleep(ms(100)).await;
        assert!(began.elapsed() < ms(2_000), "{:?}", began.elapsed());
    }
    assert!(began.elapsed() >= ms(900), "{:?}", began.elapsed());
    closed(&mut waits).await;
    assert!((ms(1_000)..ms(2_000)).contains(&began.elapsed()), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_handshake_that_never_ends_is_given_up() {
    let ms = Duration::from_millis;
    let deadlines = Deadlines { handshake: ms(200), ..DEADLINES };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let open = |stream: TcpStream| async move {
        let never: io::Result<TcpStream> = std::future::pending().await;
        drop(stream);
        never
    };
    let serving = serve_opened(deadlines, TLS_LIMITS, open, listener, pages(|_| None), CancellationToken::new());
    let _task = AbortOnDropHandle::new(tokio::spawn(serving));
    let began = std::time::Instant::now();
    closed(&mut dial(STRANGER, at).await).await;
    assert!((ms(150)..ms(2_000)).contains(&began.elapsed()), "{:?}", began.elapsed());
}
