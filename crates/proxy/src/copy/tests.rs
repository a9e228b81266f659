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
    let ((client, first), (second, server)) = (sockets().await, sockets().await);
    let carried = carried(first, second, Duration::from_secs(25));
    (client, server, carried)
}

/// The second leg is the one on the network.
fn carried(mut first: TcpStream, mut second: TcpStream, bound: Duration) -> tokio::task::JoinHandle<Carried> {
    tokio::spawn(async move {
        let (counter, cut) = (Counter::default(), Cut::default());
        let network = Network { leg: Side::Second, bound };
        let counters = (&counter, &counter);
        let terms = Terms { first_ended: false, counters, cut: &cut, network, under_way: false };
        carry(&mut first, &mut second, terms).await
    })
}

/// Bytes that wait in the talker's leg, for the most part, when the listener takes none.
const SPEECH: usize = 150_000;

/// A talker and a listener with little room on the listener's side, so that what is said waits between them. The talker's leg
/// is the second one, or the first one.
async fn narrow(talker_is_second: bool) -> (TcpStream, TcpStream, tokio::task::JoinHandle<Carried>) {
    let ((listener, to), (from, talker)) = (sockets().await, sockets().await);
    let socket = socket2::SockRef::from;
    socket(&listener).set_recv_buffer_size(4_096).unwrap();
    socket(&to).set_send_buffer_size(4_096).unwrap();
    socket(&from).set_recv_buffer_size(200_000).unwrap();
    let (first, second) = if talker_is_second { (to, from) } else { (from, to) };
    (talker, listener, carried(first, second, Duration::from_secs(25)))
}

/// Writes until the peer takes no more.
async fn flood(stream: &mut TcpStream) -> usize {
    let (bytes, mut sent) = (vec![7; 64 * 1024], 0);
    while let Ok(Ok(n)) = tokio::time::timeout(Duration::from_millis(100), stream.write(&bytes)).await {
        sent += n;
    }
    sent
}

async fn until_acknowledged(stream: &TcpStream) {
    while standing(stream).unacknowledged > 0 {
        tokio::task::yield_now().await;
    }
}

/// Reads to the end or the error; what was read, and whether the end was clean.
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
    for _ in 0..10 {
        let (mut client, mut server, carried) = between().await;
        // The upload waits for a server that takes none of it, so that the reset is met by a write. The client does not write
        // when it comes: a reset is told once, and it is the client's read that is to hear of it.
        flood(&mut client).await;
        server.write_all(b"half an ans").await.unwrap();
        drop(server);
        assert_eq!(hear(&mut client).await, (b"half an ans".to_vec(), false), "a reset looked like an end");
        assert_eq!(carried.await.unwrap().end, End::Reset);
    }
}

#[tokio::test]
async fn a_transfer_that_both_ends_have_finished_reaches_a_slow_reader_whole() {
    for talker_is_second in [true, false] {
        let (mut talker, mut listener, mut carried) = narrow(talker_is_second).await;
        // Half-closed, as `nc -N` does: the talker's leg is closed both ways while most of the answer waits in it.
        listener.shutdown().await.unwrap();
        assert_eq!(talker.read(&mut [0]).await.unwrap(), 0);
        talker.write_all(&vec![7; SPEECH]).await.unwrap();
        talker.shutdown().await.unwrap();
        until_acknowledged(&talker).await;
        drop(talker);
        assert!(tokio::time::timeout(STUCK * 4, &mut carried).await.is_err(), "it waits for its reader");
        let (heard, clean) = hear(&mut listener).await;
        assert_eq!((heard.len(), clean), (SPEECH, true));
        assert_eq!(carried.await.unwrap().end, End::Closed);
    }
}

#[tokio::test]
async fn what_a_leg_said_before_its_reset_reaches_a_slow_reader_whole_and_is_no_end() {
    for talker_is_second in [true, false] {
        let (mut talker, mut listener, mut carried) = narrow(talker_is_second).await;
        talker.write_all(&vec![7; SPEECH]).await.unwrap();
        until_acknowledged(&talker).await;
        reset_on_close(&talker);
        drop(talker);
        assert!(tokio::time::timeout(STUCK * 4, &mut carried).await.is_err(), "it waits for its reader");
        let (heard, clean) = hear(&mut listener).await;
        assert_eq!((heard.len(), clean), (SPEECH, false));
        assert_eq!(carried.await.unwrap().end, End::Reset);
    }
}

#[tokio::test]
async fn a_reader_that_stands_still_lives_for_as_long_as_it_answers() {
    let ((mut client, first), (second, mut server)) = (sockets().await, sockets().await);
    let bound = Duration::from_secs(1);
    let mut carried = carried(first, second, bound);
    let sent = flood(&mut client).await;
    // The kernel's probes of a closed window are soon further apart than the bound: 0.2 s, doubled each time.
    assert!(tokio::time::timeout(bound * 6, &mut carried).await.is_err(), "its reader is alive");
    client.shutdown().await.unwrap();
    let (heard, clean) = hear(&mut server).await;
    assert_eq!((heard.len(), clean), (sent, true));
    drop(server);
    assert_eq!(carried.await.unwrap().end, End::Closed);
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

#[tokio::test]
async fn a_connection_that_gets_stuck_while_memory_is_short_keeps_little_and_loses_nothing() {
    crate::buffer::SHORT.set(true);
    let ((mut client, mut first), (mut second, mut server)) = (sockets().await, sockets().await);
    let counter = Counter::default();
    let mut flow = Flow::new(&counter, false);
    let stuck = std::future::poll_fn(|cx| {
        let _ = flow.poll(cx, &mut first, &mut second);
        if flow.kept() > 0 { Poll::Ready(()) } else { Poll::Pending }
    });
    let bytes = vec![7; 64 * 1024];
    let sending = async { while client.write_all(&bytes).await.is_ok() {} };
    tokio::select! { () = stuck => {}, () = sending => {} }
    assert!((1..=4 * 1024).contains(&flow.kept()), "{} bytes", flow.kept());
    crate::buffer::SHORT.set(false);
    let passed = flow.bytes;
    drop(client);
    let carrying = std::future::poll_fn(|cx| flow.poll(cx, &mut first, &mut second));
    let (carried, (heard, clean)) = tokio::join!(carrying, hear(&mut server));
    assert!(carried.is_ok() && clean && heard.len() as u64 == flow.bytes && flow.bytes >= passed);
}
