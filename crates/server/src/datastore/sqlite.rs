//! SQLite, embedded: WAL, synced on each commit, migrated at start.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use countersign_api::convert::{bundle_from_wire, bundle_to_wire, entry_from_wire, entry_to_wire};
use countersign_api::spire::types;
use countersign_identity::trust_domain::parse_workload_id;
use countersign_identity::{Entry, EntryId, SpiffeId, X509Bundle};
use prost::Message;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Row, SqlitePool};
use time::OffsetDateTime;

use super::{DataStore, DataStoreError, JoinToken};
use crate::agents::AttestedAgent;
use crate::authority::Record;

/// The embedded store.
pub struct Sqlite(SqlitePool);

impl Sqlite {
    /// Opens the file, makes it if it is missing, brings its schema up to date.
    pub async fn open(path: &Path) -> Result<Self, DataStoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(5));
        // One writer at a time is SQLite's nature; a pool of one queues fairly instead of colliding.
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(Duration::from_secs(5))
            .connect_with(options)
            .await?;
        sqlx::migrate!("migrations/sqlite").run(&pool).await?;
        Ok(Self(pool))
    }
}

fn bad_row(what: &'static str, name: String, why: impl ToString) -> DataStoreError {
    DataStoreError::Row { what, name, why: why.to_string() }
}

fn entry_of(id: String, body: &[u8]) -> Result<Entry, DataStoreError> {
    let read = types::Entry::decode(body).map_err(|e| e.to_string());
    let read = read.and_then(|e| {
        let own: Result<EntryId, _> = e.id.parse();
        entry_from_wire(e, || own.unwrap_or_else(|_| unreachable!("stored entries carry their ID")))
            .map_err(|e| e.to_string())
    });
    read.map_err(|why| bad_row("entry", id, why))
}

#[async_trait]
impl DataStore for Sqlite {
    async fn entries(&self) -> Result<Vec<Entry>, DataStoreError> {
        let rows = sqlx::query("SELECT id, body FROM entries").fetch_all(&self.0).await?;
        rows.iter().map(|r| entry_of(r.get("id"), r.get("body"))).collect()
    }

    async fn put_entries(&self, entries: &[Entry]) -> Result<(), DataStoreError> {
        let mut tx = self.0.begin().await?;
        for e in entries {
            sqlx::query("INSERT OR REPLACE INTO entries (id, spiffe_id, parent_id, body) VALUES (?, ?, ?, ?)")
                .bind(e.id.as_str())
                .bind(e.spiffe_id.to_string())
                .bind(e.parent_id.to_string())
                .bind(entry_to_wire(e).encode_to_vec())
                .execute(&mut *tx)
                .await?;
        }
        Ok(tx.commit().await?)
    }

    async fn delete_entries(&self, ids: &[EntryId]) -> Result<(), DataStoreError> {
        let mut tx = self.0.begin().await?;
        for id in ids {
            sqlx::query("DELETE FROM entries WHERE id = ?").bind(id.as_str()).execute(&mut *tx).await?;
        }
        Ok(tx.commit().await?)
    }

    async fn agents(&self) -> Result<Vec<AttestedAgent>, DataStoreError> {
        let rows = sqlx::query("SELECT spiffe_id, body FROM agents").fetch_all(&self.0).await?;
        rows.iter()
            .map(|r| serde_json::from_str(r.get("body")).map_err(|e| bad_row("agent", r.get("spiffe_id"), e)))
            .collect()
    }

    async fn put_agent(&self, agent: &AttestedAgent) -> Result<(), DataStoreError> {
        let body = serde_json::to_string(agent).map_err(|e| bad_row("agent", agent.id.to_string(), e))?;
        sqlx::query("INSERT OR REPLACE INTO agents (spiffe_id, body) VALUES (?, ?)")
            .bind(agent.id.to_string())
            .bind(body)
            .execute(&self.0)
            .await?;
        Ok(())
    }

    async fn delete_agent(&self, id: &SpiffeId) -> Result<(), DataStoreError> {
        sqlx::query("DELETE FROM agents WHERE spiffe_id = ?").bind(id.to_string()).execute(&self.0).await?;
        Ok(())
    }

    async fn put_token(&self, token: &JoinToken, now: OffsetDateTime) -> Result<(), DataStoreError> {
        let mut tx = self.0.begin().await?;
        sqlx::query("DELETE FROM join_tokens WHERE expires_at <= ?")
            .bind(now.unix_timestamp())
            .execute(&mut *tx)
            .await?;
        sqlx::query("INSERT INTO join_tokens (token, expires_at, agent_id) VALUES (?, ?, ?)")
            .bind(&token.token)
            .bind(token.expires_at.unix_timestamp())
            .bind(token.agent_id.as_ref().map(ToString::to_string))
            .execute(&mut *tx)
            .await?;
        Ok(tx.commit().await?)
    }

    async fn take_token(&self, token: &str) -> Result<Option<JoinToken>, DataStoreError> {
        let row = sqlx::query("DELETE FROM join_tokens WHERE token = ? RETURNING token, expires_at, agent_id")
            .bind(token)
            .fetch_optional(&self.0)
            .await?;
        let Some(row) = row else { return Ok(None) };
        let bad = |e: String| bad_row("join token", "(secret)".into(), e);
        let agent_id: Option<String> = row.get("agent_id");
        Ok(Some(JoinToken {
            token: row.get("token"),
            expires_at: OffsetDateTime::from_unix_timestamp(row.get("expires_at")).map_err(|e| bad(e.to_string()))?,
            agent_id: agent_id.map(|id| parse_workload_id(&id)).transpose().map_err(|e| bad(e.to_string()))?,
        }))
    }

    async fn bundles(&self) -> Result<Vec<X509Bundle>, DataStoreError> {
        let rows = sqlx::query("SELECT trust_domain, body FROM bundles").fetch_all(&self.0).await?;
        let read = |body: &[u8]| {
            bundle_from_wire(types::Bundle::decode(body).map_err(|e| e.to_string())?).map_err(|e| e.to_string())
        };
        rows.iter().map(|r| read(r.get("body")).map_err(|e| bad_row("bundle", r.get("trust_domain"), e))).collect()
    }

    async fn put_bundle(&self, bundle: &X509Bundle) -> Result<(), DataStoreError> {
        sqlx::query("INSERT OR REPLACE INTO bundles (trust_domain, body) VALUES (?, ?)")
            .bind(bundle.trust_domain.as_str())
            .bind(bundle_to_wire(bundle).encode_to_vec())
            .execute(&self.0)
            .await?;
        Ok(())
    }

    async fn delete_bundle(&self, trust_domain: &str) -> Result<(), DataStoreError> {
        sqlx::query("DELETE FROM bundles WHERE trust_domain = ?").bind(trust_domain).execute(&self.0).await?;
        Ok(())
    }

    async fn authorities(&self) -> Result<Vec<Record>, DataStoreError> {
        let rows = sqlx::query("SELECT id, status, key_name, certificate, chain FROM authorities ORDER BY position")
            .fetch_all(&self.0)
            .await?;
        rows.iter()
            .map(|r| {
                let id: String = r.get("id");
                let status: &str = r.get("status");
                let chain: Vec<Vec<u8>> =
                    serde_json::from_slice(r.get("chain")).map_err(|e| bad_row("authority", id.clone(), e))?;
                Ok(Record {
                    status: status.parse().map_err(|e| bad_row("authority", id.clone(), e))?,
                    key_name: r.get("key_name"),
                    certificate: r.get::<Vec<u8>, _>("certificate").into(),
                    chain: chain.into_iter().map(Into::into).collect(),
                    id,
                })
            })
            .collect()
    }

    async fn put_authorities(&self, journal: &[Record], bundle: &X509Bundle) -> Result<(), DataStoreError> {
        let mut tx = self.0.begin().await?;
        sqlx::query("DELETE FROM authorities").execute(&mut *tx).await?;
        for (position, a) in journal.iter().enumerate() {
            let chain: Vec<&[u8]> = a.chain.iter().map(AsRef::as_ref).collect();
            let chain = serde_json::to_vec(&chain).map_err(|e| bad_row("authority", a.id.clone(), e))?;
            sqlx::query("INSERT INTO authorities (id, position, status, key_name, certificate, chain) VALUES (?, ?, ?, ?, ?, ?)")
                .bind(&a.id)
                .bind(i64::try_from(position).unwrap_or(i64::MAX))
                .bind(a.status.as_str())
                .bind(&a.key_name)
                .bind(a.certificate.as_ref())
                .bind(chain)
                .execute(&mut *tx)
                .await?;
        }
        sqlx::query("INSERT OR REPLACE INTO bundles (trust_domain, body) VALUES (?, ?)")
            .bind(bundle.trust_domain.as_str())
            .bind(bundle_to_wire(bundle).encode_to_vec())
            .execute(&mut *tx)
            .await?;
        Ok(tx.commit().await?)
    }
}
