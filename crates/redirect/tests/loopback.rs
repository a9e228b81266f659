//! The loopback interface, in real network namespaces: an app without any privilege binds a socket to it, and what the kernel then
//! remembers of a connection takes nothing past the redirect.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use std::io::Read;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::process::{Child, Command, Stdio};

use countersign_redirect::netns::NetNs;
use countersign_redirect::{Backend, Guard, Redirect, remove};

use world::{HERE, THERE, World, has_iptables, put, serve};

mod world;

/// Port of the app, and the port that a stranger calls it from.
const APP: u16 = 8080;
const STRANGER: u16 = 40_123;

/// What every program begins with: a user without capabilities.
const BEGIN: &str = r#"
import os, socket, sys, time
os.setgroups([]); os.setgid(1000); os.setuid(1000)
here, there, app, stranger = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
family = socket.AF_INET6 if ":" in here else socket.AF_INET
def opened(inside=False, spoof=False):
    s = socket.socket(family, socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if inside: s.setsockopt(socket.SOL_SOCKET, 25, b"lo\0")   # SO_BINDTODEVICE
    if spoof: s.setsockopt(41, 78, 1)   # IPV6_FREEBIND
    s.settimeout(1)
    return s
def tries(do):
    try: return do()
    except OSError as error: return f"nothing: {error}"
"#;

/// Opens a connection that the kernel takes for one inside, and a second one by the same ports.
const OUT: &str = r"
first = opened(inside=True)
first.bind((here, 0))
port = first.getsockname()[1]
tries(lambda: first.connect((there, 80)))
first.close()
second = opened()
second.bind((here, port))
def read():
    second.connect((there, 80))
    return second.recv(99).decode()
print(tries(read))
";

/// Serves the app's port after a connection from it, by the loopback interface, to whoever will call.
const IN: &str = r"
first = opened(inside=True)
first.bind((here, app))
tries(lambda: first.connect((there, stranger)))
first.close()
listener = opened()
listener.bind((here, app))
listener.listen()
";

/// The same, after a connection to it that seems to come from the stranger.
const SPOOF: &str = r"
listener = opened()
listener.bind((here, app))
listener.listen()
first = opened(spoof=True)
tries(lambda: (first.bind((there, stranger)), first.connect((here, app))))
";

/// How the app then serves its listener.
const SERVE: &str = r#"
print("listening", flush=True)
listener.settimeout(4)
def serve():
    s, _ = listener.accept()
    s.send(b"the app")
    return "served"
tries(serve)
"#;

/// The stranger's call, from its port.
const CALL: &str = r"
s = opened()
s.bind((there, stranger))
def read():
    s.connect((here, app))
    return s.recv(99).decode()
print(tries(read))
";

fn python(ns: &NetNs, program: &str, (here, there): (IpAddr, IpAddr)) -> Child {
    let text = format!("{BEGIN}{program}");
    let arguments = [here.to_string(), there.to_string(), APP.to_string(), STRANGER.to_string()];
    ns.run(move || Command::new("python3").args(["-c", &text]).args(arguments).stdout(Stdio::piped()).spawn()).unwrap()
}

fn said(child: Child) -> String {
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap().trim().to_owned()
}

/// What the stranger reads of the app, which serves after what this program does.
fn called(world: &World, program: &str, addresses: (IpAddr, IpAddr)) -> String {
    let mut app = python(&world.here, &format!("{program}{SERVE}"), addresses);
    let mut line = [0; 10];
    app.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    let read = said(python(&world.there, CALL, addresses));
    app.kill().unwrap();
    app.wait().unwrap();
    read
}

fn leads_nowhere(backend: Backend, test: &str, guard: Option<Guard>) {
    let Some(world) = World::new(test) else { return };
    serve(&world.there, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 80), "outside");
    let families: [(IpAddr, IpAddr); 2] = [(HERE.0.into(), THERE.0.into()), (HERE.1.into(), THERE.1.into())];
    for addresses in families {
        assert_eq!(said(python(&world.here, OUT, addresses)), "outside", "without a redirect nothing is in its way");
        assert_eq!(called(&world, IN, addresses), "the app");
    }
    let redirect = Redirect { guard, ..Redirect::for_proxy(4242) };
    put(&world.here, &redirect, backend);
    for addresses in families {
        // Nobody is at the sidecar's ports: what is redirected is refused.
        assert!(said(python(&world.here, OUT, addresses)).starts_with("nothing"), "{backend} out, {addresses:?}");
        assert!(called(&world, IN, addresses).starts_with("nothing"), "{backend} in, {addresses:?}");
    }
    assert!(called(&world, SPOOF, families[1]).starts_with("nothing"), "{backend}: a source of another machine");
    let rules = world.here.run(|| Ok(remove().unwrap())).unwrap();
    for way in ["to", "from"] {
        let comment = format!("countersign inside: loopback {way} another machine dropped");
        assert!(rules.iter().any(|r| r.comment == comment && r.packets > 0), "{comment}: {rules:#?}");
    }
}

#[test]
fn with_nftables_a_connection_over_the_loopback_interface_takes_nothing_past_the_redirect() {
    leads_nowhere(Backend::Nftables, "lonft", None);
    leads_nowhere(Backend::Nftables, "lonftg", Some(Guard::default()));
}

#[test]
fn with_iptables_a_connection_over_the_loopback_interface_takes_nothing_past_the_redirect() {
    if has_iptables() {
        leads_nowhere(Backend::Iptables, "loipt", Some(Guard::default()));
    }
}
