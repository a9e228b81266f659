//! The end of a role that serves: what is under way may finish, but not without bound. A client that is stopped (SIGSTOP, a
//! paused container) never reads what it is sent, and the answer to it never ends.

use std::future::Future;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// What a role that was told to end still waits for its callers: shorter than the 10 s that Docker, and the 30 s that
/// Kubernetes and systemd leave it at least.
pub const GRACE: Duration = Duration::from_secs(5);

/// Awaits `serving`; once `shutdown` has come, no longer than `grace` from then on. `None` when that was too short.
pub async fn within_grace<T>(
    serving: impl Future<Output = T>,
    shutdown: &CancellationToken,
    grace: Duration,
) -> Option<T> {
    let late = async {
        shutdown.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        biased;
        served = serving => Some(served),
        () = late => None,
    }
}

/// What follows the end of serving without us: accept loops hear of it and take their sockets' files away.
const LAST_STEPS: Duration = Duration::from_millis(50);

/// Awaits `serving` as [`within_grace`] does; when that was too short, says so and ends without whoever is still there.
pub async fn take_leave<T>(
    serving: impl Future<Output = T>,
    shutdown: &CancellationToken,
    grace: Duration,
) -> Option<T> {
    let served = within_grace(serving, shutdown, grace).await;
    if served.is_none() {
        tracing::warn!("some callers did not take leave within {grace:?}; ending without them");
        tokio::time::sleep(LAST_STEPS).await;
    }
    served
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_never_ends_is_left_when_the_grace_is_over() {
        let shutdown = CancellationToken::new();
        let grace = Duration::from_millis(50);
        assert_eq!(within_grace(async { 1 }, &shutdown, grace).await, Some(1));
        let never = within_grace(std::future::pending::<()>(), &shutdown, grace);
        tokio::pin!(never);
        let early = tokio::time::timeout(Duration::from_millis(150), &mut never).await;
        assert!(early.is_err(), "without a shutdown there is no deadline");
        shutdown.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(10), never).await;
        assert_eq!(ended.unwrap(), None);
        // What ends in time is not cut short.
        let quick = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            2
        };
        assert_eq!(within_grace(quick, &shutdown, Duration::from_secs(5)).await, Some(2));
    }
}
