//! Which workload this sidecar stands beside: its addresses, and what the directory says of them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use countersign_api::directory::Subscriptions;
use countersign_identity::directory::{Answer, Workload};
use tokio::sync::watch;

use crate::identity::Identity;
use crate::sockets::own_addresses;

/// Addresses are looked up again at most this often.
const LOOK: Duration = Duration::from_secs(1);

/// The workload behind this namespace's addresses.
pub struct Own {
    directory: Subscriptions,
    state: Mutex<State>,
}

struct State {
    /// Held, so that the directory goes on to be asked.
    answers: HashMap<IpAddr, Option<watch::Receiver<Option<Answer>>>>,
    looked: Instant,
}

impl Own {
    /// Begins to follow this namespace's addresses.
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
            // Loopback and link-local addresses are alike everywhere: the directory cannot know them.
            let local = address.is_loopback() || matches!(address, IpAddr::V6(a) if a.is_unicast_link_local());
            state.answers.entry(address).or_insert_with(|| (!local).then(|| self.directory.follow(address)));
        }
    }

    /// Whether an address is this namespace's own.
    pub fn is_own(&self, address: IpAddr) -> bool {
        let mut state = self.state();
        if !state.answers.contains_key(&address) && state.looked.elapsed() >= LOOK {
            self.look(&mut state);
        }
        state.answers.contains_key(&address)
    }

    /// The workload at one of our addresses, if the directory says that it is us.
    pub fn at(&self, address: IpAddr, identity: &Identity) -> Option<Arc<Workload>> {
        let state = self.state();
        let answer = state.answers.get(&address)?.as_ref()?.borrow().clone();
        ours(answer?, identity)
    }

    /// The workload at any of our addresses, if the directory says that it is us.
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
        Answer::Meshed(workload) if workload.spiffe_ids.contains(&identity.svid().id().to_string()) => Some(workload),
        _ => None,
    }
}
