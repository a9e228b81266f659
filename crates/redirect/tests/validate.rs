//! A process without privileges finds out whether the redirect is in force, in real network namespaces.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use countersign_redirect::netns::NetNs;
use countersign_redirect::validate::{NotProved, wait_until_in_force};
use countersign_redirect::{Backend, Redirect, install, remove};

use world::{THERE, World, as_sidecar, has_iptables};

mod world;

/// Wait for a redirect that is not there.
const SHORT: Duration = Duration::from_millis(700);
/// Wait for one that is.
const LONG: Duration = Duration::from_secs(20);

fn add_route(world: &World, family: &str, via: &str) {
    let netns = format!("--net={}", world.here.path().display());
    let added = Command::new("nsenter").args([&netns, "ip", family, "route", "add", "default", "via", via]).status();
    assert!(added.unwrap().success());
}

fn waits(ns: &NetNs, redirect: &Redirect, patience: Duration) -> Result<(), NotProved> {
    let redirect = redirect.clone();
    ns.run(move || Ok(wait_until_in_force(&redirect, patience))).unwrap()
}

/// When the kernel answers with SYN cookies: 2 is always.
fn cookies(world: &World, when: &str) {
    let netns = format!("--net={}", world.here.path().display());
    let set = format!("echo {when} > /proc/sys/net/ipv4/tcp_syncookies");
    assert!(Command::new("nsenter").args([&netns, "sh", "-c", &set]).status().unwrap().success());
}

fn proves(backend: Backend, test: &str) {
    let Some(world) = World::new(test) else { return };
    let redirect = Redirect::for_proxy(4242);
    let waits = |patience| waits(&world.here, &redirect, patience);
    let installs = || {
        let redirect = redirect.clone();
        world.here.run(move || Ok(install(&redirect, backend).unwrap())).unwrap();
    };
    let removes = || world.here.run(|| Ok(remove().unwrap())).unwrap();
    // Without a route, or where all that could be dialled is exempt, the drop of what others send from the sidecar's port proves it.
    let everything = ["0.0.0.0/0", "::/0"].map(|net| net.parse().unwrap()).into();
    let exempt = Redirect { exempt_outbound_cidrs: everything, ..redirect.clone() };
    let one_family = Redirect { exempt_outbound_cidrs: ["0.0.0.0/0".parse().unwrap()].into(), ..redirect.clone() };
    for case in [&redirect, &exempt, &one_family] {
        let waits = |patience| self::waits(&world.here, case, patience);
        assert!(matches!(waits(SHORT), Err(NotProved::NotInForce(_))), "{case:?}");
        let installed = case.clone();
        world.here.run(move || Ok(install(&installed, backend).unwrap())).unwrap();
        waits(LONG).unwrap();
        cookies(&world, "2");
        waits(LONG).unwrap();
        removes();
        assert!(matches!(waits(SHORT), Err(NotProved::NotInForce(_))), "{case:?}");
        cookies(&world, "1");
    }

    // The neighbour has no route for it, refuses it, answers it: all of that is no redirect.
    add_route(&world, "-4", &THERE.0.to_string());
    assert!(matches!(waits(SHORT), Err(NotProved::NotInForce(_))));
    let refusing = format!("--net={}", world.there.path().display());
    for rule in [&["-j", "REJECT", "--reject-with", "tcp-reset"][..], &["-j", "REDIRECT", "--to-ports", "15001"]] {
        let table = if rule.contains(&"REDIRECT") { "nat" } else { "filter" };
        let chain = if table == "nat" { "PREROUTING" } else { "FORWARD" };
        let mut command = Command::new("nsenter");
        command.args([&refusing, "iptables", "-w", "-t", table, "-A", chain, "-p", "tcp"]).args(rule);
        assert!(command.status().unwrap().success());
        let _far = world.there.run(|| TcpListener::bind("0.0.0.0:15001")).unwrap();
        let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
        assert!(Command::new("nsenter").args([&refusing, "sh", "-c", forward]).status().unwrap().success());
        assert!(matches!(waits(SHORT), Err(NotProved::NotInForce(_))), "a neighbour that does {rule:?}");
    }

    // It comes while one waits, is found at once afterwards, and its end is noticed.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| waits(LONG));
        std::thread::sleep(SHORT / 2);
        assert!(!waiting.is_finished());
        installs();
        waiting.join().unwrap().unwrap();
    });
    let began = Instant::now();
    waits(LONG).unwrap();
    assert!(began.elapsed() < LONG / 4, "{:?}", began.elapsed());
    removes();
    assert!(matches!(waits(SHORT), Err(NotProved::NotInForce(_))));

    // IPv6 alone proves it too.
    add_route(&world, "-6", &THERE.1.to_string());
    installs();
    let v6 = Redirect { exempt_outbound_cidrs: ["0.0.0.0/0".parse().unwrap()].into(), ..redirect.clone() };
    self::waits(&world.here, &v6, LONG).unwrap();
    let sidecar = || {
        as_sidecar();
        TcpListener::bind("127.0.0.1:15001")
    };
    let occupied = world.here.run(sidecar).unwrap();
    assert!(matches!(waits(SHORT), Err(NotProved::Listen(..))));
    drop(occupied);
    removes();
}

#[test]
fn a_redirect_by_nftables_is_proved_without_privileges() {
    if has_iptables() {
        proves(Backend::Nftables, "valnft");
    }
}

#[test]
fn a_redirect_by_iptables_is_proved_without_privileges() {
    if has_iptables() {
        proves(Backend::Iptables, "valipt");
    }
}
