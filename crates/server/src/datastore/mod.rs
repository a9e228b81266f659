//! What survives a restart: entries, nodes, join tokens, bundles, the journal of authorities.

mod sqlite;

use async_trait::async_trait;
use countersign_identity::{Entry, EntryId, SpiffeId, X509Bundle};
use time::OffsetDateTime;

use crate::agents::AttestedAgent;
use crate::authority::Record;

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
    async fn entries(&self) -> Result<Vec<Entry>, DataStoreError>;
    /// Adds or replaces entries.
    async fn put_entries(&self, entries: &[Entry]) -> Result<(), DataStoreError>;
    /// Deletes entries.
    async fn delete_entries(&self, ids: &[EntryId]) -> Result<(), DataStoreError>;
    /// Every attested agent.
    async fn agents(&self) -> Result<Vec<AttestedAgent>, DataStoreError>;
    /// Adds or replaces an agent.
    async fn put_agent(&self, agent: &AttestedAgent) -> Result<(), DataStoreError>;
    /// Deletes an agent.
    async fn delete_agent(&self, id: &SpiffeId) -> Result<(), DataStoreError>;
    /// Adds a join token; tokens whose time is over go.
    async fn put_token(&self, token: &JoinToken, now: OffsetDateTime) -> Result<(), DataStoreError>;
    /// Takes a join token out. Of two callers at once, one gets it.
    async fn take_token(&self, token: &str) -> Result<Option<JoinToken>, DataStoreError>;
    /// Every bundle, our own among them.
    async fn bundles(&self) -> Result<Vec<X509Bundle>, DataStoreError>;
    /// Adds or replaces a bundle.
    async fn put_bundle(&self, bundle: &X509Bundle) -> Result<(), DataStoreError>;
    /// Deletes a bundle.
    async fn delete_bundle(&self, trust_domain: &str) -> Result<(), DataStoreError>;
    /// The journal of authorities, oldest first.
    async fn authorities(&self) -> Result<Vec<Record>, DataStoreError>;
    /// Replaces the journal and our own bundle together.
    async fn put_authorities(&self, journal: &[Record], bundle: &X509Bundle) -> Result<(), DataStoreError>;
}
