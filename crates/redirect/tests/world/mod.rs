//! Two network namespaces that see each other, for one test.

#![allow(dead_code)] // each test has a use for some of it

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use countersign_redirect::bridge::{Addresses, Bridge};
use countersign_redirect::netns::NetNs;
use countersign_redirect::{Backend, Redirect, in_force, install, installed};

/// Two namespaces on one switch, gone when dropped.
pub struct World {
    bridge: Bridge,
    pub here: NetNs,
    pub there: NetNs,
    name: String,
}

pub const HERE: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 99, 0, 1), Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1));
pub const THERE: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 99, 0, 2), Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 2));

impl World {
    /// `None` without root: the test says so and passes, but in CI it fails.
    pub fn new(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI runs as root");
            eprintln!("skipped: network namespaces need root");
            return None;
        }
        let name = format!("cst-{test}-{}", std::process::id());
        let bridge = Bridge::create(&name).unwrap();
        let plug = |n: &str, (v4, v6)| {
            let addresses = Addresses { v4: (v4, 24), v6: Some((v6, 64)) };
            bridge.plug(&format!("{name}-{n}"), n, addresses).unwrap()
        };
        let (here, there) = (plug("here", HERE), plug("there", THERE));
        Some(Self { bridge, here, there, name })
    }
}

/// What a thread opens from now on belongs to the user 4242, the sidecar's in these tests: the file system's user of a thread
/// becomes the owner of its sockets.
pub fn as_sidecar() {
    nix::unistd::setfsuid(nix::unistd::Uid::from_raw(4242));
}

/// Answers every connection with a name, as the sidecar's user.
pub fn serve(ns: &NetNs, address: SocketAddr, name: &'static str) {
    let bind = move || {
        as_sidecar();
        TcpListener::bind(address)
    };
    let listener = ns.run(bind).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A caller that is gone already needs no answer.
            let _ = (&stream).write_all(name.as_bytes());
        }
    });
}

/// Installs a redirect, which is then in force.
pub fn put(ns: &NetNs, redirect: &Redirect, backend: Backend) {
    let redirect = redirect.clone();
    ns.run(move || {
        install(&redirect, backend).unwrap();
        assert!(in_force(&redirect, &installed().unwrap()), "{:#?}", installed().unwrap());
        Ok(())
    })
    .unwrap();
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.bridge.unplug(&self.here, "here");
        let _ = self.bridge.unplug(&self.there, "there");
        let _ = self.bridge.netns().remove();
        assert!(NetNs::list(&self.name).is_empty());
    }
}

/// Whether `iptables` is here; in CI it must be.
pub fn has_iptables() -> bool {
    if std::process::Command::new("iptables").arg("-V").output().is_ok() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "CI has iptables");
    eprintln!("skipped: no iptables here");
    false
}
