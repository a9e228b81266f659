//! What a person watches: a table that is drawn again each second in a terminal, lines of news elsewhere.

use std::collections::BTreeMap;
use std::io::Write;
use std::rc::Rc;
use std::time::Duration;

use countersign_api::push::GetStatusResponse;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use super::children::State;
use super::mesh::{Mesh, Running};
use crate::operator::output::Table;

const EVERY: Duration = Duration::from_secs(1);

/// Draws the table until told to stop.
pub async fn live(mesh: &Rc<Mesh>, stop: &CancellationToken) {
    let mut out = std::io::stdout();
    // Another screen, so that what was in the terminal is there again afterwards.
    let _ = write!(out, "\x1b[?1049h\x1b[?25l");
    loop {
        let text = draw(mesh).await;
        let _ = write!(out, "\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\r\n"));
        let _ = out.flush();
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stop.cancelled() => break,
        }
    }
    let _ = write!(out, "\x1b[?25h\x1b[?1049l");
    let _ = out.flush();
}

async fn draw(mesh: &Rc<Mesh>) -> String {
    let spec = &mesh.spec;
    let mut table =
        Table::new(&["workload", "spiffe id", "serial", "expires in", "in", "out", "bytes", "refused", "state"]);
    for (name, running) in mesh.workloads() {
        let status = running.status().await.ok();
        table.row(row(&name, &running, status.as_ref()));
    }
    format!(
        "mesh {}  trust domain {}  mode {}  svid ttl {}  ca ttl {}\n\n{}\n\
         join it:  countersign run --name me -- curl http://{}/\n\
         logs:     {}\n\
         Ctrl-C takes the mesh down and leaves nothing behind.\n",
        spec.name,
        spec.trust_domain,
        spec.mode,
        spec.svid_ttl,
        spec.ca_ttl,
        table.render(),
        example_host(spec),
        mesh.logs().display()
    )
}

fn example_host(spec: &super::mesh_file::MeshSpec) -> String {
    let first = spec.workloads.first();
    let port = first.and_then(|w| w.ports.first()).map(|p| format!(":{p}")).unwrap_or_default();
    format!("{}{port}", first.map_or("workload", |w| &w.name))
}

fn row(name: &str, running: &Running, status: Option<&GetStatusResponse>) -> Vec<String> {
    let number = |key: &str| status.and_then(|s| s.facts.get(key)?.parse::<u64>().ok()).unwrap_or(0);
    let identity = status.and_then(|s| s.identities.first());
    let expires = identity
        .map_or_else(|| "-".into(), |i| format!("{}s", i.expires_at - OffsetDateTime::now_utc().unix_timestamp()));
    let serial = identity.map_or_else(|| "-".into(), |i| i.serial.chars().take(12).collect());
    let refused: u64 = status.map_or(0, |s| s.refused.values().sum());
    let state = match (running.program(), status) {
        (_, None) => "sidecar away".into(),
        (Some(State::Ended(how)), _) => how,
        (Some(State::Running(_)), _) => "running".into(),
        (None, _) => "joined".into(),
    };
    vec![
        name.to_owned(),
        running.spiffe_id.to_string(),
        serial,
        expires,
        (number("connections in, mtls") + number("connections in, plain")).to_string(),
        (number("connections out, mtls") + number("connections out, plain")).to_string(),
        bytes(number("bytes in") + number("bytes out")),
        refused.to_string(),
        state,
    ]
}

fn bytes(n: u64) -> String {
    match n {
        0..1_024 => format!("{n} B"),
        1_024..1_048_576 => format!("{} KiB", n / 1_024),
        1_048_576..1_073_741_824 => format!("{} MiB", n / 1_048_576),
        _ => format!("{}.{} GiB", n / 1_073_741_824, n % 1_073_741_824 * 10 / 1_073_741_824),
    }
}

/// Prints what changes until told to stop: rotations, refusals, programs that end.
pub async fn plain(mesh: &Rc<Mesh>, stop: &CancellationToken) {
    println!("mesh {} is up; logs in {}; Ctrl-C takes it down", mesh.spec.name, mesh.logs().display());
    let mut seen: BTreeMap<String, (String, u64, Option<State>)> = BTreeMap::new();
    loop {
        for (name, running) in mesh.workloads() {
            let Ok(status) = running.status().await else { continue };
            let serial = status.identities.first().map(|i| i.serial.clone()).unwrap_or_default();
            let refused = status.refused.values().sum();
            let now = (serial, refused, running.program());
            match seen.get(&name) {
                Some(before) if *before == now => continue,
                Some(before) => {
                    if before.0 != now.0 {
                        println!("{name}: new SVID, serial {}", now.0);
                    }
                    if before.1 != now.1 {
                        let reasons: Vec<String> = status.refused.iter().map(|(k, v)| format!("{k}: {v}")).collect();
                        println!("{name}: refused so far: {}", reasons.join(", "));
                    }
                    if let (true, Some(State::Ended(how))) = (before.2 != now.2, &now.2) {
                        println!("{name}: {how}");
                    }
                }
                None => println!("{name}: {} serial {}", running.spiffe_id, now.0),
            }
            seen.insert(name, now);
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stop.cancelled() => return,
        }
    }
}
