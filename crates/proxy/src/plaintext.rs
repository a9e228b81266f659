//! Which peers use plaintext: what a switch to strict mode would cut off.
//!
//! Bounded tables, entered at admission, so that a connection that never ends counts from its first second. When one is full
//! the row that was used longest ago falls out, one without an open connection first; how many did is counted, for then a
//! missing row proves nothing. Refused callers have a table of their own: a stranger who tries many ports leaves the rows of
//! those that were let through where they are.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::telemetry::{Carried, Direction};

/// Rows of a table at most.
const ROWS: usize = 1_024;

/// What one row is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// IP address of the caller, or of the destination for outgoing connections.
    pub peer: IpAddr,
    /// Destination port of the connection.
    pub port: u16,
    /// Direction as seen from the workload.
    pub direction: Direction,
    /// Whether the connections were carried in plaintext or refused for it.
    pub mode: Carried,
}

/// What is known of one peer. Times are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The peer, port, direction and outcome that the counts are for.
    #[serde(flatten)]
    pub key: Key,
    /// Time of its first connection.
    pub first_seen: i64,
    /// Time when a connection last started or ended.
    pub last_seen: i64,
    /// Number of open connections.
    pub open: u64,
    /// Number of connections since the row was created.
    pub total: u64,
}

/// The table as it is shown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    /// Rows, sorted by key.
    pub peers: Vec<Row>,
    /// Number of rows that were removed because the table was full.
    pub forgotten: u64,
}

/// The table of a sidecar, shared by all its connections.
#[derive(Debug, Clone, Default)]
pub struct Plaintext(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    carried: Rows,
    refused: Rows,
    forgotten: u64,
    made: u64,
}

/// Each with the number that it was made as.
type Rows = HashMap<Key, (u64, Row)>;

impl Plaintext {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an accepted plaintext connection; it is open until the guard is dropped.
    pub fn admitted(&self, key: Key, now: OffsetDateTime) -> Open {
        let mut state = self.state();
        let (made, row) = state.count(key, now.unix_timestamp());
        row.open += 1;
        let made = *made;
        drop(state);
        Open { table: self.clone(), key, made }
    }

    /// Counts a connection that was refused because it was plaintext.
    pub fn refused(&self, key: Key, now: OffsetDateTime) {
        self.state().count(key, now.unix_timestamp());
    }

    /// A snapshot of all rows.
    pub fn shown(&self) -> Shown {
        let state = self.state();
        let mut peers: Vec<Row> =
            state.carried.values().chain(state.refused.values()).map(|(_, row)| row.clone()).collect();
        let forgotten = state.forgotten;
        drop(state);
        peers.sort_by_key(|row| row.key);
        Shown { peers, forgotten }
    }
}

impl State {
    fn rows(&mut self, mode: Carried) -> &mut Rows {
        if mode == Carried::Refused { &mut self.refused } else { &mut self.carried }
    }

    fn count(&mut self, key: Key, now: i64) -> &mut (u64, Row) {
        let rows = self.rows(key.mode);
        if rows.len() >= ROWS && !rows.contains_key(&key) {
            let least = rows.values().min_by_key(|(_, row)| (row.open > 0, row.last_seen, row.key));
            let least = least.map(|(_, row)| row.key);
            if least.and_then(|key| rows.remove(&key)).is_some() {
                self.forgotten += 1;
            }
        }
        self.made += 1;
        let made = self.made;
        let row = Row { key, first_seen: now, last_seen: now, open: 0, total: 0 };
        let row = self.rows(key.mode).entry(key).or_insert((made, row));
        row.1.last_seen = now;
        row.1.total += 1;
        row
    }
}

/// Guard of one open connection in a row.
#[derive(Debug)]
pub struct Open {
    table: Plaintext,
    key: Key,
    made: u64,
}

impl Drop for Open {
    fn drop(&mut self) {
        // The row may have fallen out and come back: then this connection is none of those that it counts.
        if let Some((made, row)) = self.table.state().rows(self.key.mode).get_mut(&self.key)
            && *made == self.made
        {
            row.open = row.open.saturating_sub(1);
            row.last_seen = row.last_seen.max(OffsetDateTime::now_utc().unix_timestamp());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32, port: u16) -> Key {
        let peer = IpAddr::from(std::net::Ipv4Addr::from(n));
        Key { peer, port, direction: Direction::Inbound, mode: Carried::Plain }
    }

    fn at(seconds: i64) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(seconds).unwrap()
    }

    #[test]
    fn an_open_connection_counts_at_once_and_falls_out_last() {
        let table = Plaintext::default();
        let open = table.admitted(key(0, 80), at(1));
        let shown = table.shown();
        assert_eq!(shown.peers, [Row { key: key(0, 80), first_seen: 1, last_seen: 1, open: 1, total: 1 }]);
        for n in 1..=2_000_u32 {
            table.refused(key(n, 80), at(i64::from(n) + 1));
        }
        let shown = table.shown();
        assert_eq!((shown.peers.len(), shown.forgotten), (ROWS, 2_001 - 1_024));
        assert_eq!((shown.peers[0].key, shown.peers[0].open), (key(0, 80), 1));
        assert_eq!(shown.peers[1].key, key(2_001 - 1_023, 80), "the oldest of the others went first");
        drop(open);
        assert_eq!(table.shown().peers[0].open, 0);
        let json = serde_json::to_value(&table.shown().peers[0]).unwrap();
        assert_eq!(
            (&json["peer"], &json["direction"], &json["mode"]),
            (&"0.0.0.0".into(), &"inbound".into(), &"plain".into())
        );
    }

    #[test]
    fn a_connection_of_a_row_that_fell_out_does_not_end_one_of_the_row_that_came_back() {
        let table = Plaintext::default();
        let open: Vec<_> = (0..=u32::try_from(ROWS).unwrap()).map(|n| table.admitted(key(n, 80), at(1))).collect();
        // All are open: the first one has fallen out, and comes back with one connection.
        assert!(table.shown().peers.iter().all(|row| row.key != key(0, 80)));
        let back = table.admitted(key(0, 80), at(2));
        drop(open);
        assert_eq!(table.shown().peers[0], Row { key: key(0, 80), first_seen: 2, last_seen: 2, open: 1, total: 1 });
        drop(back);
        assert_eq!(table.shown().peers[0].open, 0);
    }

    #[test]
    fn strangers_who_are_refused_leave_the_rows_of_those_that_were_let_through() {
        let table = Plaintext::default();
        drop(table.admitted(key(0, 80), at(1)));
        for n in 1..=2_000 {
            table.refused(Key { mode: Carried::Refused, ..key(n, 80) }, at(2));
        }
        assert_eq!(table.shown().peers[0].key, key(0, 80));
    }
}
