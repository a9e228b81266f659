//! Prepares, activates, retires, taints and revokes authorities. Each one is published in the bundle before its first
//! use.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use countersign_api::clock::Clock;
use countersign_identity::profile::{IssueError, Issued, LeafRequest};
use countersign_identity::{JwtAuthority, KeyType, TrustBundle, TrustDomain, X509Authority};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::sync::{Mutex, watch};

use super::lifecycle::{Due, is_forgotten, is_usable, validity_of};
use super::stored::{Stored, retire_intermediates, roots_of, take_up_keys};
use super::upstream_call::{DEADLINE, UpstreamCall};
use super::{AuthorityError, Record, Status};
use crate::config::Issuance;
use crate::datastore::{DataStore, DataStoreError, Version, Written};
use crate::key_manager::{KeyManagerError, Keys};
use crate::signing_ca::{SigningCa, issue_root};
use crate::upstream_authority::UpstreamAuthority;

/// Authorities kept in the journal (SPIRE: 10), and besides them all that are still trusted.
const JOURNAL_LENGTH: usize = 10;
/// Longest interval at which workloads are asked to refresh the bundle.
const MAX_REFRESH_HINT: Duration = Duration::from_secs(300);

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
    settings: Settings,
    upstream: Option<UpstreamCall>,
    /// Locked while an authority is made, before `writer` if both are: the upstream may take its time to sign.
    making: Mutex<Making>,
    /// Locked while authorities change, never during a call to the upstream or while a key signs. Readers use `journal` instead and
    /// never wait.
    writer: Mutex<Journal>,
    journal: ArcSwap<Vec<Record>>,
    active: ArcSwapOption<SigningCa>,
    bundle: watch::Sender<Arc<TrustBundle>>,
}

/// The right to make an authority. Whoever holds it knows that no key is waiting for its record.
struct Making;

/// A CA certificate for a new key, not published yet.
struct Made {
    key_name: String,
    certificate: CertificateDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<X509Authority>,
}

/// The journal as it is in the store.
struct Journal {
    /// Authorities, the oldest first.
    records: Vec<Record>,
    version: Version,
    /// Whether the key manager may hold keys without a record.
    unswept: bool,
}

impl Authorities {
    /// Loads the journal of an earlier run or starts a new one, and rotates. Afterwards one authority is active.
    /// Errors: none could be activated.
    pub async fn load(settings: Settings) -> Result<Self, AuthorityError> {
        let Stored { mut records, version, bundle } = Stored::read(&settings).await?;
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
            writer: Mutex::new(Journal { records, version, unswept: true }),
            active: ArcSwapOption::new(active),
            bundle: watch::Sender::new(Arc::new(bundle)),
        };
        if is_lost {
            authorities.restore_bundle().await?;
        }
        if let Err(error) = authorities.rotate().await {
            if authorities.active.load().is_none() {
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
        if roots.is_empty() {
            // All of them hang below an upstream, whose root comes with the authority that the rotation makes now.
            return Ok(());
        }
        let refresh_hint = refresh_hint(self.settings.issuance.borrow().ca_ttl);
        self.commit(&mut journal, next, |bundle| {
            bundle.refresh_hint = refresh_hint;
            add_missing(bundle, roots);
        })
        .await
    }

    fn now(&self) -> OffsetDateTime {
        (self.settings.clock)()
    }

    /// Our trust domain's bundle, with notification of each change.
    pub fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }

    /// The journal, the oldest first. Never waits for a change in progress.
    pub fn journal(&self) -> Arc<Vec<Record>> {
        self.journal.load_full()
    }

    /// Signs a leaf with the active authority. Errors: [`AuthorityError::NotReady`], [`AuthorityError::Issue`],
    /// [`AuthorityError::Sign`].
    pub async fn sign(&self, request: &LeafRequest<'_>) -> Result<Issued, AuthorityError> {
        let active = self.active.load_full().ok_or(AuthorityError::NotReady)?;
        Ok(active.issue(request, self.now()).await?)
    }

    /// Does what is due now: prepares, activates, deletes expired authorities and keys without a record.
    pub async fn rotate(&self) -> Result<(), AuthorityError> {
        let making = self.making.lock().await;
        let now = self.now();
        self.sweep(&making).await;
        let journal = self.writer.lock().await;
        let due = |journal: &Journal| Due::at(now, journal.find(Status::Active));
        let ready = |journal: &Journal| journal.find(Status::Prepared).filter(|r| is_usable(r, now)).cloned();
        let mut prepared = ready(&journal);
        let due = due(&journal);
        drop(journal);
        if due.prepare && prepared.is_none() {
            prepared = Some(self.make(&making, now).await?);
        }
        if due.activate
            && let Some(prepared) = prepared
        {
            self.activate(&prepared.id).await?;
        }
        // Last: the bundle now holds the new authority and cannot become empty.
        self.forget_ended(now).await?;
        self.sweep(&making).await;
        Ok(())
    }

    /// Prepares a new authority now. It replaces one that was prepared before.
    pub async fn prepare(&self) -> Result<Record, AuthorityError> {
        let making = self.making.lock().await;
        self.make(&making, self.now()).await
    }

    /// Makes this prepared authority the signing one.
    pub async fn activate(&self, id: &str) -> Result<Record, AuthorityError> {
        let record = self.writer.lock().await.prepared(id)?.clone();
        let gone = || AuthorityError::Unknown(format!("{id} (its key is gone)"));
        // The key manager may take its time, so nothing is locked.
        let key = self.settings.keys.get(&record.key_name).await?.ok_or_else(gone)?;
        let signer = SigningCa::new(record.certificate, record.chain, key)?;
        let mut journal = self.writer.lock().await;
        journal.prepared(id)?;
        let mut next = journal.records.clone();
        next.iter_mut().filter(|r| r.status == Status::Active).for_each(|r| r.status = Status::Old);
        let activated = set_status(&mut next, id, Status::Active).ok_or_else(gone)?;
        // Stored before the switch: after a crash the journal names the authority that has signed.
        self.commit(&mut journal, next, |_| {}).await?;
        self.active.store(Some(Arc::new(signer)));
        tracing::info!(authority = id, "authority active");
        Ok(activated)
    }

    /// Marks an old authority as compromised: every SVID under it is renewed at once.
    pub async fn taint(&self, id: &str) -> Result<Record, AuthorityError> {
        if self.settings.upstream.is_some() {
            return Err(AuthorityError::Upstream);
        }
        let mut journal = self.writer.lock().await;
        let record = journal.named(id)?.clone();
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
        self.commit(&mut journal, next, |bundle| {
            bundle.authorities.iter_mut().filter(|a| a.id() == id).for_each(|a| a.tainted = true);
        })
        .await?;
        tracing::warn!(authority = id, "authority tainted; everything it signed is renewed now");
        record.ok_or_else(|| AuthorityError::Unknown(id.to_owned()))
    }

    /// Removes a tainted authority from the bundle: nothing under it is trusted any more.
    pub async fn revoke(&self, id: &str) -> Result<Record, AuthorityError> {
        if self.settings.upstream.is_some() {
            return Err(AuthorityError::Upstream);
        }
        let mut journal = self.writer.lock().await;
        let record = journal.named(id)?.clone();
        // Tainted first: by then agents have renewed, so that the revocation cuts off only what did not.
        match record.status {
            Status::Tainted => {}
            Status::Old => return Err(AuthorityError::Untainted(id.to_owned())),
            status => {
                let needed = "only an old and tainted one can be revoked; prepare and activate another first";
                return Err(AuthorityError::State { id: id.to_owned(), status, needed });
            }
        }
        let next = journal.records.iter().filter(|r| r.id != id).cloned().collect();
        self.commit(&mut journal, next, |bundle| bundle.authorities.retain(|a| a.id() != id)).await?;
        journal.unswept = true;
        drop(journal);
        // A key that is being made has no record yet. The rotation that is due next sweeps instead.
        if let Ok(making) = self.making.try_lock() {
            self.sweep(&making).await;
        }
        tracing::warn!(authority = id, "authority revoked; nothing under it is trusted any more");
        Ok(record)
    }

    /// Adds authorities that another party signs with (SPIRE: AppendBundle). Errors: a key has the ID of another one.
    pub async fn append(&self, more: Vec<X509Authority>, keys: Vec<JwtAuthority>) -> Result<(), AuthorityError> {
        let mut journal = self.writer.lock().await;
        let mut all = self.bundle.borrow().jwt_authorities.clone();
        for key in keys {
            match all.iter_mut().find(|a| a.key_id() == key.key_id()) {
                None => all.push(key),
                // Its end may be another one now.
                Some(known) if known.der() == key.der() => *known = key,
                // A token names its key by the ID alone.
                Some(_) => return Err(AuthorityError::KeyIdTaken(key.key_id().to_owned())),
            }
        }
        let next = journal.records.clone();
        self.commit(&mut journal, next, |bundle| {
            add_missing(bundle, more);
            bundle.jwt_authorities = all;
        })
        .await
    }

    /// Makes an authority and publishes it as the prepared one. Between the two the journal is free.
    async fn make(&self, making: &Making, now: OffsetDateTime) -> Result<Record, AuthorityError> {
        let Issuance { ca_ttl, ca_key_type, .. } = *self.settings.issuance.borrow();
        let before = {
            let mut journal = self.writer.lock().await;
            // From here on, an error leaves a key without a record, which the sweep removes: the new key if its record
            // was not stored, the replaced one if it was.
            journal.unswept = true;
            journal.in_use()
        };
        let signed = self.have_signed(random_name()?, ca_key_type, ca_ttl, now).await;
        let mut journal = self.writer.lock().await;
        let published = match signed {
            // Made as a successor of what was there; what is there now may need none, or another.
            Ok(_) if journal.in_use() != before => Err(AuthorityError::Changed),
            Ok(made) => self.publish_prepared(&mut journal, made, ca_ttl, now).await,
            Err(error) => Err(error),
        };
        drop(journal);
        self.sweep(making).await;
        let record = published?;
        let until = validity_of(&record.certificate).1;
        tracing::info!(authority = record.id, %until, "authority prepared and published");
        Ok(record)
    }

    /// A new key, with the certificate that the upstream signs for it or that it signs itself.
    async fn have_signed(
        &self,
        key_name: String,
        key_type: KeyType,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<Made, AuthorityError> {
        let td = &self.settings.trust_domain;
        let key = self.settings.keys.generate(&key_name, key_type).await?;
        if let Some(upstream) = &self.upstream {
            let signed = upstream.sign_intermediate(td, &key, ttl, now).await?;
            let own = signed.chain.first().ok_or_else(|| IssueError::Sign("the upstream signed nothing".into()))?;
            return Ok(Made { key_name, certificate: own.clone(), chain: signed.chain, roots: signed.roots });
        }
        let certificate = issue_root(td, &*key, ttl, now).await?;
        let roots = vec![X509Authority::from_der(certificate.to_vec())?];
        Ok(Made { key_name, certificate, chain: vec![], roots })
    }

    async fn publish_prepared(
        &self,
        journal: &mut Journal,
        made: Made,
        ca_ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<Record, AuthorityError> {
        let Made { key_name, certificate, chain, roots } = made;
        let id = X509Authority::from_der(certificate.to_vec())?.id().to_owned();
        let record = Record { id, status: Status::Prepared, key_name, certificate, chain };
        let is_prepared = |r: &&Record| r.status == Status::Prepared;
        let dropped: Vec<String> = journal.records.iter().filter(is_prepared).map(|r| r.id.clone()).collect();
        let mut next: Vec<_> = journal.records.iter().filter(|r| !is_prepared(r)).cloned().collect();
        next.push(record.clone());
        shorten(&mut next, &self.bundle.borrow(), now);
        self.commit(journal, next, |bundle| {
            bundle.authorities.retain(|a| !dropped.iter().any(|id| id == a.id()));
            bundle.refresh_hint = refresh_hint(ca_ttl);
            add_missing(bundle, roots);
        })
        .await?;
        Ok(record)
    }

    /// Deletes authorities and roots that expired long enough ago, and their keys.
    async fn forget_ended(&self, now: OffsetDateTime) -> Result<(), AuthorityError> {
        let mut journal = self.writer.lock().await;
        let over = |r: &Record| r.status != Status::Active && is_forgotten(&r.certificate, now);
        let root_over = |a: &X509Authority| is_forgotten(a.der(), now);
        let has_ended = |bundle: &TrustBundle| {
            bundle.authorities.iter().any(root_over) || bundle.jwt_authorities.iter().any(|a| a.is_over(now))
        };
        if !journal.records.iter().any(over) && !has_ended(&self.bundle.borrow()) {
            return Ok(());
        }
        let (ended, next): (Vec<Record>, Vec<Record>) = journal.records.iter().cloned().partition(over);
        self.commit(&mut journal, next, |bundle| {
            bundle.authorities.retain(|a| !root_over(a));
            bundle.jwt_authorities.retain(|a| !a.is_over(now));
        })
        .await?;
        for record in ended {
            tracing::info!(authority = record.id, "authority ended and forgotten");
        }
        journal.unswept = true;
        Ok(())
    }

    /// Removes keys without a record, if there may be any. A failure is tried again with the next rotation. The journal is free
    /// meanwhile: whoever holds `making` knows that no key is waiting for its record.
    async fn sweep(&self, _: &Making) {
        let named: Vec<String> = {
            let mut journal = self.writer.lock().await;
            if !std::mem::take(&mut journal.unswept) {
                return;
            }
            journal.records.iter().map(|r| r.key_name.clone()).collect()
        };
        if let Err(error) = self.remove_all_but(&named).await {
            self.writer.lock().await.unswept = true;
            tracing::error!(%error, "cannot remove the key of an authority that is gone; trying again");
        }
    }

    async fn remove_all_but(&self, named: &[String]) -> Result<(), KeyManagerError> {
        for name in self.settings.keys.names().await? {
            if !named.contains(&name) {
                self.settings.keys.remove(&name).await?;
            }
        }
        Ok(())
    }

    /// Takes up what another server has written: its revocations hold here too, and the next change is made from it.
    async fn take_up(&self, journal: &mut Journal) -> Result<(), AuthorityError> {
        let Stored { mut records, version, bundle } = Stored::read(&self.settings).await?;
        let active = take_up_keys(&self.settings.keys, &mut records).await?;
        self.journal.store(Arc::new(records.clone()));
        (journal.records, journal.version) = (records, version);
        // Published before it is signed with. A bundle that the store has lost stays as it is here.
        if let Some(bundle) = bundle
            && bundle != **self.bundle.borrow()
        {
            self.bundle.send_replace(Arc::new(bundle));
        }
        self.active.store(active);
        Ok(())
    }

    /// Stores the journal and the bundle together, then publishes. If the store refuses, nothing has changed.
    async fn commit(
        &self,
        journal: &mut Journal,
        next: Vec<Record>,
        change: impl FnOnce(&mut TrustBundle),
    ) -> Result<(), AuthorityError> {
        let mut bundle = TrustBundle::clone(&self.bundle.borrow());
        change(&mut bundle);
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
        self.journal.store(Arc::new(next.clone()));
        journal.records = next;
        if changed {
            self.bundle.send_replace(Arc::new(bundle));
        }
        Ok(())
    }
}

impl Journal {
    fn find(&self, status: Status) -> Option<&Record> {
        self.records.iter().find(|r| r.status == status)
    }

    /// The prepared authority with this ID. Errors: it is none, or in another state.
    fn prepared(&self, id: &str) -> Result<&Record, AuthorityError> {
        let record = self.named(id)?;
        match record.status {
            Status::Prepared => Ok(record),
            status => {
                let needed = "only a prepared authority can be activated";
                Err(AuthorityError::State { id: id.to_owned(), status, needed })
            }
        }
    }

    /// Names of the keys of the active and the prepared authority: what a new authority is made to follow or replace.
    fn in_use(&self) -> Vec<String> {
        let in_use = |r: &&Record| matches!(r.status, Status::Active | Status::Prepared);
        self.records.iter().filter(in_use).map(|r| r.key_name.clone()).collect()
    }

    fn named(&self, id: &str) -> Result<&Record, AuthorityError> {
        if id.is_empty() {
            return Err(AuthorityError::NoId);
        }
        self.records.iter().find(|r| r.id == id).ok_or_else(|| AuthorityError::Unknown(id.to_owned()))
    }
}

fn refresh_hint(ca_ttl: Duration) -> Duration {
    (ca_ttl / 10).min(MAX_REFRESH_HINT)
}

/// Takes the oldest records out of a journal that is too long, but none that can still sign or that something trusted hangs
/// on: an authority that is not in the journal can be neither tainted nor revoked.
fn shorten(records: &mut Vec<Record>, bundle: &TrustBundle, now: OffsetDateTime) {
    let is_trusted = |r: &Record| bundle.authorities.iter().any(|a| a.id() == r.id);
    let is_done = |r: &Record| r.status != Status::Active && r.validity().1 <= now && !is_trusted(r);
    let mut excess = records.len().saturating_sub(JOURNAL_LENGTH);
    records.retain(|r| {
        let drop = excess > 0 && is_done(r);
        excess -= usize::from(drop);
        !drop
    });
}

fn set_status(journal: &mut [Record], id: &str, status: Status) -> Option<Record> {
    let record = journal.iter_mut().find(|r| r.id == id)?;
    record.status = status;
    Some(record.clone())
}

fn add_missing(bundle: &mut TrustBundle, more: Vec<X509Authority>) {
    for authority in more {
        if !bundle.authorities.iter().any(|a| a.der() == authority.der()) {
            bundle.authorities.push(authority);
        }
    }
}

fn random_name() -> Result<String, AuthorityError> {
    let mut bytes = [0u8; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| IssueError::Sign("no randomness".into()))?;
    Ok(hex::encode(bytes))
}

#[cfg(test)]
mod tests;
