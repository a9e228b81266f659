//! Keys that were revoked: no bundle of ours has them again, whoever names them.

use std::collections::BTreeSet;

use countersign_identity::{AuthorityKey, TrustBundle, X509Authority};

/// The keys of revoked authorities, of both kinds. None is ever taken out: a certificate for the same key can be made at any time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RevokedKeys(BTreeSet<AuthorityKey>);

impl RevokedKeys {
    /// Whether this key was revoked.
    pub fn has(&self, key: AuthorityKey) -> bool {
        self.0.contains(&key)
    }

    /// These and those.
    #[must_use]
    pub fn with(&self, more: impl IntoIterator<Item = AuthorityKey>) -> Self {
        Self(self.0.iter().copied().chain(more).collect())
    }

    /// All of them, sorted.
    pub fn iter(&self) -> impl Iterator<Item = AuthorityKey> {
        self.0.iter().copied()
    }

    /// Takes them out of a bundle. A key that is tainted under one certificate is so under all.
    pub fn apply(&self, bundle: &mut TrustBundle) {
        bundle.authorities.retain(|root| !self.has(root.key()));
        bundle.jwt_authorities.retain(|key| !self.has(key.digest()));
        let tainted: BTreeSet<_> = bundle.authorities.iter().filter(|a| a.tainted).map(X509Authority::key).collect();
        bundle.authorities.iter_mut().for_each(|a| a.tainted |= tainted.contains(&a.key()));
    }
}

impl FromIterator<AuthorityKey> for RevokedKeys {
    fn from_iter<I: IntoIterator<Item = AuthorityKey>>(keys: I) -> Self {
        Self(keys.into_iter().collect())
    }
}
