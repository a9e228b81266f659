//! The redirect in real network namespaces: what is caught, what is not, and that nothing stays behind.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use countersign_redirect::netns::NetNs;
use countersign_redirect::{Backend, Redirect, in_force, install, installed, is_whole, remove};

use world::{HERE, THERE, World, has_iptables, serve};

mod world;

/// Who answers at an address, seen from a namespace.
fn who(ns: &NetNs, ip: impl Into<IpAddr>, port: u16) -> String {
    let address = SocketAddr::new(ip.into(), port);
    let asked = ns.run(move || {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    });
    asked.unwrap_or_else(|e: io::Error| format!("{:?}", e.kind()))
}

fn catches_what_it_should(backend: Backend, test: &str) {
    let Some(world) = World::new(test) else { return };
    let any4 = |port| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
    for (port, name) in [(80, "app"), (53, "dns"), (81, "excluded"), (15008, "mesh")] {
        serve(&world.there, any4(port), name);
        serve(&world.here, any4(port), "own");
    }
    {
        let ip = Ipv6Addr::UNSPECIFIED;
        serve(&world.here, SocketAddr::new(ip.into(), 15011), "outbound");
        serve(&world.here, SocketAddr::new(ip.into(), 90), "own");
        serve(&world.there, SocketAddr::new(ip.into(), 15016), "inbound");
    }
    assert_eq!(who(&world.here, THERE.0, 80), "app", "nothing is caught before");
    let mut redirect = Redirect::for_proxy(4242);
    redirect.outbound_port = 15011;
    redirect.inbound_port = 15016;
    redirect.exempt_outbound_ports.insert(81);
    redirect.exempt_outbound_cidrs.insert("10.99.0.77/32".parse().unwrap());
    let (here, there) = (redirect.clone(), redirect.clone());
    // Twice, for it replaces itself.
    for _ in 0..2 {
        let (here, there) = (here.clone(), there.clone());
        assert_eq!(world.here.run(move || Ok(install(&here, backend).unwrap())).unwrap(), backend);
        world.there.run(move || Ok(install(&there, backend).unwrap())).unwrap();
    }
    assert_eq!(who(&world.here, THERE.0, 80), "outbound");
    assert_eq!(who(&world.here, THERE.1, 80), "outbound", "IPv6 as well");
    assert_eq!(who(&world.here, THERE.0, 81), "inbound", "excluded going out, caught coming in");
    assert_eq!(who(&world.here, THERE.0, 53), "inbound", "DNS is left alone going out");
    assert_eq!(who(&world.here, THERE.0, 15008), "outbound", "an app's own connection to a mesh port is caught");
    assert_eq!(who(&world.here, Ipv4Addr::LOCALHOST, 80), "own");
    assert_eq!(who(&world.here, HERE.0, 80), "own", "its own address never leaves the namespace");
    assert_eq!(who(&world.here, HERE.1, 90), "own", "nor its address of IPv6");
    assert_eq!(who(&world.here, Ipv6Addr::LOCALHOST, 90), "own");
    let rules = world.here.run(|| Ok(installed().unwrap())).unwrap();
    assert!(in_force(&redirect, &rules), "{rules:#?}");
    let whole = |ns: &NetNs| ns.run(|| Ok(is_whole().unwrap())).unwrap();
    assert!(whole(&world.here));
    if backend == Backend::Iptables {
        let flushed = world.here.run(|| Command::new("ip6tables").args(["-t", "nat", "-F"]).status());
        assert!(flushed.unwrap().success());
        assert!(!whole(&world.here), "that of IPv6 is missing");
        let again = redirect.clone();
        world.here.run(move || Ok(install(&again, backend).unwrap())).unwrap();
        assert!(whole(&world.here));
    }
    let expected = redirect.rules();
    let rest = rules.iter().find(|r| r.comment.ends_with("rest to 15011")).unwrap();
    assert!(rest.packets >= 3, "its counter shows what was caught: {rest:?}");
    for ns in [&world.here, &world.there] {
        let removed = ns.run(|| Ok(remove().unwrap())).unwrap();
        assert_eq!(removed.len(), expected.len(), "it says what was there");
        assert_eq!(ns.run(|| Ok(remove().unwrap())).unwrap(), [], "and that nothing was");
        assert_eq!(ns.run(|| Ok(installed().unwrap())).unwrap(), []);
        assert!(!whole(ns));
    }
    assert_eq!(who(&world.here, THERE.0, 80), "app", "nothing is caught after");
}

#[test]
fn nftables_catches_what_it_should_and_leaves_nothing_behind() {
    catches_what_it_should(Backend::Nftables, "nft");
}

#[test]
fn iptables_catches_what_it_should_and_leaves_nothing_behind() {
    if !has_iptables() {
        return;
    }
    catches_what_it_should(Backend::Iptables, "ipt");
}
