//! What is not TCP, in real network namespaces: dropped under a guard but for what is named, and left alone without one.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use countersign_redirect::guard::Guard;
use countersign_redirect::netns::NetNs;
use countersign_redirect::{Backend, Redirect, installed, remove};

use world::{HERE, THERE, World, as_sidecar, has_iptables, put};

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
    put(&world.here, &redirect, backend);
    assert!(dial_link_local(&world).0.is_ok(), "going out it is left alone, for the sidecar could not dial it");
    // Coming in the sidecar gets it, with a guard and without: who may come in is a question of policy.
    for guard in [None, Some(Guard::default())] {
        redirect.guard = guard;
        put(&world.there, &redirect, backend);
        let (dialled, took) = dial_link_local(&world);
        assert!(
            dialled.is_err() && took < Duration::from_secs(2),
            "no sidecar listens, so it is refused at once: {took:?}"
        );
        assert!(packets(&world.there, "countersign in: rest to 15006") >= 1);
    }
    // A sidecar hears the caller, and reaches the app behind the address that was asked for.
    let bind = || {
        as_sidecar();
        std::net::TcpListener::bind("[::]:15006")
    };
    let sidecar = world.there.run(bind).unwrap();
    assert!(dial_link_local(&world).0.is_ok());
    let (_, caller) = sidecar.accept().unwrap();
    assert!(matches!(caller.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local()), "{caller}");
    let (address, number) = link_local(&world.there);
    let app = SocketAddr::V6(std::net::SocketAddrV6::new(address, 80, 0, number));
    world.there.run(move || TcpStream::connect_timeout(&app, Duration::from_secs(2)).map(drop)).unwrap();
    put(&world.here, &redirect, backend);
    assert!(dial_link_local(&world).0.is_err(), "a strict caller does not get out");
    assert!(packets(&world.here, "countersign others out: TCP with net fe80::/10 dropped") >= 1);
}

#[test]
fn nftables_brings_link_local_callers_to_the_sidecar_and_leaves_callees_alone_without_a_guard() {
    link_local_is_no_black_hole(Backend::Nftables, "llnft");
}

#[test]
fn iptables_brings_link_local_callers_to_the_sidecar_and_leaves_callees_alone_without_a_guard() {
    if has_iptables() {
        link_local_is_no_black_hole(Backend::Iptables, "llipt");
    }
}

/// A connection from one namespace to port 80 of the other: the caller's end, and the callee's.
fn connected(from: &NetNs, at: &NetNs, to: Ipv4Addr) -> (TcpStream, TcpStream) {
    let listener = at.run(move || std::net::TcpListener::bind((to, 80))).unwrap();
    let wait = Duration::from_secs(5);
    let caller = from.run(move || TcpStream::connect_timeout(&SocketAddr::new(to.into(), 80), wait)).unwrap();
    let (callee, _) = listener.accept().unwrap();
    for end in [&caller, &callee] {
        end.set_read_timeout(Some(wait)).unwrap();
    }
    (caller, callee)
}

/// Says something over a connection that must not go on; whatever the other end hears of it.
fn said_over(mut near: TcpStream, mut far: TcpStream) -> (io::Result<usize>, String) {
    use std::io::{Read, Write};
    near.write_all(b"secret").unwrap();
    let answered = near.read(&mut [0; 64]);
    far.set_read_timeout(Some(SILENCE)).unwrap();
    let mut heard = [0; 64];
    let n = far.read(&mut heard).unwrap_or(0);
    (answered, String::from_utf8_lossy(&heard[..n]).into_owned())
}

fn cuts_older_connections(backend: Backend, test: &str) {
    let Some(world) = World::new(test) else { return };
    let (here, there) = (&world.here, &world.there);
    // The first two are followed by the kernel, and exempt; the others are older than that.
    let mut plain = Redirect::for_proxy(4242);
    plain.exempt_outbound_ports.insert(80);
    plain.exempt_inbound_ports.insert(80);
    let oldest = [connected(here, there, THERE.0), connected(there, here, HERE.0)];
    put(here, &plain, backend);
    let older = [connected(here, there, THERE.0), connected(there, here, HERE.0)];
    let mut strict = Redirect::for_proxy(4242);
    strict.guard = Some(Guard::default());
    put(here, &strict, backend);
    for [(caller, there_end), (there_caller, callee)] in [older, oldest] {
        for (near, far) in [(caller, there_end), (callee, there_caller)] {
            let (answered, heard) = said_over(near, far);
            assert_eq!(heard, "", "what a strict workload says stays here");
            let kind = answered.unwrap_err().kind();
            assert_eq!(kind, io::ErrorKind::ConnectionReset, "and it learns at once that nobody hears it");
        }
    }
    // The same rules once more change nothing for anybody.
    strict.exempt_outbound_ports.insert(80);
    put(here, &strict, backend);
    let (mut caller, mut callee) = connected(here, there, THERE.0);
    put(here, &strict, backend);
    io::Write::write_all(&mut caller, b"exempt").unwrap();
    assert_eq!(io::Read::read(&mut callee, &mut [0; 64]).unwrap(), 6);
}

#[test]
fn nftables_cuts_connections_that_are_older_than_the_guard() {
    cuts_older_connections(Backend::Nftables, "oldnft");
}

#[test]
fn iptables_cuts_connections_that_are_older_than_the_guard() {
    if has_iptables() {
        cuts_older_connections(Backend::Iptables, "oldipt");
    }
}

fn drops_tcp_of_no_connection(backend: Backend, test: &str) {
    /// A segment that begins and ends a connection at once, with data in it.
    const SEND: &str = "import socket, struct, sys\ns = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)\n\
                        head = struct.pack('!HHIIBBHHH', 4000, 80, 1, 0, 5 << 4, 3, 1024, 0, 0)\n\
                        try: print(s.sendto(head + b'secret', (sys.argv[1], 0)))\nexcept OSError as e: print(e)";
    let Some(world) = World::new(test) else { return };
    let mut strict = Redirect::for_proxy(4242);
    strict.guard = Some(Guard::default());
    put(&world.here, &strict, backend);
    python(&world.here, SEND, THERE.0.into());
    assert!(packets(&world.here, "countersign others out: TCP of no connection dropped") >= 1);
    python(&world.there, SEND, HERE.0.into());
    assert!(packets(&world.here, "countersign others in: TCP of no connection dropped") >= 1);
}

#[test]
fn nftables_drops_tcp_that_nat_does_not_touch() {
    drops_tcp_of_no_connection(Backend::Nftables, "invnft");
}

#[test]
fn iptables_drops_tcp_that_nat_does_not_touch() {
    if has_iptables() {
        drops_tcp_of_no_connection(Backend::Iptables, "invipt");
    }
}

fn one_backend_holds_the_rules(first: Backend, second: Backend, test: &str) {
    let Some(world) = World::new(test) else { return };
    echo(&world.there, 4000);
    let mut strict = Redirect::for_proxy(4242);
    strict.guard = Some(Guard::default());
    put(&world.here, &strict, first);
    put(&world.here, &Redirect::for_proxy(4242), second);
    assert!(answered(&world.here, THERE.0, 4000), "the other backend's guard is gone");
}

#[test]
fn a_redirect_by_one_backend_takes_the_place_of_the_others() {
    if has_iptables() {
        one_backend_holds_the_rules(Backend::Iptables, Backend::Nftables, "iptnft");
        one_backend_holds_the_rules(Backend::Nftables, Backend::Iptables, "nftipt");
    }
}

#[test]
fn nftables_takes_more_rules_than_a_sockets_memory_has_acknowledgements_for() {
    let Some(world) = World::new("manynft") else { return };
    let mut many = Redirect::for_proxy(4242);
    many.exempt_outbound_cidrs = (0..160).map(|n| format!("10.1.{n}.0/24").parse().unwrap()).collect();
    many.guard = Some(Guard::default());
    put(&world.here, &many, Backend::Nftables);
}

#[test]
fn an_iptables_guard_that_somebody_has_put_a_rule_before_stands_first_again() {
    if !has_iptables() {
        return;
    }
    let Some(world) = World::new("firstipt") else { return };
    echo(&world.there, 4000);
    let mut strict = Redirect::for_proxy(4242);
    strict.guard = Some(Guard::default());
    put(&world.here, &strict, Backend::Iptables);
    world.here.run(|| Command::new("iptables").args(["-I", "OUTPUT", "1", "-j", "ACCEPT"]).status()).unwrap();
    assert!(answered(&world.here, THERE.0, 4000), "the guard is not asked");
    put(&world.here, &strict, Backend::Iptables);
    assert!(!answered(&world.here, THERE.0, 4000));
}
