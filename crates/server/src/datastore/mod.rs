//! Persistent state: entries, nodes, join tokens, bundles, federation relationships and the journal of authorities.

#[cfg(test)]
mod held;
mod sqlite;

use async_trait::async_trait;
use countersign_identity::{Entry, EntryId, SpiffeId, TrustBundle, TrustDomain};
use time::OffsetDateTime;

use crate::agents::AttestedAgent;
use crate::authority::StoredJournal;
use crate::federation::relationship::Relationship;

#[cfg(test)]
pub(crate) use held::Held;
pub use sqlite::Sqlite;

/// Why the store failed. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum DataStoreError {
    /// The database failed: disk full, file missing, locked.
    #[error("the database refused: {0}")]
    Database(#[from] sqlx::Error),
    /// The schema could not be migrated.
    #[error("cannot migrate the database: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// A row that this version cannot parse.
    #[error("cannot read {what} `{name}` in the database: {why}")]
    Row {
        /// Kind of row, as in `entry`.
        what: &'static str,
        /// Key of the row.
        name: String,
        /// Why it cannot be parsed.
        why: String,
    },
    /// The data belongs to a server of another trust domain.
    #[error(
        "this data belongs to trust domain `{stored}`, and the server was started for `{asked}`; nothing was changed. \
         Start it with --trust-domain {stored}, or give `{asked}` a data folder of its own"
    )]
    TrustDomain {
        /// The trust domain that the data belongs to.
        stored: String,
        /// The trust domain that the server was started for.
        asked: String,
    },
    /// A bundle without authorities, with which no peer would be trusted.
    #[error("the bundle of `{0}` would become empty, and nobody would be trusted; it stays as it is")]
    EmptyBundle(TrustDomain),
    /// Other writers were first in every attempt.
    #[error("{0} was changed by others again and again; try once more")]
    Contended(String),
    /// The trust bundle or the journal of authorities was changed by another server.
    #[error(
        "another server has changed the authorities in this store; its changes were taken up and nothing else was done: \
         look at them (`countersign authority show`), then try again"
    )]
    Overtaken,
}

/// Version of a row. Never the same for two states of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version(i64);

impl Version {
    /// Version of a row that was written before rows had versions.
    const FIRST: Self = Self(0);

    fn fresh() -> Self {
        // Random instead of counted: a row that was deleted and created again never matches its predecessor.
        Self(rand::random_range(1..i64::MAX))
    }
}

/// A row and the version that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned<T> {
    /// The content of the row.
    pub value: T,
    /// The version of the row.
    pub version: Version,
}

/// Outcome of a write based on a version (`None`: no row existed).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Written {
    /// The row is stored, with this version.
    Stored(Version),
    /// Another writer was first. Nothing was written: read again.
    Stale,
    /// A banned agent has the same evidence. Nothing was written.
    Banned,
}

/// A join token: for single use, until it expires.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The secret itself; never logged.
    pub token: String,
    /// When the token expires.
    pub expires_at: OffsetDateTime,
    /// SPIFFE ID that the agent gets as an alias; `None` for none.
    pub agent_id: Option<SpiffeId>,
}

/// The store. Each call is one transaction.
#[async_trait]
pub trait DataStore: Send + Sync {
    /// All entries, in no particular order.
    async fn entries(&self) -> Result<Vec<Versioned<Entry>>, DataStoreError>;
    /// The entry with this ID; `None` if there is none.
    async fn entry(&self, id: &EntryId) -> Result<Option<Versioned<Entry>>, DataStoreError>;
    /// Adds or replaces entries: all of them, or none if one is stale.
    async fn put_entries(&self, entries: &[(Entry, Option<Version>)]) -> Result<Written, DataStoreError>;
    /// Deletes entries; IDs without an entry are ignored.
    async fn delete_entries(&self, ids: &[EntryId]) -> Result<(), DataStoreError>;
    /// All attested agents, in no particular order.
    async fn agents(&self) -> Result<Vec<Versioned<AttestedAgent>>, DataStoreError>;
    /// The agent with this ID; `None` if there is none.
    async fn agent(&self, id: &SpiffeId) -> Result<Option<Versioned<AttestedAgent>>, DataStoreError>;
    /// Adds or replaces an agent. An agent that is not banned is rejected while a banned one has the same evidence.
    async fn put_agent(&self, agent: &AttestedAgent, from: Option<Version>) -> Result<Written, DataStoreError>;
    /// Deletes an agent, if it exists.
    async fn delete_agent(&self, id: &SpiffeId) -> Result<(), DataStoreError>;
    /// Adds a join token and deletes expired ones.
    async fn put_token(&self, token: &JoinToken, now: OffsetDateTime) -> Result<(), DataStoreError>;
    /// Removes a join token and returns it. Of two concurrent callers, one gets it.
    async fn take_token(&self, token: &str) -> Result<Option<JoinToken>, DataStoreError>;
    /// All bundles, including our own.
    async fn bundles(&self) -> Result<Vec<Versioned<TrustBundle>>, DataStoreError>;
    /// Adds or replaces a bundle. An empty one is rejected.
    async fn put_bundle(&self, bundle: &TrustBundle, from: Option<Version>) -> Result<Written, DataStoreError>;
    /// Deletes a trust domain's bundle, if it exists.
    async fn delete_bundle(&self, trust_domain: &str) -> Result<(), DataStoreError>;
    /// All federation relationships, in no particular order.
    async fn relationships(&self) -> Result<Vec<Versioned<Relationship>>, DataStoreError>;
    /// Adds or replaces a federation relationship, and with it a bundle: both or neither. An empty bundle is rejected.
    async fn put_relationship(
        &self,
        relationship: &Relationship,
        from: Option<Version>,
        bundle: Option<(&TrustBundle, Option<Version>)>,
    ) -> Result<Written, DataStoreError>;
    /// Deletes a federation relationship, if it exists. Its bundle stays.
    async fn delete_relationship(&self, trust_domain: &TrustDomain) -> Result<(), DataStoreError>;
    /// The journal of authorities, with the common version of journal and own bundle.
    async fn authorities(&self) -> Result<Versioned<StoredJournal>, DataStoreError>;
    /// Replaces the journal and our own bundle in one transaction. An empty bundle is rejected. Revoked keys are added only: those
    /// that the store has stay.
    async fn put_authorities(
        &self,
        journal: &StoredJournal,
        bundle: &TrustBundle,
        from: Version,
    ) -> Result<Written, DataStoreError>;
}
