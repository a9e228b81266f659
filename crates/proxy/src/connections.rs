//! Open connections: counted, bounded, and cut when the authority behind their peer is revoked.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use countersign_identity::verify::VerifiedPeer;
use countersign_identity::{AuthorityKey, BundleSet};
use prometheus_client::metrics::gauge::Gauge;
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::config::Limits;
use crate::cut::Cut;
use crate::refusal::Refused;

/// The authority in which a peer's verified path ends. Of fixed size, so no bytes of a peer's choice are kept.
type Anchor = AuthorityKey;

/// All open connections of a sidecar, for all worker threads.
pub struct Connections {
    limits: Limits,
    open: Mutex<Open>,
    count: watch::Sender<usize>,
    active: Gauge,
}

#[derive(Default)]
struct Open {
    next: u64,
    peers: HashMap<IpAddr, usize>,
    /// The cut of each open connection by ID, with the authority behind its peer once that is known.
    cuts: HashMap<u64, (Option<Anchor>, Arc<Cut>)>,
}

impl Connections {
    /// No open connections; `active` is the gauge that follows their number.
    pub fn new(limits: Limits, active: Gauge) -> Self {
        Self { limits, open: Mutex::default(), count: watch::Sender::new(0), active }
    }

    fn open(&self) -> std::sync::MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a connection from `peer`. Errors: [`Refused::TooMany`] once a bound is reached.
    pub fn admit(self: &Arc<Self>, peer: IpAddr) -> Result<Admitted, Refused> {
        let mut open = self.open();
        if *self.count.borrow() >= self.limits.connections {
            return Err(Refused::TooMany("in all"));
        }
        let from_peer = open.peers.entry(peer).or_default();
        if *from_peer >= self.limits.connections_per_peer {
            return Err(Refused::TooMany("from this address"));
        }
        *from_peer += 1;
        open.next += 1;
        let id = open.next;
        let cut = Arc::<Cut>::default();
        open.cuts.insert(id, (None, cut.clone()));
        drop(open);
        self.count.send_modify(|n| *n += 1);
        self.active.inc();
        Ok(Admitted { all: self.clone(), id, peer, cut })
    }

    /// Number of connections admitted since start.
    pub fn admitted(&self) -> u64 {
        self.open().next
    }

    /// Cuts all open connections, because the drain time is over.
    pub fn abort(&self) {
        self.open().cuts.values().for_each(|(_, cut)| cut.drain());
    }

    /// The number of open connections, with notification of each change.
    pub fn count(&self) -> watch::Receiver<usize> {
        self.count.subscribe()
    }

    /// Cuts each connection whose peer's authority was trusted before, has not expired, and is no longer trusted.
    pub fn cut_revoked(&self, before: &BundleSet, after: &BundleSet, now: OffsetDateTime) {
        // Authorities leave a bundle when they expire, too. That is no reason to cut: only a removal before the end is
        // a revocation.
        let alive = |set: &BundleSet| -> HashMap<Anchor, String> {
            let authorities = set.iter().flat_map(|b| b.authorities.iter().filter(|a| a.not_after() > now));
            authorities.map(|a| (a.key(), a.id().to_owned())).collect()
        };
        let after = alive(after);
        let mut revoked = alive(before);
        revoked.retain(|key, _| !after.contains_key(key));
        if revoked.is_empty() {
            return;
        }
        let open = self.open();
        let hit = open.cuts.values().filter(|(anchor, _)| anchor.is_some_and(|a| revoked.contains_key(&a)));
        let cut = hit.map(|(_, cut)| cut.revoke()).count();
        let revoked: Vec<_> = revoked.into_values().collect();
        tracing::warn!(?revoked, cut, "an authority was revoked; its connections are cut");
    }
}

/// One open connection, counted until it is dropped.
pub struct Admitted {
    all: Arc<Connections>,
    id: u64,
    peer: IpAddr,
    cut: Arc<Cut>,
}

impl Admitted {
    /// Ties the connection to its peer's authority, as soon as the handshake has finished. `trusted` looks the
    /// authority up in the current bundles; a peer whose authority was revoked meanwhile is rejected.
    ///
    /// The lookup comes after the entry: the lookup sees a revocation between handshake and entry, and a later
    /// revocation finds the entry. That includes one that comes while the connection waits for its preamble: see
    /// [`Self::check`].
    pub fn authenticated_as(
        &self,
        peer: &VerifiedPeer,
        trusted: impl FnOnce(&str, AuthorityKey) -> bool,
    ) -> Result<(), Refused> {
        self.all.open().cuts.insert(self.id, (Some(peer.anchor), self.cut.clone()));
        if trusted(peer.id.trust_domain_name(), peer.anchor) { Ok(()) } else { Err(Refused::AuthorityRevoked) }
    }

    /// Whether the peer's authority is still trusted. Errors: [`Refused::AuthorityRevoked`].
    pub fn check(&self) -> Result<(), Refused> {
        if self.cut.is_revoked() { Err(Refused::AuthorityRevoked) } else { Ok(()) }
    }

    /// The cut to poll while bytes are carried.
    pub fn cut(&self) -> &Cut {
        &self.cut
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut open = self.all.open();
        open.cuts.remove(&self.id);
        if let Some(n) = open.peers.get_mut(&self.peer) {
            *n -= 1;
            if *n == 0 {
                open.peers.remove(&self.peer);
            }
        }
        drop(open);
        self.all.active.dec();
        self.all.count.send_modify(|n| *n -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_identity::profile::issue_root;
    use countersign_identity::svid::LeafFacts;
    use countersign_identity::{KeyType, PrivateKey, SpiffeId, TrustDomain, X509Authority, X509Bundle};
    use std::time::Duration;

    #[test]
    fn the_bounds_hold_in_all_and_for_each_peer_and_free_themselves() {
        let limits = Limits { connections: 3, connections_per_peer: 2 };
        let all = Arc::new(Connections::new(limits, Gauge::default()));
        let (a, b): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let first = all.admit(a).unwrap();
        let _second = all.admit(a).unwrap();
        assert_eq!(all.admit(a).err().unwrap().code(), "too_many");
        let _third = all.admit(b).unwrap();
        assert!(all.admit(b).is_err());
        drop(first);
        assert!(all.admit(b).is_ok());
    }

    fn authority(td: &str) -> X509Bundle {
        let (td, now) = (TrustDomain::new(td).unwrap(), OffsetDateTime::now_utc());
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let root = issue_root(&td, &key, Duration::from_secs(600), now).unwrap();
        let authorities = vec![X509Authority::from_der(root.to_vec()).unwrap()];
        X509Bundle { trust_domain: td, authorities, sequence: 1, refresh_hint: Duration::ZERO }
    }

    fn peer_of(bundle: &X509Bundle) -> VerifiedPeer {
        let (id, now) = (SpiffeId::new("spiffe://td/a").unwrap(), OffsetDateTime::now_utc());
        let facts = LeafFacts {
            serial: "1".into(),
            not_before: now,
            not_after: now,
            authority_id: "what the peer says".into(),
        };
        let top = &bundle.authorities[0];
        VerifiedPeer { id, facts, authority: top.id().into(), anchor: top.key() }
    }

    #[test]
    fn a_revocation_cuts_who_is_entered_and_refuses_who_comes_with_an_older_handshake() {
        let all = Arc::new(Connections::new(Limits { connections: 9, connections_per_peer: 9 }, Gauge::default()));
        let (old, new) = (authority("td"), authority("td"));
        let before: BundleSet =
            [X509Bundle { authorities: [old.authorities.clone(), new.authorities.clone()].concat(), ..old.clone() }]
                .into_iter()
                .collect();
        let after: BundleSet = [new.clone()].into_iter().collect();
        let admit = || all.admit("10.0.0.1".parse().unwrap()).unwrap();
        let (first, second, idle, late) = (admit(), admit(), admit(), admit());
        let trusted = |set: &BundleSet| {
            let set = set.clone();
            move |td: &str, key| set.holds(td, key)
        };
        first.authenticated_as(&peer_of(&old), trusted(&before)).unwrap();
        second.authenticated_as(&peer_of(&new), trusted(&before)).unwrap();
        all.cut_revoked(&before, &after, OffsetDateTime::now_utc());
        assert_eq!(first.check().unwrap_err().code(), "authority_revoked", "its preamble may come seconds later");
        assert!(second.check().is_ok() && idle.check().is_ok());
        // Its handshake was verified against the earlier bundle; it is registered after the cut.
        let refused = late.authenticated_as(&peer_of(&old), trusted(&after)).unwrap_err();
        assert_eq!(refused.code(), "authority_revoked");
    }

    #[test]
    fn an_authority_that_ended_is_not_one_that_was_revoked() {
        let all = Arc::new(Connections::new(Limits { connections: 9, connections_per_peer: 9 }, Gauge::default()));
        let old = authority("td");
        let (before, after): (BundleSet, BundleSet) =
            ([old.clone()].into_iter().collect(), [authority("td")].into_iter().collect());
        let open = all.admit("10.0.0.1".parse().unwrap()).unwrap();
        open.authenticated_as(&peer_of(&old), |td, key| before.holds(td, key)).unwrap();
        all.cut_revoked(&before, &after, OffsetDateTime::now_utc() + Duration::from_secs(601));
        assert!(open.check().is_ok());
    }
}
