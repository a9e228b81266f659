//! The workload that this sidecar belongs to: its addresses, and what the directory says about them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use countersign_api::directory::Subscriptions;
use countersign_identity::directory::{Answer, Workload};
use tokio::sync::watch;

use crate::identity::Identity;
use crate::sockets::{is_link_local, own_addresses};

/// Shortest interval between two reads of the interface addresses.
const LOOK: Duration = Duration::from_secs(1);

/// The workload behind this namespace's addresses.
pub struct LocalWorkload {
    directory: Subscriptions,
    state: Mutex<State>,
}

struct State {
    /// Kept, because the directory is asked for an address only while a receiver exists.
    answers: HashMap<IpAddr, Option<watch::Receiver<Option<Answer>>>>,
    looked: Instant,
}

impl LocalWorkload {
    /// Starts following this namespace's addresses in the directory.
    pub fn new(directory: Subscriptions) -> Self {
        let local = Self { state: Mutex::new(State { answers: HashMap::new(), looked: Instant::now() }), directory };
        local.look(&mut local.state());
        local
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, state: &mut State) {
        state.looked = Instant::now();
        let addresses = own_addresses();
        state.answers.retain(|a, _| addresses.contains(a));
        // One that the directory had no room for has nobody who would tell of it any more: it is asked for again.
        state.answers.retain(|_, a| a.as_ref().is_none_or(|answers| answers.has_changed().is_ok()));
        for address in addresses {
            // Loopback and link-local addresses are alike everywhere: the directory cannot know them.
            let local = address.is_loopback() || is_link_local(address);
            state.answers.entry(address).or_insert_with(|| (!local).then(|| self.directory.follow(address)));
        }
    }

    /// Resolves once the directory has told more of our addresses than when this was called, and after [`LOOK`] in any case:
    /// addresses come and go without a word.
    pub fn changed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut answers: Vec<_> = self.state().answers.values().flatten().cloned().collect();
        answers.iter_mut().for_each(watch::Receiver::mark_unchanged);
        let told = |mut answers: watch::Receiver<_>| {
            Box::pin(async move {
                if answers.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            })
        };
        async move {
            // `select_all` takes no empty list.
            let never = tokio::sync::watch::channel(None).1;
            let any = futures::future::select_all(answers.into_iter().chain([never]).map(told));
            let _ = tokio::time::timeout(LOOK, any).await;
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

    /// The workload at one of our addresses, if the directory says that it is us. A link-local address is that of the workload at
    /// our others.
    pub fn at(&self, address: IpAddr, identity: &Identity) -> Option<Arc<Workload>> {
        if is_link_local(address) {
            return if self.is_own(address) { self.workload(identity) } else { None };
        }
        let mut state = self.state();
        let lost =
            |s: &State| s.answers.get(&address).and_then(Option::as_ref).is_some_and(|a| a.has_changed().is_err());
        if lost(&state) && state.looked.elapsed() >= LOOK {
            self.look(&mut state);
        }
        let answer = state.answers.get(&address)?.as_ref()?.borrow().clone();
        ours(answer?, identity)
    }

    /// The workload at any of our addresses; `None` unless the directory names our own SPIFFE ID there.
    pub fn workload(&self, identity: &Identity) -> Option<Arc<Workload>> {
        let mut state = self.state();
        let is_gone = |a: &Option<watch::Receiver<_>>| a.as_ref().is_none_or(|answers| answers.has_changed().is_err());
        if state.answers.values().all(is_gone) && state.looked.elapsed() >= LOOK {
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

#[cfg(test)]
pub(crate) mod tests {
    use std::net::Ipv4Addr;

    use countersign_identity::directory::Workload;
    use countersign_identity::policy::Policy;
    use countersign_identity::profile::{LeafRequest, RequestedKey, SigningAuthority, issue_leaf, issue_root, request};
    use countersign_identity::{KeyType, PrivateKey, SpiffeId, TrustDomain, X509Svid};
    use time::OffsetDateTime;

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    /// An identity with this SPIFFE ID, for an hour.
    pub fn identity(id: &str) -> Identity {
        let (now, id) = (OffsetDateTime::now_utc(), SpiffeId::new(id).unwrap());
        let above = PrivateKey::generate(KeyType::EcP256).unwrap();
        let root = issue_root(&TrustDomain::new("td").unwrap(), &above, DAY, now).unwrap();
        let authority = SigningAuthority::new(root, vec![], &above).unwrap();
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let asked = RequestedKey::from_csr(&request(&key, None).unwrap()).unwrap();
        let leaf = LeafRequest { id: &id, dns_names: &[], key: &asked, ttl: DAY / 24 };
        let issued = issue_leaf(&leaf, &authority, now).unwrap();
        Identity::new(X509Svid::new(issued.chain, key).unwrap(), std::iter::empty().collect()).unwrap()
    }

    /// The directory's answer for the address of a meshed workload.
    pub fn meshed(address: IpAddr, id: &str) -> Answer {
        Answer::Meshed(Arc::new(Workload {
            uid: "u".into(),
            name: "web".into(),
            addresses: vec![address],
            spiffe_ids: [id.to_owned()].into(),
            mesh_port: 15008,
            policy: Policy::default(),
            place: Default::default(),
        }))
    }

    impl LocalWorkload {
        /// Takes an address for one of ours, whatever the interfaces say.
        pub fn knows(&self, address: IpAddr, answers: watch::Receiver<Option<Answer>>) {
            let mut state = self.state();
            state.answers.insert(address, Some(answers));
            state.looked = Instant::now() + DAY;
        }
    }

    #[test]
    fn a_link_local_address_of_ours_is_that_of_the_workload_at_our_others() {
        let local = LocalWorkload::new(Subscriptions::default());
        let (here, link): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "fe80::1".parse().unwrap());
        let (_directory, answer) = watch::channel(Some(meshed(here, "spiffe://td/web")));
        // These addresses are in no interface's list, which is not read again meanwhile.
        local.knows(here, answer);
        local.state().answers.insert(link, None);
        let web = identity("spiffe://td/web");
        assert_eq!(local.at(link, &web).map(|w| w.uid.clone()), Some("u".into()), "its policy decides there too");
        assert_eq!(local.at("fe80::2".parse().unwrap(), &web), None, "somebody else's");
        assert_eq!(local.at(Ipv4Addr::LOCALHOST.into(), &web), None);
        assert_eq!(local.at(link, &identity("spiffe://td/db")), None, "the directory knows somebody else here");
    }

    #[test]
    fn an_address_that_there_was_no_room_for_is_asked_for_again() {
        let local = LocalWorkload::new(Subscriptions::default());
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        let (_, nobody) = watch::channel(None);
        local.state().answers.insert(loopback, Some(nobody));
        local.look(&mut local.state());
        assert!(local.state().answers[&loopback].is_none(), "it was looked up anew");
    }
}
