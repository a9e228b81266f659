//! The directory: which workload or service is at an address. Published by others, held in memory, never stored.
//!
//! Until the whole directory was published once, every address is unknown: an address that is not in it yet must not
//! count as outside the mesh.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{PoisonError, RwLock};

use countersign_api::directory::Quota;
use countersign_identity::directory::{Answer, Service, Workload};
use tokio::sync::watch;

/// Most workloads and services together.
pub const MAX_WORKLOADS: usize = 200_000;

/// Most addresses that all agents may follow together, and most for one agent.
const MAX_FOLLOWED: usize = 2_000_000;
const MAX_FOLLOWED_PER_AGENT: usize = 100_000;

/// The directory of one server.
pub struct Directory {
    /// Bounds the number of addresses that each agent follows.
    pub followers: Quota<String>,
    state: RwLock<State>,
    revision: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    complete: bool,
    by_uid: HashMap<String, Answer>,
    /// All that have an address, in the order in which they got it. Pods of a restarted node may for a moment have the
    /// address of another one.
    by_address: HashMap<IpAddr, Vec<Answer>>,
}

impl Default for Directory {
    fn default() -> Self {
        let followers = Quota::new(MAX_FOLLOWED, MAX_FOLLOWED_PER_AGENT);
        Self { followers, state: RwLock::default(), revision: watch::Sender::new(0) }
    }
}

impl Directory {
    /// The answer for an address; `None` while the directory is incomplete.
    pub fn lookup(&self, address: IpAddr) -> Option<Answer> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        match state.by_address.get(&address.to_canonical()).and_then(|holders| holders.last()) {
            Some(known) => Some(known.clone()),
            None => state.complete.then_some(Answer::NotMeshed),
        }
    }

    /// Number of workloads and services.
    pub fn len(&self) -> usize {
        self.state.read().unwrap_or_else(PoisonError::into_inner).by_uid.len()
    }

    /// Whether there are no workloads and services.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds and removes workloads and services. With `replace`, everything that is not named is removed, and the
    /// directory is complete from then on. Returns the revision, which grows only if something changed.
    pub fn publish(&self, replace: bool, workloads: Vec<Workload>, services: Vec<Service>, removed: &[String]) -> u64 {
        let workloads = workloads.into_iter().map(|w| Answer::Meshed(w.into()));
        let upserted: Vec<Answer> = workloads.chain(services.into_iter().map(|s| Answer::Service(s.into()))).collect();
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = replace && !state.complete;
        state.complete |= replace;
        if replace {
            let named: HashSet<&str> = upserted.iter().map(|a| facts(a).0).collect();
            let gone: Vec<String> = state.by_uid.keys().filter(|uid| !named.contains(uid.as_str())).cloned().collect();
            gone.iter().for_each(|uid| changed |= state.remove(uid));
        }
        removed.iter().for_each(|uid| changed |= state.remove(uid));
        upserted.into_iter().for_each(|a| changed |= state.insert(a));
        drop(state);
        if changed {
            self.revision.send_modify(|n| *n += 1);
        }
        *self.revision.borrow()
    }
}

impl countersign_api::directory::Source for Directory {
    type Handle = ();

    fn follow(&self, _: IpAddr) {}

    fn answer(&self, address: IpAddr, (): &()) -> Option<Answer> {
        self.lookup(address)
    }

    fn revisions(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }
}

/// UID and addresses of an item of the directory.
fn facts(known: &Answer) -> (&str, &[IpAddr]) {
    match known {
        Answer::Meshed(w) => (&w.uid, &w.addresses),
        Answer::Service(s) => (&s.uid, &s.addresses),
        Answer::NotMeshed => ("", &[]),
    }
}

impl State {
    fn remove(&mut self, uid: &str) -> bool {
        let Some(known) = self.by_uid.remove(uid) else { return false };
        facts(&known).1.iter().for_each(|address| self.release(address.to_canonical(), uid));
        true
    }

    fn insert(&mut self, fresh: Answer) -> bool {
        let (uid, addresses) = facts(&fresh);
        let before = self.by_uid.insert(uid.to_owned(), fresh.clone());
        if before.as_ref() == Some(&fresh) {
            return false;
        }
        let addresses: HashSet<IpAddr> = addresses.iter().map(IpAddr::to_canonical).collect();
        let had = before.iter().flat_map(|before| facts(before).1).map(IpAddr::to_canonical);
        had.filter(|address| !addresses.contains(address)).for_each(|address| self.release(address, uid));
        for address in addresses {
            let holders = self.by_address.entry(address).or_default();
            // Whoever changes otherwise does not take the address from one that got it later.
            match holders.iter_mut().find(|holder| facts(holder).0 == uid) {
                Some(holder) => *holder = fresh.clone(),
                None => holders.push(fresh.clone()),
            }
        }
        true
    }

    /// Gives an address back. Another holder has it from then on.
    fn release(&mut self, address: IpAddr, uid: &str) {
        let Entry::Occupied(mut held) = self.by_address.entry(address) else { return };
        held.get_mut().retain(|holder| facts(holder).0 != uid);
        if held.get().is_empty() {
            held.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_identity::policy::Policy;

    fn workload(uid: &str, address: &str) -> Workload {
        Workload {
            uid: uid.into(),
            name: uid.into(),
            addresses: vec![address.parse().unwrap()],
            spiffe_ids: [format!("spiffe://td/{uid}")].into(),
            mesh_port: 15008,
            policy: Policy::default(),
            place: Default::default(),
        }
    }

    fn who(d: &Directory, address: &str) -> Option<String> {
        d.lookup(address.parse().unwrap()).map(|a| match a {
            Answer::Meshed(w) => w.uid.clone(),
            Answer::Service(s) => s.uid.clone(),
            Answer::NotMeshed => "-".into(),
        })
    }

    #[test]
    fn nobody_is_declared_outside_before_the_directory_is_complete() {
        let d = Directory::default();
        d.publish(false, vec![workload("a", "10.0.0.1")], vec![], &[]);
        assert_eq!(who(&d, "10.0.0.1").as_deref(), Some("a"));
        assert_eq!(who(&d, "10.0.0.2"), None);
        d.publish(true, vec![workload("a", "10.0.0.1")], vec![], &[]);
        assert_eq!(who(&d, "10.0.0.2").as_deref(), Some("-"));
    }

    #[test]
    fn an_address_used_again_is_the_new_ones_even_when_the_old_one_goes_later() {
        let d = Directory::default();
        d.publish(true, vec![workload("old", "10.0.0.1")], vec![], &[]);
        d.publish(false, vec![workload("new", "10.0.0.1")], vec![], &[]);
        d.publish(false, vec![], vec![], &["old".into()]);
        assert_eq!(who(&d, "10.0.0.1").as_deref(), Some("new"));
    }

    #[test]
    fn an_address_that_two_have_is_the_others_when_one_goes_or_moves() {
        let d = Directory::default();
        d.publish(true, vec![workload("new", "10.0.0.1"), workload("old", "10.0.0.1")], vec![], &[]);
        d.publish(false, vec![], vec![], &["old".into()]);
        assert_eq!(who(&d, "10.0.0.1").as_deref(), Some("new"));
        d.publish(false, vec![workload("old", "10.0.0.1")], vec![], &[]);
        d.publish(false, vec![workload("old", "10.0.0.2")], vec![], &[]);
        assert_eq!(who(&d, "10.0.0.1").as_deref(), Some("new"));
        assert_eq!(who(&d, "10.0.0.2").as_deref(), Some("old"));
        d.publish(true, vec![workload("old", "10.0.0.2")], vec![], &[]);
        assert_eq!(who(&d, "10.0.0.1").as_deref(), Some("-"));
    }

    #[test]
    fn a_change_of_the_old_one_does_not_take_the_address_from_the_new_one() {
        let d = Directory::default();
        d.publish(true, vec![workload("old", "10.0.0.1")], vec![], &[]);
        d.publish(false, vec![workload("new", "10.0.0.1")], vec![], &[]);
        let changed = Workload { mesh_port: 15009, ..workload("old", "::ffff:10.0.0.1") };
        d.publish(false, vec![changed], vec![], &[]);
        assert_eq!(who(&d, "10.0.0.1").as_deref(), Some("new"));
        d.publish(false, vec![], vec![], &["new".into()]);
        let port = |answer| if let Some(Answer::Meshed(w)) = answer { w.mesh_port } else { 0 };
        assert_eq!(port(d.lookup("10.0.0.1".parse().unwrap())), 15009, "as it is now");
    }

    #[test]
    fn publishing_the_same_again_is_no_change() {
        let d = Directory::default();
        let first = d.publish(true, vec![workload("a", "10.0.0.1")], vec![], &[]);
        assert_eq!(
            d.publish(true, vec![workload("a", "::ffff:10.0.0.1"),], vec![], &[]),
            first + 1,
            "another spelling is another workload"
        );
        assert_eq!(d.publish(true, vec![workload("a", "::ffff:10.0.0.1")], vec![], &[]), first + 1);
        assert_eq!(who(&d, "10.0.0.1").as_deref(), Some("a"));
    }

    #[test]
    fn a_service_is_known_by_its_virtual_address_and_goes_with_its_uid() {
        let service = Service {
            uid: "s".into(),
            name: "s".into(),
            addresses: vec!["10.91.0.1".parse().unwrap()],
            ports: Default::default(),
            claimed: false,
        };
        let d = Directory::default();
        d.publish(true, vec![workload("a", "10.0.0.1")], vec![service], &[]);
        assert_eq!(who(&d, "10.91.0.1").as_deref(), Some("s"));
        d.publish(false, vec![], vec![], &["s".into()]);
        assert_eq!(who(&d, "10.91.0.1").as_deref(), Some("-"));
        assert_eq!(who(&d, "10.0.0.1").as_deref(), Some("a"));
    }
}
