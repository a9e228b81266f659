//! What a sidecar refused or was refused, in words: `run` prints it once its program has ended.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use countersign_api::files::{Links, open_regular_as};
use serde::Deserialize;
use tokio::time::{Instant, sleep};

use super::mesh::Mesh;
use super::rotate::previous;
use super::running::Running;

/// Size of the end of an access log that is read, in bytes.
const MAX_BYTES: u64 = 1024 * 1024;
/// Most lines that are reported.
const MAX_LINES: usize = 10;
/// Longest wait until the sidecar has written a line.
const WRITTEN: Duration = Duration::from_secs(2);

/// The relevant fields of an access log line.
#[derive(Deserialize)]
struct Line {
    direction: String,
    mode: String,
    source: Option<SocketAddr>,
    source_id: Option<String>,
    destination: Option<SocketAddr>,
    destination_id: Option<String>,
    code: Option<String>,
    reason: Option<String>,
}

/// What a workload's sidecar refused since its start, one line each; empty if nothing was.
pub async fn told(mesh: &Mesh, running: &Running) -> Vec<String> {
    let deadline = Instant::now() + WRITTEN;
    loop {
        let counted: u64 = running.status().await.map_or(0, |status| status.refused.values().sum());
        let lines = refused_lines(&running.access_log());
        // The counter is incremented first, and the line is written a moment later.
        if lines.len() as u64 >= counted || Instant::now() >= deadline {
            return in_words(&lines, &|address| name_of(mesh, address));
        }
        sleep(Duration::from_millis(50)).await;
    }
}

fn in_words(lines: &[Line], name: &dyn Fn(SocketAddr) -> Option<String>) -> Vec<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for line in lines {
        let outbound = line.direction == "outbound";
        // A caller's port differs each time and is meaningless.
        let (way, address, id) = if outbound {
            ("to", line.destination.map(|a| (a, a.to_string())), &line.destination_id)
        } else {
            ("from", line.source.map(|a| (a, a.ip().to_string())), &line.source_id)
        };
        let peer = match address {
            Some((address, shown)) => name(address).map_or(shown.clone(), |name| format!("{name} ({shown})")),
            None => id.clone().unwrap_or_else(|| "an unknown address".into()),
        };
        let code = line.code.as_deref().unwrap_or("refused");
        let reason = line.reason.as_deref().map(|r| format!(": {r}")).unwrap_or_default();
        *counts.entry(format!("a connection {way} {peer} was refused: {code}{reason}")).or_default() += 1;
    }
    let more = counts.len().saturating_sub(MAX_LINES);
    let times = |n: usize| if n == 1 { String::new() } else { format!(" ({n} times)") };
    let mut told: Vec<String> =
        counts.into_iter().take(MAX_LINES).map(|(what, n)| format!("{what}{}", times(n))).collect();
    if more > 0 {
        told.push(format!("and {more} other kinds of refusals; the access log has each"));
    }
    told
}

fn name_of(mesh: &Mesh, address: SocketAddr) -> Option<String> {
    mesh.workloads().into_iter().find(|(_, w)| w.addresses.contains(&address.ip())).map(|(name, _)| name)
}

/// The refusals at the end of an access log and of its rotated part. Unreadable files count as empty.
fn refused_lines(log: &Path) -> Vec<Line> {
    let text = end_of(&previous(log)) + &end_of(log);
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
    lines.filter(|line| line.mode == "refused").collect()
}

/// The last [`MAX_BYTES`] of a file; empty if it cannot be read.
fn end_of(log: &Path) -> String {
    let read = || {
        // The folder belongs to the sidecar's user, and this thread is the mesh's only one.
        let mut file = open_regular_as(log, OpenOptions::new().read(true), Links::Reject)?;
        let start = file.metadata()?.len().saturating_sub(MAX_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = vec![];
        file.take(MAX_BYTES).read_to_end(&mut bytes)?;
        std::io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_one_kind_are_counted_and_others_are_kept_apart() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("access.log");
        let out = r#"{"direction":"outbound","mode":"refused","source":"10.86.0.11:5","destination":"10.86.0.10:8000","code":"not_allowed","reason":"me is not on the list","bytes_sent":0}"#;
        let inbound = r#"{"direction":"inbound","mode":"refused","source":"10.86.0.12:5","code":"not_mtls"}"#;
        let fine = r#"{"direction":"inbound","mode":"mtls","source":"10.86.0.12:5"}"#;
        // The log was rotated in between: its first part is in the file beside it.
        std::fs::write(previous(&log), format!("{out}\n{fine}\n")).unwrap();
        std::fs::write(&log, format!("{out}\n{inbound}\nhalf a li")).unwrap();
        let name = |a: SocketAddr| (a.ip().to_string() == "10.86.0.10").then(|| "web".to_owned());
        assert_eq!(
            in_words(&refused_lines(&log), &name),
            [
                "a connection from 10.86.0.12 was refused: not_mtls",
                "a connection to web (10.86.0.10:8000) was refused: not_allowed: me is not on the list (2 times)",
            ]
        );
        assert!(in_words(&refused_lines(Path::new("/nowhere")), &name).is_empty());
        // A sidecar that was taken over cannot hold the mesh up, nor have another file read.
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink(&log, previous(&pipe)).unwrap();
        assert!(refused_lines(&pipe).is_empty());
    }
}
