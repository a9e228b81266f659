//! The content of the display, without its layout: a row per workload, those with problems first.

use std::rc::Rc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::super::children::State;
use super::super::mesh::Mesh;
use super::super::mesh_file::MeshSpec;
use super::super::running::{Running, is_ready};
use super::answers::Answers;
use crate::operator::output::told;
use crate::settings::words::{bytes, count, duration};

/// Time without an answer after which a sidecar is shown as silent.
const SILENT: Duration = Duration::from_secs(3);
/// Most events in a view.
const EVENTS: usize = 50;

/// The content of the table.
pub struct View {
    /// The mesh, in one line.
    pub title: String,
    /// Its state, in one line.
    pub summary: String,
    /// Whether anything is wrong.
    pub troubled: bool,
    /// A row per workload, those with problems first.
    pub rows: Vec<Row>,
    /// Events in chronological order.
    pub events: Vec<String>,
    /// Hints at commands and keys, one per line.
    pub hints: Vec<String>,
}

/// The row of a workload.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Name of the workload.
    pub name: String,
    /// State in words.
    pub state: String,
    /// Severity of its problems; 0 for none, higher is more urgent.
    pub trouble: u8,
    /// SPIFFE ID of the workload.
    pub spiffe_id: String,
    /// Serial number of its SVID.
    pub serial: String,
    /// When its SVID expires, seconds since 1970; 0 without an SVID.
    pub expires_at: i64,
    /// Number of connections to it.
    pub connections_in: u64,
    /// Number of connections from it.
    pub connections_out: u64,
    /// Bytes in both directions.
    pub bytes: u64,
    /// Number of refused connections.
    pub refused: u64,
    /// Number of restarts of its sidecar and program.
    pub restarts: u32,
    /// Path of its sidecar's admin socket.
    pub admin_socket: String,
}

impl Row {
    /// The remaining lifetime of its SVID, in words.
    pub fn expires(&self) -> String {
        if self.expires_at == 0 {
            return "-".into();
        }
        let left = self.expires_at - OffsetDateTime::now_utc().unix_timestamp();
        u64::try_from(left).map_or_else(|_| "expired".into(), duration)
    }

    /// Its number of bytes, in words.
    pub fn amount(&self) -> String {
        bytes(self.bytes)
    }
}

/// The current content for a mesh.
pub fn view(mesh: &Rc<Mesh>, answers: &Answers) -> View {
    let spec = &mesh.spec;
    let rows = rows(mesh, answers);
    let mut parts = vec![];
    for (name, process) in mesh.roles() {
        let restarts = process.restarts();
        match process.state() {
            State::Running(_) if restarts == 0 => {}
            State::Running(_) => parts.push(format!("{name} restarted {}", times(restarts))),
            State::Ended(end) => parts.push(format!("{name} {end}")),
        }
    }
    let events = mesh.events().newest(EVENTS);
    View {
        title: format!(
            "mesh {}  trust domain {}  mode {}  svid ttl {}  ca ttl {}",
            spec.name, spec.trust_domain, spec.mode, spec.svid_ttl, spec.ca_ttl
        ),
        troubled: !parts.is_empty() || rows.iter().any(|r| r.trouble > 0),
        summary: summary(&rows, &parts),
        rows,
        events: events.iter().map(|e| format!("{} {}", e.time(), e.text)).collect(),
        hints: vec![
            format!("join it:  countersign run --name me -- curl http://{}/", example_host(spec)),
            format!("logs:     {}", mesh.logs().display()),
        ],
    }
}

/// A row per workload, those with problems first, then by name.
pub fn rows(mesh: &Rc<Mesh>, answers: &Answers) -> Vec<Row> {
    let mut rows: Vec<Row> = mesh.workloads().iter().map(|(name, running)| row(name, running, answers)).collect();
    rows.sort_by(|a, b| b.trouble.cmp(&a.trouble).then_with(|| a.name.cmp(&b.name)));
    rows
}

fn row(name: &str, running: &Running, answers: &Answers) -> Row {
    let (status, silent) = answers.of(name);
    let status = status.as_ref();
    let number = |key: &str| status.and_then(|s| s.facts.get(key)?.parse::<u64>().ok()).unwrap_or(0);
    let identity = status.and_then(|s| s.identities.first());
    let refused: u64 = status.map_or(0, |s| s.refused.values().sum());
    let (trouble, state) = match (running.sidecar(), running.program()) {
        (State::Ended(end), _) => (5, format!("sidecar {end}")),
        (_, Some(State::Ended(end))) if !end.good => (4, end.to_string()),
        _ if silent > SILENT => (3, format!("no answer for {}", duration(silent.as_secs()))),
        (_, Some(State::Ended(end))) => (2, end.to_string()),
        _ if status.is_none() && silent >= super::answers::PATIENCE => {
            (3, format!("no answer for {}", duration(silent.as_secs())))
        }
        _ if status.is_none() => (1, "asking".into()),
        (_, Some(State::Running(_))) => (0, "running".into()),
        (_, None) if !status.is_some_and(is_ready) => (1, "joining".into()),
        (_, None) => (0, "joined".into()),
    };
    Row {
        name: name.to_owned(),
        state,
        trouble,
        spiffe_id: running.spiffe_id.to_string(),
        serial: identity.map_or_else(|| "-".into(), |i| told(&i.serial)),
        expires_at: identity.map_or(0, |i| i.expires_at),
        connections_in: number("connections in, mtls") + number("connections in, plain"),
        connections_out: number("connections out, mtls") + number("connections out, plain"),
        bytes: number("bytes in") + number("bytes out"),
        refused,
        restarts: running.restarts(),
        admin_socket: running.admin_socket.display().to_string(),
    }
}

fn summary(rows: &[Row], parts: &[String]) -> String {
    let good = rows.iter().filter(|r| r.trouble == 0).count();
    let mut said = vec![format!("{}: {good} running", count(rows.len(), "workload"))];
    if good < rows.len() {
        said.push(format!("{} not", rows.len() - good));
    }
    let refused: u64 = rows.iter().map(|r| r.refused).sum();
    let restarts: u32 = rows.iter().map(|r| r.restarts).sum();
    if refused > 0 {
        said.push(count(usize::try_from(refused).unwrap_or(usize::MAX), "refused connection"));
    }
    if restarts > 0 {
        said.push(count(restarts as usize, "restart"));
    }
    said.extend_from_slice(parts);
    said.join(", ")
}

fn times(n: u32) -> String {
    if n == 1 { "once".into() } else { format!("{n} times") }
}

fn example_host(spec: &MeshSpec) -> String {
    let first = spec.workloads.first();
    let port = first.and_then(|w| w.ports.first()).map(|p| format!(":{p}")).unwrap_or_default();
    format!("{}{port}", first.map_or("workload", |w| &w.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_counts_what_matters() {
        let row = |trouble, refused, restarts| Row { trouble, refused, restarts, ..Row::default() };
        assert_eq!(summary(&[row(0, 0, 0)], &[]), "1 workload: 1 running");
        let parts = ["server restarted once".to_owned()];
        assert_eq!(
            summary(&[row(3, 0, 0), row(0, 2, 1)], &parts),
            "2 workloads: 1 running, 1 not, 2 refused connections, 1 restart, server restarted once"
        );
    }
}
