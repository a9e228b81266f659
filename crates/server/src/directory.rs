//! Who is at an address: fed from outside, held in memory, never stored.
//!
//! Until somebody has published the whole directory once, nothing is known: an address that is not in it yet must not
//! be taken for one that is outside the mesh.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use countersign_identity::directory::{Answer, Workload};
use tokio::sync::watch;

/// Workloads held at most.
pub const MAX_WORKLOADS: usize = 200_000;

/// The directory of one server.
pub struct Directory {
    state: RwLock<State>,
    revision: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    complete: bool,
    by_uid: HashMap<String, Arc<Workload>>,
    by_address: HashMap<IpAddr, Arc<Workload>>,
}

impl Default for Directory {
    fn default() -> Self {
        Self { state: RwLock::default(), revision: watch::Sender::new(0) }
    }
}

impl Directory {
    /// What is known about an address; `None` while the directory is not complete.
    pub fn lookup(&self, address: IpAddr) -> Option<Answer> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        match state.by_address.get(&address.to_canonical()) {
            Some(workload) => Some(Answer::Meshed(workload.clone())),
            None => state.complete.then_some(Answer::NotMeshed),
        }
    }

    /// How many workloads it holds.
    pub fn len(&self) -> usize {
        self.state.read().unwrap_or_else(PoisonError::into_inner).by_uid.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds and removes workloads; with `replace`, what is not named goes, and the directory is complete from then on.
    /// Returns the revision after it; one that changes nothing makes no new revision.
    pub fn publish(&self, replace: bool, upserted: Vec<Workload>, removed: &[String]) -> u64 {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = replace && !state.complete;
        state.complete |= replace;
        if replace {
            let named: std::collections::HashSet<&str> = upserted.iter().map(|w| w.uid.as_str()).collect();
            let gone: Vec<String> = state.by_uid.keys().filter(|uid| !named.contains(uid.as_str())).cloned().collect();
            gone.iter().for_each(|uid| changed |= state.remove(uid));
        }
        removed.iter().for_each(|uid| changed |= state.remove(uid));
        upserted.into_iter().for_each(|w| changed |= state.insert(w));
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

impl State {
    fn remove(&mut self, uid: &str) -> bool {
        let Some(workload) = self.by_uid.remove(uid) else { return false };
        for address in &workload.addresses {
            // An address that another workload has taken over in the meantime is no longer this one's.
            if self.by_address.get(address).is_some_and(|w| w.uid == uid) {
                self.by_address.remove(address);
            }
        }
        true
    }

    fn insert(&mut self, workload: Workload) -> bool {
        if self.by_uid.get(&workload.uid).is_some_and(|before| **before == workload) {
            return false;
        }
        self.remove(&workload.uid);
        let workload = Arc::new(workload);
        for address in &workload.addresses {
            self.by_address.insert(address.to_canonical(), workload.clone());
        }
        self.by_uid.insert(workload.uid.clone(), workload);
        true
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
        }
    }

    fn who(d: &Directory, address: &str) -> Option<String> {
        d.lookup(address.parse().unwrap()).map(|a| match a {
            Answer::Meshed(w) => w.uid.clone(),
            Answer::NotMeshed => "-".into(),
        })
    }

    #[test]
    fn nobody_is_declared_outside_before_the_directory_is_complete() {
        let d = Directory::default();
        d.publish(false, vec![workload("a", "10.0.0.1")], &[]);
        assert_eq!(who(&d, "10.0.0.1").as_deref(), Some("a"));
        assert_eq!(who(&d, "10.0.0.2"), None);
        d.publish(true, vec![workload("a", "10.0.0.1")], &[]);
        assert_eq!(who(&d, "10.0.0.2").as_deref(), Some("-"));
    }

    #[test]
    fn an_address_used_again_is_the_new_ones_even_when_the_old_one_goes_later() {
        let d = Directory::default();
        d.publish(true, vec![workload("old", "10.0.0.1")], &[]);
        d.publish(false, vec![workload("new", "10.0.0.1")], &[]);
        d.publish(false, vec![], &["old".into()]);
        assert_eq!(who(&d, "10.0.0.1").as_deref(), Some("new"));
    }

    #[test]
    fn publishing_the_same_again_is_no_change() {
        let d = Directory::default();
        let first = d.publish(true, vec![workload("a", "10.0.0.1")], &[]);
        assert_eq!(
            d.publish(true, vec![workload("a", "::ffff:10.0.0.1"),], &[]),
            first + 1,
            "another spelling is another workload"
        );
        assert_eq!(d.publish(true, vec![workload("a", "::ffff:10.0.0.1")], &[]), first + 1);
        assert_eq!(who(&d, "10.0.0.1").as_deref(), Some("a"));
    }
}
