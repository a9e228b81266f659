//! Prepares, activates, retires, taints and revokes authorities. Each one is published in the bundle before its first
//! use.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use arc_swap::ArcSwap;
use countersign_api::clock::Clock;
use countersign_identity::profile::jwt::TokenRequest;
use countersign_identity::profile::{Issued, LeafRequest, RequestedKey};
use countersign_identity::{JwtAuthority, TrustBundle, TrustDomain, X509Authority};
use time::OffsetDateTime;
use tokio::sync::{Mutex, MutexGuard, watch};

use super::active::{Active, Signing};
use super::journal::{Journal, set_status};
use super::lifecycle::{Due, GRACE, is_forgotten, is_usable};
use super::making::{Making, refresh_hint};
use super::stored::{Stored, retire_intermediates, roots_of, take_up_keys};
use super::upstream_call::{DEADLINE, UpstreamCall};
use super::{AuthorityError, Kind, Public, Record, RevokedKeys, Status, StoredJournal};
use crate::config::Issuance;
use crate::datastore::{DataStore, DataStoreError, Written};
use crate::key_manager::Keys;
use crate::signing_jwt::IssuedToken;
use crate::upstream_authority::UpstreamAuthority;

/// Settings and dependencies of [`Authorities`].
pub struct Settings {
    /// The trust domain that the authorities sign for.
    pub trust_domain: TrustDomain,
    /// Lifetime and key type of the next authority.
    pub issuance: watch::Receiver<Issuance>,
    /// Stores the private keys.
    pub keys: Keys,
    /// The CA above us; `None` makes each authority its own root.
    pub upstream: Option<Arc<dyn UpstreamAuthority>>,
    /// Stores the journal and the bundle.
    pub store: Arc<dyn DataStore>,
    /// The current time.
    pub clock: Clock,
}

/// The authorities of one server.
pub struct Authorities {
    pub(super) settings: Settings,
    pub(super) upstream: Option<UpstreamCall>,
    /// Locked while an authority is made, before `writer` if both are: the upstream may take its time to sign.
    making: Mutex<Making>,
    /// Locked while authorities change, never during a call to the upstream or while a key signs. Readers use `journal` instead and
    /// never wait.
    pub(super) writer: Mutex<Journal>,
    journal: ArcSwap<Vec<Record>>,
    active: Active,
    pub(super) bundle: watch::Sender<Arc<TrustBundle>>,
    /// Counts what the upstream signs and publishes for us: a look at its bundle that began before says nothing of it.
    pub(super) told_above: AtomicU64,
    /// The keys of tokens that the upstream named last; none before it has.
    pub(super) named_above: Mutex<Vec<JwtAuthority>>,
    /// IDs of our keys of tokens that the upstream refuses, each with a record that goes at its end.
    pub(super) refused_above: std::sync::Mutex<HashSet<String>>,
}

impl Authorities {
    /// Loads the journal of an earlier run or starts a new one, and rotates. Afterwards one authority is active.
    /// Errors: none could be activated.
    pub async fn load(settings: Settings) -> Result<Self, AuthorityError> {
        let Stored { mut records, revoked, version, bundle } = Stored::read(&settings).await?;
        let is_lost = bundle.is_none() && !records.is_empty();
        if is_lost {
            tracing::error!("the store has authorities and no trust bundle: it is made again from their roots");
            retire_intermediates(&mut records);
        }
        let bundle = bundle.unwrap_or_else(|| TrustBundle {
            // How far a lost bundle had counted is unknown; seconds are ahead of every count of changes.
            sequence: if is_lost { (settings.clock)().unix_timestamp().unsigned_abs() } else { 0 },
            ..TrustBundle::empty(settings.trust_domain.clone())
        });
        let active = take_up_keys(&settings.keys, &mut records).await?;
        let authorities = Self {
            upstream: settings.upstream.clone().map(|upstream| UpstreamCall::new(upstream, DEADLINE)),
            settings,
            journal: ArcSwap::from_pointee(records.clone()),
            // A crash between generating a key and storing its record leaves a key without a record.
            making: Mutex::new(Making),
            writer: Mutex::new(Journal { records, revoked, version, unswept: true }),
            active: Active::default(),
            bundle: watch::Sender::new(Arc::new(bundle)),
            told_above: AtomicU64::new(0),
            named_above: Mutex::default(),
            refused_above: std::sync::Mutex::default(),
        };
        authorities.active.replace(active);
        if is_lost {
            authorities.restore_bundle().await?;
        }
        if let Err(error) = authorities.rotate().await {
            if authorities.active.x509.load().is_none() {
                return Err(error);
            }
            // The next authority cannot be created now, but the active one still signs, so there is no reason not to
            // start.
            tracing::error!(%error, "cannot rotate the authorities; trying again");
        }
        Ok(authorities)
    }

    /// Publishes the roots of the journal, for a bundle that the store had lost.
    async fn restore_bundle(&self) -> Result<(), AuthorityError> {
        let mut journal = self.writer.lock().await;
        let (next, roots) = (journal.records.clone(), roots_of(&journal.records)?);
        let keys: Vec<_> = next.iter().filter_map(Record::jwt_authority).collect();
        if roots.is_empty() {
            // All of them hang below an upstream, whose root comes with the authority that the rotation makes now. It publishes the
            // JWT authorities with it.
            return Ok(());
        }
        let refresh_hint = refresh_hint(self.settings.issuance.borrow().ca_ttl);
        self.commit(&mut journal, next, |bundle| {
            bundle.refresh_hint = refresh_hint;
            add_missing(bundle, roots);
            add_missing_keys(bundle, keys);
        })
        .await
    }

    pub(super) fn now(&self) -> OffsetDateTime {
        (self.settings.clock)()
    }

    /// Our trust domain's bundle, with notification of each change.
    pub fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }

    /// The journal of both kinds, the oldest first. Never waits for a change in progress.
    pub fn journal(&self) -> Arc<Vec<Record>> {
        self.journal.load_full()
    }

    /// Signs a leaf with the active authority. Errors: [`AuthorityError::NotReady`], [`AuthorityError::Issue`],
    /// [`AuthorityError::Sign`].
    pub async fn sign(&self, request: &LeafRequest<'_>) -> Result<Issued, AuthorityError> {
        let active = self.active.x509.load_full().ok_or(AuthorityError::NotReady)?;
        Ok(active.issue(request, self.now()).await?)
    }

    /// Signs a CA certificate for a server below with the active authority. Errors as [`Authorities::sign`].
    pub async fn sign_downstream(&self, key: &RequestedKey, ttl: Duration) -> Result<Issued, AuthorityError> {
        let active = self.active.x509.load_full().ok_or(AuthorityError::NotReady)?;
        Ok(active.issue_intermediate(&self.settings.trust_domain, key, ttl, self.now()).await?)
    }

    /// Signs a token with the active JWT authority. Errors as [`Authorities::sign`].
    pub async fn sign_token(&self, request: &TokenRequest<'_>) -> Result<IssuedToken, AuthorityError> {
        let active = self.active.jwt.load_full().ok_or(AuthorityError::NotReady)?;
        Ok(active.issue(request, self.now()).await?)
    }

    /// Does what is due now: prepares, activates, deletes expired authorities and keys without a record.
    pub async fn rotate(&self) -> Result<(), AuthorityError> {
        let making = self.making.lock().await;
        let now = self.now();
        self.sweep(&making).await;
        // Neither kind depends on the other: an upstream that is away signs no CA, and tokens need none.
        let x509 = self.renew_ca(&making, now).await;
        let jwt = self.renew(Kind::Jwt, &making, now).await;
        x509.and(jwt)
    }

    async fn renew_ca(&self, making: &Making, now: OffsetDateTime) -> Result<(), AuthorityError> {
        self.renew(Kind::X509, making, now).await?;
        // After it: the bundle now holds the new authority and cannot become empty.
        self.forget_ended(now).await?;
        self.sweep(making).await;
        Ok(())
    }

    /// Prepares and activates what is due of a kind.
    async fn renew(&self, kind: Kind, making: &Making, now: OffsetDateTime) -> Result<(), AuthorityError> {
        let (due, mut prepared) = {
            let journal = self.writer.lock().await;
            let is_ready = |r: &&Record| is_usable(r, now) && !self.is_distrusted(r) && !self.is_refused_above(&r.id);
            let ready = journal.find(kind, Status::Prepared).filter(is_ready).cloned();
            let active = journal.find(kind, Status::Active);
            // The upstream, or another server below it, has tainted or revoked the root of the active one.
            (
                Due::at(now, active.filter(|active| !self.is_distrusted(active) && !self.is_refused_above(&active.id))),
                ready,
            )
        };
        if due.prepare && prepared.is_none() {
            prepared = Some(self.make(kind, making, now).await?);
        }
        if due.activate
            && let Some(prepared) = prepared
        {
            self.activate(kind, &prepared.id).await?;
        }
        Ok(())
    }

    /// Prepares a new authority of a kind now. It replaces one that was prepared before.
    pub async fn prepare(&self, kind: Kind) -> Result<Record, AuthorityError> {
        let making = self.making.lock().await;
        self.make(kind, &making, self.now()).await
    }

    /// Makes this prepared authority the signing one.
    pub async fn activate(&self, kind: Kind, id: &str) -> Result<Record, AuthorityError> {
        let record = self.writer.lock().await.prepared(kind, id)?.clone();
        // Whoever is below the upstream verifies its tokens from the first one on.
        if let Some(key) = record.jwt_authority() {
            self.ensure_above(&key).await?;
        }
        let gone = || AuthorityError::Unknown(format!("{id} (its key is gone)"));
        // The key manager may take its time, so nothing is locked.
        let key = self.settings.keys.get(&record.key_name).await?.ok_or_else(gone)?;
        let signer = Signing::new(&record, key)?;
        let mut journal = self.writer.lock().await;
        journal.prepared(kind, id)?;
        let mut next = journal.records.clone();
        let is_active = |r: &&mut Record| r.kind() == kind && r.status == Status::Active;
        next.iter_mut().filter(is_active).for_each(|r| r.status = Status::Old);
        let activated = set_status(&mut next, id, Status::Active).ok_or_else(gone)?;
        // Stored before the switch: after a crash the journal names the authority that has signed.
        self.commit(&mut journal, next, |_| {}).await?;
        self.active.switch(signer);
        tracing::info!(authority = id, kind = kind.as_str(), "authority active");
        Ok(activated)
    }

    /// Marks an old authority as compromised: every SVID under it is renewed at once.
    pub async fn taint(&self, kind: Kind, id: &str) -> Result<Record, AuthorityError> {
        self.refuse_upstreams(kind)?;
        let mut journal = self.writer.lock().await;
        if let Some(record) = self.key_of_another(&journal, kind, id) {
            let records = journal.records.clone();
            self.commit(&mut journal, records, |bundle| taint_in(bundle, kind, id)).await?;
            tracing::warn!(authority = id, "key of another server tainted; agents give out none of its tokens");
            return Ok(record);
        }
        let record = journal.named(kind, id)?.clone();
        // The active authority cannot be tainted: the renewed SVIDs would be under it again.
        match record.status {
            Status::Old => {}
            Status::Tainted => return Ok(record),
            status => {
                let needed = "only an old one can be tainted; prepare and activate another first";
                return Err(AuthorityError::State { id: id.to_owned(), status, needed });
            }
        }
        let mut next = journal.records.clone();
        let record = set_status(&mut next, id, Status::Tainted);
        self.commit(&mut journal, next, |bundle| taint_in(bundle, kind, id)).await?;
        let follows = match kind {
            Kind::X509 => "agents renew what it signed",
            Kind::Jwt => "agents give out none of its tokens",
        };
        tracing::warn!(authority = id, kind = kind.as_str(), "authority tainted; {follows}");
        record.ok_or_else(|| AuthorityError::Unknown(id.to_owned()))
    }

    /// Removes a tainted authority from the bundle: nothing under it is trusted any more.
    pub async fn revoke(&self, kind: Kind, id: &str) -> Result<Record, AuthorityError> {
        self.refuse_upstreams(kind)?;
        let mut journal = self.writer.lock().await;
        let record = match self.key_of_another(&journal, kind, id) {
            Some(record) => record,
            None => journal.named(kind, id)?.clone(),
        };
        // Tainted first: by then agents have renewed, so that the revocation cuts off only what did not.
        match record.status {
            Status::Tainted => {}
            Status::Old => return Err(AuthorityError::Untainted(id.to_owned())),
            status => {
                let needed = "only an old and tainted one can be revoked; prepare and activate another first";
                return Err(AuthorityError::State { id: id.to_owned(), status, needed });
            }
        }
        let records = journal.records.iter().filter(|r| r.kind() != kind || r.id != id).cloned().collect();
        // By its key, so that it goes under every ID and certificate that somebody gave it.
        let revoked = journal.revoked.with(record.key());
        self.commit_all(&mut journal, StoredJournal { records, revoked }, |_| {}).await?;
        self.sweep_after(journal).await;
        tracing::warn!(authority = id, kind = kind.as_str(), "authority revoked; nothing under it is trusted any more");
        Ok(record)
    }

    /// Removes the keys of records that are gone now.
    pub(super) async fn sweep_after(&self, mut journal: MutexGuard<'_, Journal>) {
        journal.unswept = true;
        drop(journal);
        // A key that is being made has no record yet. The rotation that is due next sweeps instead.
        if let Ok(making) = self.making.try_lock() {
            self.sweep(&making).await;
        }
    }

    /// A key of tokens that another server signs with: below ours, beside it, or of an `AppendBundle`. It is in the bundle alone.
    fn key_of_another(&self, journal: &Journal, kind: Kind, id: &str) -> Option<Record> {
        if kind != Kind::Jwt || journal.named(kind, id).is_ok() {
            return None;
        }
        let bundle = self.bundle.borrow().clone();
        let key = bundle.jwt_authorities.iter().find(|a| a.key_id() == id)?.clone();
        let status = if key.tainted { Status::Tainted } else { Status::Old };
        let public = Public::Jwt { key, not_before: OffsetDateTime::UNIX_EPOCH };
        Some(Record { id: id.to_owned(), status, key_name: String::new(), public })
    }

    /// Roots that are the upstream's are known by other IDs than our authorities.
    fn refuse_upstreams(&self, kind: Kind) -> Result<(), AuthorityError> {
        match &self.settings.upstream {
            Some(_) if kind == Kind::X509 => self.refuse_above().and(Err(AuthorityError::Upstream)),
            _ => Ok(()),
        }
    }

    /// Adds authorities that another party signs with (SPIRE: AppendBundle). Of our own, nothing changes. Errors: a key has the ID of
    /// another one.
    pub async fn append(&self, more: Vec<X509Authority>, keys: Vec<JwtAuthority>) -> Result<(), AuthorityError> {
        let mut journal = self.writer.lock().await;
        if let Some(root) = more.iter().find(|root| journal.revoked.has(root.key())) {
            return Err(AuthorityError::Revoked(root.id().to_owned()));
        }
        let mut all = self.bundle.borrow().jwt_authorities.clone();
        for key in keys {
            judge(&key, &all, &journal.revoked)?;
            match all.iter_mut().find(|a| a.key_id() == key.key_id()) {
                None => all.push(key),
                Some(_) if journal.named(Kind::Jwt, key.key_id()).is_ok() => {}
                // Its end may be another one now; a taint stays.
                Some(known) => {
                    let tainted = known.tainted || key.tainted;
                    *known = key;
                    known.tainted = tainted;
                }
            }
        }
        let next = journal.records.clone();
        self.commit(&mut journal, next, |bundle| {
            add_missing(bundle, more);
            bundle.jwt_authorities = all;
        })
        .await
    }

    /// Deletes authorities and roots that expired long enough ago, and their keys.
    async fn forget_ended(&self, now: OffsetDateTime) -> Result<(), AuthorityError> {
        let mut journal = self.writer.lock().await;
        let over = |r: &Record| r.status != Status::Active && is_forgotten(r.validity(), now);
        let (ended, next): (Vec<Record>, Vec<Record>) = journal.records.iter().cloned().partition(over);
        let root_over = |a: &X509Authority| is_forgotten((a.not_before(), a.not_after()), now);
        // A key of ours is kept as long as its record is: a clock that is ahead for a moment must not take it away.
        let own: Vec<String> = next.iter().filter(|r| r.kind() == Kind::Jwt).map(|r| r.id.clone()).collect();
        let key_over = |a: &JwtAuthority| a.is_over(now - GRACE.0) && !own.iter().any(|id| id == a.key_id());
        let has_ended = |bundle: &TrustBundle| {
            bundle.authorities.iter().any(root_over) || bundle.jwt_authorities.iter().any(key_over)
        };
        if ended.is_empty() && !has_ended(&self.bundle.borrow()) {
            return Ok(());
        }
        self.commit(&mut journal, next, |bundle| {
            bundle.authorities.retain(|a| !root_over(a));
            bundle.jwt_authorities.retain(|a| !key_over(a));
        })
        .await?;
        for record in ended {
            tracing::info!(authority = record.id, "authority ended and forgotten");
        }
        journal.unswept = true;
        Ok(())
    }

    /// Takes up what another server has written: its revocations hold here too, and the next change is made from it.
    async fn take_up(&self, journal: &mut Journal) -> Result<(), AuthorityError> {
        let Stored { mut records, revoked, version, bundle } = Stored::read(&self.settings).await?;
        let active = take_up_keys(&self.settings.keys, &mut records).await?;
        self.journal.store(Arc::new(records.clone()));
        (journal.records, journal.revoked, journal.version) = (records, revoked, version);
        // Published before it is signed with. A bundle that the store has lost stays as it is here.
        if let Some(bundle) = bundle
            && bundle != **self.bundle.borrow()
        {
            self.bundle.send_replace(Arc::new(bundle));
        }
        self.active.replace(active);
        Ok(())
    }

    /// Stores these records and the bundle together, then publishes. If the store refuses, nothing has changed.
    pub(super) async fn commit(
        &self,
        journal: &mut Journal,
        records: Vec<Record>,
        change: impl FnOnce(&mut TrustBundle),
    ) -> Result<(), AuthorityError> {
        let next = StoredJournal { records, revoked: journal.revoked.clone() };
        self.commit_all(journal, next, change).await
    }

    /// [`Self::commit`] with the keys that are revoked. Whatever a change does, the bundle has none of them.
    pub(super) async fn commit_all(
        &self,
        journal: &mut Journal,
        next: StoredJournal,
        change: impl FnOnce(&mut TrustBundle),
    ) -> Result<(), AuthorityError> {
        let mut bundle = TrustBundle::clone(&self.bundle.borrow());
        change(&mut bundle);
        next.revoked.apply(&mut bundle);
        let changed = bundle != **self.bundle.borrow();
        if changed {
            bundle.sequence += 1;
        }
        // Stored before published: peers must never trust an authority that a restart would forget.
        match self.settings.store.put_authorities(&next, &bundle, journal.version).await? {
            Written::Stored(version) => journal.version = version,
            Written::Stale | Written::Banned => {
                self.take_up(journal).await?;
                return Err(DataStoreError::Overtaken.into());
            }
        }
        self.journal.store(Arc::new(next.records.clone()));
        (journal.records, journal.revoked) = (next.records, next.revoked);
        if changed {
            self.bundle.send_replace(Arc::new(bundle));
        }
        Ok(())
    }
}

/// Whether a key for tokens may be added to these. Errors: it was revoked, is there under another ID, or its ID is another one's.
pub(super) fn judge(key: &JwtAuthority, all: &[JwtAuthority], revoked: &RevokedKeys) -> Result<(), AuthorityError> {
    let key_id = || key.key_id().to_owned();
    if revoked.has(key.digest()) {
        return Err(AuthorityError::Revoked(key_id()));
    }
    // Under another ID it would outlive the revocation of the one.
    if let Some(twin) = all.iter().find(|a| a.key() == key.key() && a.key_id() != key.key_id()) {
        return Err(AuthorityError::KeyKnown { key_id: key_id(), as_id: twin.key_id().to_owned() });
    }
    // A token names its key by the ID alone.
    match all.iter().find(|a| a.key_id() == key.key_id()) {
        Some(known) if known.key() != key.key() => Err(AuthorityError::KeyIdTaken(key_id())),
        _ => Ok(()),
    }
}

pub(super) fn taint_in(bundle: &mut TrustBundle, kind: Kind, id: &str) {
    match kind {
        Kind::X509 => bundle.authorities.iter_mut().filter(|a| a.id() == id).for_each(|a| a.tainted = true),
        Kind::Jwt => bundle.jwt_authorities.iter_mut().filter(|a| a.key_id() == id).for_each(|a| a.tainted = true),
    }
}

/// Adds the keys whose IDs the bundle does not have.
pub(super) fn add_missing_keys(bundle: &mut TrustBundle, more: Vec<JwtAuthority>) {
    for key in more {
        if !bundle.jwt_authorities.iter().any(|a| a.key_id() == key.key_id()) {
            bundle.jwt_authorities.push(key);
        }
    }
}

/// Adds the roots that the bundle does not have.
pub(super) fn add_missing(bundle: &mut TrustBundle, more: Vec<X509Authority>) {
    for authority in more {
        if !bundle.authorities.iter().any(|a| a.der() == authority.der()) {
            bundle.authorities.push(authority);
        }
    }
}

#[cfg(test)]
mod tests;
