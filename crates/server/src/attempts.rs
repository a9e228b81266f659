//! Bounds on attestations before it is known who attests: strangers may share an address with agents (one machine, a NAT), and
//! must neither keep them from attesting nor the server busy.
//!
//! An attempt waits for its turn to be judged; no attempt is refused for what others at its address do. Turns are given in the
//! order of arrival, and a connection has one attempt at a time, so that an agent waits at most for one attempt of every other
//! connection, whose number is bounded. An attempt that fails keeps its turn for [`FAILED_TURN`], one that succeeds gives it
//! back at once: failures use up the share of those who fail. While an attempt waits for its node it has no turn.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use countersign_api::admission::Source as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Attempts of one address and kind of evidence that are judged at once. With [`FAILED_TURN`]: 40 failures per second.
const PER_ADDRESS: usize = 4;
/// Attempts of one kind of evidence that are judged at once. With [`FAILED_TURN`]: 320 failures per second.
const IN_ALL: usize = 32;
/// How long a failed attempt keeps its turn.
const FAILED_TURN: Duration = Duration::from_millis(100);

/// What has one bound: a kind of evidence, at one address (IPv6: /64) or in all.
type Line = (&'static str, Option<IpAddr>);

/// The attempts of all strangers.
#[derive(Clone, Default)]
pub struct Attempts(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Connections with an attempt.
    busy: HashSet<SocketAddr>,
    /// Lines that somebody is in.
    lines: HashMap<Line, Arc<Semaphore>>,
}

impl Attempts {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins an attempt over the connection from this address; `None` if there is one already.
    pub fn begin(&self, from: SocketAddr) -> Option<Attempt> {
        let is_first = self.state().busy.insert(from);
        is_first.then(|| Attempt { from: Some((self.clone(), from)), kind: "", turn: None })
    }

    fn line(&self, line: Line, most: usize) -> Arc<Semaphore> {
        self.state().lines.entry(line).or_insert_with(|| Arc::new(Semaphore::new(most))).clone()
    }

    /// Waits for a place in a line. Cancel safe.
    async fn place(&self, line: Line, most: usize) -> Place {
        let semaphore = self.line(line, most);
        let mut place = Place { attempts: self.clone(), line, semaphore: Some(semaphore.clone()), permit: None };
        place.permit = semaphore.acquire_owned().await.ok();
        place
    }
}

/// One attempt to attest.
pub struct Attempt {
    /// `None`: a local caller, who is not bounded.
    from: Option<(Attempts, SocketAddr)>,
    kind: &'static str,
    turn: Option<(Place, Place)>,
}

impl Attempt {
    /// An attempt without bounds.
    pub fn unbounded() -> Self {
        Self { from: None, kind: "", turn: None }
    }

    /// Waits until evidence of this kind may be judged. Cancel safe.
    pub async fn take_turn(&mut self, kind: &'static str) {
        let Some((attempts, from)) = &self.from else { return };
        // The address first: whoever waits for it keeps nobody else waiting.
        let own = attempts.place((kind, Some(from.ip().group())), PER_ADDRESS).await;
        let in_all = attempts.place((kind, None), IN_ALL).await;
        (self.kind, self.turn) = (kind, Some((own, in_all)));
    }

    /// Gives the turn back while the node is waited for.
    pub fn pause(&mut self) {
        self.turn = None;
    }

    /// Waits for a turn as before [`Self::pause`].
    pub async fn resume(&mut self) {
        self.take_turn(self.kind).await;
    }

    /// Ends an attempt that failed: its turn and its connection are busy for a while longer.
    pub async fn fail(self) {
        if self.from.is_some() {
            tokio::time::sleep(FAILED_TURN).await;
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some((attempts, from)) = &self.from {
            attempts.state().busy.remove(from);
        }
    }
}

/// A place in a line. A line that nobody is in is forgotten.
struct Place {
    attempts: Attempts,
    line: Line,
    /// `None` only while it is dropped.
    semaphore: Option<Arc<Semaphore>>,
    /// `None` while it waits.
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.permit = None;
        let mut state = self.attempts.state();
        // Given up under the lock, and whoever joins needs the lock: what is left is the map's and others' who wait.
        self.semaphore = None;
        if state.lines.get(&self.line).is_some_and(|line| Arc::strong_count(line) == 1) {
            state.lines.remove(&self.line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    fn address(n: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, n], port))
    }

    /// An attempt that fails, in a task of its own, over and over.
    fn flood(attempts: &Attempts, from: SocketAddr) -> tokio::task::JoinHandle<()> {
        let attempts = attempts.clone();
        tokio::spawn(async move {
            loop {
                let mut attempt = attempts.begin(from).unwrap();
                attempt.take_turn("x").await;
                attempt.fail().await;
            }
        })
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_gets_its_turn_among_hundreds_of_connections_that_fail_at_its_address() {
        let attempts = Attempts::default();
        let strangers: Vec<_> = (1..=255).map(|port| flood(&attempts, address(1, port))).collect();
        tokio::time::sleep(Duration::from_secs(60)).await;
        for _ in 0..5 {
            let asked = Instant::now();
            let mut agent = attempts.begin(address(1, 9_999)).unwrap();
            agent.take_turn("x").await;
            // One attempt of each other connection, four at once.
            assert!(asked.elapsed() <= FAILED_TURN * 65, "{:?}", asked.elapsed());
            let asked = Instant::now();
            let mut other = attempts.begin(address(2, 1)).unwrap();
            other.take_turn("x").await;
            assert_eq!(asked.elapsed(), Duration::ZERO, "another address does not wait");
        }
        strangers.iter().for_each(tokio::task::JoinHandle::abort);
        for stranger in strangers {
            assert!(stranger.await.unwrap_err().is_cancelled());
        }
        let state = attempts.state();
        assert!(state.busy.is_empty() && state.lines.is_empty(), "nothing is kept of those who are gone");
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_bounded_by_address_and_in_all() {
        for (addresses, most_per_second) in [(1, 40), (60, 320)] {
            let attempts = Attempts::default();
            let count = Arc::new(std::sync::atomic::AtomicUsize::new(0));
            let mut tasks = tokio::task::JoinSet::new();
            for n in 0..addresses {
                for port in 0..20 {
                    let (attempts, count) = (attempts.clone(), count.clone());
                    tasks.spawn(async move {
                        loop {
                            let mut attempt = attempts.begin(address(n, port)).unwrap();
                            attempt.take_turn("x").await;
                            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            attempt.fail().await;
                        }
                    });
                }
            }
            tokio::time::sleep(Duration::from_millis(9_950)).await;
            let judged = count.load(std::sync::atomic::Ordering::Relaxed);
            assert!((1..=most_per_second * 10).contains(&judged), "{judged} in ten seconds from {addresses} addresses");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_that_waits_for_its_node_has_no_turn_and_its_connection_no_other_attempt() {
        let attempts = Attempts::default();
        let mut waiting = vec![];
        for port in 0..100 {
            let mut attempt = attempts.begin(address(1, port)).unwrap();
            attempt.take_turn("x").await;
            attempt.pause();
            assert!(attempts.begin(address(1, port)).is_none());
            waiting.push(attempt);
        }
        for attempt in &mut waiting[..PER_ADDRESS] {
            attempt.resume().await;
        }
        let fifth = tokio::time::timeout(Duration::from_secs(60), waiting[PER_ADDRESS].resume()).await;
        assert!(fifth.is_err(), "all turns are taken");
        drop(waiting);
        let again = attempts.begin(address(1, 0));
        assert!(again.is_some() && attempts.state().lines.is_empty());
    }
}
