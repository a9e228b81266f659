//! What is not TCP, in real network namespaces: dropped under a guard but for what is named, and left alone without one.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use countersign_redirect::guard::Guard;
use countersign_redirect::netns::NetNs;
use countersign_redirect::{Backend, Redirect, in_force, install, installed, remove};

use world::{HERE, THERE, World, has_iptables};

mod world;

/// How long something is waited for that must not come.
const SILENCE: Duration = Duration::from_millis(700);

/// Answers every datagram to a port with the same bytes.
fn echo(ns: &NetNs, port: u16) {
    let socket = ns.run(move || UdpSocket::bind(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port))).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((n, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..n], from);
        }
    });
}

/// Whether a datagram is answered.
fn answered(ns: &NetNs, ip: impl Into<IpAddr>, port: u16) -> bool {
    let to = SocketAddr::new(ip.into(), port);
    let asked = ns.run(move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(SILENCE))?;
        socket.send_to(b"canary", to)?;
        socket.recv(&mut [0; 64])
    });
    asked.is_ok()
}

/// A Python program in a namespace; what it said.
fn python(ns: &NetNs, program: &'static str, to: IpAddr) -> String {
    let ran = ns.run(move || Command::new("python3").args(["-c", program, &to.to_string()]).output()).unwrap();
    format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr))
}

/// Whether a packet of SCTP (132), which no program here speaks, reaches the other namespace.
fn sctp_arrives(from: &NetNs, at: &NetNs, to: Ipv4Addr) -> bool {
    const RECEIVE: &str = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_RAW, 132)\ns.settimeout(2)\n\
                           try: print('heard', len(s.recv(99)))\nexcept TimeoutError: print('nothing')";
    const SEND: &str = "import socket, sys, time\ns = socket.socket(socket.AF_INET, socket.SOCK_RAW, 132)\n\
                        for _ in range(12):\n  time.sleep(.1)\n  try: s.sendto(b'x' * 32, (sys.argv[1], 0))\n  except OSError as e: print(e)";
    let there = NetNs::at(at.path());
    let heard = std::thread::spawn(move || python(&there, RECEIVE, to.into()));
    python(from, SEND, to.into());
    heard.join().unwrap().contains("heard")
}

/// Whether an ICMP echo is answered.
fn pinged(ns: &NetNs, to: Ipv4Addr) -> bool {
    const PING: &str = "import socket, sys, struct\ns = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\ns.settimeout(2)\n\
                        head = struct.pack('!BBHHH', 8, 0, 0, 7, 1)\n\
                        total = sum(struct.unpack('!4H', head)); total = (total >> 16) + (total & 0xffff)\n\
                        s.sendto(struct.pack('!BBHHH', 8, 0, ~total & 0xffff, 7, 1), (sys.argv[1], 0))\n\
                        print('echo' if s.recv(99)[20] == 0 else 'other')";
    python(ns, PING, to.into()).contains("echo")
}

fn put(ns: &NetNs, redirect: &Redirect, backend: Backend) {
    let redirect = redirect.clone();
    ns.run(move || {
        install(&redirect, backend).unwrap();
        assert!(in_force(&redirect, &installed().unwrap()), "{:#?}", installed().unwrap());
        Ok(())
    })
    .unwrap();
}

fn packets(ns: &NetNs, comment: &'static str) -> u64 {
    let all = ns.run(|| Ok(installed().unwrap())).unwrap();
    all.iter().find(|r| r.comment == comment).unwrap_or_else(|| panic!("no `{comment}` in {all:#?}")).packets
}

fn guards(backend: Backend, test: &str) {
    let Some(world) = World::new(test) else { return };
    let (here, there) = (&world.here, &world.there);
    for port in [53, 4000, 4433, 5000] {
        echo(there, port);
        echo(here, port);
    }
    let mut plain = Redirect::for_proxy(4242);
    plain.exempt_outbound_cidrs.insert("10.99.0.77/32".parse().unwrap());
    put(here, &plain, backend);
    assert!(answered(here, THERE.0, 4000), "without a guard UDP goes as it went");
    assert!(sctp_arrives(here, there, THERE.0), "and so does all else");

    let mut strict = plain.clone();
    strict.guard = Some(Guard { resolvers: [THERE.0.into()].into(), udp_ports: [4433].into(), cidrs: [].into() });
    put(here, &strict, backend);
    assert!(!answered(here, THERE.0, 4000), "UDP does not go out");
    assert!(packets(here, "countersign others out: rest dropped") >= 1);
    assert!(!answered(there, HERE.0, 4000), "and does not come in");
    assert!(packets(here, "countersign others in: rest dropped") >= 1);
    assert!(answered(here, THERE.0, 53), "DNS goes to the resolver");
    assert!(!answered(there, HERE.0, 53), "nobody asks us for DNS");
    assert!(answered(here, THERE.0, 4433) && answered(there, HERE.0, 4433), "a named port is open in both directions");
    assert!(answered(here, Ipv4Addr::LOCALHOST, 4000) && answered(here, HERE.0, 4000), "loopback is not the network");
    assert!(pinged(here, THERE.0) && pinged(there, HERE.0), "ICMP passes");
    assert!(!sctp_arrives(here, there, THERE.0), "SCTP does not go out");
    assert!(!sctp_arrives(there, here, HERE.0), "and does not come in");

    // DNS to somebody else, over UDP and TCP.
    strict.guard = Some(Guard { cidrs: ["10.99.0.0/30".parse().unwrap()].into(), ..Guard::default() });
    put(here, &strict, backend);
    assert!(answered(here, THERE.0, 4000) && sctp_arrives(there, here, HERE.0), "a named network is open");
    strict.guard = Some(Guard::default());
    put(here, &strict, backend);
    assert!(!answered(here, THERE.0, 53), "no resolver means nobody");
    let caught = |ns: &NetNs| packets(ns, "countersign out: rest to 15001");
    let before = caught(here);
    let _ = here.run(|| TcpStream::connect_timeout(&SocketAddr::new(THERE.0.into(), 53), SILENCE));
    assert!(caught(here) > before, "TCP 53 to somebody who is no resolver goes to the sidecar");

    put(here, &plain, backend);
    assert!(answered(here, THERE.0, 4000), "a redirect without a guard takes the earlier one's away");
    assert!(here.run(|| Ok(remove().unwrap())).unwrap().len() >= 8);
    put(here, &strict, backend);
    here.run(|| Ok(remove().unwrap())).unwrap();
    assert!(answered(here, THERE.0, 4000), "nothing stays behind");
}

#[test]
fn nftables_drops_what_is_not_tcp_unless_it_is_named() {
    guards(Backend::Nftables, "gnft");
}

#[test]
fn iptables_drops_what_is_not_tcp_unless_it_is_named() {
    if has_iptables() {
        guards(Backend::Iptables, "gipt");
    }
}

/// The link-local address of a namespace's own interface, with its number.
fn link_local(ns: &NetNs) -> (std::net::Ipv6Addr, u32) {
    let text = ns.run(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6")).unwrap();
    let line = text.lines().find(|l| l.starts_with("fe80") && !l.ends_with(" lo")).expect("a link-local address");
    let mut words = line.split_ascii_whitespace();
    let address = u128::from_str_radix(words.next().unwrap(), 16).unwrap().into();
    (address, u32::from_str_radix(words.next().unwrap(), 16).unwrap())
}

/// What becomes of a connection to the other's link-local address, and after what time.
fn dial_link_local(world: &World) -> (io::Result<()>, Duration) {
    let ((there, _), (_, number)) = (link_local(&world.there), link_local(&world.here));
    let began = Instant::now();
    let to = SocketAddr::V6(std::net::SocketAddrV6::new(there, 80, 0, number));
    let dialled = world.here.run(move || TcpStream::connect_timeout(&to, Duration::from_secs(5)).map(drop));
    (dialled, began.elapsed())
}

fn link_local_is_no_black_hole(backend: Backend, test: &str) {
    let Some(world) = World::new(test) else { return };
    let _listener = world.there.run(|| std::net::TcpListener::bind("[::]:80")).unwrap();
    // Duplicate address detection takes a second or two.
    let end = Instant::now() + Duration::from_secs(10);
    while dial_link_local(&world).0.is_err() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
    }
    let mut redirect = Redirect::for_proxy(4242);
    for ns in [&world.here, &world.there] {
        put(ns, &redirect, backend);
    }
    assert!(dial_link_local(&world).0.is_ok(), "it is left alone, for the sidecar could not dial it");
    // Strict: the sidecar gets it, who refuses what is not in the mesh.
    redirect.guard = Some(Guard::default());
    put(&world.there, &redirect, backend);
    let (dialled, took) = dial_link_local(&world);
    assert!(
        dialled.is_err() && took < Duration::from_secs(2),
        "no sidecar listens, so it is refused at once: {took:?}"
    );
    assert!(packets(&world.there, "countersign in: rest to 15006") >= 1);
    put(&world.here, &redirect, backend);
    assert!(dial_link_local(&world).0.is_err(), "a strict caller does not get out");
    assert!(packets(&world.here, "countersign others out: TCP with net fe80::/10 dropped") >= 1);
}

#[test]
fn nftables_leaves_link_local_alone_unless_others_are_guarded() {
    link_local_is_no_black_hole(Backend::Nftables, "llnft");
}

#[test]
fn iptables_leaves_link_local_alone_unless_others_are_guarded() {
    if has_iptables() {
        link_local_is_no_black_hole(Backend::Iptables, "llipt");
    }
}
