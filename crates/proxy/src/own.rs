//! The workload that this sidecar belongs to: its addresses, and what the directory says about them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use countersign_api::directory::Subscriptions;
use countersign_identity::directory::{Answer, Workload};
use tokio::sync::watch;

use crate::identity::Identity;
use crate::sockets::own_addresses;

/// Shortest interval between two reads of the interface addresses.
const LOOK: Duration = Duration::from_secs(1);

/// The workload behind this namespace's addresses.
pub struct Own {
    directory: Subscriptions,
    state: Mutex<State>,
}

struct State {
    /// Kept, because the directory is asked for an address only while a receiver exists.
    answers: HashMap<IpAddr, Option<watch::Receiver<Option<Answer>>>>,
    looked: Instant,
}

impl Own {
    /// Starts following this namespace's addresses in the directory.
    pub fn new(directory: Subscriptions) -> Self {
        let own = Self { state: Mutex::new(State { answers: HashMap::new(), looked: Instant::now() }), directory };
        own.look(&mut own.state());
        own
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, state: &mut State) {
        state.looked = Instant::now();
        let addresses = own_addresses();
        state.answers.retain(|a, _| addresses.contains(a));
        for address in addresses {
            // Loopback and link-local addresses exist on every machine: the directory cannot know them.
            let local = address.is_loopback() || matches!(address, IpAddr::V6(a) if a.is_unicast_link_local());
            state.answers.entry(address).or_insert_with(|| (!local).then(|| self.directory.follow(address)));
        }
    }

    /// Whether an address is one of this namespace's own. Rereads the interfaces if it is not known yet.
    pub fn is_own(&self, address: IpAddr) -> bool {
        let mut state = self.state();
        if !state.answers.contains_key(&address) && state.looked.elapsed() >= LOOK {
            self.look(&mut state);
        }
        state.answers.contains_key(&address)
    }

    /// The workload at one of our addresses; `None` unless the directory names our own SPIFFE ID there.
    pub fn at(&self, address: IpAddr, identity: &Identity) -> Option<Arc<Workload>> {
        let state = self.state();
        let answer = state.answers.get(&address)?.as_ref()?.borrow().clone();
        ours(answer?, identity)
    }

    /// The workload at any of our addresses; `None` unless the directory names our own SPIFFE ID there.
    pub fn workload(&self, identity: &Identity) -> Option<Arc<Workload>> {
        let mut state = self.state();
        if state.answers.values().all(Option::is_none) && state.looked.elapsed() >= LOOK {
            self.look(&mut state);
        }
        let answers = state.answers.values().flatten();
        answers.filter_map(|a| a.borrow().clone()).find_map(|a| ours(a, identity))
    }
}

fn ours(answer: Answer, identity: &Identity) -> Option<Arc<Workload>> {
    match answer {
        // During a change of pods the directory may still name the address's former owner: its policy is not ours.
        Answer::Meshed(workload) if workload.spiffe_ids.contains(&identity.svid().id().to_string()) => Some(workload),
        _ => None,
    }
}
