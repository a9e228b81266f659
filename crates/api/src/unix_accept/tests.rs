//! One local user cannot keep another one from being served.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_stream::StreamExt;
use tokio_util::task::AbortOnDropHandle;

use super::*;

struct Served {
    path: PathBuf,
    open: Arc<AtomicUsize>,
    _dir: tempfile::TempDir,
    _task: AbortOnDropHandle<()>,
}

/// Greets each caller that is passed on, and holds it until it ends.
fn served(descriptors: usize) -> Served {
    crate::test_support::many_descriptors();
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = dir.path().join("agent.sock");
    let listener = bind_unix(&path, 0o666).unwrap();
    let mut incoming = accept_bounded(listener, path.clone(), 0o666, descriptors);
    let open = Arc::new(AtomicUsize::new(0));
    let count = open.clone();
    let task = tokio::spawn(async move {
        while let Some(Ok(mut io)) = incoming.next().await {
            let count = count.clone();
            tokio::spawn(async move {
                count.fetch_add(1, Ordering::SeqCst);
                let _ = io.write_all(b"hello").await;
                let _ = io.read_to_end(&mut vec![]).await;
                count.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    Served { path, open, _dir: dir, _task: AbortOnDropHandle::new(task) }
}

/// Connects and sends the preface at once; `Some` with the connection if it is served within a second.
async fn greeted(path: &Path) -> Option<UnixStream> {
    let asked = async {
        let mut stream = UnixStream::connect(path).await.ok()?;
        stream.write_all(PREFACE).await.ok()?;
        let mut greeting = [0; 5];
        stream.read_exact(&mut greeting).await.ok()?;
        (greeting == *b"hello").then_some(stream)
    };
    tokio::time::timeout(Duration::from_secs(1), asked).await.ok().flatten()
}

/// A process of user 65534 that opens this many connections, prints `says`, and waits.
fn nobody_holds(path: &Path, count: usize, says: &str) -> std::process::Child {
    use std::io::Read;
    let script = "import resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
import os
os.setgid(65534); os.setuid(65534)
held = []
for n in range(int(sys.argv[2])):
    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); held.append(s)
    if sys.argv[3] == 'preface': s.sendall(b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n')
print('held', flush=True)
time.sleep(60)
";
    let mut child = std::process::Command::new("python3")
        .args(["-c", script, path.to_str().unwrap(), &count.to_string(), says])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut word = [0; 4];
    child.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
    assert_eq!(&word, b"held");
    child
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_silent_connections_of_nobody_keep_no_caller_waiting() {
    assert!(nix::unistd::geteuid().is_root(), "this test connects as another user, and so runs as root");
    let served = served(1_024);
    let path = served.path.clone();
    let mut nobody = tokio::task::spawn_blocking(move || nobody_holds(&path, 1_010, "nothing")).await.unwrap();
    for n in 0..30 {
        assert!(greeted(&served.path).await.is_some(), "call {n} of 30");
    }
    nobody.kill().unwrap();
    nobody.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_nobody_that_do_speak_are_bounded_and_take_from_nobody_else() {
    let served = served(1_024);
    let long = greeted(&served.path).await.unwrap();
    let path = served.path.clone();
    let mut nobody = tokio::task::spawn_blocking(move || nobody_holds(&path, 1_010, "preface")).await.unwrap();
    for n in 0..30 {
        assert!(greeted(&served.path).await.is_some(), "call {n} of 30");
    }
    // 1,024 descriptors allow 256 connections, at most 128 of them per user.
    let began = Instant::now();
    while served.open.load(Ordering::SeqCst) > 129 && began.elapsed() < Duration::from_secs(5) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(served.open.load(Ordering::SeqCst) <= 129, "{}", served.open.load(Ordering::SeqCst));
    let mut byte = [0];
    assert_eq!(
        long.try_read(&mut byte).unwrap_err().kind(),
        io::ErrorKind::WouldBlock,
        "it was there before, and stays"
    );
    nobody.kill().unwrap();
    nobody.wait().unwrap();
}

#[tokio::test]
async fn a_caller_that_says_nothing_is_dropped_after_a_while_and_garbage_at_once() {
    let served = served(1_024);
    let began = Instant::now();
    let mut garbage = UnixStream::connect(&served.path).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let _ = garbage.read_to_end(&mut vec![]).await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let mut silent = UnixStream::connect(&served.path).await.unwrap();
    silent.write_all(&PREFACE[..23]).await.unwrap();
    let _ = silent.read_to_end(&mut vec![]).await;
    assert!(began.elapsed() < PREFACE_TIMEOUT + Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(served.open.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_preface_in_pieces_with_more_behind_it_comes_through_whole() {
    let served = served(1_024);
    let mut stream = UnixStream::connect(&served.path).await.unwrap();
    for piece in PREFACE.chunks(5) {
        stream.write_all(piece).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut greeting = [0; 5];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"hello");
}
