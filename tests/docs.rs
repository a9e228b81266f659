//! The pages, followed as they are written: every command of every `console` block in README and `docs`, in the order
//! given, from below a folder that only root may enter.
//!
//! Each block has one runner, by its page and its first command; a block without one fails a test here.

use std::time::Duration;

use crate::support::pages::{Block, Step, blocks, source};
use crate::support::reader::{PROGRAMS, Reader, Running, Terminal};
use crate::support::{able, wait_for};

/// Who runs a block.
#[derive(Clone, Copy)]
enum Runner {
    /// A story of this file.
    Here(Story),
    /// Each command is run elsewhere: the command, the file that runs it, and its words there.
    There(&'static [(&'static str, &'static str, &'static str)]),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Story {
    Mesh,
    ByHand,
    ProxyProtocol,
    Backup,
}

const RUNNERS: [(&str, &str, Runner); 21] = [
    (
        "README.md",
        "cargo run -- up --verify",
        Runner::There(&[
            ("cargo run -- up --verify", ".ci/run", "cargo run --quiet -- up --verify"),
            ("tests/run", ".ci/run", "tests/run"),
        ]),
    ),
    (
        "README.md",
        "cargo install --path crates/countersign --locked --root /usr/local",
        Runner::There(&[(
            "cargo install --path crates/countersign --locked --root /usr/local",
            ".ci/run",
            "cargo install --path crates/countersign --locked --root",
        )]),
    ),
    ("docs/guide.md", "countersign up examples/mesh.yaml", Runner::Here(Story::Mesh)),
    ("docs/guide.md", "countersign run --name me -- curl http://web:8000/", Runner::Here(Story::Mesh)),
    (
        "docs/guide.md",
        "export COUNTERSIGN_SERVER_SOCKET=/run/countersign/up/example/server/server.sock",
        Runner::Here(Story::Mesh),
    ),
    ("docs/guide.md", "countersign up examples/mesh.yaml --verify", Runner::Here(Story::Mesh)),
    ("docs/guide.md", "countersign server --trust-domain example.org", Runner::Here(Story::ByHand)),
    ("docs/operations.md", "systemctl stop countersign-server", Runner::Here(Story::Backup)),
    (
        "docs/operations.md",
        "countersign authority taint --kind upstream --id ROOT",
        Runner::There(&[
            (
                "countersign authority taint --kind upstream --id ROOT",
                "tests/pki.rs",
                r#"["authority", what, "--kind", "upstream", "--id", &stolen]"#,
            ),
            (
                "countersign authority revoke --kind upstream --id ROOT",
                "tests/pki.rs",
                r#"upstream_root(&server, "revoke")"#,
            ),
        ]),
    ),
    (
        "docs/operations.md",
        "countersign authority prepare --kind jwt && countersign authority activate --kind jwt",
        Runner::There(&[
            (
                "countersign authority prepare --kind jwt && countersign authority activate --kind jwt",
                "tests/operator.rs",
                r#"["authority", "activate", "--kind", "jwt"]"#,
            ),
            (
                "countersign authority taint --kind jwt --id OLD",
                "tests/operator.rs",
                r#"["authority", "taint", "--kind", "jwt", "--id", &first]"#,
            ),
            (
                "countersign authority revoke --kind jwt --id OLD",
                "tests/operator.rs",
                r#"["authority", "revoke", "--kind", "jwt", "--id", &first]"#,
            ),
        ]),
    ),
    (
        "docs/operations.md",
        "countersign bundle set --trust-domain partner.example --path partner.json --format spiffe",
        Runner::There(&[
            (
                "countersign bundle set --trust-domain partner.example --path partner.json --format spiffe",
                "tests/workload_api.rs",
                r#"["bundle", "set", "--trust-domain""#,
            ),
            (
                "countersign entry update --id ID --federates-with partner.example",
                "tests/workload_api.rs",
                r#"["entry", "update", "--id""#,
            ),
        ]),
    ),
    (
        "docs/nested.md",
        "countersign entry create --spiffe-id spiffe://example.org/server/east --parent-id AGENT --selector unix:uid:900 --downstream",
        Runner::There(&[
            (
                "countersign entry create --spiffe-id spiffe://example.org/server/east --parent-id AGENT --selector unix:uid:900 --downstream",
                "tests/nested.rs",
                r#"node.register(&root, "below", &["--downstream"]);"#,
            ),
            (
                "countersign server --trust-domain example.org --upstream-spire root.example.org:8081 --upstream-spire-workload-api /run/countersign/agent.sock",
                "tests/nested.rs",
                r#"&["--upstream-spire", &address, "--upstream-spire-workload-api", &node.socket]"#,
            ),
        ]),
    ),
    (
        "docs/federation.md",
        "countersign server --trust-domain here.example --bundle-endpoint 0.0.0.0:8443",
        Runner::There(&[(
            "countersign server --trust-domain here.example --bundle-endpoint 0.0.0.0:8443",
            "tests/federation.rs",
            r#""--bundle-endpoint", &endpoint]"#,
        )]),
    ),
    (
        "docs/federation.md",
        "countersign bundle show --format spiffe > here.json",
        Runner::There(&[(
            "countersign bundle show --format spiffe > here.json",
            "tests/federation.rs",
            r#"["bundle", "show", "--format", "spiffe"]"#,
        )]),
    ),
    (
        "docs/federation.md",
        "countersign federation create --trust-domain partner.example --bundle-endpoint-url https://partner.example:8443 --endpoint-spiffe-id spiffe://partner.example/spire/server --trust-domain-bundle-path partner.json --trust-domain-bundle-format spiffe",
        Runner::There(&[(
            "countersign federation create --trust-domain partner.example --bundle-endpoint-url https://partner.example:8443 --endpoint-spiffe-id spiffe://partner.example/spire/server --trust-domain-bundle-path partner.json --trust-domain-bundle-format spiffe",
            "tests/federation.rs",
            r#"["federation", "create", "--trust-domain", name"#,
        )]),
    ),
    (
        "docs/federation.md",
        "countersign federation refresh --trust-domain partner.example",
        Runner::There(&[
            (
                "countersign federation refresh --trust-domain partner.example",
                "tests/federation.rs",
                r#"["federation", "refresh", "--trust-domain""#,
            ),
            (
                "countersign federation show --trust-domain partner.example",
                "tests/federation.rs",
                r#"["federation", "show", "--trust-domain""#,
            ),
        ]),
    ),
    (
        "docs/federation.md",
        "countersign entry update --id ID --federates-with partner.example",
        Runner::There(&[(
            "countersign entry update --id ID --federates-with partner.example",
            "tests/workload_api.rs",
            r#"["entry", "update", "--id""#,
        )]),
    ),
    (
        "docs/federation.md",
        "countersign server --trust-domain here.example --bundle-endpoint 0.0.0.0:8443 --bundle-endpoint-cert web.crt --bundle-endpoint-key web.key",
        Runner::There(&[(
            "countersign server --trust-domain here.example --bundle-endpoint 0.0.0.0:8443 --bundle-endpoint-cert web.crt --bundle-endpoint-key web.key",
            "tests/federation.rs",
            r#"["--bundle-endpoint-cert""#,
        )]),
    ),
    (
        "docs/federation.md",
        "countersign federation create --trust-domain partner.example --bundle-endpoint-url https://partner.example:8443 --bundle-endpoint-profile https_web",
        Runner::There(&[(
            "countersign federation create --trust-domain partner.example --bundle-endpoint-url https://partner.example:8443 --bundle-endpoint-profile https_web",
            "tests/federation.rs",
            r#""--bundle-endpoint-profile", "https_web"]"#,
        )]),
    ),
    (
        "docs/federation.md",
        "countersign federation delete --trust-domain partner.example",
        Runner::There(&[
            (
                "countersign federation delete --trust-domain partner.example",
                "tests/federation.rs",
                r#"["federation", "delete", "--trust-domain""#,
            ),
            (
                "countersign bundle delete --trust-domain partner.example --mode dissociate",
                "tests/federation.rs",
                r#"["bundle", "delete", "--trust-domain", PARTNER]"#,
            ),
        ]),
    ),
    ("docs/proxy-protocol.md", "countersign proxy --proxy-protocol 8080 …", Runner::Here(Story::ProxyProtocol)),
];

/// Pages whose blocks are all read and run elsewhere: the page, the file that does it, and its words there.
const PAGES: [(&str, &str, &str); 1] =
    [("docs/kubernetes.md", "tests/cluster/suite/test_guide.py", r#"GUIDE = images.ROOT / "docs" / "kubernetes.md""#)];

fn runners_of(block: &Block) -> Vec<Runner> {
    let claims = RUNNERS.iter().filter(|(page, first, _)| *page == block.page && *first == block.steps[0].command);
    claims.map(|(.., runner)| *runner).collect()
}

fn runs(file: &str, words: &str) -> bool {
    let text = std::fs::read_to_string(source(file)).unwrap();
    text.lines().any(|line| line.contains(words) && !line.trim_start().starts_with('#'))
}

#[test]
fn every_block_of_the_pages_is_run_by_a_test() {
    let mut wrong = vec![];
    let blocks = blocks();
    for block in &blocks {
        if PAGES.iter().any(|(page, file, words)| *page == block.page && runs(file, words)) {
            continue;
        }
        let place = &block.steps[0].place;
        match runners_of(block)[..] {
            [Runner::Here(_)] => {}
            [Runner::There(commands)] => {
                let on_the_page: Vec<&str> = block.steps.iter().map(|step| step.command.as_str()).collect();
                let elsewhere: Vec<&str> = commands.iter().map(|(command, ..)| *command).collect();
                if on_the_page != elsewhere {
                    wrong.push(format!("{place}: these run elsewhere: {elsewhere:?}; the block has {on_the_page:?}"));
                }
                let gone = commands.iter().filter(|(_, file, words)| !runs(file, words));
                wrong.extend(
                    gone.map(|(command, file, _)| format!("{place}: {file} does not run `{command}` any more")),
                );
            }
            [] => wrong.push(format!("{place}: nothing runs `{}`", block.steps[0].command)),
            _ => wrong.push(format!("{place}: several run `{}`", block.steps[0].command)),
        }
    }
    for (page, first, _) in RUNNERS {
        if !blocks.iter().any(|block| block.page == page && block.steps[0].command == first) {
            wrong.push(format!("{page} has no block any more that begins with `{first}`"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The blocks of a story, as they stand.
fn blocks_of(story: Story) -> Vec<Block> {
    let of_it = |block: &Block| matches!(runners_of(block)[..], [Runner::Here(its)] if its == story);
    let blocks: Vec<Block> = blocks().into_iter().filter(of_it).collect();
    assert!(!blocks.is_empty(), "no page tells this story");
    blocks
}

/// What a command must say, by how it begins.
const ANSWERS: [(&str, &str); 7] = [
    ("countersign run --name me -- curl", "Directory listing"),
    ("countersign status --socket", "example.local/ns/default/sa/web"),
    ("countersign entry show", "example.local/ns/default/sa/web"),
    ("countersign authority prepare", "active"),
    ("countersign up examples/mesh.yaml --verify", ", 0 failed"),
    ("countersign entry create", "spiffe://example.org/"),
    ("curl http://127.0.0.1:8001/", "Directory listing"),
];

/// Runs a command and looks at its answer.
fn follow(terminal: &mut Terminal, step: &Step, filled: &[(&str, &str)]) {
    let said = terminal.run(&step.with(filled));
    let answer = ANSWERS.iter().find(|(begin, _)| step.command.starts_with(begin));
    assert!(answer.is_none_or(|(_, answer)| said.contains(answer)), "{}: `{}` said {said}", step.place, step.command);
}

#[test]
fn the_guides_mesh_comes_up_is_used_and_checks_itself() {
    if !able(&[&PROGRAMS[..], &["curl", "python3"]].concat()) {
        return;
    }
    let reader = Reader::new();
    let mut up: Option<Running> = None;
    for block in blocks_of(Story::Mesh) {
        let mut terminal = reader.terminal();
        for step in &block.steps {
            if step.command == "countersign up examples/mesh.yaml" {
                up = Some(terminal.start(&step.command, " is up; logs in "));
                wait_for("web to listen", Duration::from_secs(60), || {
                    let listening = terminal.run("ip netns exec cs-example-web ss -Hltn 'sport = :8000'");
                    (!listening.is_empty()).then_some(())
                });
                continue;
            }
            if step.command.ends_with(" --verify") {
                up.take().expect("the mesh is up").interrupt();
            }
            follow(&mut terminal, step, &[]);
        }
    }
    assert!(!reader.file("/run/countersign/up/example").exists());
    let left = reader.terminal().run("ip netns list");
    assert_eq!(left, "", "namespaces are left");
}

/// Server, agent and sidecars, as the guide has them.
fn by_hand(reader: &Reader) -> Vec<Running> {
    let (mut root, mut user) = (reader.terminal(), reader.terminal_of(1000));
    let mut running = vec![root.start("python3 -u -m http.server --bind 127.0.0.1 8000", "Serving HTTP")];
    for step in blocks_of(Story::ByHand).iter().flat_map(|block| &block.steps) {
        let command = step.with(&[("SERVER", "127.0.0.1")]);
        match command.split(' ').nth(1).unwrap_or_default() {
            "server" => running.push(root.start(&command, "server ready")),
            "agent" => running.push(root.start(&command, "attested")),
            "x509" => running.push(user.start(&command, "spiffe://example.org/web")),
            "proxy" => running.push(user.start(&command, "identity in use")),
            "entry" => {
                let agent = agent(&mut root);
                follow(&mut root, step, &[("AGENT", &agent)]);
            }
            _ if command.starts_with("curl ") => follow(&mut user, step, &[]),
            _ => follow(&mut root, step, &[]),
        }
    }
    running
}

/// The one agent, as `countersign node list` shows it.
fn agent(terminal: &mut Terminal) -> String {
    let listed = terminal.run("countersign node list");
    let agent = listed.split_whitespace().find(|word| word.starts_with("spiffe://"));
    agent.unwrap_or_else(|| panic!("no agent in {listed}")).to_owned()
}

#[test]
fn the_guides_roles_by_hand_carry_a_connection_and_tell_the_app_who_calls() {
    if !able(&[&PROGRAMS[..], &["curl", "python3", "nc"]].concat()) {
        return;
    }
    let reader = Reader::new();
    let mut running = by_hand(&reader);
    let mut user = reader.terminal_of(1000);
    running.push(user.start("nc -v -l 127.0.0.1 8080", "Listening on"));
    for step in blocks_of(Story::ProxyProtocol).iter().flat_map(|block| &block.steps) {
        let rest = "--inbound-listen 127.0.0.1:15018 --inbound-target 127.0.0.1:8080";
        running.push(user.start(&step.with(&[("…", rest)]), "identity in use"));
    }
    let way_out = "countersign proxy --outbound-listen 127.0.0.1:8011 --outbound-target 127.0.0.1:15018 \
                   --outbound-expect spiffe://example.org/web";
    running.push(user.start(way_out, "identity in use"));
    user.run("echo first | nc -N 127.0.0.1 8011");
    let app = running.iter().find(|r| r.is("nc ")).unwrap();
    wait_for("the app to be told", Duration::from_secs(20), || app.said().contains("first").then_some(()));
    assert!(app.said().contains("spiffe://example.org/webfirst"), "{:?}", app.said());
    // The roles end orderly; what only watches has nothing to put in order.
    running.retain(|r| !r.is("nc ") && !r.is("countersign x509 "));
    running.into_iter().rev().for_each(Running::interrupt);
}

/// Starts and stops the server as its unit does, where systemd is not the first process.
const SYSTEMCTL: &str = "#!/bin/sh
set -e
[ \"$2\" = countersign-server ]
case $1 in
  start) setsid countersign server --trust-domain example.org > /run/server.log 2>&1 & echo $! > /run/server.pid ;;
  stop) kill \"$(cat /run/server.pid)\"; while kill -0 \"$(cat /run/server.pid)\" 2>/dev/null; do sleep 0.1; done ;;
  *) exit 1 ;;
esac
";

#[test]
fn the_backup_of_operations_is_the_whole_server_and_only_its_recipient_reads_it() {
    if !able(&[&PROGRAMS[..], &["age", "tar"]].concat()) {
        return;
    }
    let reader = Reader::new();
    reader.install("systemctl", SYSTEMCTL);
    let mut root = reader.terminal();
    let bundle = |root: &mut Terminal| {
        let socket = reader.file("/run/countersign/server.sock");
        wait_for("the server", Duration::from_secs(30), || std::os::unix::net::UnixStream::connect(&socket).ok());
        root.run("countersign bundle show")
    };
    root.run("systemctl start countersign-server");
    let before = bundle(&mut root);
    root.run("age-keygen -o /run/key.txt");
    let recipient = root.run("age-keygen -y /run/key.txt");
    for step in blocks_of(Story::Backup).iter().flat_map(|block| &block.steps) {
        follow(&mut root, step, &[("RECIPIENT", recipient.trim())]);
    }
    assert_eq!(bundle(&mut root), before, "the server goes on as it was");
    let kept = root.run("age -d -i /run/key.txt server.tar.age | tar -t");
    assert!(kept.contains("server/server.sqlite") && kept.lines().any(|l| l.starts_with("server/keys/")), "{kept}");
    root.run("age-keygen -o /run/other.txt && ! age -d -i /run/other.txt server.tar.age > /dev/null");
    root.run("systemctl stop countersign-server");
}
