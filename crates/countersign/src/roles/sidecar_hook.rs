//! Hooks of a sidecar that is a plain container, for Kubernetes without native sidecars: its start blocks the
//! containers after it, its end waits for theirs.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::metrics_page::metric;
use crate::probe;

/// URL of the sidecar's pages.
const PAGES: &str = "http://127.0.0.1:15020";
/// Interval between two polls.
const LOOK: Duration = Duration::from_millis(200);
/// After this time without an identity the hook fails, and the kubelet restarts the sidecar.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long the app must be absent before it counts as ended.
const QUIET: Duration = Duration::from_secs(2);

/// Hooks that the kubelet runs in a sidecar's container.
#[derive(Debug, clap::Subcommand)]
pub enum SidecarHook {
    /// Wait until the sidecar is ready (postStart).
    Gate,
    /// Wait until the app neither listens nor has an open connection (preStop).
    Drain,
}

/// Runs a hook.
pub fn run(hook: &SidecarHook) -> Result<()> {
    // It has the sidecar's user and cgroup: whoever could trace it would pass the redirect.
    super::hide_memory();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match hook {
            SidecarHook::Gate => gate().await,
            SidecarHook::Drain => {
                drain().await;
                Ok(())
            }
        }
    })
}

async fn gate() -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        // The sidecar holds its answer until it is ready, within what the client waits.
        match probe::get(&format!("{PAGES}/ready?wait=10")).await {
            Ok(_) => return Ok(()),
            Err(why) if Instant::now() > until => return Err(anyhow!("the sidecar is not ready: {why:#}")),
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Waits until the app has ended. Returns at once if the sidecar does not answer.
async fn drain() {
    let own = nix::unistd::geteuid().as_raw();
    let mut quiet = Instant::now();
    while quiet.elapsed() < QUIET {
        let Ok(metrics) = probe::get(&format!("{PAGES}/metrics")).await else { return };
        let table = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let listens = [table("/proc/net/tcp"), table("/proc/net/tcp6")].iter().any(|t| somebody_listens(t, own));
        if listens || is_connected(&metrics) {
            quiet = Instant::now();
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether a socket of another user than `own` listens (proc(5): column 4 is the state, 0A is listening; column 8 is
/// the owner).
fn somebody_listens(table: &str, own: u32) -> bool {
    table.lines().skip(1).any(|line| {
        let columns: Vec<&str> = line.split_ascii_whitespace().take(8).collect();
        columns.get(3) == Some(&"0A") && columns.get(7).and_then(|uid| uid.parse().ok()) != Some(own)
    })
}

/// Whether the sidecar has open connections, by its metrics.
fn is_connected(metrics: &str) -> bool {
    metric(metrics, "countersign_proxy_active_connections").any(|(_, open)| open > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_others_that_listen_count() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
        let line = |state: &str, uid: u32| {
            format!(
                "{head}   0: 00000000:1F90 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 {uid:>5} 0 1\n"
            )
        };
        assert!(somebody_listens(&line("0A", 1000), 2102));
        assert!(!somebody_listens(&line("0A", 2102), 2102));
        assert!(!somebody_listens(&line("01", 1000), 2102));
        assert!(!somebody_listens("", 2102));
    }

    #[test]
    fn open_connections_are_read_from_the_page() {
        assert!(is_connected("# TYPE x gauge\ncountersign_proxy_active_connections 3\n"));
        assert!(!is_connected("countersign_proxy_active_connections 0\n"));
        assert!(!is_connected(""));
    }
}
