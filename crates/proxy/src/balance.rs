//! Selects the endpoint of a service for each new connection.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::Balance;

/// Counts the connections to each endpoint of the services that this sidecar's app uses.
pub struct Balancer {
    how: Balance,
    under_way: Mutex<HashMap<SocketAddr, usize>>,
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
        Self { how, under_way: Mutex::default(), turn: AtomicUsize::new(0) }
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
    fn in_turn_each_has_its_turn_and_nobody_is_chosen_from_none() {
        let balancer = Arc::new(Balancer::new(Balance::RoundRobin));
        let all = endpoints(3);
        let ports: Vec<u16> = (0..6).map(|_| balancer.choose(&all).unwrap().address.port()).collect();
        assert_eq!(ports, [1, 2, 3, 1, 2, 3]);
        assert!(balancer.choose(&[]).is_none());
    }
}
