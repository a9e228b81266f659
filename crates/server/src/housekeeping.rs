//! The server's periodic work. Each job has its own task: a hanging upstream does not delay the renewal of the server's
//! own SVID, and a hanging database does not stop metrics.

use std::sync::Arc;
use std::time::Duration;

use countersign_identity::rotation::PAUSE;

use crate::core::Core;
use crate::own_svid::OwnSvid;

/// Interval between two checks for due work; shorter if the CA lifetime is short.
const CHECK: Duration = Duration::from_secs(10);

/// Interval between two looks for entries that have expired.
const EXPIRY: Duration = Duration::from_secs(1);

/// Interval between two deletions of expired entries.
const PRUNING: Duration = Duration::from_secs(60);
/// How long an expired entry is kept at least, and how long the server has run before it deletes any: an operator may prolong it, and
/// a clock that is ahead deletes nothing.
const KEPT_EXPIRED: Duration = Duration::from_secs(3_600);

/// Starts all jobs; they end with the server.
pub fn start(core: &Arc<Core>, own: &Arc<OwnSvid>) {
    core.tasks.spawn(rotate(core.clone()));
    core.tasks.spawn(follow_upstream(core.clone()));
    core.tasks.spawn(renew_own_svid(core.clone(), own.clone()));
    core.tasks.spawn(expire_entries(core.clone()));
    core.tasks.spawn(prune_entries(core.clone()));
    core.tasks.spawn(observe(core.clone(), own.clone()));
    core.tasks.spawn(reopen_audit(core.clone()));
    core.tasks.spawn(crate::federation::refresh::keep(core.clone()));
}

/// Waits until it is time to look again, `most` at the latest; false when the server ends.
async fn pause(core: &Core, most: Duration) -> bool {
    let pause = most.min(core.issuance().ca_ttl / 60).max(Duration::from_millis(100));
    tokio::select! {
        () = tokio::time::sleep(pause) => true,
        () = core.shutdown.cancelled() => false,
    }
}

/// Rotates the authorities when due.
async fn rotate(core: Arc<Core>) {
    loop {
        let rotated = tokio::select! {
            rotated = core.authorities.rotate() => rotated,
            // Safe to cancel: the store applies a change completely or not at all.
            () = core.shutdown.cancelled() => return,
        };
        if let Err(error) = rotated {
            tracing::error!(%error, "cannot rotate the authorities; trying again");
        }
        if !pause(&core, CHECK).await {
            return;
        }
    }
}

/// Publishes the upstream's roots when they change.
async fn follow_upstream(core: Arc<Core>) {
    let mut told = String::new();
    while pause(&core, CHECK).await {
        let followed = tokio::select! {
            followed = core.authorities.follow_upstream() => followed,
            // Safe to cancel, as a rotation is.
            () = core.shutdown.cancelled() => return,
        };
        let (now, what) = match followed {
            Ok(revoked) => (
                revoked.join(" "),
                "the upstream authority names roots that were revoked here; they stay out of the trust bundle",
            ),
            Err(error) => (error.to_string(), "cannot follow the upstream authority; trying again"),
        };
        // Once for each reason: an upstream may be away for days.
        if now != told && !now.is_empty() {
            tracing::warn!(reason = now, "{what}");
        }
        told = now;
    }
}

/// Renews the server's own SVID when due, and at once after a change of the bundle: its authority may be revoked or
/// tainted.
async fn renew_own_svid(core: Arc<Core>, own: Arc<OwnSvid>) {
    let mut bundles = core.authorities.bundle();
    loop {
        bundles.mark_unchanged();
        if let Err(error) = own.renew_if_due().await {
            tracing::error!(%error, "cannot renew the server's own SVID; trying again");
        }
        let go_on = tokio::select! {
            // What was too fresh for it a moment ago is looked at soon again.
            go_on = pause(&core, PAUSE) => go_on,
            changed = bundles.changed() => changed.is_ok(),
        };
        if !go_on {
            return;
        }
    }
}

/// Tells agents of entries that expire, as soon as they do: what hangs below an expired entry goes with it.
async fn expire_entries(core: Arc<Core>) {
    while pause(&core, EXPIRY).await {
        core.entries.expire(core.now());
    }
}

/// Deletes entries some time after they have expired (SPIRE: at once).
async fn prune_entries(core: Arc<Core>) {
    let (began, started) = (core.now(), std::time::Instant::now());
    loop {
        tokio::select! {
            () = tokio::time::sleep(PRUNING) => {}
            () = core.shutdown.cancelled() => return,
        }
        // Of a clock that jumps ahead, as of one that is wrong until the network has set it, nothing is believed at once.
        let now = core.now().min(began + started.elapsed());
        if started.elapsed() < KEPT_EXPIRED {
            continue;
        }
        if let Err(error) = core.entries.prune(now - KEPT_EXPIRED).await {
            tracing::error!(%error, "cannot delete expired entries; trying again");
        }
    }
}

/// Updates the metrics that are looked up rather than counted, and logs refusals that were only counted.
async fn observe(core: Arc<Core>, own: Arc<OwnSvid>) {
    loop {
        core.metrics.observe_trust(&core.authorities.bundle().borrow(), own.ends_at());
        core.metrics.observe(core.entries.len(), core.agents.len(), &core.authorities.journal());
        core.tell_refusals(std::time::Instant::now());
        if !pause(&core, CHECK).await {
            core.tell_all_refusals();
            return;
        }
    }
}

/// Reopens the audit log on request (SIGHUP), after logrotate has renamed it.
async fn reopen_audit(core: Arc<Core>) {
    let mut reopen = core.config.reopen.clone();
    loop {
        tokio::select! {
            () = reopen.asked() => core.audit.reopen(),
            () = core.shutdown.cancelled() => return,
        }
    }
}
