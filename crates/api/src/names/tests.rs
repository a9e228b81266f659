//! Addresses that drop packets, refuse, or never serve: the next address is tried soon, and first the next time.

#![allow(clippy::unwrap_used)]

use std::net::Ipv6Addr;
use std::time::Instant;

use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;

use super::*;

#[test]
fn a_server_is_a_host_and_a_port() {
    assert_eq!(split("server.mesh.svc:8081"), Some(("server.mesh.svc", 8081)));
    assert_eq!(split("[::1]:8081"), Some(("::1", 8081)));
    for wrong in ["server", "server:", ":8081", "server:0", "server:99999", "::1:8081", "[server]:8081"] {
        assert_eq!(split(wrong), None, "{wrong}");
    }
}

#[tokio::test]
async fn a_name_of_the_hosts_file_is_reached() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    assert_eq!(connect(&format!("localhost:{port}")).await.unwrap().peer_addr().unwrap().port(), port);
    let error = connect(&format!("no-such-host.invalid:{port}")).await.unwrap_err().to_string();
    assert!(error.starts_with("cannot find the address of `no-such-host.invalid`"), "{error}");
}

#[test]
fn both_ip_versions_are_tried_in_turn() {
    let v4 = |n| IpAddr::from([192, 0, 2, n]);
    let v6 = |n| IpAddr::from(Ipv6Addr::from_bits(n));
    assert_eq!(in_turn(vec![v6(1), v6(2), v4(1), v4(2), v6(3)]), [v6(1), v4(1), v6(2), v4(2), v6(3)]);
    assert_eq!(in_turn(vec![v4(1), v6(1)]), [v4(1), v6(1)]);
    assert!(in_turn(vec![]).is_empty());
}

/// A listener on a loopback address with a full backlog: SYNs are dropped, as by a black hole.
struct BlackHole {
    _listener: Socket,
    _fill: Vec<Socket>,
    port: u16,
}

fn black_hole(address: IpAddr) -> BlackHole {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::new(address, 0).into()).unwrap();
    listener.listen(0).unwrap();
    let bound = listener.local_addr().unwrap();
    let mut fill = vec![];
    for _ in 0..8 {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let _ = socket.connect(&bound);
        fill.push(socket);
    }
    BlackHole { port: bound.as_socket().unwrap().port(), _listener: listener, _fill: fill }
}

#[tokio::test]
async fn a_black_hole_costs_a_quarter_of_a_second_and_not_the_connection() {
    let (hole, good) = (IpAddr::from([127, 0, 8, 1]), IpAddr::from([127, 0, 8, 2]));
    let swallowing = black_hole(hole);
    let alone = tokio::time::timeout(Duration::from_millis(600), TcpStream::connect((hole, swallowing.port))).await;
    assert!(alone.is_err(), "the backlog was meant to be full: {alone:?}");
    let listener = TcpListener::bind((good, swallowing.port)).await.unwrap();
    let began = Instant::now();
    let mut tried = vec![];
    let dialled = race(&[hole, good], swallowing.port, &mut tried).await.map_err(|(_, e)| e).unwrap();
    assert_eq!((dialled.address, tried), (good, vec![hole, good]));
    assert!((200..2_000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    drop(listener);
}

#[tokio::test]
async fn an_address_that_refuses_is_left_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (refuses, good) = (IpAddr::from([127, 0, 8, 3]), IpAddr::from([127, 0, 0, 1]));
    let began = Instant::now();
    let dialled = race(&[refuses, good], port, &mut vec![]).await.map_err(|(_, e)| e).unwrap();
    assert_eq!(dialled.address, good);
    assert!(began.elapsed() < STAGGER, "{:?}", began.elapsed());
    let (address, error) = race(&[refuses, IpAddr::from([127, 0, 8, 4])], port, &mut vec![]).await.err().unwrap();
    assert_eq!((address, error.kind()), (IpAddr::from([127, 0, 8, 4]), io::ErrorKind::ConnectionRefused));
}

#[test]
fn another_address_comes_first_at_the_next_try_and_a_good_one_stays_first() {
    let dialer = Dialer::new("server:1".into());
    let at = |n| IpAddr::from([192, 0, 2, n]);
    let all = || vec![at(1), at(2), at(3)];
    assert_eq!(dialer.in_order(all()), all());
    // The first one answered, but its handshake failed.
    dialer.learned().doubtful.insert(at(1));
    assert_eq!(dialer.in_order(all()), [at(2), at(3), at(1)]);
    dialer.is_good(at(3));
    assert_eq!(dialer.in_order(all()), [at(3), at(2), at(1)]);
    // When all are doubtful, none is more so than another.
    dialer.learned().good = None;
    dialer.learned().doubtful.extend(all());
    assert_eq!(dialer.in_order(all()), all());
    assert!(dialer.learned().doubtful.is_empty());
}

#[tokio::test]
async fn a_machine_that_accepts_and_serves_nobody_does_not_stay_first() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let dialer = Dialer::new(format!("127.0.0.1:{port}"));
    let dialled = dialer.connect().await.unwrap();
    assert!(dialer.learned().doubtful.contains(&dialled.address), "its handshake is not over yet");
    dialer.is_good(dialled.address);
    assert!(dialer.learned().doubtful.is_empty());
    assert_eq!(dialer.learned().good, Some(dialled.address));
}
