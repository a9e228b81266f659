//! The authorities as the store has them, brought together with the keys that are there.

use countersign_identity::{TrustBundle, X509Authority};

use super::active::Signing;
use super::{AuthorityError, Kind, Public, Record, RevokedKeys, Settings, Status, StoredJournal};
use crate::datastore::{Version, Versioned};
use crate::key_manager::Keys;

/// Journal and own bundle.
pub struct Stored {
    /// Oldest first.
    pub records: Vec<Record>,
    /// Keys that were revoked.
    pub revoked: RevokedKeys,
    /// The state of journal and bundle together.
    pub version: Version,
    /// `None` when the store has none, or an empty one.
    pub bundle: Option<TrustBundle>,
}

impl Stored {
    /// Reads both.
    pub async fn read(settings: &Settings) -> Result<Self, AuthorityError> {
        let Versioned { value: StoredJournal { records, revoked }, version } = settings.store.authorities().await?;
        let mut bundles = settings.store.bundles().await?.into_iter().map(|b| b.value);
        let own = bundles.find(|b| b.trust_domain == settings.trust_domain).map(|mut bundle| {
            // A version that remembers no revocations may have written it.
            revoked.apply(&mut bundle);
            bundle
        });
        let bundle = own.filter(|bundle| !bundle.authorities.is_empty());
        Ok(Self { records, revoked, version, bundle })
    }
}

/// What signs: the active authorities with their keys. One whose key is gone (key manager `memory`) signs no more; it stays trusted
/// until its end.
pub async fn take_up_keys(keys: &Keys, records: &mut [Record]) -> Result<Vec<Signing>, AuthorityError> {
    let mut active = vec![];
    for record in records.iter_mut().filter(|r| matches!(r.status, Status::Active | Status::Prepared)) {
        match key_of(keys, record).await {
            Ok(Some(signing)) if record.status == Status::Active => active.push(signing),
            Ok(Some(_)) => {}
            // X509-SVIDs depend on nothing of it. The next rotation makes another authority.
            Err(error) if record.kind() == Kind::Jwt => {
                tracing::error!(authority = record.id, %error, "its key cannot be used; it stays trusted until it ends");
                record.status = Status::Old;
            }
            Err(error) => return Err(error),
            Ok(None) => {
                tracing::warn!(authority = record.id, "its key is gone; it stays trusted until it ends");
                record.status = Status::Old;
            }
        }
    }
    Ok(active)
}

/// A record's authority with its key; `None` if the key is gone.
async fn key_of(keys: &Keys, record: &Record) -> Result<Option<Signing>, AuthorityError> {
    let Some(key) = keys.get(&record.key_name).await? else { return Ok(None) };
    Ok(Some(Signing::new(record, key)?))
}

/// The roots of a journal, for a bundle that was lost.
pub fn roots_of(records: &[Record]) -> Result<Vec<X509Authority>, AuthorityError> {
    let roots = records.iter().filter_map(|record| match &record.public {
        Public::X509 { certificate, chain } if chain.is_empty() => {
            let root = X509Authority::from_der(certificate.to_vec());
            Some(root.map(|mut root| {
                root.tainted = record.status == Status::Tainted;
                root
            }))
        }
        _ => None,
    });
    Ok(roots.collect::<Result<_, _>>()?)
}

/// Lets nothing sign whose root is not in the journal: with the bundle lost nobody would trust it. The upstream names its
/// root with the next one that it signs.
pub fn retire_intermediates(records: &mut [Record]) {
    let signs = |r: &&mut Record| {
        let is_intermediate = matches!(&r.public, Public::X509 { chain, .. } if !chain.is_empty());
        is_intermediate && matches!(r.status, Status::Active | Status::Prepared)
    };
    records.iter_mut().filter(signs).for_each(|r| r.status = Status::Old);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_bundle_an_intermediate_signs_no_more_and_a_root_goes_on() {
        let record = |chain: Vec<_>| Record {
            id: "a".into(),
            status: Status::Active,
            key_name: "k".into(),
            public: Public::X509 { certificate: vec![1u8].into(), chain },
        };
        let mut records = [record(vec![vec![1u8].into()]), record(vec![])];
        retire_intermediates(&mut records);
        assert_eq!(records.map(|r| r.status), [Status::Old, Status::Active]);
    }
}
