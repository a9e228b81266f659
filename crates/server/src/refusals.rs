//! Refusals that anyone can cause as fast as the network allows: counted, and logged once per minute and source.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use countersign_api::admission::Source as _;

/// How often one source has a line.
const WINDOW: Duration = Duration::from_secs(60);
/// Most sources that are counted on their own; all others share one line.
const MAX_SOURCES: usize = 1_000;

/// Who was refused, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Refused {
    /// `None` stands for all the sources that no room was left for.
    pub source: Option<Group>,
    /// The reason that metrics name.
    pub code: &'static str,
}

/// An address, or the /64 of an IPv6 one, which one host may fill alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Group(IpAddr);

impl Group {
    /// The one that an address belongs to.
    pub fn of(address: IpAddr) -> Self {
        Self(address.group())
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(address) => write!(f, "{address}"),
            IpAddr::V6(network) => write!(f, "{network}/64"),
        }
    }
}

/// Counts refusals by source.
#[derive(Default)]
pub struct Refusals(Mutex<HashMap<Refused, Counted>>);

struct Counted {
    since: Instant,
    /// Refusals that are in no log line yet.
    untold: u64,
}

impl Refusals {
    /// Counts one; true when it is to be told now: the source's first of this reason in a minute.
    pub fn count(&self, source: IpAddr, code: &'static str, now: Instant) -> bool {
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut refused = Refused { source: Some(Group::of(source)), code };
        if sources.len() >= MAX_SOURCES && !sources.contains_key(&refused) {
            refused.source = None;
        }
        let mut is_first = false;
        let counted = sources.entry(refused).or_insert_with(|| {
            is_first = true;
            Counted { since: now, untold: 0 }
        });
        if !is_first {
            counted.untold += 1;
        }
        is_first
    }

    /// What is to be told of the minutes that are over: source, and how many refusals beyond the first.
    pub fn over(&self, now: Instant) -> Vec<(Refused, u64)> {
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut told = vec![];
        sources.retain(|source, counted| {
            if now.duration_since(counted.since) < WINDOW {
                return true;
            }
            if counted.untold == 0 {
                return false;
            }
            told.push((*source, counted.untold));
            // The source continues: its next minute starts without a line of its own.
            *counted = Counted { since: now, untold: 0 };
            true
        });
        told
    }

    /// Everything that no line has told yet.
    pub fn rest(&self) -> Vec<(Refused, u64)> {
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sources.drain().map(|(source, counted)| (source, counted.untold)).filter(|(_, untold)| *untold > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(source: IpAddr) -> Refused {
        Refused { source: Some(Group::of(source)), code: "x" }
    }

    #[test]
    fn a_host_with_a_whole_ipv6_network_has_one_line_and_each_reason_its_own() {
        let refusals = Refusals::default();
        let t = Instant::now();
        let address = |n: u128| IpAddr::V6(((0x2001_0db8_u128 << 96) | n).into());
        let told = (0..10_000).filter(|n| refusals.count(address(*n), "x", t)).count();
        assert_eq!(told, 1);
        assert!(refusals.count(address(1), "y", t), "another reason");
        assert!(refusals.count(address(1 << 64), "x", t), "another network");
        let rest = refusals.rest();
        assert_eq!(rest, [(refused(address(7)), 9_999)]);
        assert_eq!(rest[0].0.source.unwrap().to_string(), "2001:db8::/64");
        assert_eq!(Group::of("::ffff:192.0.2.1".parse().unwrap()).to_string(), "192.0.2.1");
    }

    #[test]
    fn a_source_has_one_line_a_minute_and_nothing_is_lost() {
        let refusals = Refusals::default();
        let (a, t) = ("127.0.0.1".parse().unwrap(), Instant::now());
        let told = (0..100_000).filter(|_| refusals.count(a, "x", t)).count();
        assert_eq!(told, 1);
        assert_eq!(refusals.over(t + Duration::from_secs(59)), []);
        assert_eq!(refusals.over(t + WINDOW), [(refused(a), 99_999)]);
        assert!(!refusals.count(a, "x", t + WINDOW), "counted for the next line");
        assert_eq!(refusals.over(t + WINDOW * 2), [(refused(a), 1)]);
        assert_eq!(refusals.over(t + WINDOW * 3), []);
        assert!(refusals.count(a, "x", t + WINDOW * 3), "after a quiet minute it is told at once again");
    }

    #[test]
    fn sources_beyond_the_bound_share_a_line() {
        let refusals = Refusals::default();
        let t = Instant::now();
        let told = (0..50_000u32).filter(|n| refusals.count(IpAddr::from(n.to_be_bytes()), "x", t)).count();
        assert_eq!(told, MAX_SOURCES + 1);
        let others = Refused { source: None, code: "x" };
        assert_eq!(refusals.rest(), [(others, u64::try_from(50_000 - MAX_SOURCES - 1).unwrap())]);
    }
}
