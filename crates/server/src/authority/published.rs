//! Keys of JWT-SVIDs that are published to the servers above and below.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use countersign_identity::JwtAuthority;

use super::manager::{Authorities, add_missing_keys, judge};
use super::{AuthorityError, Kind, RevokedKeys, Status};
use crate::upstream_authority::UpstreamError;

/// Most keys of JWT-SVIDs in the bundle for servers below ours to add to.
const MAX_KEYS: usize = 1_000;

impl Authorities {
    /// Publishes a key that a server below ours will sign tokens with, above first. Answers all keys of the bundle then. Errors: the
    /// key cannot be taken, here or above; nothing has changed here.
    pub async fn publish_jwt_key(&self, key: JwtAuthority) -> Result<Vec<JwtAuthority>, AuthorityError> {
        let known = {
            let journal = self.writer.lock().await;
            let all = self.bundle.borrow().jwt_authorities.clone();
            judge(&key, &all, &journal.revoked)?;
            all
        };
        // Whoever has only seen a key must not give it another end, nor take its taint away.
        if known.iter().any(|a| a.key_id() == key.key_id()) {
            return Ok(known);
        }
        if known.len() >= MAX_KEYS {
            return Err(AuthorityError::TooManyKeys);
        }
        let others = self.publish_above(&key).await?;
        let mut journal = self.writer.lock().await;
        judge(&key, &self.bundle.borrow().jwt_authorities, &journal.revoked)?;
        let records = journal.records.clone();
        self.commit(&mut journal, records, |bundle| {
            add_missing_keys(bundle, vec![key]);
            add_missing_keys(bundle, others);
        })
        .await?;
        Ok(self.bundle.borrow().jwt_authorities.clone())
    }

    /// Publishes a key of ours above, unless the upstream has it already. Each key is ours for as long as its record is, so that a
    /// failure is tried again with the same.
    pub(super) async fn ensure_above(&self, key: &JwtAuthority) -> Result<(), AuthorityError> {
        if self.named_above.lock().await.iter().any(|a| a.key() == key.key()) {
            return Ok(());
        }
        let others = self.publish_above(key).await?;
        if others.is_empty() {
            return Ok(());
        }
        let mut journal = self.writer.lock().await;
        let records = journal.records.clone();
        self.commit(&mut journal, records, |bundle| add_missing_keys(bundle, others)).await
    }

    /// Publishes what the upstream does not name of ours: this server was its own root before, or the upstream has lost it.
    pub(super) async fn publish_own_keys(&self, named: &[JwtAuthority]) -> Result<(), AuthorityError> {
        let (now, journal) = (self.now(), self.journal());
        let signs = journal.iter().filter(|r| r.kind() == Kind::Jwt && r.status != Status::Tainted);
        for key in signs.filter_map(super::Record::jwt_authority).filter(|key| !key.is_over(now)) {
            if named.iter().any(|a| a.key() == key.key()) || self.is_refused_above(key.key_id()) {
                continue;
            }
            match self.ensure_above(&key).await {
                Ok(()) => tracing::info!(authority = key.key_id(), "key of JWT-SVIDs published at the server above"),
                // Revoked there: the rotation makes another, and this one goes.
                Err(AuthorityError::Unsigned(UpstreamError::Refused { why, .. })) => {
                    tracing::error!(
                        authority = key.key_id(),
                        why,
                        "the server above refuses the key of our JWT-SVIDs; it is replaced"
                    );
                    self.refused_above.lock().unwrap_or_else(PoisonError::into_inner).insert(key.key_id().to_owned());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether the upstream has refused this key of ours: nobody there accepts what is signed with it.
    pub(super) fn is_refused_above(&self, key_id: &str) -> bool {
        self.refused_above.lock().unwrap_or_else(PoisonError::into_inner).contains(key_id)
    }

    /// Publishes a key to the upstream, if there is one that publishes keys. Answers those of others that it has.
    async fn publish_above(&self, key: &JwtAuthority) -> Result<Vec<JwtAuthority>, AuthorityError> {
        let Some(upstream) = &self.upstream else { return Ok(vec![]) };
        self.told_above.fetch_add(1, Ordering::SeqCst);
        let answered = upstream.publish_jwt_key(key).await;
        self.told_above.fetch_add(1, Ordering::SeqCst);
        let Some(mut named) = answered? else { return Ok(vec![]) };
        self.named_above.lock().await.clone_from(&named);
        let now = self.now();
        let revoked = self.writer.lock().await.revoked.clone();
        let bundle = self.bundle.borrow().clone();
        named.retain(|other| is_new(other, &bundle.jwt_authorities, &revoked) && !other.is_over(now));
        Ok(named)
    }
}

/// Whether a key that another server names can be added as it is. What cannot is no reason to refuse anything else.
pub(super) fn is_new(key: &JwtAuthority, all: &[JwtAuthority], revoked: &RevokedKeys) -> bool {
    judge(key, all, revoked).is_ok() && !all.iter().any(|a| a.key_id() == key.key_id())
}
