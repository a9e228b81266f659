//! Ends and last bytes over real sockets; the second leg is the one that fails.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (a, b) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (a.unwrap(), b.unwrap().0)
}

/// Carries between a client and a server; returns their ends and the result.
async fn between() -> (TcpStream, TcpStream, tokio::task::JoinHandle<Carried>) {
    let ((client, mut first), (mut second, server)) = (sockets().await, sockets().await);
    let carried = tokio::spawn(async move {
        let (counter, cut) = (Counter::default(), Cut::default());
        let network = Network { leg: Side::Second, bound: Duration::from_secs(25) };
        let terms = Terms { first_ended: false, counters: (&counter, &counter), cut: &cut, network };
        carry(&mut first, &mut second, terms).await
    });
    (client, server, carried)
}

/// Reads to the end or the error; returns what was read, and whether the end was clean.
async fn hear(stream: &mut TcpStream) -> (Vec<u8>, bool) {
    let mut heard = vec![];
    let clean = stream.read_to_end(&mut heard).await.is_ok();
    (heard, clean)
}

#[tokio::test]
async fn an_answer_that_ends_before_the_upload_is_heard_each_time() {
    for size in [100_000, 1_000_000, 5_000_000] {
        for _ in 0..30 {
            let (mut client, mut server, carried) = between().await;
            let answer = vec![b'a'; 2_000];
            let serve = async {
                server.read_exact(&mut [0; 1_000]).await.unwrap();
                server.write_all(&answer).await.unwrap();
                server.shutdown().await.unwrap();
                // Closed with unread bytes: the kernel sends a reset after the answer's end.
                drop(server);
            };
            let upload = vec![0; size];
            let ((), _) = tokio::join!(serve, client.write_all(&upload));
            let (heard, _) = hear(&mut client).await;
            assert_eq!(heard.len(), answer.len(), "of an upload of {size} bytes");
            drop(client);
            carried.await.unwrap();
        }
    }
}

#[tokio::test]
async fn an_answer_that_is_cut_by_a_reset_never_ends_cleanly() {
    for _ in 0..30 {
        let (mut client, mut server, carried) = between().await;
        let serve = async {
            server.read_exact(&mut [0; 1_000]).await.unwrap();
            server.write_all(b"half an ans").await.unwrap();
            drop(server);
        };
        // The client keeps sending, so that a write meets the reset.
        let upload = vec![0; 2_000_000];
        let ((), sent) = tokio::join!(serve, client.write_all(&upload));
        let (heard, clean) = hear(&mut client).await;
        assert_eq!(heard, b"half an ans");
        // The reset is reported once, to the client's write or its read.
        assert!(sent.is_err() || !clean, "a reset looked like an end");
        assert_eq!(carried.await.unwrap().end, End::Reset);
    }
}

#[tokio::test]
async fn a_megabyte_that_was_sent_before_a_reset_arrives_before_it() {
    let (mut client, mut server, carried) = between().await;
    let sent = vec![7; 1_000_000];
    server.write_all(&sent).await.unwrap();
    // Everything is acknowledged before the reset, so that the reset discards nothing.
    while standing(&server).unacknowledged > 0 {
        tokio::task::yield_now().await;
    }
    reset_on_close(&server);
    drop(server);
    let (heard, clean) = hear(&mut client).await;
    assert_eq!((heard.len(), clean), (sent.len(), false));
    assert_eq!(carried.await.unwrap().end, End::Reset);
}

#[tokio::test]
async fn a_client_that_never_reads_is_not_waited_for_without_bound() {
    let (client, mut server, carried) = between().await;
    // More than the client's receive buffer holds.
    let flood = vec![0; 1 << 20];
    while let Ok(Ok(())) = tokio::time::timeout(Duration::from_millis(300), server.write_all(&flood)).await {}
    reset_on_close(&server);
    drop(server);
    let carried = tokio::time::timeout(PATIENCE + Duration::from_secs(10), carried).await.expect("it is bounded");
    assert_eq!(carried.unwrap().end, End::Reset);
    drop(client);
}
