//! What a workload's settings mean for its sidecar: the sidecar's command line and the redirect of its namespace.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use countersign_identity::policy::Mode;
use countersign_redirect::guard::RESOLV_CONF;
use countersign_redirect::{Guard, Redirect};

use super::mesh_file::WorkloadSpec;
use crate::launch::OWN_PROGRAM;

/// Where a sidecar whose folder is `home` answers operators.
pub fn admin_socket(home: &Path) -> PathBuf {
    home.join("admin.sock")
}

/// Program and arguments of a sidecar.
pub fn command(spec: &WorkloadSpec, agent_socket: &Path, home: &Path) -> Vec<String> {
    let mut command: Vec<String> = vec![OWN_PROGRAM.into(), "proxy".into()];
    let mut set = |flag: &str, value: String| command.extend([flag.to_owned(), value]);
    set("--agent-socket", agent_socket.display().to_string());
    set("--admin-socket", admin_socket(home).display().to_string());
    set("--access-log", home.join("access.log").display().to_string());
    set("--drain", "3s".into());
    for port in &spec.proxy_protocol {
        set("--proxy-protocol", port.to_string());
    }
    command
}

/// Keeps the C library's copies off `rep movsb`. glibc before 2.39 uses it for copies of 8 KiB and more, and on AMD's
/// processors it is several times slower than a loop where source and destination lie badly to each other within their pages
/// (glibc bug 30994); a TLS record is copied twice. Newer versions know better and other C libraries do not read it.
/// `images/build` sets the same for images.
const COPIES: (&str, &str) = ("GLIBC_TUNABLES", "glibc.cpu.x86_rep_movsb_threshold=0x10000000");

/// Environment of a sidecar.
pub fn environment() -> BTreeMap<String, String> {
    let (name, value) = COPIES;
    BTreeMap::from([(name.into(), value.into())])
}

/// What is caught in a workload's namespace, and what else is dropped there.
pub fn redirect(spec: &WorkloadSpec, proxy_uid: u32) -> Redirect {
    let mut redirect = Redirect::for_proxy(proxy_uid);
    redirect.exempt_outbound_ports.extend(&spec.exclude_outbound_ports);
    redirect.exempt_inbound_ports.extend(&spec.exclude_inbound_ports);
    redirect.exempt_outbound_cidrs.extend(&spec.exclude_outbound_cidrs);
    redirect.exempt_inbound_cidrs.extend(&spec.exclude_inbound_cidrs);
    // The mode of the start: a mode that changes while the mesh runs leaves the rules as they are.
    redirect.guard = (spec.policy.mode == Mode::Strict).then(|| Guard {
        udp_ports: spec.allow_udp_ports.clone(),
        cidrs: spec.allow_other_cidrs.clone(),
        ..Guard::with_resolvers_of(Path::new(RESOLV_CONF))
    });
    redirect
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::up::mesh_file;

    fn workload(mode: &str) -> WorkloadSpec {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mesh.yaml");
        let keys = "ports: [25, 80, 8080]\n    proxy_protocol: [25, 8080]\n    allow_udp_ports: [4433]\n    allow_other_cidrs: [10.9.0.0/16]";
        let text = format!("mode: {mode}\nworkloads:\n  - name: a\n    command: [sleep]\n    {keys}\n");
        std::fs::write(&path, text).unwrap();
        mesh_file::load(&path).unwrap().workloads.remove(0)
    }

    #[test]
    fn a_sidecar_copies_the_same_way_in_a_mesh_an_image_and_the_race() {
        let (name, value) = COPIES;
        assert!(include_str!("../../../../images/build").contains(&format!("\"{name}={value}\"")));
        assert!(include_str!("../../../../benches/sidecar-pair.sh").contains(&format!("export {name}={value}\n")));
    }

    #[test]
    fn the_keys_for_single_ports_and_other_protocols_have_their_effect() {
        let words = command(&workload("strict"), Path::new("/agent.sock"), Path::new("/home"));
        assert!(words.join(" ").ends_with(" --proxy-protocol 25 --proxy-protocol 8080"), "{words:?}");
        let guard = redirect(&workload("strict"), 2102).guard.unwrap();
        assert_eq!((guard.udp_ports, guard.cidrs), ([4433].into(), ["10.9.0.0/16".parse().unwrap()].into()));
        assert_eq!(redirect(&workload("permissive"), 2102).guard, None, "there everything passes");
    }
}
