//! Graceful shutdown with a bound: calls in progress may finish, but a client that is stopped (SIGSTOP, a paused
//! container) never reads its answer and must not keep the process alive.

use std::future::Future;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// How long a role waits for its callers after it was asked to stop: shorter than the 10 s of Docker and the 30 s of
/// Kubernetes and systemd.
pub const GRACE: Duration = Duration::from_secs(5);

/// Awaits `serving`, but no longer than `grace` after `shutdown`. `None` if it did not finish in time.
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
        // Work that ends within the deadline is not cancelled.
        let quick = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            2
        };
        assert_eq!(within_grace(quick, &shutdown, Duration::from_secs(5)).await, Some(2));
    }
}
