//! The sidecar told by its cgroup, in real network namespaces and cgroups: an app that takes on its user ID gets nowhere.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use countersign_redirect::netns::NetNs;
use countersign_redirect::sidecar::{Cgroup, Known, admit, known, try_here};
use countersign_redirect::{Backend, Redirect, RedirectError, in_force, install, installed};

use world::{HERE, THERE, World, put, serve};

mod world;

/// The sidecar's user ID in these tests.
const UID: u32 = 4242;
/// A cgroup that nobody is in.
const NONE: Cgroup = Cgroup { id: 1, level: 1 };
/// Joins a cgroup and becomes a user; then dials an address and says what it read there, or listens on a port and sends.
const PROGRAM: &str = r#"
import os, socket, sys
cgroup, uid, what, at, port = sys.argv[1:]
with open(cgroup + "/cgroup.procs", "w") as procs: procs.write(str(os.getpid()))
os.setuid(int(uid))
family = socket.AF_INET6 if ":" in at else socket.AF_INET
if what == "dial":
    try:
        s = socket.socket(family, socket.SOCK_STREAM)
        s.settimeout(1)
        s.connect((at, int(port)))
        print(s.recv(99).decode())
    except OSError as e: print("nothing:", e)
else:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((at, int(port)))
    listener.listen()
    print("listening", flush=True)
    while True:
        s, _ = listener.accept()
        print("accepted", flush=True)
        s.send(b"served")
        s.close()
"#;

/// A cgroup of version 2, gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(path: PathBuf) -> Self {
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn cgroup(&self, root: &Path) -> Cgroup {
        let level = self.0.strip_prefix(root).unwrap().components().count();
        Cgroup { id: std::fs::metadata(&self.0).unwrap().ino(), level: level.try_into().unwrap() }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            // Its last process has not quite ended.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// Where cgroups of version 2 are, alone or beside version 1. In CI there are some.
fn root() -> Option<PathBuf> {
    let places = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
    let found = places.into_iter().find(|path| path.join("cgroup.procs").exists() && path.join("cgroup.stat").exists());
    assert!(found.is_some() || std::env::var_os("CI").is_none(), "CI has cgroups of version 2");
    found
}

fn python(ns: &NetNs, cgroup: &Folder, uid: u32, what: &'static str, at: impl Into<IpAddr>, port: u16) -> Child {
    let arguments =
        [cgroup.0.display().to_string(), uid.to_string(), what.into(), at.into().to_string(), port.to_string()];
    ns.run(move || Command::new("python3").args(["-c", PROGRAM]).args(arguments).stdout(Stdio::piped()).spawn())
        .unwrap()
}

fn dial(ns: &NetNs, cgroup: &Folder, uid: u32, at: impl Into<IpAddr>, port: u16) -> String {
    let output = python(ns, cgroup, uid, "dial", at, port).wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// What a caller in another namespace reads from a listener of this cgroup and user.
///
/// Also whether the listener has accepted it.
fn read_from(world: &World, cgroup: &Folder, uid: u32, port: u16, everywhere: &Folder) -> (String, bool) {
    let mut server = python(&world.here, cgroup, uid, "listen", Ipv4Addr::UNSPECIFIED, port);
    let mut line = [0; 10];
    std::io::Read::read_exact(server.stdout.as_mut().unwrap(), &mut line).unwrap();
    let read = dial(&world.there, everywhere, 0, HERE.0, port);
    server.kill().unwrap();
    let rest = server.wait_with_output().unwrap();
    (read, String::from_utf8(rest.stdout).unwrap().contains("accepted"))
}

#[test]
fn an_app_that_takes_on_the_sidecars_user_id_gets_nowhere() {
    let (Some(world), Some(root)) = (World::new("sidecar"), root()) else { return };
    let of = |name: &str| Folder::new(root.join(format!("cst-{name}-{}", std::process::id())));
    let (sidecar, app) = (of("sidecar"), of("app"));
    let below = Folder::new(sidecar.0.join("below"));
    let any: IpAddr = Ipv6Addr::UNSPECIFIED.into();
    serve(&world.there, SocketAddr::new(any, 80), "outside");
    let redirect = Redirect { by_cgroup: true, ..Redirect::for_proxy(UID) };
    let known_here = |cgroup| world.here.run(move || Ok(known(cgroup).unwrap())).unwrap();
    put(&world.here, &redirect, Backend::Nftables);
    assert_eq!(known_here(NONE), Known::Otherwise);
    let out = |cgroup: &Folder, uid| dial(&world.here, cgroup, uid, THERE.0, 80);
    assert!(out(&sidecar, UID).starts_with("nothing"), "nobody is the sidecar yet");

    let cgroup = sidecar.cgroup(&root);
    let redirect_then = redirect.clone();
    let admitted = move || {
        admit(cgroup).unwrap();
        assert_eq!((known(cgroup).unwrap(), known(NONE).unwrap()), (Known::ByCgroup, Known::Otherwise));
        assert!(in_force(&redirect_then, &installed().unwrap()), "{:#?}", installed().unwrap());
        Ok(())
    };
    world.here.run(admitted).unwrap();
    assert_eq!(out(&sidecar, UID), "outside");
    assert_eq!(out(&below, UID), "outside", "a cgroup below the container's");
    assert_eq!(dial(&world.here, &sidecar, UID, THERE.1, 80), "outside", "over IPv6");
    assert!(out(&app, UID).starts_with("nothing"), "the app as the sidecar's user");
    assert!(out(&sidecar, 1000).starts_with("nothing"), "another user of that cgroup is redirected: nobody is there");

    // What is redirected comes to the sidecar, whose answers pass.
    assert_eq!(read_from(&world, &sidecar, UID, 15008, &app), ("served".into(), true));
    assert_eq!(read_from(&world, &sidecar, UID, 15006, &app), ("served".into(), true));
    let (read, accepted) = read_from(&world, &app, UID, 15008, &app);
    assert!(read.starts_with("nothing") && !accepted, "the app on the sidecar's port: {read}");

    let other = app.cgroup(&root);
    let replace = move || {
        admit(other).unwrap();
        Ok(())
    };
    world.here.run(replace).unwrap();
    assert!(out(&sidecar, UID).starts_with("nothing"), "a new one replaces the old one");
    assert_eq!(out(&app, UID), "outside");
    put(&world.here, &redirect, Backend::Nftables);
    assert_eq!(known_here(other), Known::Otherwise);
    assert!(out(&app, UID).starts_with("nothing"), "a redirect that is installed again begins with nobody");
}

#[test]
fn a_redirect_that_trusts_the_user_id_admits_no_cgroup() {
    let Some(world) = World::new("sidecaruid") else { return };
    let tried = || {
        install(&Redirect::for_proxy(UID), Backend::Nftables).unwrap();
        assert_eq!(known(NONE).unwrap(), Known::ByUserId);
        assert!(matches!(admit(NONE), Err(RedirectError::NoNftables(_))));
        let by_cgroup = Redirect { by_cgroup: true, ..Redirect::for_proxy(UID) };
        assert!(matches!(install(&by_cgroup, Backend::Iptables), Err(RedirectError::NoCgroups)));
        try_here().unwrap();
        Ok(())
    };
    world.here.run(tried).unwrap();
}

#[test]
fn what_is_read_while_a_sidecar_is_admitted_is_whole() {
    let Some(world) = World::new("dump") else { return };
    let redirect = Redirect { by_cgroup: true, ..Redirect::for_proxy(UID) };
    let (asked, admitting) = (redirect.clone(), world.here.clone());
    put(&world.here, &redirect, Backend::Nftables);
    let writer = std::thread::spawn(move || {
        let all = || {
            (0..300).for_each(|id| admit(Cgroup { id, level: 1 }).unwrap());
            Ok(())
        };
        admitting.run(all).unwrap();
    });
    let torn = world.here.run(move || {
        let read = std::iter::from_fn(|| Some(installed().unwrap())).take_while(|_| !writer.is_finished());
        Ok(read.filter(|found| !in_force(&asked, found)).count())
    });
    assert_eq!(torn.unwrap(), 0);
}
