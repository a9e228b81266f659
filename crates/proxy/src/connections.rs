//! Open connections: counted, bounded, and cut when the authority behind their peer is revoked.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use countersign_api::admission::Source;
use countersign_identity::verify::VerifiedPeer;
use countersign_identity::{AuthorityKey, BundleSet, X509Authority};
use prometheus_client::metrics::gauge::Gauge;
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::config::Limits;
use crate::cut::Cut;
use crate::refusal::Refused;

/// The authority in which a peer's verified path ends. Another trust domain may have one with the same key.
struct Anchor {
    trust_domain: Box<str>,
    key: AuthorityKey,
}

/// Whose connection it is; what shares a bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The app's own.
    Outbound,
    /// From the mesh. Until its caller is proven it also has a seat among the unfinished handshakes.
    Mesh,
    /// In plaintext: its caller proves nothing, for as long as it is open.
    Plaintext,
}

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
    kinds: HashMap<Kind, usize>,
    /// Of those that call us.
    peers: HashMap<(Kind, IpAddr), usize>,
    /// What cuts each connection, and the authority behind its peer once that is known.
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

    /// One more, unless there are too many.
    pub fn admit(self: &Arc<Self>, kind: Kind, peer: IpAddr) -> Result<Admitted, Refused> {
        let peer = match kind {
            Kind::Outbound => None,
            Kind::Mesh => Some((kind, peer)),
            Kind::Plaintext => Some((kind, peer.group())),
        };
        let mut open = self.open();
        open.check(self.limits, kind, peer)?;
        *open.kinds.entry(kind).or_default() += 1;
        if let Some(peer) = peer {
            *open.peers.entry(peer).or_default() += 1;
        }
        open.next += 1;
        let id = open.next;
        let cut = Arc::<Cut>::default();
        open.cuts.insert(id, (None, cut.clone()));
        drop(open);
        self.count.send_modify(|n| *n += 1);
        self.active.inc();
        Ok(Admitted { all: self.clone(), id, kind, peer, cut })
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

    /// Cuts every connection whose peer's authority is trusted no more, unless its time was over.
    ///
    /// Each connection's own authority is judged, and not the difference between two revisions: one that came and went between
    /// them is in neither.
    pub fn cut_revoked(&self, before: &BundleSet, after: &BundleSet, now: OffsetDateTime) {
        let mut cut = 0;
        for (anchor, connection) in self.open().cuts.values_mut() {
            let Some(Anchor { trust_domain, key }) = anchor else { continue };
            if after.holds(trust_domain, *key) {
                continue;
            }
            if authority(before, trust_domain, *key).is_some_and(|a| a.not_after() <= now) {
                // It ended by itself; nobody has revoked it, and nobody will.
                *anchor = None;
                continue;
            }
            connection.revoke();
            cut += 1;
        }
        let known = before.iter().flat_map(|b| b.authorities.iter().map(move |a| (b, a)));
        let revoked = known.filter(|(b, a)| a.not_after() > now && !after.holds(b.trust_domain.as_str(), a.key()));
        let revoked: Vec<_> = revoked.map(|(_, a)| a.id()).collect();
        if cut > 0 || !revoked.is_empty() {
            tracing::warn!(?revoked, cut, "an authority was revoked; its connections are cut");
        }
    }
}

impl Open {
    /// Whether there is room for one more.
    fn check(&self, limits: Limits, kind: Kind, peer: Option<(Kind, IpAddr)>) -> Result<(), Refused> {
        let held = |kind| self.kinds.get(&kind).copied().unwrap_or_default();
        let (outbound, mesh, plaintext) = (held(Kind::Outbound), held(Kind::Mesh), held(Kind::Plaintext));
        let (in_direction, per_peer) = match kind {
            Kind::Outbound => (outbound, usize::MAX),
            Kind::Mesh => (mesh + plaintext, limits.connections_per_peer),
            Kind::Plaintext => (mesh + plaintext, limits.unproven_per_peer()),
        };
        let from_peer = peer.and_then(|peer| self.peers.get(&peer).copied()).unwrap_or_default();
        if outbound + mesh + plaintext >= limits.connections {
            return Err(Refused::TooMany("in all"));
        }
        if in_direction >= limits.one_way() {
            return Err(Refused::TooMany("in this direction"));
        }
        if kind == Kind::Plaintext && plaintext >= limits.unproven() {
            return Err(Refused::TooMany("in plaintext"));
        }
        if from_peer >= per_peer {
            return Err(Refused::TooMany("from this address"));
        }
        Ok(())
    }
}

fn authority<'a>(set: &'a BundleSet, trust_domain: &str, key: AuthorityKey) -> Option<&'a X509Authority> {
    set.get(trust_domain)?.authorities.iter().find(|a| a.key() == key)
}

/// One open connection; counted until it is dropped.
pub struct Admitted {
    all: Arc<Connections>,
    id: u64,
    kind: Kind,
    peer: Option<(Kind, IpAddr)>,
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
        let anchor = Anchor { trust_domain: peer.id.trust_domain_name().into(), key: peer.anchor };
        self.all.open().cuts.insert(self.id, (Some(anchor), self.cut.clone()));
        if trusted(peer.id.trust_domain_name(), peer.anchor) { Ok(()) } else { Err(Refused::AuthorityRevoked) }
    }

    /// The peer was left for another one, or for none: what becomes of its authority is nothing to this connection.
    pub fn leave_peer(&self) {
        // Under the lock, as a revocation is: it comes before, and is taken back, or finds no authority.
        if let Some((anchor, cut)) = self.all.open().cuts.get_mut(&self.id) {
            *anchor = None;
            cut.take_back_revocation();
        }
    }

    /// Whether the authority behind the peer is still trusted.
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
        if let Some(n) = open.kinds.get_mut(&self.kind) {
            *n -= 1;
        }
        if let Some(peer) = self.peer
            && let Some(n) = open.peers.get_mut(&peer)
        {
            *n -= 1;
            if *n == 0 {
                open.peers.remove(&peer);
            }
        }
        drop(open);
        self.all.active.dec();
        self.all.count.send_modify(|n| *n -= 1);
    }
}

#[cfg(test)]
mod tests;
