//! What callers are attested for: their identities.

use countersign_identity::Selector;
use countersign_identity::selector::SelectorSet;
use time::OffsetDateTime;

use crate::cache::Cache;
use crate::workload_attestor::Purpose;

/// The identities of one caller. An attestor has done enough once nothing that it may add can change them.
pub struct Identities<'a> {
    /// Holds the entries.
    pub cache: &'a Cache,
    /// Time of the attestation.
    pub now: OffsetDateTime,
    /// What other attestors have found.
    pub known: &'a SelectorSet,
}

impl Purpose for Identities<'_> {
    fn is_met_by(&self, facts: &SelectorSet, may_follow: fn(&Selector) -> bool) -> bool {
        let all = self.known.union(facts).cloned().collect();
        self.cache.is_settled(&all, may_follow, self.now)
    }
}
