//! `/ready`, and who may wait for it.
//!
//! The kubelet leaves a warning at the pod for each health check that fails. The sidecar's startup probe therefore asks for
//! `/ready?wait=28` (seconds), and the answer is held until the sidecar is ready, or that time is over. Only the node itself may
//! wait, which includes callers inside the pod: others would hold connections.

use std::sync::Arc;
use std::time::Duration;

use countersign_api::http::{Answer, Asked};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::sidecar::Sidecar;

/// Longest wait.
const LONGEST: Duration = Duration::from_secs(60);
/// Most questions that wait at once; further ones are answered at once. A kubelet has one.
const AT_ONCE: usize = 16;

/// Answers `/ready`.
pub struct Readiness {
    sidecar: Arc<Sidecar>,
    shutdown: CancellationToken,
    waiting: Semaphore,
}

/// How long the answer may be held; zero for callers that are not near.
pub fn wait_of(asked: &Asked) -> Duration {
    let seconds = asked.parameter("wait").filter(|_| asked.near).and_then(|text| text.parse().ok());
    seconds.map_or(Duration::ZERO, Duration::from_secs).min(LONGEST)
}

impl Readiness {
    /// Nobody waits yet.
    pub fn new(sidecar: Arc<Sidecar>, shutdown: CancellationToken) -> Self {
        Self { sidecar, shutdown, waiting: Semaphore::new(AT_ONCE) }
    }

    /// 200 once the sidecar is ready, or 503 after `wait`. A sidecar that shuts down answers at once.
    pub async fn answer(&self, wait: Duration) -> Answer {
        if self.missing().is_some()
            && !wait.is_zero()
            && let Ok(_place) = self.waiting.try_acquire()
        {
            tokio::select! {
                () = self.ready() => {}
                () = self.shutdown.cancelled() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
        Answer::ready(self.missing())
    }

    fn missing(&self) -> Option<String> {
        let draining = self.shutdown.is_cancelled().then(|| "shutting down".to_owned());
        draining.or_else(|| self.sidecar.missing())
    }

    /// Resolves once nothing is missing.
    async fn ready(&self) {
        let mut identities = self.sidecar.current.changes();
        let mut exemption = self.sidecar.exemption.changes();
        loop {
            identities.mark_unchanged();
            exemption.mark_unchanged();
            let directory = self.sidecar.local.changed();
            if self.sidecar.missing().is_none() {
                return;
            }
            tokio::select! {
                // Their senders live as long as the sidecar.
                _ = identities.changed() => {}
                _ = exemption.changed() => {}
                () = directory => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::config::Routing;
    use crate::local_workload::tests::identity;

    const WAIT: Duration = Duration::from_secs(28);

    fn asked(query: &str, near: bool) -> Asked {
        Asked { path: "/ready".into(), query: query.into(), local: "10.0.0.1:15020".parse().unwrap(), near }
    }

    /// A sidecar that lacks nothing but its identity, and has not been told to stop.
    fn readiness() -> Arc<Readiness> {
        let mut sidecar = crate::tests::sidecar();
        sidecar.config.routing = Routing::Fixed { outbound: None, inbound: None };
        Arc::new(Readiness::new(Arc::new(sidecar), CancellationToken::new()))
    }

    fn asks(readiness: &Arc<Readiness>, wait: Duration) -> tokio::task::JoinHandle<u16> {
        let readiness = readiness.clone();
        tokio::spawn(async move { readiness.answer(wait).await.status })
    }

    #[test]
    fn the_node_alone_may_wait_and_not_for_ever() {
        assert_eq!(wait_of(&asked("wait=28", true)), WAIT);
        assert_eq!(wait_of(&asked("a=b&wait=28", true)), WAIT);
        assert_eq!(wait_of(&asked("wait=28", false)), Duration::ZERO, "a stranger is answered at once");
        assert_eq!(wait_of(&asked("wait=999999", true)), LONGEST);
        for none in ["", "wait", "wait=", "wait=-1", "wait=1.5", "wait=x", "xwait=28"] {
            assert_eq!(wait_of(&asked(none, true)), Duration::ZERO, "{none}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_answer_is_held_until_the_sidecar_is_ready() {
        let (readiness, began) = (readiness(), Instant::now());
        assert_eq!(readiness.answer(Duration::ZERO).await.status, 503, "who does not ask to wait does not");
        let held = asks(&readiness, WAIT);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(!held.is_finished());
        readiness.sidecar.current.set(identity("spiffe://td/web"));
        assert_eq!((held.await.unwrap(), began.elapsed().as_secs()), (200, 5));
        assert_eq!(readiness.answer(WAIT).await.status, 200);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_does_not_become_ready_says_so_in_time_and_one_that_ends_at_once() {
        let (readiness, began) = (readiness(), Instant::now());
        assert_eq!(readiness.answer(WAIT).await.status, 503);
        assert_eq!(began.elapsed(), WAIT);
        let held = asks(&readiness, WAIT);
        tokio::time::sleep(Duration::from_secs(1)).await;
        readiness.shutdown.cancel();
        assert_eq!(held.await.unwrap(), 503);
        assert_eq!(began.elapsed(), WAIT + Duration::from_secs(1));
        assert_eq!(readiness.answer(WAIT).await.status, 503);
        assert_eq!(began.elapsed(), WAIT + Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn more_questions_than_may_wait_are_answered_at_once() {
        let (readiness, began) = (readiness(), Instant::now());
        let held: Vec<_> = (0..AT_ONCE).map(|_| asks(&readiness, WAIT)).collect();
        tokio::task::yield_now().await;
        assert_eq!((readiness.answer(WAIT).await.status, began.elapsed()), (503, Duration::ZERO));
        for one in held {
            assert_eq!(one.await.unwrap(), 503);
        }
        assert_eq!(readiness.waiting.available_permits(), AT_ONCE);
    }

    #[tokio::test(start_paused = true)]
    async fn behind_a_redirect_the_directory_is_waited_for_too() {
        let sidecar = Arc::new(crate::tests::sidecar());
        let readiness = Arc::new(Readiness::new(sidecar.clone(), CancellationToken::new()));
        sidecar.current.set(identity("spiffe://td/web"));
        let (directory, address) = (tokio::sync::watch::channel(None).0, "192.0.2.1".parse().unwrap());
        sidecar.local.knows(address, directory.subscribe());
        let (held, began) = (asks(&readiness, WAIT), Instant::now());
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!held.is_finished());
        directory.send(Some(crate::local_workload::tests::meshed(address, "spiffe://td/web"))).unwrap();
        assert_eq!(held.await.unwrap(), 200);
        assert_eq!(began.elapsed(), Duration::from_millis(300));
    }
}
