//! Keeps the agent's own identity: attests at the start, renews at half life, attests again where the server asks.

use std::sync::Arc;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_api::denied::Reason;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::link::Link;

/// The time is looked at this often, so that a clock that jumps is noticed.
const LOOK: Duration = Duration::from_secs(1);

/// Runs until `shutdown`. `denials` brings the server's refusals that other calls met.
pub async fn keep(
    link: Arc<Link>,
    cache: Arc<Cache>,
    mut denials: mpsc::Receiver<Reason>,
    shutdown: CancellationToken,
) {
    let work = async {
        let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(30));
        let mut jitter = draw();
        loop {
            let identity = link.identity().borrow().clone();
            let result = match identity {
                None => link.attest().await.inspect(|svid| tracing::info!(agent = %svid.id(), "attested")),
                Some(svid) if svid.is_expired(link.now()) => {
                    tracing::error!(agent = %svid.id(), expired_at = %svid.facts().not_after, "the agent's own SVID has expired; attesting again");
                    link.forget();
                    continue;
                }
                Some(svid) if svid.renew_at(jitter) <= link.now() => {
                    jitter = draw();
                    link.renew()
                        .await
                        .inspect(|svid| tracing::debug!(serial = svid.facts().serial, "agent SVID renewed"))
                }
                Some(_) => {
                    tokio::select! {
                        () = tokio::time::sleep(LOOK) => {}
                        denial = denials.recv() => match denial {
                            Some(reason) => heed(&link, &cache, reason),
                            None => return,
                        },
                    }
                    continue;
                }
            };
            match result {
                Ok(_) => backoff.reset(),
                Err(error) => {
                    let delay = backoff.next_delay();
                    tracing::error!(%error, "cannot prove this node to the server; trying again in {delay:.1?}");
                    if let Some(reason) = error.denial() {
                        heed(&link, &cache, reason);
                    }
                    tokio::time::sleep(delay).await;
                }
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = shutdown.cancelled() => {}
    }
}

/// Does what the server's refusal asks for.
fn heed(link: &Link, cache: &Cache, reason: Reason) {
    match reason {
        Reason::AgentBanned => {
            tracing::error!("this agent is banned: its workloads' identities are withdrawn");
            cache.change(|state| {
                state.entries.clear();
                state.synced = true;
            });
            link.forget();
        }
        Reason::AgentExpired | Reason::AgentNotAttested | Reason::AgentNotActive | Reason::AgentMustReattest => {
            tracing::warn!(?reason, "the server asks this agent to attest again");
            link.forget();
        }
        Reason::Unknown => {}
    }
}

fn draw() -> f64 {
    rand::random_range(-1.0..=1.0)
}
