//! Hooks of a sidecar that is a plain container, where Kubernetes has no native ones: its start holds back the containers
//! behind it, its end waits for theirs.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::metrics_page::metric;
use crate::probe;

/// The sidecar's pages.
const PAGES: &str = "http://127.0.0.1:15020";
/// How often is looked.
const LOOK: Duration = Duration::from_millis(200);
/// A sidecar without identity after this time lets the kubelet start it anew.
const PATIENCE: Duration = Duration::from_secs(300);
/// The app has gone when it was seen nowhere for so long.
const QUIET: Duration = Duration::from_secs(2);

/// What the kubelet runs in a sidecar's container.
#[derive(Debug, clap::Subcommand)]
pub enum SidecarHook {
    /// Wait until the sidecar is ready (postStart).
    Gate,
    /// Wait until the app neither listens nor has a connection open (preStop).
    Drain,
}

/// Waits.
pub fn run(hook: &SidecarHook) -> Result<()> {
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
        match probe::get(&format!("{PAGES}/ready")).await {
            Ok(_) => return Ok(()),
            Err(why) if Instant::now() > until => return Err(anyhow!("the sidecar is not ready: {why:#}")),
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Returns when the app has gone. A sidecar that does not answer has nothing to wait for.
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

/// Whether a socket of anybody but `own` listens (proc(5): column 4 is the state, 0A listens; column 8 is the owner).
fn somebody_listens(table: &str, own: u32) -> bool {
    table.lines().skip(1).any(|line| {
        let columns: Vec<&str> = line.split_ascii_whitespace().take(8).collect();
        columns.get(3) == Some(&"0A") && columns.get(7).and_then(|uid| uid.parse().ok()) != Some(own)
    })
}

/// Whether a connection is open, by the sidecar's own page.
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
