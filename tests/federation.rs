//! Two trust domains federate: their servers fetch each other's bundle, and their workloads get it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::roles::{Role, Server, free_port};
use crate::support::{able, outcome, run, sh, wait_for};

/// The two trust domains.
const HERE: &str = "here.test";
const PARTNER: &str = "partner.test";
/// Longest wait for a refresh that comes by itself: the bundles ask for one every six seconds, and get one every fifteen.
const REFRESHED: Duration = Duration::from_secs(45);

/// A server with a bundle endpoint.
struct Side {
    server: Server,
    url: String,
}

impl Side {
    fn start(dir: &Path, trust_domain: &str, more: &[&str], variable: Option<(&'static str, PathBuf)>) -> Self {
        let (dir, port) = (dir.join(trust_domain), free_port());
        std::fs::create_dir(&dir).unwrap();
        let endpoint = format!("127.0.0.1:{port}");
        let flags = ["--ca-ttl", "60s", "--svid-ttl", "20s", "--bundle-endpoint", &endpoint];
        let server = Server::start_in(&dir, trust_domain, &[&flags[..], more].concat(), variable);
        Self { server, url: format!("https://localhost:{port}") }
    }

    /// Two that do not know each other yet.
    fn two(dir: &Path) -> (Self, Self) {
        (Self::start(dir, HERE, &[], None), Self::start(dir, PARTNER, &[], None))
    }

    /// Its bundle in a file, as an operator carries it to the other side.
    fn document(&self) -> String {
        let path = self.server.dir.join("bundle.json");
        std::fs::write(&path, run(&mut self.server.operator(&["bundle", "show", "--format", "spiffe"]))).unwrap();
        path.display().to_string()
    }

    /// Federates with another, whose endpoint has this ID, as an operator does.
    fn federate_with(&self, other: &Self, endpoint_id: &str) {
        let document = other.document();
        let name = &other.server.trust_domain;
        let create = ["federation", "create", "--trust-domain", name, "--bundle-endpoint-url", &other.url];
        let proof = ["--endpoint-spiffe-id", endpoint_id, "--trust-domain-bundle-path", &document];
        let format = ["--trust-domain-bundle-format", "spiffe"];
        run(&mut self.server.operator(&[&create[..], &proof, &format].concat()));
    }

    /// What its command says about a refresh of the other's bundle.
    fn refresh(&self, of: &str) -> (i32, String) {
        outcome(&mut self.server.operator(&["federation", "refresh", "--trust-domain", of]))
    }

    /// An agent, and an entry for this user that federates with the other trust domain.
    fn workload(&self, other: &str) -> Role {
        let (agent, parent) = self.server.agent();
        let (id, uid) =
            (format!("spiffe://{}/me", self.server.trust_domain), format!("unix:uid:{}", nix::unistd::geteuid()));
        let entry = ["entry", "create", "--spiffe-id", &id, "--parent-id", &parent, "--selector", &uid];
        self.server.json(&[&entry[..], &["--federates-with", &format!("spiffe://{other}")]].concat());
        agent
    }

    /// The IDs of the authorities of both kinds in a bundle.
    fn authorities(&self, of: &str) -> Vec<String> {
        let own = if of == self.server.trust_domain { vec![] } else { vec!["--trust-domain", of] };
        let bundle = self.server.json(&[&["bundle", "show"], &own[..]].concat());
        let ids = |list: &str, id: &str| -> Vec<String> {
            bundle[list].as_array().unwrap().iter().map(|a| a[id].as_str().unwrap().to_owned()).collect()
        };
        [ids("authorities", "id"), ids("jwt_authorities", "key_id")].concat()
    }

    /// Waits until it knows the other's authorities as they are.
    fn wait_for_bundle_of(&self, other: &Self) {
        let of = &other.server.trust_domain;
        wait_for(&format!("the bundle of {of}"), REFRESHED, || {
            (self.authorities(of) == other.authorities(of)).then_some(())
        });
    }
}

fn server_id(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}/spire/server")
}

#[test]
fn workloads_of_two_trust_domains_get_each_others_bundle_and_its_rotation() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (here, partner) = Side::two(dir.path());
    here.federate_with(&partner, &server_id(PARTNER));
    partner.federate_with(&here, &server_id(HERE));
    let _agents = [here.workload(PARTNER), partner.workload(HERE)];
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let source = |side: &Side| {
        let endpoint = format!("unix:{}", side.server.agent_socket().display());
        runtime.block_on(spiffe::X509Source::builder().endpoint(endpoint).build()).unwrap()
    };
    let (of_here, of_partner) = (source(&here), source(&partner));
    let known = |source: &spiffe::X509Source, of: &str| {
        let bundle = source.try_bundle_for_trust_domain(&spiffe::TrustDomain::new(of).unwrap());
        bundle.map_or(0, |bundle| bundle.authorities().len())
    };
    wait_for("each other's bundle", REFRESHED, || {
        (known(&of_here, PARTNER) > 0 && known(&of_partner, HERE) > 0).then_some(())
    });
    // A new authority is published before it signs; nobody carries it over by hand.
    let before = known(&of_here, PARTNER);
    for kind in ["x509", "jwt"] {
        partner.server.json(&["authority", "prepare", "--kind", kind]);
    }
    here.wait_for_bundle_of(&partner);
    wait_for("the new authority at the workload", REFRESHED, || (known(&of_here, PARTNER) > before).then_some(()));
    // The endpoint's own SVID is under the new authority now, and the old one is gone.
    partner.server.json(&["authority", "activate"]);
    here.wait_for_bundle_of(&partner);
    let (code, said) = here.refresh(PARTNER);
    assert_eq!(code, 0, "{said}");
    // And the end of it: workloads lose the bundle.
    let delete = ["bundle", "delete", "--trust-domain", PARTNER];
    run(&mut here.server.operator(&["federation", "delete", "--trust-domain", PARTNER]));
    let (code, said) = outcome(&mut here.server.operator(&delete));
    assert!(code == 1 && said.contains("1 entries federate"), "{said}");
    run(&mut here.server.operator(&[&delete[..], &["--mode", "dissociate"]].concat()));
    wait_for("the withdrawal", REFRESHED, || (known(&of_here, PARTNER) == 0).then_some(()));
    runtime.block_on(async { tokio::join!(of_here.shutdown(), of_partner.shutdown()) });
}

#[test]
fn an_endpoint_with_another_id_is_refused_and_relationships_outlive_a_restart() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut here, partner) = Side::two(dir.path());
    here.federate_with(&partner, &format!("spiffe://{PARTNER}/another"));
    let good = here.authorities(PARTNER);
    partner.server.json(&["authority", "prepare"]);
    let refused = |side: &Side| {
        let (code, said) = side.refresh(PARTNER);
        assert_eq!(code, 1, "{said}");
        assert!(said.contains(&server_id(PARTNER)) && said.contains("/another"), "{said}");
        assert_eq!(side.authorities(PARTNER), good, "the last good bundle stays");
    };
    refused(&here);
    here.server.again();
    refused(&here);
    let relationships = here.server.json(&["federation", "list"]);
    assert_eq!(relationships[0]["endpoint_spiffe_id"], format!("spiffe://{PARTNER}/another"));
    // What is put right takes effect at once.
    here.server.json(&[
        "federation",
        "update",
        "--trust-domain",
        &format!("spiffe://{PARTNER}"),
        "--endpoint-spiffe-id",
        &server_id(PARTNER),
    ]);
    here.wait_for_bundle_of(&partner);
    assert_eq!(here.server.json(&["federation", "delete", "--trust-domain", PARTNER])["deleted"][0], PARTNER);
    let (code, said) = here.refresh(PARTNER);
    assert!(code == 1 && said.contains("no federation relationship"), "{said}");
    assert!(!here.authorities(PARTNER).is_empty(), "its bundle stays");
    run(&mut here.server.operator(&["bundle", "delete", "--trust-domain", PARTNER]));
    assert_eq!(outcome(&mut here.server.operator(&["bundle", "show", "--trust-domain", PARTNER])).0, 1);
}

/// A certificate authority of the web, made by openssl, in `root.crt` and `root.key`.
fn web_authority(dir: &Path) {
    sh(&format!(
        "cd {} && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout root.key -out root.crt -days 2 \
         -subj /CN=Root -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign 2>/dev/null",
        dir.display()
    ));
}

/// A certificate for `localhost` below it, and its key, moved into place; its serial number.
fn web_certificate(dir: &Path) -> String {
    sh(&format!(
        "cd {}
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout new.key -out new.csr -subj /CN=x 2>/dev/null
        printf 'subjectAltName=DNS:localhost\nextendedKeyUsage=serverAuth\n' > ext
        openssl x509 -req -in new.csr -CA root.crt -CAkey root.key -CAcreateserial -days 1 -extfile ext -out new.crt 2>/dev/null
        mv new.key web.key && mv new.crt web.crt && openssl x509 -in web.crt -noout -serial",
        dir.display()
    ))
}

#[test]
fn a_bundle_is_fetched_by_the_web_pki_from_an_endpoint_whose_certificate_is_renewed() {
    if !able(&["openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    web_authority(dir.path());
    let first = web_certificate(dir.path());
    let file = |name: &str| dir.path().join(name);
    let files = ["web.crt", "web.key"].map(|name| file(name).display().to_string());
    let web = ["--bundle-endpoint-cert", &files[0], "--bundle-endpoint-key", &files[1]];
    let partner = Side::start(dir.path(), PARTNER, &web, None);
    let trusting = Side::start(dir.path(), HERE, &[], Some(("SSL_CERT_FILE", file("root.crt"))));
    let federate = |side: &Side, with: &Side| {
        let (url, name) = (&with.url, &with.server.trust_domain);
        let flags = ["--trust-domain", name, "--bundle-endpoint-url", url, "--bundle-endpoint-profile", "https_web"];
        run(&mut side.server.operator(&[&["federation", "create"], &flags[..]].concat()));
    };
    federate(&trusting, &partner);
    // No bundle was carried over.
    wait_for("the first bundle", REFRESHED, || {
        let shown = trusting.server.json(&["federation", "show", "--trust-domain", PARTNER]);
        (!shown["bundle"].is_null()).then_some(())
    });
    trusting.wait_for_bundle_of(&partner);
    let renewed = web_certificate(dir.path());
    assert_ne!(renewed, first);
    let served = format!(
        "openssl s_client -connect {} </dev/null 2>/dev/null | openssl x509 -noout -serial",
        partner.url.trim_start_matches("https://")
    );
    wait_for("the renewed certificate", Duration::from_secs(20), || (sh(&served) == renewed).then_some(()));
    assert_eq!(trusting.refresh(PARTNER).0, 0);
    // Whoever does not trust that authority gets nothing, and an SVID is no certificate of the web.
    federate(&partner, &trusting);
    let (code, said) = partner.refresh(HERE);
    assert!(code == 1 && said.contains("needs the profile https_spiffe"), "{said}");
    let shown = partner.server.json(&["federation", "show", "--trust-domain", HERE]);
    assert!(shown["bundle"].is_null(), "{shown}");
}

#[test]
fn mistakes_in_a_relationship_say_what_to_do() {
    if !able(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let said = |args: &[&str]| outcome(&mut server.operator(&[&["federation"], args].concat()));
    let create = |more: &[&str]| said(&[&["create", "--trust-domain", "partner.test"], more].concat());
    let url = ["--bundle-endpoint-url", "https://partner.test"];
    for (code, words, outcome) in [
        (2, "--bundle-endpoint-url", create(&[])),
        (2, "spiffe://partner.test/spire/server", create(&url)),
        (2, "--endpoint-spiffe-id", create(&[&url[..], &["--bundle-endpoint-profile", "https_spiffe"]].concat())),
        (2, "has no path", create(&[&url[..], &["--endpoint-spiffe-id", "spiffe://partner.test"]].concat())),
        (1, "https://", create(&["--bundle-endpoint-url", "http://x", "--bundle-endpoint-profile", "https_web"])),
        (2, "nothing to change", said(&["update", "--trust-domain", "partner.test"])),
        (1, "no federation relationship", said(&["show", "--trust-domain", "spiffe://partner.test"])),
        (1, "no federation relationship", said(&["delete", "--trust-domain", "partner.test"])),
        (2, "upper-case", said(&["show", "--trust-domain", "Partner.test"])),
    ] {
        assert!(outcome.0 == code && outcome.1.contains(words), "{words}: {outcome:?}");
    }
    assert_eq!(server.json(&["federation", "list"]), serde_json::json!([]));
    let id = format!("spiffe://{}/me", server.trust_domain);
    let entry = ["entry", "create", "--spiffe-id", &id, "--parent-id", &format!("{id}/p"), "--selector", "unix:uid:1"];
    let (code, said) = outcome(&mut server.operator(&[&entry[..], &["--federates-with", "partner.test"]].concat()));
    assert!(code == 1 && said.contains("countersign federation create"), "{said}");
}
