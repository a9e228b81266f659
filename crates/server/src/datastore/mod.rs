//! What survives a restart: entries, nodes, join tokens, bundles, the journal of authorities.

#[cfg(test)]
mod held;
mod sqlite;

use async_trait::async_trait;
use countersign_identity::{Entry, EntryId, SpiffeId, TrustDomain, X509Bundle};
use time::OffsetDateTime;

use crate::agents::AttestedAgent;
use crate::authority::Record;

#[cfg(test)]
pub(crate) use held::Held;
pub use sqlite::Sqlite;

/// Why the store did not do it. Nothing is half done.
#[derive(Debug, thiserror::Error)]
pub enum DataStoreError {
    /// The database said no: disk full, file gone, locked.
    #[error("the database refused: {0}")]
    Database(#[from] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("cannot migrate the database: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// A row that this version cannot read.
    #[error("cannot read {what} `{name}` in the database: {why}")]
    Row {
        /// Table.
        what: &'static str,
        /// Its key.
        name: String,
        /// Why.
        why: String,
    },
    /// The store belongs to a server of another trust domain.
    #[error(
        "this data belongs to trust domain `{stored}`, and the server was started for `{asked}`; nothing was changed. \
         Start it with --trust-domain {stored}, or give `{asked}` a data folder of its own"
    )]
    TrustDomain {
        /// Whose data it is.
        stored: String,
        /// Whose server asked for it.
        asked: String,
    },
    /// A bundle without authorities: whoever takes it up trusts nobody.
    #[error("the bundle of `{0}` would become empty, and nobody would be trusted; it stays as it is")]
    EmptyBundle(TrustDomain),
    /// Other writers kept coming first.
    #[error("{0} was changed by others again and again; try once more")]
    Contended(String),
    /// The trust bundle or the journal of authorities was changed by another server.
    #[error(
        "another server has changed the authorities in this store; its changes were taken up and nothing else was done: \
         look at them (`countersign authority show`), then try again"
    )]
    Overtaken,
}

/// Which state of a row was read. Never the same for two states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version(i64);

impl Version {
    /// Of a row that was written before rows had versions.
    const FIRST: Self = Self(0);

    fn fresh() -> Self {
        // Drawn, not counted: a row that was deleted and made again cannot be taken for the one before.
        Self(rand::random_range(1..i64::MAX))
    }
}

/// A row and the state it was read in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned<T> {
    /// The row.
    pub value: T,
    /// Its state.
    pub version: Version,
}

/// What came of a write that names the state it was made from (`None`: there was no row).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Written {
    /// It is stored, in this state.
    Stored(Version),
    /// Somebody else wrote first. Nothing was written: read again.
    Stale,
    /// A banned agent has the same evidence. Nothing was written.
    Banned,
}

/// A join token: one use, before its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The secret.
    pub token: String,
    /// Its end.
    pub expires_at: OffsetDateTime,
    /// An ID that the agent gets as an alias.
    pub agent_id: Option<SpiffeId>,
}

/// The store. Each call is one transaction.
#[async_trait]
pub trait DataStore: Send + Sync {
    /// Every entry.
    async fn entries(&self) -> Result<Vec<Versioned<Entry>>, DataStoreError>;
    /// One entry.
    async fn entry(&self, id: &EntryId) -> Result<Option<Versioned<Entry>>, DataStoreError>;
    /// Adds or replaces entries: all of them, or none when one is stale.
    async fn put_entries(&self, entries: &[(Entry, Option<Version>)]) -> Result<Written, DataStoreError>;
    /// Deletes entries.
    async fn delete_entries(&self, ids: &[EntryId]) -> Result<(), DataStoreError>;
    /// Every attested agent.
    async fn agents(&self) -> Result<Vec<Versioned<AttestedAgent>>, DataStoreError>;
    /// One agent.
    async fn agent(&self, id: &SpiffeId) -> Result<Option<Versioned<AttestedAgent>>, DataStoreError>;
    /// Adds or replaces an agent. One that is not banned is refused while a banned one has the same evidence.
    async fn put_agent(&self, agent: &AttestedAgent, from: Option<Version>) -> Result<Written, DataStoreError>;
    /// Deletes an agent.
    async fn delete_agent(&self, id: &SpiffeId) -> Result<(), DataStoreError>;
    /// Adds a join token; tokens whose time is over go.
    async fn put_token(&self, token: &JoinToken, now: OffsetDateTime) -> Result<(), DataStoreError>;
    /// Takes a join token out. Of two callers at once, one gets it.
    async fn take_token(&self, token: &str) -> Result<Option<JoinToken>, DataStoreError>;
    /// Every bundle, our own among them.
    async fn bundles(&self) -> Result<Vec<Versioned<X509Bundle>>, DataStoreError>;
    /// Adds or replaces a bundle, never by an empty one.
    async fn put_bundle(&self, bundle: &X509Bundle, from: Option<Version>) -> Result<Written, DataStoreError>;
    /// Deletes a bundle.
    async fn delete_bundle(&self, trust_domain: &str) -> Result<(), DataStoreError>;
    /// The journal of authorities, oldest first, with the state of journal and own bundle together.
    async fn authorities(&self) -> Result<Versioned<Vec<Record>>, DataStoreError>;
    /// Replaces the journal and our own bundle together, the bundle never by an empty one.
    async fn put_authorities(
        &self,
        journal: &[Record],
        bundle: &X509Bundle,
        from: Version,
    ) -> Result<Written, DataStoreError>;
}
