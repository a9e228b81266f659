//! Bounds on open connections that let unauthenticated callers share a listener without starving each other.
//!
//! Every connection is accepted. When a bound is reached, a seat is taken away: from the group of sources that holds the
//! most, in it from the member that holds the most, and of that member's connections the oldest that waits for its peer.
//! A caller that connects and asks at once is therefore served, however many silent connections somebody else holds. Whoever
//! comes from hundreds of sources holds one seat of each; sources that are near ([`Admission::admit_near`]) keep theirs.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::peer::UnixPeer;

/// Shortest interval between two log lines of one table.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// Which connections were dropped, and why.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Dropped {
    /// The table's name, with `_` between its words; `accept` before there is a seat.
    listener: String,
    /// `source`: its source, or the group of it, held as many as it may; `total`: all together did; `descriptors`: they had run
    /// out.
    reason: &'static str,
}

/// Connections dropped in this process since its start.
static DROPPED: LazyLock<Family<Dropped, Counter>> = LazyLock::new(Family::default);

/// The count of dropped connections of every table in this process, for a role's metrics.
pub fn dropped() -> Family<Dropped, Counter> {
    DROPPED.clone()
}

/// Counts one more.
pub(crate) fn count_dropped(listener: &str, reason: &'static str) {
    DROPPED.get_or_create(&Dropped { listener: listener.to_lowercase().replace(' ', "_"), reason }).inc();
}

/// Bounds of one table.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Name of the seats in the log.
    pub name: &'static str,
    /// Most connections in total. 0 counts as 1.
    pub total: usize,
    /// Most connections per group of sources. 0 counts as 1.
    pub per_group: usize,
}

/// Origin of a connection.
pub trait Source: Clone + Eq + Hash + std::fmt::Debug + Send + Sync + 'static {
    /// Type of the group that shares one bound.
    type Group: Clone + Eq + Hash + Send + 'static;
    /// The group of this source.
    fn group(&self) -> Self::Group;
}

/// Each IPv4 address is its own group; IPv6 addresses are grouped by /64, because one host may use a whole one (RFC
/// 4291 2.5.4).
impl Source for IpAddr {
    type Group = IpAddr;

    fn group(&self) -> IpAddr {
        match self.to_canonical() {
            IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
            v4 @ IpAddr::V4(_) => v4,
        }
    }
}

/// A local caller. Its user is the group; within a user, processes with many connections give way to those with few.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LocalSource {
    /// Effective user ID at connect time.
    pub uid: u32,
    /// Process ID at connect time.
    pub pid: i32,
}

impl LocalSource {
    /// The caller of a request on a Unix socket. A connection without a peer cannot be; its calls would share a place.
    pub fn of<B>(request: &http::Request<B>) -> Self {
        let peer = request.extensions().get::<UnixPeer>();
        peer.map_or(Self { uid: u32::MAX, pid: -1 }, |peer| Self { uid: peer.uid, pid: peer.pid })
    }
}

impl Source for LocalSource {
    type Group = u32;

    fn group(&self) -> u32 {
        self.uid
    }
}

/// A caller with a verified identity, which is its group.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProvenSource {
    /// SPIFFE ID of the caller.
    pub id: String,
    /// IP address of the caller.
    pub address: IpAddr,
}

impl Source for ProvenSource {
    type Group = String;

    fn group(&self) -> String {
        self.id.clone()
    }
}

/// A table of seats. Clones share it.
#[derive(Clone)]
pub struct Admission<S: Source>(Arc<Table<S>>);

struct Table<S: Source> {
    limits: Limits,
    state: Mutex<State<S>>,
}

struct State<S: Source> {
    next: u64,
    sources: HashMap<u64, S>,
    groups: HashMap<S::Group, Group<S>>,
    taken_away: u64,
    said: Option<Instant>,
}

struct Group<S> {
    /// Strangers take no seat of it, unless all seats are its own and its like's.
    near: bool,
    held: usize,
    waiting: usize,
    members: HashMap<S, Member>,
}

impl<S> Default for Group<S> {
    fn default() -> Self {
        Self { near: false, held: 0, waiting: 0, members: HashMap::new() }
    }
}

#[derive(Default)]
struct Member {
    waiting: usize,
    held: BTreeMap<u64, Held>,
}

struct Held {
    busy: bool,
    taken_away: CancellationToken,
}

impl Member {
    /// The seat to take away first: the oldest that waits for its peer, otherwise the oldest.
    fn first_to_go(&self) -> Option<u64> {
        let waiting = self.held.iter().find(|(_, h)| !h.busy);
        waiting.or_else(|| self.held.iter().next()).map(|(number, _)| *number)
    }
}

impl<S: Source> Group<S> {
    fn first_to_go(&self) -> Option<u64> {
        let most = self.members.values().map(|m| (m.waiting > 0, m.held.len())).max()?;
        let greatest = self.members.values().filter(|m| (m.waiting > 0, m.held.len()) == most);
        greatest.filter_map(Member::first_to_go).min()
    }
}

impl<S: Source> State<S> {
    fn first_to_go(&self) -> Option<u64> {
        let rank = |g: &Group<S>| (!g.near, g.waiting > 0, g.held);
        let most = self.groups.values().map(rank).max()?;
        let greatest = self.groups.values().filter(|g| rank(g) == most);
        greatest.filter_map(Group::first_to_go).min()
    }

    fn remove(&mut self, number: u64) -> Option<(S, Held)> {
        let source = self.sources.remove(&number)?;
        let name = source.group();
        let group = self.groups.get_mut(&name)?;
        let member = group.members.get_mut(&source)?;
        let held = member.held.remove(&number)?;
        group.held -= 1;
        if !held.busy {
            member.waiting -= 1;
            group.waiting -= 1;
        }
        if member.held.is_empty() {
            group.members.remove(&source);
        }
        if group.held == 0 {
            self.groups.remove(&name);
        }
        Some((source, held))
    }

    fn set_busy(&mut self, number: u64, busy: bool) {
        let Some(source) = self.sources.get(&number) else { return };
        let Some(group) = self.groups.get_mut(&source.group()) else { return };
        let Some(member) = group.members.get_mut(source) else { return };
        let Some(held) = member.held.get_mut(&number) else { return };
        if held.busy != busy {
            held.busy = busy;
            let change = |waiting: &mut usize| if busy { *waiting -= 1 } else { *waiting += 1 };
            change(&mut group.waiting);
            change(&mut member.waiting);
        }
    }
}

impl<S: Source> Admission<S> {
    /// An empty table with these bounds.
    pub fn new(limits: Limits) -> Self {
        let state = State { next: 0, sources: HashMap::new(), groups: HashMap::new(), taken_away: 0, said: None };
        Self(Arc::new(Table { limits, state: Mutex::new(state) }))
    }

    /// Gives a connection a seat, which is taken from another one if a bound is reached.
    pub fn admit(&self, source: S) -> Seat {
        self.seat(source, false)
    }

    /// The same for a source that is near, as a node's own probes are: strangers take no seat from it, however many they are.
    /// Its own bound holds for it as for everybody.
    pub fn admit_near(&self, source: S) -> Seat {
        self.seat(source, true)
    }

    fn seat(&self, source: S, near: bool) -> Seat {
        let limits = self.0.limits;
        let taken_away = CancellationToken::new();
        let mut state = self.0.state();
        let group = source.group();
        let crowded = state.groups.get(&group).filter(|g| g.held >= limits.per_group.max(1));
        let (gives_way, reason) = match crowded {
            Some(group) => (group.first_to_go(), "source"),
            None if state.sources.len() >= limits.total.max(1) => (state.first_to_go(), "total"),
            None => (None, ""),
        };
        let gone = gives_way.and_then(|number| state.remove(number));
        let number = state.next;
        state.next += 1;
        state.sources.insert(number, source.clone());
        let group = state.groups.entry(group).or_default();
        group.near = near;
        group.held += 1;
        group.waiting += 1;
        let member = group.members.entry(source).or_default();
        member.waiting += 1;
        member.held.insert(number, Held { busy: false, taken_away: taken_away.clone() });
        if let Some((source, held)) = gone {
            held.taken_away.cancel();
            count_dropped(limits.name, reason);
            self.0.say(&mut state, &source);
        }
        drop(state);
        Seat { table: self.0.clone(), number, taken_away }
    }

    /// Takes one seat away, for example because descriptors have run out. `false` if the table is empty.
    pub fn shed(&self) -> bool {
        let mut state = self.0.state();
        let gone = state.first_to_go().and_then(|number| state.remove(number));
        let Some((_, held)) = gone else { return false };
        held.taken_away.cancel();
        count_dropped(self.0.limits.name, "descriptors");
        true
    }

    /// Number of seats in use.
    pub fn held(&self) -> usize {
        self.0.state().sources.len()
    }
}

impl<S: Source> Table<S> {
    fn state(&self) -> MutexGuard<'_, State<S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs at most one line per minute, however many seats are taken away: a flood of connections must not fill the
    /// log too.
    fn say(&self, state: &mut State<S>, source: &S) {
        state.taken_away += 1;
        if state.said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
            state.said = Some(Instant::now());
            let count = std::mem::take(&mut state.taken_away);
            let Limits { name, total, per_group } = self.limits;
            tracing::warn!(
                what = name,
                count,
                ?source,
                total,
                per_group,
                "connections at their bound; dropped the oldest"
            );
        }
    }
}

/// The part of a table that a seat uses, independent of the type of sources.
trait Seats: Send + Sync {
    fn leave(&self, number: u64);
    fn set_busy(&self, number: u64, busy: bool);
}

impl<S: Source> Seats for Table<S> {
    fn leave(&self, number: u64) {
        self.state().remove(number);
    }

    fn set_busy(&self, number: u64, busy: bool) {
        self.state().set_busy(number, busy);
    }
}

/// A connection's seat, given back when dropped.
pub struct Seat {
    table: Arc<dyn Seats>,
    number: u64,
    taken_away: CancellationToken,
}

impl Seat {
    /// Resolves once the seat was taken away; the connection must then be closed.
    pub fn taken_away(&self) -> WaitForCancellationFutureOwned {
        self.taken_away.clone().cancelled_owned()
    }

    /// Marks the seat as busy until the guard is dropped: we are working on an answer, not waiting for the peer.
    pub fn busy(&self) -> Busy {
        self.table.set_busy(self.number, true);
        Busy { table: self.table.clone(), number: self.number }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.table.leave(self.number);
    }
}

/// Guard of a busy seat.
pub struct Busy {
    table: Arc<dyn Seats>,
    number: u64,
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.table.set_busy(self.number, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(total: usize, per_group: usize) -> Admission<IpAddr> {
        Admission::new(Limits { name: "test", total, per_group })
    }

    fn at(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn is_gone(seat: &Seat) -> bool {
        seat.taken_away.is_cancelled()
    }

    #[test]
    fn the_source_with_the_most_gives_way_with_its_oldest() {
        let table = table(10, 10);
        let few: Vec<Seat> = (0..2).map(|_| table.admit(at(1))).collect();
        let many: Vec<Seat> = (0..8).map(|_| table.admit(at(2))).collect();
        let fresh = table.admit(at(3));
        assert!(is_gone(&many[0]) && many[1..].iter().chain(&few).chain([&fresh]).all(|s| !is_gone(s)));
        assert_eq!(table.held(), 10);
        drop((few, many, fresh));
        assert_eq!(table.held(), 0);
        assert!(table.0.state().groups.is_empty());
    }

    #[test]
    fn what_is_dropped_is_counted_by_table_and_reason() {
        let table = Admission::new(Limits { name: "Counted here", total: 3, per_group: 2 });
        let _seats: Vec<Seat> = [1, 1, 1, 2, 3].map(|n| table.admit(at(n))).into();
        assert!(table.shed());
        let count = |reason| {
            let labels = Dropped { listener: "counted_here".into(), reason };
            dropped().get(&labels).map_or(0, |c| c.get())
        };
        assert_eq!((count("source"), count("total"), count("descriptors")), (1, 1, 1));
    }

    #[test]
    fn a_source_at_its_own_bound_takes_from_itself() {
        let table = table(10, 3);
        let other = table.admit(at(1));
        let own: Vec<Seat> = (0..5).map(|_| table.admit(at(2))).collect();
        assert_eq!(own.iter().map(is_gone).collect::<Vec<_>>(), [true, true, false, false, false]);
        assert!(!is_gone(&other));
        assert_eq!(table.held(), 4);
    }

    #[test]
    fn whoever_is_being_answered_goes_last() {
        let table = table(3, 3);
        let seats: Vec<Seat> = (0..3).map(|_| table.admit(at(1))).collect();
        let mut busy: Vec<Busy> = seats[..2].iter().map(Seat::busy).collect();
        let next = table.admit(at(1));
        assert_eq!(seats.iter().map(is_gone).collect::<Vec<_>>(), [false, false, true]);
        busy.push(next.busy());
        let last = table.admit(at(1));
        assert!(is_gone(&seats[0]) && !is_gone(&last), "when all are busy the oldest goes all the same");
        busy.clear();
        drop((seats, next, last));
        assert_eq!(table.held(), 0);
    }

    #[test]
    fn strangers_from_any_number_of_sources_take_no_seat_from_who_is_near() {
        let table = table(256, 64);
        let probe = table.admit_near(at(1));
        let answered = table.admit_near(at(2));
        let busy = answered.busy();
        let strangers: Vec<Seat> =
            (0..600u32).map(|n| table.admit(IpAddr::from((0x0a00_0000 + n).to_be_bytes()))).collect();
        assert!(!is_gone(&probe) && !is_gone(&answered));
        assert_eq!(table.held(), 256);
        assert_eq!(strangers.iter().filter(|s| !is_gone(s)).count(), 254, "they share what is left");
        // One that is near has its own bound, and takes from strangers up to it.
        let many: Vec<Seat> = (0..100).map(|_| table.admit_near(at(1))).collect();
        assert_eq!((many.iter().filter(|s| !is_gone(s)).count(), is_gone(&probe)), (64, true));
        assert_eq!(strangers.iter().filter(|s| !is_gone(s)).count(), 256 - 64 - 1);
        drop(busy);
    }

    #[test]
    fn those_who_are_near_share_when_nobody_else_is_there() {
        let table = table(4, 4);
        let first: Vec<Seat> = (1..=4).map(|n| table.admit_near(at(n))).collect();
        let stranger = table.admit(at(9));
        assert_eq!(first.iter().map(is_gone).collect::<Vec<_>>(), [true, false, false, false]);
        let next = table.admit_near(at(1));
        assert!(is_gone(&stranger) && !is_gone(&next), "the stranger goes first");
    }

    #[test]
    fn a_source_with_many_addresses_of_one_ipv6_network_has_one_share() {
        let table = table(4, 4);
        let host = |n: u16| IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, n]);
        let many: Vec<Seat> = (0..3).map(|n| table.admit(host(n))).collect();
        let other = table.admit(IpAddr::from([0x2001, 0xdb8, 0, 2, 0, 0, 0, 1]));
        let _fresh = table.admit(at(1));
        assert!(is_gone(&many[0]) && !is_gone(&other));
    }

    #[test]
    fn within_a_user_the_process_with_the_most_gives_way() {
        let table = Admission::new(Limits { name: "test", total: 100, per_group: 5 });
        let quiet = table.admit(LocalSource { uid: 2102, pid: 10 });
        let greedy: Vec<Seat> = (0..4).map(|_| table.admit(LocalSource { uid: 2102, pid: 11 })).collect();
        let _fresh = table.admit(LocalSource { uid: 2102, pid: 12 });
        assert!(is_gone(&greedy[0]) && !is_gone(&quiet));
    }

    #[test]
    fn shedding_takes_from_the_greatest_until_nobody_is_left() {
        let table = table(10, 10);
        let one = table.admit(at(1));
        let two: Vec<Seat> = (0..2).map(|_| table.admit(at(2))).collect();
        assert!(table.shed() && is_gone(&two[0]) && !is_gone(&one));
        assert!(table.shed() && table.shed() && !table.shed());
        assert_eq!(table.held(), 0);
    }
}
