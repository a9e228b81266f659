//! Selects the endpoint of a service for each new connection.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::affinity::{Affinities, Session};
use crate::config::Balance;

/// Counts the connections to each endpoint of the services that this sidecar's app uses.
pub struct Balancer {
    how: Balance,
    under_way: Mutex<HashMap<SocketAddr, usize>>,
    affinities: Mutex<Affinities>,
    turn: AtomicUsize,
}

/// A selected endpoint. Its connection counts until this is dropped.
pub struct Chosen {
    /// IP address and port of the endpoint.
    pub address: SocketAddr,
    balancer: Arc<Balancer>,
}

impl Balancer {
    /// A balancer without connections, using one strategy.
    pub fn new(how: Balance) -> Self {
        Self { how, under_way: Mutex::default(), affinities: Mutex::default(), turn: AtomicUsize::new(0) }
    }

    /// As [`Balancer::choose`], but the endpoint of the session's last connection is selected again if it is a candidate and was
    /// selected within `timeout` before `now`.
    pub fn choose_again(
        self: &Arc<Self>,
        candidates: &[SocketAddr],
        session: Session,
        timeout: Duration,
        now: Instant,
    ) -> Option<Chosen> {
        // Held all the while: of two connections at once the second one goes where the first one does.
        let mut affinities = self.affinities.lock().unwrap_or_else(PoisonError::into_inner);
        let known = affinities.remembered(&session, now).filter(|known| candidates.contains(known));
        let chosen = match known {
            Some(known) => self.choose(&[known]),
            None => self.choose(candidates),
        }?;
        affinities.remember(session, chosen.address, timeout, now);
        Some(chosen)
    }

    /// Selects one of `candidates` and counts a connection to it; `None` if there are none.
    pub fn choose(self: &Arc<Self>, candidates: &[SocketAddr]) -> Option<Chosen> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let address = match (candidates, self.how) {
            ([], _) => return None,
            ([only], _) => *only,
            (all, Balance::RoundRobin) => all[self.turn.fetch_add(1, Ordering::Relaxed) % all.len()],
            (all, Balance::LeastConnections) => {
                let first = rand::random_range(0..all.len());
                // Never the first one again.
                let second = (first + rand::random_range(1..all.len())) % all.len();
                let count = |at: usize| under_way.get(&all[at]).copied().unwrap_or(0);
                all[if count(second) < count(first) { second } else { first }]
            }
        };
        *under_way.entry(address).or_default() += 1;
        Some(Chosen { address, balancer: self.clone() })
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        let mut under_way = self.balancer.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = under_way.get_mut(&self.address) {
            *count -= 1;
            // Only endpoints in use take memory.
            if *count == 0 {
                under_way.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(n: u16) -> Vec<SocketAddr> {
        (1..=n).map(|port| SocketAddr::from(([10, 0, 0, 1], port))).collect()
    }

    #[test]
    fn the_busy_endpoint_of_two_is_left_alone() {
        let balancer = Arc::new(Balancer::new(Balance::LeastConnections));
        let both = endpoints(2);
        let first = balancer.choose(&both).unwrap();
        let second = balancer.choose(&both).unwrap();
        assert_ne!(first.address, second.address, "one has a connection, the other none");
        drop(second);
        assert_ne!(balancer.choose(&both).unwrap().address, first.address);
        drop(first);
        assert!(balancer.under_way.lock().unwrap().is_empty(), "nothing is remembered of what is over");
    }

    #[test]
    fn connections_that_stay_spread_evenly() {
        let balancer = Arc::new(Balancer::new(Balance::LeastConnections));
        let all = endpoints(10);
        let held: Vec<_> = (0..1_000).map(|_| balancer.choose(&all).unwrap()).collect();
        let count = |a: &SocketAddr| held.iter().filter(|c| c.address == *a).count();
        assert!(all.iter().all(|a| (85..=115).contains(&count(a))), "{:?}", all.iter().map(count).collect::<Vec<_>>());
    }

    #[test]
    fn a_session_stays_until_it_is_idle_too_long_or_its_endpoint_may_not_be_used() {
        let balancer = Arc::new(Balancer::new(Balance::RoundRobin));
        let (all, timeout, began) = (endpoints(3), Duration::from_secs(10), Instant::now());
        let port = |candidates: &[SocketAddr], port, seconds| {
            let session = Session { service: "s".into(), port };
            let now = began + Duration::from_secs(seconds);
            balancer.choose_again(candidates, session, timeout, now).unwrap().address.port()
        };
        let ports: Vec<u16> = [0, 5, 14, 23].iter().map(|at| port(&all, 80, *at)).collect();
        assert_eq!(ports, [1, 1, 1, 1], "each connection prolongs it");
        assert_eq!(port(&all, 443, 24), 2, "another port is another session");
        assert_eq!(port(&all, 80, 33), 3, "ten seconds without a connection");
        assert_eq!(port(&all[..2], 80, 34), 2, "the endpoint is gone");
        assert_eq!(port(&all, 80, 35), 2, "and the session stays with the new one");
        assert!(balancer.choose_again(&[], Session { service: "s".into(), port: 80 }, timeout, began).is_none());
    }

    #[test]
    fn in_turn_each_has_its_turn_and_nobody_is_chosen_from_none() {
        let balancer = Arc::new(Balancer::new(Balance::RoundRobin));
        let all = endpoints(3);
        let ports: Vec<u16> = (0..6).map(|_| balancer.choose(&all).unwrap().address.port()).collect();
        assert_eq!(ports, [1, 2, 3, 1, 2, 3]);
        assert!(balancer.choose(&[]).is_none());
    }
}
