//! The sidecar's ports, in real network namespaces: nobody else serves them, whether or not the sidecar runs.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use countersign_redirect::netns::NetNs;
use countersign_redirect::{Backend, Guard, Redirect, installed, remove};
use nix::sys::socket::{Backlog, listen};

use world::{HERE, THERE, World, as_sidecar, has_iptables, put};

mod world;

/// How long a connection is waited for that must not come about.
const SILENCE: Duration = Duration::from_millis(400);

/// Longest wait for a connection that must come about, or be refused.
const PATIENCE: Duration = Duration::from_secs(10);

fn dial(ns: &NetNs, ip: impl Into<IpAddr>, port: u16, wait: Duration) -> io::Result<TcpStream> {
    let to = SocketAddr::new(ip.into(), port);
    ns.run(move || TcpStream::connect_timeout(&to, wait))
}

/// Listens on a port of every address, as the sidecar or as an app.
fn serve(ns: &NetNs, port: u16, sidecar: bool) -> TcpListener {
    let bind = move || {
        if sidecar {
            as_sidecar();
        }
        TcpListener::bind(("::", port))
    };
    ns.run(bind).unwrap()
}

fn keeps_own_ports(backend: Backend, test: &str, guard: Option<Guard>) {
    let Some(world) = World::new(test) else { return };
    let (here, there) = (&world.here, &world.there);
    let ports = [15001, 15006, 15008, 15020];
    let apps = ports.map(|port| serve(here, port, false));
    assert!(dial(there, HERE.0, 15008, PATIENCE).is_ok(), "without a redirect the ports are nobody's");
    let redirect = Redirect { guard, ..Redirect::for_proxy(4242) };
    // Twice, for it replaces itself.
    for _ in 0..2 {
        put(here, &redirect, backend);
    }
    for (ip, port) in [(HERE.0.into(), 80), (HERE.0.into(), 15008), (HERE.1.into(), 80), (HERE.1.into(), 15020)] {
        let ip: IpAddr = ip;
        assert_eq!(dial(there, ip, port, SILENCE).unwrap_err().kind(), ErrorKind::TimedOut, "{ip} port {port}");
    }
    assert_eq!(dial(here, THERE.0, 80, SILENCE).unwrap_err().kind(), ErrorKind::TimedOut, "what goes out, to 15001");
    let rules = here.run(|| Ok(installed().unwrap())).unwrap();
    for port in ports {
        let comment = format!("countersign own ports: port {port} of another user dropped");
        assert!(rules.iter().any(|r| r.comment == comment && r.packets >= 1), "{comment}: {rules:#?}");
    }
    // A listener without a backlog makes the kernel answer with a SYN cookie, which belongs to no socket.
    listen(&apps[2], Backlog::new(0).unwrap()).unwrap();
    apps[2].set_nonblocking(true).unwrap();
    if let Ok(mut caller) = dial(there, HERE.0, 15008, PATIENCE)
        && let Ok((mut app, _)) = apps[2].accept()
    {
        app.write_all(b"not the sidecar").unwrap();
        caller.set_read_timeout(Some(SILENCE)).unwrap();
        assert!(caller.read(&mut [0]).is_err(), "nothing of it gets out");
    }
    drop(apps);
    assert_eq!(
        dial(there, HERE.0, 15008, PATIENCE).unwrap_err().kind(),
        ErrorKind::ConnectionRefused,
        "nobody: refused at once"
    );
    let sidecar = ports.map(|port| serve(here, port, true));
    for (ip, port) in [(HERE.0.into(), 80), (HERE.0.into(), 15008), (HERE.1.into(), 15020)] {
        let ip: IpAddr = ip;
        dial(there, ip, port, PATIENCE).unwrap_or_else(|e| panic!("the sidecar at {ip} port {port}: {e}"));
    }
    dial(here, THERE.0, 80, PATIENCE).unwrap();
    sidecar[2].accept().unwrap();
    listen(&sidecar[2], Backlog::new(0).unwrap()).unwrap();
    dial(there, HERE.0, 15008, PATIENCE).expect("by a SYN cookie: a flood does not keep callers out");
    drop(sidecar);
    assert_eq!(here.run(|| Ok(remove().unwrap())).unwrap().len(), redirect.rules().len());
    assert_eq!(here.run(|| Ok(installed().unwrap())).unwrap(), [], "nothing stays behind");
}

#[test]
fn nftables_lets_nobody_but_the_sidecar_serve_its_ports() {
    keeps_own_ports(Backend::Nftables, "ownnft", None);
    keeps_own_ports(Backend::Nftables, "ownnftg", Some(Guard::default()));
}

#[test]
fn iptables_lets_nobody_but_the_sidecar_serve_its_ports() {
    if has_iptables() {
        keeps_own_ports(Backend::Iptables, "ownipt", None);
    }
}
