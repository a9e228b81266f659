//! Prepares, activates, retires, taints and revokes authorities, and publishes the bundle before each first use.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use countersign_api::clock::Clock;
use countersign_identity::profile::{IssueError, Issued, LeafRequest, SigningAuthority, issue_leaf, issue_root};
use countersign_identity::rotation::{activate_at, prepare_at};
use countersign_identity::{TrustDomain, X509Authority, X509Bundle};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::sync::{Mutex, watch};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Record, Status};
use crate::config::Issuance;
use crate::datastore::{DataStore, DataStoreError};
use crate::key_manager::{KeyManager, KeyManagerError};
use crate::upstream_authority::{UpstreamAuthority, UpstreamError};

/// Authorities kept in the journal (SPIRE: 10).
const JOURNAL_LENGTH: usize = 10;
/// How often workloads are told to look for a new bundle, at most.
const MAX_REFRESH_HINT: Duration = Duration::from_secs(300);

/// Why an authority could not be prepared, activated, tainted, revoked or used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// No authority of that ID.
    #[error("there is no authority `{0}`; `countersign authority show` lists them")]
    Unknown(String),
    /// It is not in the state that the command needs.
    #[error("authority `{id}` is {status}; {needed}")]
    State {
        /// Which.
        id: String,
        /// Where it is in its life.
        status: Status,
        /// What the command needs, and the next step.
        needed: &'static str,
    },
    /// The roots are not ours to taint.
    #[error("the roots come from the upstream authority; taint or revoke them there, then restart with the new files")]
    Upstream,
    /// No authority signs yet.
    #[error("no authority is active yet")]
    NotReady,
    /// A prepared authority is missing.
    #[error("no authority is prepared; run `countersign authority prepare` first")]
    NothingPrepared,
    /// The store did not keep the change, so it was not made.
    #[error(transparent)]
    Store(#[from] DataStoreError),
    /// The key could not be kept.
    #[error(transparent)]
    Key(#[from] KeyManagerError),
    /// The upstream authority refused.
    #[error(transparent)]
    UpstreamRefused(#[from] UpstreamError),
    /// Signing failed.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// A certificate that cannot be an authority.
    #[error(transparent)]
    Bundle(#[from] countersign_identity::bundle::BundleError),
}

/// What the manager needs to know and have.
pub struct Settings {
    /// What it signs for.
    pub trust_domain: TrustDomain,
    /// Life and key type of the next authority.
    pub issuance: watch::Receiver<Issuance>,
    /// Where keys live.
    pub keys: Arc<dyn KeyManager>,
    /// The PKI above us.
    pub upstream: Option<Arc<dyn UpstreamAuthority>>,
    /// Where the journal lives.
    pub store: Arc<dyn DataStore>,
    /// The time.
    pub clock: Clock,
}

/// The authorities of one server.
pub struct Authorities {
    settings: Settings,
    journal: Mutex<Vec<Record>>,
    active: ArcSwapOption<SigningAuthority>,
    bundle: watch::Sender<Arc<X509Bundle>>,
}

impl Authorities {
    /// Takes up the journal of an earlier run, or starts anew; in the end one authority is active.
    pub async fn load(settings: Settings) -> Result<Self, AuthorityError> {
        let td = &settings.trust_domain;
        let mut journal = settings.store.authorities().await?;
        let bundle =
            settings.store.bundles().await?.into_iter().find(|b| b.trust_domain == *td).unwrap_or(X509Bundle {
                trust_domain: td.clone(),
                authorities: vec![],
                sequence: 0,
                refresh_hint: Duration::ZERO,
            });
        // An authority whose key is gone (key manager `memory`) signs no more; it stays trusted until its end.
        let mut active = None;
        for record in &mut journal {
            if !matches!(record.status, Status::Active | Status::Prepared) {
                continue;
            }
            match settings.keys.get(&record.key_name)? {
                Some(key) if record.status == Status::Active => {
                    active =
                        Some(Arc::new(SigningAuthority::new(record.certificate.clone(), record.chain.clone(), &key)?));
                }
                Some(_) => {}
                None => {
                    tracing::warn!(authority = record.id, "its key is gone; it stays trusted until it ends");
                    record.status = Status::Old;
                }
            }
        }
        let authorities = Self {
            settings,
            journal: Mutex::new(journal),
            active: ArcSwapOption::new(active),
            bundle: watch::Sender::new(Arc::new(bundle)),
        };
        authorities.rotate().await?;
        Ok(authorities)
    }

    fn now(&self) -> OffsetDateTime {
        (self.settings.clock)()
    }

    /// Our trust domain's bundle, and each change to it.
    pub fn bundle(&self) -> watch::Receiver<Arc<X509Bundle>> {
        self.bundle.subscribe()
    }

    /// The journal, oldest first.
    pub async fn journal(&self) -> Vec<Record> {
        self.journal.lock().await.clone()
    }

    /// Signs a leaf with the active authority.
    pub fn sign(&self, request: &LeafRequest<'_>) -> Result<Issued, AuthorityError> {
        let active = self.active.load_full().ok_or(AuthorityError::NotReady)?;
        Ok(issue_leaf(request, &active, self.now())?)
    }

    /// Does what is due now: prepares, activates, forgets what has ended.
    pub async fn rotate(&self) -> Result<(), AuthorityError> {
        let now = self.now();
        let mut journal = self.journal.lock().await;
        self.forget_expired(&mut journal, now).await?;
        let find = |journal: &[Record], status| journal.iter().find(|r| r.status == status).cloned();
        let due = match find(&journal, Status::Active) {
            None => Due { prepare: true, activate: true },
            Some(active) => {
                let (from, until) = validity_of(&active.certificate);
                Due { prepare: now >= prepare_at(from, until), activate: now >= activate_at(from, until) }
            }
        };
        if due.prepare && find(&journal, Status::Prepared).is_none() {
            self.prepare_in(&mut journal, now).await?;
        }
        if due.activate
            && let Some(prepared) = find(&journal, Status::Prepared)
        {
            self.activate_in(&mut journal, &prepared.id).await?;
        }
        Ok(())
    }

    /// Prepares a new authority now; one that was prepared before is dropped.
    pub async fn prepare(&self) -> Result<Record, AuthorityError> {
        let mut journal = self.journal.lock().await;
        self.prepare_in(&mut journal, self.now()).await
    }

    /// Lets the prepared authority sign from now on. An empty ID means the prepared one.
    pub async fn activate(&self, id: &str) -> Result<Record, AuthorityError> {
        let mut journal = self.journal.lock().await;
        let record = if id.is_empty() {
            journal.iter().find(|r| r.status == Status::Prepared).ok_or(AuthorityError::NothingPrepared)?
        } else {
            find_record(&journal, id)?
        };
        let id = record.id.clone();
        match record.status {
            Status::Prepared => self.activate_in(&mut journal, &id).await,
            status => Err(AuthorityError::State { id, status, needed: "only a prepared authority can be activated" }),
        }
    }

    /// Marks an old authority as compromised: every SVID under it is renewed at once.
    pub async fn taint(&self, id: &str) -> Result<Record, AuthorityError> {
        if self.settings.upstream.is_some() {
            return Err(AuthorityError::Upstream);
        }
        let mut journal = self.journal.lock().await;
        let record = find_record(&journal, id)?;
        match record.status {
            Status::Old => {}
            Status::Tainted => return Ok(record.clone()),
            status => {
                let needed = "only an old one can be tainted; prepare and activate another first";
                return Err(AuthorityError::State { id: id.to_owned(), status, needed });
            }
        }
        let mut next = journal.clone();
        let record = set_status(&mut next, id, Status::Tainted);
        self.commit(&mut journal, next, |bundle| {
            bundle.authorities.iter_mut().filter(|a| a.id() == id).for_each(|a| a.tainted = true);
        })
        .await?;
        tracing::warn!(authority = id, "authority tainted; everything it signed is renewed now");
        record.ok_or_else(|| AuthorityError::Unknown(id.to_owned()))
    }

    /// Takes an old or tainted authority out of the bundle: nothing under it is trusted any more.
    pub async fn revoke(&self, id: &str) -> Result<Record, AuthorityError> {
        if self.settings.upstream.is_some() {
            return Err(AuthorityError::Upstream);
        }
        let mut journal = self.journal.lock().await;
        let record = find_record(&journal, id)?.clone();
        if matches!(record.status, Status::Active | Status::Prepared) {
            let needed = "only an old or tainted one can be revoked; prepare and activate another first";
            return Err(AuthorityError::State { id: id.to_owned(), status: record.status, needed });
        }
        let next = journal.iter().filter(|r| r.id != id).cloned().collect();
        self.commit(&mut journal, next, |bundle| bundle.authorities.retain(|a| a.id() != id)).await?;
        self.settings.keys.remove(&record.key_name)?;
        tracing::warn!(authority = id, "authority revoked; nothing under it is trusted any more");
        Ok(record)
    }

    /// Adds authorities that somebody else signs with (SPIRE: AppendBundle).
    pub async fn append(&self, more: Vec<X509Authority>) -> Result<(), AuthorityError> {
        let mut journal = self.journal.lock().await;
        let next = journal.clone();
        self.commit(&mut journal, next, |bundle| add_missing(bundle, more)).await
    }

    async fn prepare_in(&self, journal: &mut Vec<Record>, now: OffsetDateTime) -> Result<Record, AuthorityError> {
        let Settings { trust_domain, issuance, keys, upstream, .. } = &self.settings;
        let Issuance { ca_ttl, ca_key_type, .. } = *issuance.borrow();
        let key_name = random_name()?;
        let key = keys.generate(&key_name, ca_key_type)?;
        let made = async {
            let (chain, roots) = match upstream {
                None => {
                    let root = issue_root(trust_domain, &key, ca_ttl, now)?;
                    (vec![], vec![X509Authority::from_der(root.to_vec())?])
                }
                Some(upstream) => {
                    let signed = upstream.sign_intermediate(trust_domain, &key, ca_ttl, now).await?;
                    (signed.chain, signed.roots)
                }
            };
            let certificate = chain.first().unwrap_or_else(|| roots[0].der()).clone();
            let id = X509Authority::from_der(certificate.to_vec())?.id().to_owned();
            let record = Record { id, status: Status::Prepared, key_name: key_name.clone(), certificate, chain };
            let dropped: Vec<Record> = journal.iter().filter(|r| r.status == Status::Prepared).cloned().collect();
            let mut next: Vec<_> = journal.iter().filter(|r| r.status != Status::Prepared).cloned().collect();
            next.push(record.clone());
            let excess = next.len().saturating_sub(JOURNAL_LENGTH);
            next.drain(..excess);
            self.commit(journal, next, |bundle| {
                bundle.authorities.retain(|a| !dropped.iter().any(|d| d.id == a.id()));
                bundle.refresh_hint = (ca_ttl / 10).min(MAX_REFRESH_HINT);
                add_missing(bundle, roots);
            })
            .await?;
            for old in dropped {
                keys.remove(&old.key_name)?;
            }
            Ok(record)
        }
        .await;
        match &made {
            Ok(record) => {
                tracing::info!(authority = record.id, until = %validity_of(&record.certificate).1, "authority prepared and published");
            }
            Err(_) => keys.remove(&key_name)?,
        }
        made
    }

    async fn activate_in(&self, journal: &mut Vec<Record>, id: &str) -> Result<Record, AuthorityError> {
        let record = find_record(journal, id)?;
        let gone = || AuthorityError::Unknown(format!("{id} (its key is gone)"));
        let key = self.settings.keys.get(&record.key_name)?.ok_or_else(gone)?;
        let signer = SigningAuthority::new(record.certificate.clone(), record.chain.clone(), &key)?;
        let mut next = journal.clone();
        next.iter_mut().filter(|r| r.status == Status::Active).for_each(|r| r.status = Status::Old);
        let activated = set_status(&mut next, id, Status::Active).ok_or_else(gone)?;
        self.commit(journal, next, |_| {}).await?;
        self.active.store(Some(Arc::new(signer)));
        tracing::info!(authority = id, "authority active");
        Ok(activated)
    }

    /// Forgets authorities and roots whose time is over, and their keys.
    async fn forget_expired(&self, journal: &mut Vec<Record>, now: OffsetDateTime) -> Result<(), AuthorityError> {
        let over = |r: &Record| validity_of(&r.certificate).1 <= now;
        let roots_over = self.bundle.borrow().authorities.iter().any(|a| a.not_after() <= now);
        if !journal.iter().any(over) && !roots_over {
            return Ok(());
        }
        let ended: Vec<Record> = journal.iter().filter(|r| over(r)).cloned().collect();
        let next = journal.iter().filter(|r| !over(r)).cloned().collect();
        self.commit(journal, next, |bundle| bundle.authorities.retain(|a| a.not_after() > now)).await?;
        for record in ended {
            self.settings.keys.remove(&record.key_name)?;
            tracing::info!(authority = record.id, "authority ended and forgotten");
        }
        Ok(())
    }

    /// Stores the journal and the bundle together, then publishes. If the store refuses, nothing has changed.
    async fn commit(
        &self,
        journal: &mut Vec<Record>,
        next: Vec<Record>,
        change: impl FnOnce(&mut X509Bundle),
    ) -> Result<(), AuthorityError> {
        let mut bundle = X509Bundle::clone(&self.bundle.borrow());
        change(&mut bundle);
        let changed = bundle != **self.bundle.borrow();
        if changed {
            bundle.sequence += 1;
        }
        self.settings.store.put_authorities(&next, &bundle).await?;
        *journal = next;
        if changed {
            self.bundle.send_replace(Arc::new(bundle));
        }
        Ok(())
    }
}

struct Due {
    prepare: bool,
    activate: bool,
}

fn find_record<'a>(journal: &'a [Record], id: &str) -> Result<&'a Record, AuthorityError> {
    journal.iter().find(|r| r.id == id).ok_or_else(|| AuthorityError::Unknown(id.to_owned()))
}

fn set_status(journal: &mut [Record], id: &str, status: Status) -> Option<Record> {
    let record = journal.iter_mut().find(|r| r.id == id)?;
    record.status = status;
    Some(record.clone())
}

fn add_missing(bundle: &mut X509Bundle, more: Vec<X509Authority>) {
    for authority in more {
        if !bundle.authorities.iter().any(|a| a.der() == authority.der()) {
            bundle.authorities.push(authority);
        }
    }
}

/// Validity of a certificate that was parsed before it came into the journal.
pub(super) fn validity_of(certificate: &CertificateDer<'_>) -> (OffsetDateTime, OffsetDateTime) {
    X509Certificate::from_der(certificate).map_or((OffsetDateTime::UNIX_EPOCH, OffsetDateTime::UNIX_EPOCH), |(_, c)| {
        (c.validity().not_before.to_datetime(), c.validity().not_after.to_datetime())
    })
}

fn random_name() -> Result<String, AuthorityError> {
    let mut bytes = [0u8; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| IssueError::Sign("no randomness".into()))?;
    Ok(hex::encode(bytes))
}

#[cfg(test)]
mod tests;
