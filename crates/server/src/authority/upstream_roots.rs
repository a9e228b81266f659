//! The roots of the upstream authority: taken up when it names them, tainted and revoked by an operator.
//!
//! They are known by the bundle alone. So are roots of an upstream that is not configured any more, and of other parties
//! (`AppendBundle`).

use std::sync::atomic::Ordering;

use countersign_identity::{TrustBundle, X509Authority};

use super::journal::Journal;
use super::manager::{Authorities, add_missing, add_missing_keys, taint_in};
use super::published::is_new;
use super::{AuthorityError, Kind, Record, RevokedKeys, Status, StoredJournal};
use crate::upstream_authority::UpstreamBundle;

impl Authorities {
    /// Publishes what the upstream names now. A root that it names no more stays until it ends or is revoked: something below it may
    /// be in use; but where its bundle is the trust domain's, what it has tainted is tainted, and what it has removed is removed.
    /// Answers the IDs of those that were revoked here and that it names all the same. Errors: it cannot be asked, or the store
    /// refuses.
    pub async fn follow_upstream(&self) -> Result<Vec<String>, AuthorityError> {
        let Some(upstream) = &self.upstream else { return Ok(vec![]) };
        let told = self.told_above.load(Ordering::SeqCst);
        let named = upstream.bundle().await?;
        let (is_whole, keys) = (named.is_whole, named.keys.clone());
        let refused = self.take_up_named(named, told).await?;
        // Whatever becomes of our own keys, what was revoked above is revoked here by now.
        if is_whole {
            self.named_above.lock().await.clone_from(&keys);
            self.publish_own_keys(&keys).await?;
        }
        Ok(refused)
    }

    /// [`Self::follow_upstream`] once it has answered; `told`: what it had been asked for before that.
    async fn take_up_named(&self, mut named: UpstreamBundle, told: u64) -> Result<Vec<String>, AuthorityError> {
        let now = self.now();
        let mut journal = self.writer.lock().await;
        let refused = refused(&named, &journal.revoked);
        // What was signed or published meanwhile is in the next answer.
        let whole = (named.is_whole && told == self.told_above.load(Ordering::SeqCst) && !named.roots.is_empty())
            .then(|| named.clone());
        // What has ended would come and go with each look.
        named.roots.retain(|root| root.not_after() > now);
        let known = self.bundle.borrow().jwt_authorities.clone();
        named.keys.retain(|key| !key.is_over(now) && is_new(key, &known, &journal.revoked));
        let before = self.bundle.borrow().clone();
        let records = journal.records.clone();
        let change = |bundle: &mut TrustBundle| {
            add_missing(bundle, named.roots.clone());
            add_missing_keys(bundle, named.keys.clone());
            if let Some(whole) = &whole {
                keep_whole(bundle, whole, &records, &|id| self.is_refused_above(id));
            }
        };
        let mut after = TrustBundle::clone(&before);
        change(&mut after);
        journal.revoked.apply(&mut after);
        if after == *before {
            return Ok(refused);
        }
        self.commit(&mut journal, records.clone(), change).await?;
        let is_new = |root: &&X509Authority| !before.authorities.iter().any(|a| a.der() == root.der());
        for root in after.authorities.iter().filter(is_new) {
            let (authority, until) = (root.id(), root.not_after());
            tracing::warn!(authority, %until, "root of the upstream authority added to the trust bundle");
        }
        let is_gone = |root: &&X509Authority| !after.authorities.iter().any(|a| a.der() == root.der());
        for root in before.authorities.iter().filter(is_gone) {
            tracing::warn!(authority = root.id(), "root removed from the trust bundle, as the upstream has");
        }
        Ok(refused)
    }

    /// Whether everything below an authority of ours is to be renewed, or is trusted by nobody: it is below no good root.
    pub(super) fn is_distrusted(&self, record: &Record) -> bool {
        let bundle = self.bundle.borrow().clone();
        let mut above = bundle.authorities.iter().filter(|root| record.is_below(root));
        record.kind() == Kind::X509 && !bundle.authorities.is_empty() && above.all(|root| root.tainted)
    }

    /// Marks a root as compromised: every SVID below it is renewed at once. Errors: the bundle has none with this ID, or the
    /// authority that signs is below it.
    pub async fn taint_root(&self, id: &str) -> Result<X509Authority, AuthorityError> {
        let mut journal = self.writer.lock().await;
        self.refuse_above()?;
        let (id, roots) = self.roots_named(&journal, id)?;
        let root = roots[0].clone();
        if roots.iter().all(|root| root.tainted) {
            return Ok(root);
        }
        let mut records = journal.records.clone();
        records.iter_mut().filter(|r| is_below(r, &roots)).for_each(|r| r.status = Status::Tainted);
        self.commit(&mut journal, records, |bundle| taint_in(bundle, Kind::X509, &id)).await?;
        tracing::warn!(authority = id, "root of an upstream authority tainted; agents renew what is below it");
        Ok(root)
    }

    /// Removes a tainted root from the bundle, for good: nothing below its key is trusted any more, whoever names it again. Errors
    /// as [`Self::taint_root`], or it is not tainted.
    pub async fn revoke_root(&self, id: &str) -> Result<X509Authority, AuthorityError> {
        let mut journal = self.writer.lock().await;
        self.refuse_above()?;
        let (id, roots) = self.roots_named(&journal, id)?;
        // Tainted first: by then agents have renewed, so that the revocation cuts off only what did not.
        if !roots.iter().all(|root| root.tainted) {
            return Err(AuthorityError::Untainted(id));
        }
        let records = journal.records.iter().filter(|r| !is_below(r, &roots)).cloned().collect();
        let revoked = journal.revoked.with(roots.iter().map(X509Authority::key));
        self.commit_all(&mut journal, StoredJournal { records, revoked }, |_| {}).await?;
        self.sweep_after(journal).await;
        tracing::warn!(authority = id, "root of an upstream authority revoked; nothing below it is trusted any more");
        Ok(roots[0].clone())
    }

    /// Where the bundle is that of a server above, its roots are tainted and revoked there.
    pub(super) fn refuse_above(&self) -> Result<(), AuthorityError> {
        match &self.settings.upstream {
            Some(upstream) if upstream.has_whole_bundle() => Err(AuthorityError::Above(upstream.name())),
            _ => Ok(()),
        }
    }

    /// The ID of the root that an authority of ours is below; `None` where it is a root itself or signs no certificates.
    pub fn root_above(&self, record: &Record) -> Option<String> {
        let bundle = self.bundle.borrow().clone();
        let above = bundle.authorities.iter().find(|root| root.id() != record.id && record.is_below(root));
        above.map(|root| root.id().to_owned())
    }

    /// The roots with this ID, at least one, that no authority of ours signs below, and the ID as the bundle has it.
    fn roots_named(&self, journal: &Journal, id: &str) -> Result<(String, Vec<X509Authority>), AuthorityError> {
        if id.is_empty() {
            return Err(AuthorityError::NoId);
        }
        let id = id.to_lowercase();
        let bundle = self.bundle.borrow().clone();
        let roots: Vec<_> = bundle.authorities.iter().filter(|a| a.id() == id).cloned().collect();
        let is_ours = journal.named(Kind::X509, &id).is_ok();
        if self.upstream.is_none() && (is_ours || roots.is_empty()) {
            return Err(AuthorityError::NoUpstream(id));
        }
        if roots.is_empty() {
            return Err(AuthorityError::UnknownRoot(id));
        }
        for status in [Status::Active, Status::Prepared] {
            if let Some(signs) = journal.find(Kind::X509, status).filter(|r| is_below(r, &roots)) {
                return Err(AuthorityError::RootInUse { root: id, id: signs.id.clone(), status });
            }
        }
        Ok((id, roots))
    }

    /// Refuses an authority that everybody would renew away from at once, or that nobody would trust: one that all of the roots that
    /// the upstream named for it are tainted or revoked.
    pub(super) fn refuse_distrusted(
        &self,
        journal: &Journal,
        record: &Record,
        roots: &[X509Authority],
    ) -> Result<(), AuthorityError> {
        let bundle = self.bundle.borrow().clone();
        let is_tainted = |root: &X509Authority| bundle.authorities.iter().any(|a| a.tainted && a.key() == root.key());
        let is_distrusted = |root: &X509Authority| journal.revoked.has(root.key()) || is_tainted(root);
        let above: Vec<_> = roots.iter().filter(|root| record.is_below(root)).collect();
        match above.first() {
            Some(root) if above.iter().all(|root| is_distrusted(root)) => {
                Err(AuthorityError::Distrusted(root.id().to_owned()))
            }
            _ => Ok(()),
        }
    }
}

fn is_below(record: &Record, roots: &[X509Authority]) -> bool {
    roots.iter().any(|root| record.is_below(root))
}

/// What the upstream names although it was revoked here.
fn refused(named: &UpstreamBundle, revoked: &RevokedKeys) -> Vec<String> {
    let roots = named.roots.iter().filter(|root| revoked.has(root.key())).map(|root| root.id().to_owned());
    let keys = named.keys.iter().filter(|key| revoked.has(key.digest())).map(|key| key.key_id().to_owned());
    roots.chain(keys).collect()
}

/// Makes a bundle what the upstream's is, whose word is the trust domain's, apart from what these records of ours need.
fn keep_whole(bundle: &mut TrustBundle, named: &UpstreamBundle, records: &[Record], is_refused: &dyn Fn(&str) -> bool) {
    // One that we sign below stays until we sign below another.
    let signs = |r: &&Record| matches!(r.status, Status::Active | Status::Prepared);
    let is_needed = |root: &X509Authority| records.iter().any(|r| r.id == root.id() || signs(&r) && r.is_below(root));
    bundle.authorities.retain(|root| named.roots.iter().any(|a| a.der() == root.der()) || is_needed(root));
    for root in &mut bundle.authorities {
        let mut as_named = named.roots.iter().filter(|a| a.key() == root.key()).peekable();
        // What is missing is renewed away from, and trusted again should the next answer name it.
        root.tainted = as_named.peek().is_none() || as_named.any(|a| a.tainted);
    }
    // One that is refused above stays while it signs.
    let is_kept = |r: &Record| r.status == Status::Active || !is_refused(&r.id);
    let is_ours = |id: &str| records.iter().any(|r| r.kind() == Kind::Jwt && r.id == id && is_kept(r));
    bundle.jwt_authorities.retain(|key| named.keys.iter().any(|a| a.key() == key.key()) || is_ours(key.key_id()));
    for key in &mut bundle.jwt_authorities {
        key.tainted |= named.keys.iter().any(|a| a.tainted && a.key() == key.key());
    }
}
