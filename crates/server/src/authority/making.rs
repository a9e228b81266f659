//! Makes authorities, up to their publication, and removes the keys of those that are gone.

use std::sync::atomic::Ordering;
use std::time::Duration;

use countersign_identity::profile::IssueError;
use countersign_identity::{KeyType, X509Authority};
use time::OffsetDateTime;

use super::journal::{Journal, shorten};
use super::manager::{Authorities, add_missing, add_missing_keys};
use super::{AuthorityError, Kind, Public, Record, Status};
use crate::config::Issuance;
use crate::key_manager::KeyManagerError;
use crate::signing_ca::issue_root;
use crate::signing_jwt::new_authority;

/// Longest interval at which workloads are asked to refresh the bundle.
const MAX_REFRESH_HINT: Duration = Duration::from_secs(300);

/// The right to make an authority. Whoever holds it knows that no key is waiting for its record.
pub struct Making;

/// An authority with a new key, not published yet.
struct Made {
    record: Record,
    /// The roots that peers must trust for it.
    roots: Vec<X509Authority>,
}

impl Authorities {
    /// Makes an authority and publishes it as the prepared one. Between the two the journal is free.
    pub(super) async fn make(
        &self,
        kind: Kind,
        making: &Making,
        now: OffsetDateTime,
    ) -> Result<Record, AuthorityError> {
        // As in SPIRE, JWT authorities have lifetime and key type of the CA.
        let Issuance { ca_ttl, ca_key_type, .. } = *self.settings.issuance.borrow();
        let before = {
            let mut journal = self.writer.lock().await;
            // From here on, an error leaves a key without a record, which the sweep removes: the new key if its record
            // was not stored, the replaced one if it was.
            journal.unswept = true;
            journal.in_use(kind)
        };
        let signed = match kind {
            Kind::X509 => self.make_ca(ca_key_type, ca_ttl, now).await,
            Kind::Jwt => self.make_jwt(ca_key_type, ca_ttl, now).await,
        };
        let mut journal = self.writer.lock().await;
        let published = match signed {
            // Made as a successor of what was there; what is there now may need none, or another.
            Ok(_) if journal.in_use(kind) != before => Err(AuthorityError::Changed),
            Ok(made) => self.publish_prepared(&mut journal, made, ca_ttl, now).await,
            Err(error) => Err(error),
        };
        drop(journal);
        self.sweep(making).await;
        let record = published?;
        let until = record.validity().1;
        tracing::info!(authority = record.id, kind = kind.as_str(), %until, "authority prepared and published");
        Ok(record)
    }

    /// A new key, with the certificate that the upstream signs for it or that it signs itself.
    async fn make_ca(&self, key_type: KeyType, ttl: Duration, now: OffsetDateTime) -> Result<Made, AuthorityError> {
        let (td, key_name) = (&self.settings.trust_domain, random_name()?);
        let key = self.settings.keys.generate(&key_name, key_type).await?;
        let (certificate, chain, roots) = if let Some(upstream) = &self.upstream {
            self.told_above.fetch_add(1, Ordering::SeqCst);
            let signed = upstream.sign_intermediate(td, &key, ttl, now).await?;
            let own = signed.chain.first().ok_or_else(|| IssueError::Sign("the upstream signed nothing".into()))?;
            (own.clone(), signed.chain, signed.roots)
        } else {
            let certificate = issue_root(td, &*key, ttl, now).await?;
            let roots = vec![X509Authority::from_der(certificate.to_vec())?];
            (certificate, vec![], roots)
        };
        let id = X509Authority::from_der(certificate.to_vec())?.id().to_owned();
        let public = Public::X509 { certificate, chain };
        Ok(Made { record: Record { id, status: Status::Prepared, key_name, public }, roots })
    }

    /// A new key for tokens, under an ID that no other key has.
    async fn make_jwt(&self, key_type: KeyType, ttl: Duration, now: OffsetDateTime) -> Result<Made, AuthorityError> {
        let (id, key_name) = (random_name()?, random_name()?);
        let key = self.settings.keys.generate(&key_name, key_type).await?;
        let (key, not_before) = new_authority(&id, &*key, ttl, now).await?;
        let public = Public::Jwt { key, not_before };
        Ok(Made { record: Record { id, status: Status::Prepared, key_name, public }, roots: vec![] })
    }

    async fn publish_prepared(
        &self,
        journal: &mut Journal,
        made: Made,
        ca_ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<Record, AuthorityError> {
        let Made { record, mut roots } = made;
        self.refuse_distrusted(journal, &record, &roots)?;
        // What has ended would come with each authority and go with the next look.
        roots.retain(|root| root.not_after() > now);
        let kind = record.kind();
        let is_prepared = |r: &&Record| r.kind() == kind && r.status == Status::Prepared;
        let dropped: Vec<String> = journal.records.iter().filter(is_prepared).map(|r| r.id.clone()).collect();
        let mut next: Vec<_> = journal.records.iter().filter(|r| !is_prepared(r)).cloned().collect();
        next.push(record.clone());
        shorten(&mut next, kind, &self.bundle.borrow(), now);
        let keys = next.iter().filter_map(Record::jwt_authority).collect();
        self.commit(journal, next, |bundle| {
            match kind {
                Kind::X509 => bundle.authorities.retain(|a| !dropped.iter().any(|id| id == a.id())),
                Kind::Jwt => bundle.jwt_authorities.retain(|a| !dropped.iter().any(|id| id == a.key_id())),
            }
            bundle.refresh_hint = refresh_hint(ca_ttl);
            add_missing(bundle, roots);
            // All that the journal has: also what a bundle that was lost had.
            add_missing_keys(bundle, keys);
        })
        .await?;
        Ok(record)
    }

    /// Removes keys without a record, if there may be any. A failure is tried again with the next rotation. The journal is free
    /// meanwhile: whoever holds `making` knows that no key is waiting for its record.
    pub(super) async fn sweep(&self, _: &Making) {
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
}

/// How often workloads are asked to refresh a bundle whose authorities have this lifetime.
pub fn refresh_hint(ca_ttl: Duration) -> Duration {
    (ca_ttl / 10).min(MAX_REFRESH_HINT)
}

fn random_name() -> Result<String, AuthorityError> {
    let mut bytes = [0u8; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| IssueError::Sign("no randomness".into()))?;
    Ok(hex::encode(bytes))
}
