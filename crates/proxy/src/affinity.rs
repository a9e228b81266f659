//! Session affinity: the endpoint that this sidecar's app stays with, for each service port that asks for it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Most service ports whose endpoint is remembered.
const MAX_STUCK: usize = 4_096;

/// A service port with session affinity.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Session {
    /// UID of the service.
    pub service: String,
    /// Port of the service.
    pub port: u16,
}

/// The remembered endpoints. The app is the only client of its sidecar, so no client address is needed.
#[derive(Default)]
pub struct Affinities(HashMap<Session, Stuck>);

struct Stuck {
    to: SocketAddr,
    until: Instant,
}

impl Affinities {
    /// The endpoint to stay with; `None` if there is none or it was not used for too long.
    pub fn remembered(&self, session: &Session, now: Instant) -> Option<SocketAddr> {
        self.0.get(session).filter(|stuck| now < stuck.until).map(|stuck| stuck.to)
    }

    /// Remembers an endpoint for `timeout` from now on. When there is no room, what is over is forgotten, or otherwise what
    /// would be over first.
    pub fn remember(&mut self, session: Session, to: SocketAddr, timeout: Duration, now: Instant) {
        if self.0.len() >= MAX_STUCK && !self.0.contains_key(&session) {
            self.0.retain(|_, stuck| now < stuck.until);
            if self.0.len() >= MAX_STUCK
                && let Some(first) = self.0.iter().min_by_key(|(_, stuck)| stuck.until).map(|(s, _)| s.clone())
            {
                self.0.remove(&first);
            }
        }
        // A timeout beyond what the clock can hold is none.
        let Some(until) = now.checked_add(timeout) else { return };
        self.0.insert(session, Stuck { to, until });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(number: usize) -> Session {
        Session { service: format!("s{number}"), port: 80 }
    }

    #[test]
    fn the_table_is_bounded_and_forgets_what_is_over_first() {
        let (mut table, began) = (Affinities::default(), Instant::now());
        let (to, second) = (SocketAddr::from(([10, 0, 0, 1], 80)), Duration::from_secs(1));
        for number in 0..MAX_STUCK + 10 {
            let later = began + second * u32::try_from(number).unwrap();
            table.remember(session(number), to, Duration::from_secs(1_000_000), later);
        }
        assert_eq!(table.0.len(), MAX_STUCK);
        assert_eq!(table.remembered(&session(9), began), None);
        assert_eq!(table.remembered(&session(10), began), Some(to));
        // Known ones are renewed without making room.
        table.remember(session(10), to, second, began);
        assert_eq!(table.0.len(), MAX_STUCK);
        assert_eq!(table.remembered(&session(10), began + second), None, "it was not used for that long");
        let late = began + Duration::from_secs(10_000_000);
        table.remember(session(0), to, second, late);
        assert_eq!(table.0.len(), 1, "what is over takes no room");
    }
}
